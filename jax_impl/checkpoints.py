"""Other forms of the parameters, in NumPy alone: lists of linears under numbered keys, and weights of other axes."""

import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from jax_impl.array_types import kind_of, said, shown
from jax_impl.packing import Packing

_CANONICAL = {"weight": "nio", "bias": "no"}
# What torch.compile, FSDP and activation checkpointing put into keys, wherever they wrap a part of a model.
_INNER_WRAPPERS = re.compile(r"(?<![^.])(_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")


def without_inner_wrappers(key: str) -> str:
    """Take away what wrappers of parts of a model put into a key."""
    return _INNER_WRAPPERS.sub("", key)


def bare_forms(keys: Sequence[str]) -> Iterator[list[str]]:
    """Give keys without what wrappers put into them, and then again without each `module.` before all of them.

    That is what DistributedDataParallel and AveragedModel put there, whose own `n_averaged` has no such prefix.
    """
    bare = [without_inner_wrappers(key) for key in keys]
    bare = bare if len(set(bare)) == len(set(keys)) else list(keys)
    yield bare
    while all(key.startswith("module.") or key == "n_averaged" for key in bare) and bare not in ([], ["n_averaged"]):
        bare = [key.removeprefix("module.") for key in bare]
        yield bare


def without_wrappers(keys: Sequence[str], wanted: str) -> list[str]:
    """Return the first of the bare forms in which a key matches the pattern `wanted`, or the keys as they are."""
    matches = re.compile(wanted).match
    return next((bare for bare in bare_forms(keys) if any(map(matches, bare))), list(keys))


def key_of(prefix: str, k: Any, name: str, *, whole: bool = False) -> str:
    """Return the key of the k-th linear's weight or bias; for messages, with a prefix that is shown, not whole."""
    before, _, after = (prefix if whole else shown(prefix)[1:-1]).partition("*")
    return f"{before}{k}{after or '.'}{name}"


def linears_in(state_dict: Any, prefix: Any, keys: Any = None) -> list[dict[str, Any]]:
    """Return what a mapping holds of the linears 0 to n - 1, in numeric order, each by "weight" and "bias".

    Args:
        state_dict: Holds `<prefix>0.weight`, `<prefix>0.bias`, `<prefix>1.weight` and so on. All its keys may begin
            with the `module.` of DistributedDataParallel; what torch.compile, FSDP and checkpointing put into keys is
            passed over wherever it is.
        prefix: Such as "heads."; keys that do not start with it are ignored. A `*` stands for the number where it is
            not last: "heads.*.0." for the first layers of a list of `nn.Sequential`, whose other keys are ignored.
        keys: Names in place of the numbers, in the order of the partitions; None for numbers.

    Raises:
        TypeError: If `state_dict` is no mapping of strings, `prefix` no str, or `keys` no sequence of strings.
        ValueError: If no key fits, a number is skipped, a key is something else, or a weight or bias is missing.
    """
    if not isinstance(state_dict, Mapping):
        raise TypeError(f"`state_dict`: expected a mapping, got {kind_of(state_dict)}; pass a state_dict.")
    if not isinstance(prefix, str):
        raise TypeError(f"`prefix`: expected a str, got {kind_of(prefix)}; pass one such as 'heads.'.")
    names = check_keys(keys)
    entries = list(state_dict)
    for key in entries:
        if not isinstance(key, str):
            raise TypeError(
                f"`state_dict`: expected keys that are strings, got {shown(key)} of type "
                f"{type(key).__name__}; pass the state_dict of an nn.ModuleList."
            )
    bare_prefix = without_inner_wrappers(prefix)
    before, star, after = bare_prefix.partition("*")
    # Nine digits: no list is longer, and Python refuses to read numbers of thousands of them.
    numbers = "0|[1-9][0-9]{0,8}" if names is None else "|".join(map(re.escape, names))
    pattern = re.compile(f"{re.escape(before)}({numbers}){re.escape(after or '.')}(weight|bias)")
    linears: dict[int, dict[str, Any]] = {}
    inner = r"[0-9]+\.|[^.]+\.(weight|bias)$" if names is None else rf"({numbers})\."
    bare_entries = without_wrappers(entries, rf"{re.escape(before)}\.?({inner})")
    for key, bare in zip(entries, bare_entries, strict=True):
        match = pattern.fullmatch(bare)
        if match is None and (star or not bare.startswith(bare_prefix)):
            continue
        if match is None:
            advice = _advice(bare_entries, prefix, "pass the prefix of the list")
            advice = advice if names is None else "pass every name under the prefix in keys"
            wanted = " and ".join(key_of(prefix, "<k>" if names is None else "<name>", name) for name in _CANONICAL)
            raise ValueError(f"`state_dict`: expected keys {wanted} only, got {shown(key)}; {advice}.")
        try:
            k = int(match[1]) if names is None else names.index(match[1])
            linears.setdefault(k, {})[match[2]] = state_dict[key]
        except Exception as error:
            raise ValueError(
                f"`state_dict[{shown(key)}]`: expected an array, got an error from the mapping ({said(error)}); pass a "
                f"complete state_dict."
            ) from error
    if names is not None and len(linears) < len(names):
        raise ValueError(
            f"`keys`: expected names of linears under the prefix {shown(prefix)}, got "
            f"{shown(next(name for k, name in enumerate(names) if k not in linears))}, which is not there; pass the "
            f"names as they are in the state_dict."
        )
    if not linears or sorted(linears) != list(range(len(linears))):
        nested = next((key for key in ("state_dict", "model") if isinstance(state_dict.get(key), Mapping)), None)
        advice = "pass a complete state_dict, or keys=[...] for numbers that begin or step otherwise"
        if not linears:
            advice = "pass a complete state_dict" if nested is None else f"pass its entry {nested!r}"
            advice = _advice(bare_entries, prefix, advice) if nested is None else advice
        raise ValueError(
            f"`state_dict`: expected linears 0 to n - 1 under the prefix {shown(prefix)}, got "
            f"{shown(sorted(linears))}; {advice}."
        )
    for k in range(len(linears)):
        if "weight" not in linears[k] or set(linears[k]) != set(linears[0]):
            raise ValueError(
                f"`state_dict`: expected a weight in every linear and a bias in all or none, got {sorted(linears[k])} "
                f"for linear {k}; pass a complete state_dict."
            )
    return [linears[k] for k in range(len(linears))]


def _advice(keys: Sequence[str], prefix: str, otherwise: str) -> str:
    """Say what to do about keys of which none, or not all, are those of a list under the prefix."""
    before, _, after = prefix.partition("*")
    if prefix and not prefix.endswith(".") and any(key.startswith(f"{prefix}.") for key in keys):
        return f"pass the prefix {shown(prefix + '.')}"
    if before and (deeper := next((key for key in keys if f".{before}" in key), "")):
        return f"pass the prefix {shown(deeper[: deeper.index(f'.{before}') + 1] + prefix)}"
    named = re.compile(rf"{re.escape(before)}(0[0-9]+|[^.]*[^.0-9][^.]*){re.escape(after or '.')}(weight|bias)")
    own = [key for key in keys if key.startswith(before) and (after in key or not after)]
    if own and all(map(named.fullmatch, own)):
        return "for a list of names pass keys=[...], the names in the order of the partitions"
    numbered = (re.fullmatch(r"(.+[._])[0-9]+\.weight", key) for key in keys)
    lists = list(dict.fromkeys(match[1] for match in numbered if match))
    if not lists and any(key.rpartition(".")[2] == "kernel" for key in keys):
        return "for a layer's own kernel and bias, not those of a list, use import_parameters"
    return f"pass the prefix of a list, those here are {shown(lists)}" if lists else otherwise


def check_keys(keys: Any, num_partitions: int | None = None) -> list[str] | None:
    """Return names of linears; refuse what is no sequence of strings by a TypeError, and equal ones by a ValueError."""
    if keys is None:
        return None
    if not isinstance(keys, Sequence) or isinstance(keys, str) or not all(isinstance(key, str) for key in keys):
        raise TypeError(f"`keys`: expected a sequence of names, got {shown(keys)}; pass one for each partition.")
    if len(set(keys)) < len(keys) or not keys or "" in keys:
        raise ValueError(f"`keys`: expected a name of its own for each partition, got {shown(keys)}; pass n names.")
    if num_partitions not in (None, len(keys)):
        raise ValueError(f"`keys`: expected n = {num_partitions} names, got {len(keys)}; pass one for each partition.")
    return list(keys)


def arrays_from_linears(
    linears: Sequence[Mapping[str, Any]],
    prefix: str,
    expected: Mapping[str, tuple[tuple[int, ...], np.dtype]],
    packing: Packing | None,
    keys: Sequence[str] | None = None,
) -> dict[str, np.ndarray]:
    """Stack the arrays of linears to canonical ones of name -> (shape, dtype), W[n, i, o] = weight of n [o, i].

    With a packing, the canonical arrays are packed.

    Raises:
        TypeError: If one is no NumPy array, is masked, or has another dtype.
        ValueError: If their number, biases or shapes are others.
    """
    n = expected["weight"][0][0] if packing is None else packing.num_partitions
    if len(linears) != n or set(linears[0]) != set(expected):
        raise ValueError(
            f"`state_dict`: expected {n} linears {'with' if 'bias' in expected else 'without'} biases, got "
            f"{len(linears)} {'with' if 'bias' in linears[0] else 'without'}; the layer is unchanged."
        )
    for k, linear in enumerate(linears):
        i, o = expected["weight"][0][1:] if packing is None else (packing.in_features[k], packing.out_features[k])
        for name, array in linear.items():
            argument = f"state_dict[{key_of(prefix, k if keys is None else keys[k], name)!r}]"
            if not isinstance(array, np.ndarray) or isinstance(array, np.ma.MaskedArray):
                raise TypeError(
                    f"`{argument}`: expected an array of floats without a mask, got {kind_of(array)}; "
                    f"{'pass what its .numpy() returns' if hasattr(array, 'numpy') else 'the layer is unchanged'}."
                )
            symbols, shape = ("(out, in)", (o, i)) if name == "weight" else ("(out,)", (o,))
            if array.shape != shape:
                unlike = packing is None and len({getattr(each["weight"], "shape", ()) for each in linears}) > 1
                advice = ", build one with sequences of sizes for linears that differ" if unlike else ""
                raise ValueError(
                    f"`{argument}`: expected shape {symbols} = {shape}, got {array.shape}; the layer is "
                    f"unchanged{advice}."
                )
            if array.dtype != expected[name][1]:
                got = array.dtype.name if array.dtype.isnative else array.dtype.str
                raise TypeError(
                    f"`{argument}`: expected dtype {expected[name][1].name}, got {got}; the layer is unchanged, cast "
                    f"one of the two."
                )
    if packing is None:
        return {name: np.stack([linear[name].T for linear in linears]) for name in expected}
    orders = {"weight": packing.order, "bias": range(n)}
    return {name: np.concatenate([linears[k][name].T.ravel() for k in orders[name]]) for name in expected}


def of_partition(array: Any, name: str, k: int, packing: Packing | None) -> Any:
    """Return the view of one partition of a canonical weight (in, out) or bias (out,), of any framework."""
    if packing is None:
        return array[k]
    if name == "bias":
        return array[packing.out_offsets[k] : packing.out_offsets[k + 1]]
    i, o, start = packing.in_features[k], packing.out_features[k], packing.weight_offsets[k]
    return array[start : start + i * o].reshape(i, o)


def linears_from_arrays(
    arrays: Mapping[str, np.ndarray], prefix: Any, packing: Packing | None, keys: Any = None
) -> Iterator[tuple[str, np.ndarray]]:
    """Give copies of canonical arrays as those of linears, each under its key: `<prefix>0.weight` (out, in) first."""
    if not isinstance(prefix, str):
        raise TypeError(f"`prefix`: expected a str, got {kind_of(prefix)}; pass one such as 'heads.'.")
    n = len(arrays["weight"]) if packing is None else packing.num_partitions
    names = check_keys(keys, n)
    for k in range(n):
        for name, array in arrays.items():
            key = key_of(prefix, k if names is None else names[k], name, whole=True)
            yield key, np.array(of_partition(array, name, k, packing).T, order="C")


def from_axes(
    arrays: Any, axes: Any, expected: Mapping[str, tuple[tuple[int, ...], np.dtype]], as_array: Callable[[Any], Any]
) -> Any:
    """Return arrays of the declared axes with canonical ones; what is no array is left for later checks to refuse.

    Where axes are declared, arrays of the framework are taken as well, which `as_array` turns into those of NumPy.

    Raises:
        TypeError: If `axes` is no mapping of names to patterns.
        ValueError: If a pattern is none, or an array has not the shape that it says.
    """
    patterns = _checked_patterns(axes, expected)
    if axes is None or not isinstance(arrays, Mapping) or set(arrays) != set(expected):
        return arrays
    found = {name: as_array(array) for name, array in arrays.items()}
    for name, groups in patterns.items():
        array, shape, sizes = found[name], expected[name][0], _sizes(name, expected)
        if not isinstance(array, np.ndarray) or isinstance(array, np.ma.MaskedArray):
            continue
        foreign = tuple(math.prod(sizes[letter] for letter in group) for group in groups)
        if array.shape != foreign:
            raise ValueError(
                f"`arrays[{name!r}]`: expected axes {shown(axes[name])} of shape {foreign}, got {array.shape}; the "
                f"layer is unchanged."
            )
        letters = "".join(groups).replace("1", "")
        order = [letters.index(letter) for letter in _CANONICAL[name]]
        found[name] = array.reshape([sizes[letter] for letter in letters]).transpose(order).reshape(shape)
    return found


def to_axes(arrays: dict[str, np.ndarray], axes: Any) -> dict[str, np.ndarray]:
    """Return canonical arrays with the declared axes; raises as `from_axes` does."""
    expected = {name: (array.shape, array.dtype) for name, array in arrays.items()}
    for name, groups in _checked_patterns(axes, expected).items():
        sizes, letters = _sizes(name, expected), "".join(groups).replace("1", "")
        moved = arrays[name].transpose([_CANONICAL[name].index(letter) for letter in letters])
        shape = [math.prod(sizes[letter] for letter in group) for group in groups]
        arrays[name] = np.ascontiguousarray(moved).reshape(shape)
    return arrays


def _sizes(name: str, expected: Mapping[str, tuple[tuple[int, ...], np.dtype]]) -> dict[str, int]:
    return dict(zip(_CANONICAL[name], expected[name][0], strict=True)) | {"1": 1}


def _checked_patterns(axes: Any, expected: Mapping[str, Any]) -> dict[str, list[str]]:
    """Return the groups of letters of each pattern: "(n o) 1 i" is ["no", "1", "i"]."""
    if axes is None:
        return {}
    if not isinstance(axes, Mapping):
        raise TypeError(f"`axes`: expected a mapping of names to patterns, got {kind_of(axes)}; pass a dict.")
    if len(expected["weight"][0]) == 1:
        raise ValueError(
            f"`axes`: expected None for partitions of unequal sizes, whose matrices are packed, got {shown(axes)}; "
            f"pass them to load_linears."
        )
    patterns = {}
    for name, pattern in axes.items():
        if name not in expected:
            raise ValueError(
                f"`axes`: expected names among {', '.join(map(repr, expected))}, got {shown(name)}; name the layer's "
                f"own parameters."
            )
        letters = _CANONICAL[name]
        groups = re.findall(r"\(([^()]*)\)|(\S)", pattern) if isinstance(pattern, str) else []
        found = ["".join(pair).replace(" ", "") for pair in groups]
        whole = isinstance(pattern, str) and re.fullmatch(r"(\s*(\([nio1 ]+\)|[nio1]))+\s*", pattern)
        if not whole or sorted("".join(found).replace("1", "")) != sorted(letters):
            raise ValueError(
                f"`axes[{name!r}]`: expected a pattern with each of the axes {', '.join(letters)} once, such as "
                f"'n o i' or '(n o) i' for a weight, got {shown(pattern)}; write the axes as the array has them."
            )
        patterns[name] = found
    return patterns
