"""Flaws of the arguments that both trees have: names, sizes, switches, paths, shapes, canonical arrays.

Some are no flaws but unusual forms of what is documented, as controls: those must be taken.
"""

import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from parity_tests.judge.inputs import Case
from parity_tests.tests.drawn_calls import Call, Flaw


class Hostile:
    """Fail in everything that is asked of it."""

    def __repr__(self) -> str:
        raise RuntimeError("no repr")

    def __array__(self, *_: Any, **__: Any) -> Any:
        raise RuntimeError("no array")

    def __fspath__(self) -> str:
        raise RuntimeError("no path")

    def __len__(self) -> int:
        raise RuntimeError("no length")


class BytesPath:
    """Stand for a path, but of bytes."""

    def __fspath__(self) -> bytes:
        return b"file"


def flaws_of(values: Mapping[str, Any], refused: bool | None = True, names: tuple[str, ...] = ()) -> dict[str, Flaw]:
    """Make flaws that pass these values in place of the usual one."""
    return {kind: Flaw(lambda _, __, value=value: value, refused, names) for kind, value in values.items()}


ANYTHING = {
    "none": None,
    "number": 1.5,
    "text": "x",
    "bytes": b"x",
    "list": [1.0],
    "empty list": [],
    "dict": {},
    "class": dict,
    "lines": np.zeros((30, 30)),
    "hostile": Hostile(),
}
NO_OPERAND = flaws_of({kind: value for kind, value in ANYTHING.items() if kind != "lines"})
NO_BIAS = {kind: flaw for kind, flaw in NO_OPERAND.items() if kind != "none"}
NO_NAME = flaws_of(
    {kind: value for kind, value in ANYTHING.items() if kind != "text"}
    | {"unknown": "bmm", "nothing": "", "capitals": "MATMUL", "two lines": "a\nb", "long": "x" * 10**5}
)
NO_SWITCH = flaws_of(ANYTHING | {"zero": 0, "one": 1})
NO_SIZE = flaws_of(
    ANYTHING
    | {"zero": 0, "negative": -3, "truth": True, "float": 3.0, "not a number": float("nan"), "complex": 1j}
    | {"2**63": 2**63, "2**63 - 1": 2**63 - 1, "2**62": 2**62, "10**30": 10**30, "5,000 digits": 10**5000}
    | {"minus 5,000 digits": -(10**5000)}
)
# Of partitions of unequal sizes.
SIZES = ("in_features", "out_features", "features", "weight", "kernel", "x", "bias")
NO_SIZES = {
    kind: Flaw(lambda sizes, _, change=change: change(sizes), refused, SIZES)
    for kind, (change, refused) in {
        "none": (lambda sizes: None, True),
        "text": (lambda sizes: "x" * len(sizes), True),
        "bytes": (lambda sizes: b"x" * len(sizes), True),
        "set": (lambda sizes: {*sizes}, True),
        "array": (lambda sizes: np.array(sizes), True),
        "number": (lambda sizes: 1.5, True),
        "hostile": (lambda sizes: Hostile(), True),
        "zero in all": (lambda sizes: 0, True),
        "10**30 in all": (lambda sizes: 10**30, True),
        "a size less": (lambda sizes: sizes[:-1], True),
        "a size more": (lambda sizes: (*sizes, 1), True),
        "no sizes": (lambda sizes: [], True),
        "zero": (lambda sizes: (*sizes[:-1], 0), True),
        "negative": (lambda sizes: (*sizes[:-1], -sizes[-1]), True),
        "truth": (lambda sizes: (*sizes[:-1], True), True),
        "NumPy truth": (lambda sizes: (*sizes[:-1], np.bool_(True)), True),
        "float": (lambda sizes: (*sizes[:-1], float(sizes[-1])), True),
        "sequence": (lambda sizes: (*sizes[:-1], [sizes[-1]]), True),
        "hostile one": (lambda sizes: (*sizes[:-1], Hostile()), True),
        "2**62": (lambda sizes: (*sizes[:-1], 2**62), True),
        "5,000 digits": (lambda sizes: (*sizes[:-1], 10**5000), True),
        "list": (list, False),
        "NumPy ints": (lambda sizes: [*np.array(sizes)], False),
    }.items()
}
NO_PATH = flaws_of(
    {kind: value for kind, value in ANYTHING.items() if kind not in ("text", "number")}
    | {"nothing": "", "nul": "a\0b", "surrogate": "\ud800", "number": 3, "truth": True, "empty path": Path("")}
    | {"nul path": Path("a\0b"), "bytes path": BytesPath()}
)
NO_FILE = NO_PATH | {
    "missing": Flaw(lambda path, call: os.path.join(os.path.dirname(path), "missing")),
    "folder": Flaw(lambda path, call: os.path.dirname(path)),
}

_FITS: Mapping[str, Callable[[tuple[int, ...], Case], bool]] = {
    "x": lambda shape, case: len(shape) > 1 and shape[-2:] == (case.num_partitions, case.in_features),
    "flat x": lambda shape, case: _FITS["x"](shape, case) or shape[-1:] == (case.num_partitions * case.in_features,),
    "weight": lambda shape, case: shape == (case.num_partitions, case.in_features, case.out_features),
    "bias": lambda shape, case: shape == (case.num_partitions, case.out_features),
}


def wrong_shapes(argument: str, makes: Mapping[str, Callable[[Any], Any]]) -> dict[str, Flaw]:
    """Make flaws of shape; where sizes coincide, what comes out may fit, and is then no flaw but another input."""

    def refused(value: Any, call: Call) -> bool | None:
        return None if _FITS[argument](tuple(value.shape), call.case) else True

    return {
        kind: Flaw(lambda value, _, make=make: make(value), refused, ("x", "weight", "kernel", "bias"), relative=True)
        for kind, make in makes.items()
    }


X_SHAPES = {
    "one partition": lambda x: x[..., :1, :],
    "a partition less": lambda x: x[..., :-1, :],
    "a feature less": lambda x: x[..., :-1],
    "one feature": lambda x: x[..., :1],
    "exchanged": lambda x: x.swapaxes(-1, -2),
    "flat": lambda x: x.reshape((*x.shape[:-2], x.shape[-2] * x.shape[-1])),
    "features alone": lambda x: x[..., 0, :],
    "no features": lambda x: x[..., 0, 0],
}
WEIGHT_SHAPES = {
    "matrix": lambda weight: weight[0],
    "axis added": lambda weight: weight[None],
    "one partition": lambda weight: weight[:1],
    "a partition less": lambda weight: weight[:-1],
    "a feature less": lambda weight: weight[:, :-1],
    "exchanged": lambda weight: weight.swapaxes(1, 2),
    "no outputs": lambda weight: weight[..., :0],
    "no features": lambda weight: weight[:, :0],
}
BIAS_SHAPES = {
    "vector": lambda bias: bias[0],
    "axis added": lambda bias: bias[None],
    "one partition": lambda bias: bias[:1],
    "one output": lambda bias: bias[:, :1],
    "an output less": lambda bias: bias[:, :-1],
    "exchanged": lambda bias: bias.swapaxes(0, 1),
    "no axes": lambda bias: bias[0, 0],
}


class FailingMapping(dict[str, np.ndarray]):
    """Know the names, but fail to read what is under them."""

    def __getitem__(self, name: str) -> np.ndarray:
        raise OSError("the archive is damaged")


_CHANGES: dict[str, tuple[Callable[[np.ndarray], Any], bool | None]] = {
    "list": (lambda array: array.tolist(), True),
    "none": (lambda array: None, True),
    "masked": (lambda array: np.ma.masked_array(array, mask=array > 0), True),
    "masked nowhere": (lambda array: np.ma.masked_array(array), True),
    "other byte order": (lambda array: array.astype(">f4"), True),
    "objects": (lambda array: array.astype(object), True),
    "records": (lambda array: np.zeros(array.shape, [("a", "f4"), ("b", "f4")]), True),
    "texts": (lambda array: np.full(array.shape, "a"), True),
    "dates": (lambda array: np.zeros(array.shape, "M8[s]"), True),
    "integers": (lambda array: array.astype(np.int32), True),
    "complex": (lambda array: array.astype(np.complex64), True),
    "another float": (lambda array: array.astype(np.float64 if array.dtype != np.float64 else np.float32), True),
    "strided": (lambda array: np.repeat(array, 2, -1)[..., ::2], False),
    "reversed": (lambda array: array[::-1], False),
    "columns first": (np.asfortranarray, False),
    "expanded": (lambda array: np.broadcast_to(array[:1], array.shape), False),
}


def _each_array() -> dict[str, Flaw]:
    """Make the flaws, and the unusual but valid forms, of one canonical array beside another."""
    flaws = {}
    for name in ("weight", "bias"):
        for kind, (change, refused) in _CHANGES.items():
            flaws[f"{name} {kind}"] = Flaw(
                lambda arrays, _, name=name, change=change: (
                    {**arrays, name: change(arrays[name])} if name in arrays else {**arrays, "extra": 0}
                ),
                lambda arrays, _, refused=refused: "extra" in arrays or refused,
            )
        for kind, make in (WEIGHT_SHAPES if name == "weight" else BIAS_SHAPES).items():
            flaws[f"{name} {kind}"] = Flaw(
                lambda arrays, _, name=name, make=make: (
                    {**arrays, name: make(arrays[name])} if name in arrays else {**arrays, "extra": 0}
                ),
                lambda arrays, call, name=name: (
                    None if "extra" not in arrays and _FITS[name](arrays[name].shape, call.case) else True
                ),
            )
    return flaws


NO_ARRAYS = (
    flaws_of(ANYTHING)
    | _each_array()
    | {
        "missing": Flaw(lambda arrays, _: dict(list(arrays.items())[1:])),
        "extra": Flaw(lambda arrays, _: {**arrays, "scale": arrays["weight"]}),
        "many": Flaw(lambda arrays, _: {str(k): arrays["weight"] for k in range(1000)}),
        "other name": Flaw(lambda arrays, _: {"kernel": arrays["weight"]}),
        "number as name": Flaw(lambda arrays, _: {**arrays, 0: arrays["weight"]}),
        "unreadable": Flaw(lambda arrays, _: FailingMapping(arrays)),
    }
)


def _renamed(old: str, new: Any) -> Flaw:
    return Flaw(lambda state, _: {(new if key == old else key): array for key, array in state.items()})


# The state_dict of a list of linears, as NumPy arrays.
NO_LINEAR_ARRAYS = (
    flaws_of(ANYTHING, names=("path",))
    | {
        f"weight {kind}": Flaw(
            lambda state, _, change=change: {**state, "0.weight": change(state["0.weight"])},
            refused,
        )
        for kind, (change, refused) in _CHANGES.items()
    }
    | {
        "leading zero": _renamed("0.weight", "00.weight"),
        "gap": _renamed("0.weight", "7.weight"),
        "number as key": _renamed("0.weight", 0),
        "foreign key": Flaw(lambda state, _: {**state, "norm.weight": state["0.weight"]}),
        "number of 5,000 digits": Flaw(lambda state, _: {**state, "9" * 5000 + ".weight": state["0.weight"]}),
        "weight missing": Flaw(lambda state, _: {key: array for key, array in state.items() if key != "0.weight"}),
        "one more": Flaw(lambda state, call: {**state, f"{call.case.num_partitions}.weight": state["0.weight"]}),
        "exchanged": Flaw(
            lambda state, _: {**state, "0.weight": state["0.weight"].T},
            lambda _, call: True if call.case.in_features != call.case.out_features else None,
        ),
        "unreadable": Flaw(lambda state, _: FailingMapping(state)),
        "in another order": Flaw(lambda state, _: dict(reversed(state.items())), False),
        "of a compiled model": Flaw(
            lambda state, _: {f"_orig_mod.{key}": array for key, array in state.items()}, False
        ),
        "distributed": Flaw(
            lambda state, _: {"module.step": np.ones(1)} | {f"module.{key}": array for key, array in state.items()},
        ),
    }
)
NO_AXES = flaws_of(
    {kind: value for kind, value in ANYTHING.items() if kind not in ("none", "dict")}
    | {"foreign name": {"kernel": "n i o"}, "axis missing": {"weight": "n i"}, "axis twice": {"weight": "n i o o"}}
    | {"letter": {"weight": "n i x"}, "open": {"weight": "(n i o"}, "no pattern": {"weight": 3}, "number": {0: "n i o"}}
    | {"nothing": {"weight": ""}, "nested": {"weight": "((n i) o)"}, "lines": {"weight": np.zeros((30, 30))}}
) | {
    "canonical": Flaw(lambda _, __: {"weight": "n i o"}, False),
    "no names": Flaw(lambda _, __: {}, False),
    "exchanged": Flaw(lambda _, __: {"weight": "n o i"}, lambda _, call: None, ("arrays",)),
}

# Axes of a call beside an x of the usual shape: another one must not fit by luck unnoticed.
NO_IN_AXIS = flaws_of(ANYTHING | {"truth": True, "numpy": np.int64(-1)}) | flaws_of({"last": -1}, False)
NO_PARTITION_AXIS = flaws_of({kind: value for kind, value in ANYTHING.items() if kind != "none"} | {"truth": False}) | {
    "out of range": Flaw(lambda _, __: 99, names=("x",)),
    "2**70": Flaw(lambda _, __: 2**70, names=("x",)),
    "flat": Flaw(
        lambda _, __: -1,
        # With one partition flat features are those of one.
        lambda _, call: None if call.case.num_partitions == 1 or call.case.in_features == 1 else True,
        ("x",),
    ),
    "next to last": Flaw(lambda _, __: -2, False),
}
NO_PARTITIONS = flaws_of(
    {kind: value for kind, value in ANYTHING.items() if kind != "none"}
    | {"zero": 0, "slice": slice(2), "set": {0}, "truths": [True], "negative": [-1], "large": [2**70], "floats": [0.0]}
    | {"array of floats": np.zeros(1), "no axes": np.array(0), "two axes": np.zeros((1, 1), int), "texts": ["0"]}
    | {"mask": np.ones(1, bool), "many": [10**6], "nothing": np.zeros(0, int)}
) | {
    "one more": Flaw(lambda _, call: [call.case.num_partitions]),
    "all": Flaw(lambda _, call: range(call.case.num_partitions), False),
    "array of all": Flaw(lambda _, call: np.arange(call.case.num_partitions), False),
}
