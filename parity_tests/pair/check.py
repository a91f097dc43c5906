"""`check_pair`: from its arguments to both sides, to the judge, and to a report whose rows say what reproduces them."""

import contextlib
import dataclasses
import inspect
import re
import shlex
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from parity_tests.causes.pair import likely_cause
from parity_tests.interpreters.interpreter import DEFAULT_TIMEOUT_S
from parity_tests.judge.dtypes import numpy_dtype
from parity_tests.pair.draws import Draw, InputSource, Scale
from parity_tests.pair.inspection import left_out
from parity_tests.pair.judge import Judge
from parity_tests.pair.legs import Pair
from parity_tests.pair.loading import RemoteSide, build, load_factory, make_side
from parity_tests.pair.mapping import Rule
from parity_tests.pair.patterns import LeftOut
from parity_tests.pair.progress import Progress, Told
from parity_tests.pair.report import EFFORTS, PairReport, PairRow, Tell
from parity_tests.report.text import first_line

_REQUIRED = {"torch_module": "torch", "flax_module": "jax", "params": None, "inputs": None}
_KINDS = {
    "params": (Sequence, "a sequence of rules or a proposal"),
    "dtypes": (Sequence, "a tuple of dtypes"),
    "name": (str, "a string"),
    **dict.fromkeys(("torch_kwargs", "flax_kwargs"), (Mapping, "a dict of keyword arguments")),
    **dict.fromkeys(("torch_params", "draws", "output_patterns"), (Mapping, "a dict by name")),
    "input_patterns": (Mapping, "a dict by position"),
}
# Arguments for which the command line has an option, or which change no row that the command shows.
_OF_COMMAND = {
    "seed",
    "dtypes",
    "device",
    "torch_python",
    "jax_python",
    "timeout_s",
    "effort",
    "semantic",
    "state",
    "name",
}
# Arguments that a call must repeat in writing, beside the seed and the dtype.
_SCALARS = ("gradients", "semantic", "state", "scale", "not_compared", "device", "torch_python", "jax_python")
_SCALARS += ("timeout_s", "effort")


def _ignore(found: Any) -> None:
    """Take the place of a listener."""


def check_pair(
    *,
    torch_module: Any = None,
    flax_module: Any = None,
    params: Sequence[Rule] | None = None,
    inputs: InputSource | None = None,
    seed: int = 0,
    dtypes: Sequence[str] = ("float32",),
    gradients: bool = True,
    semantic: bool = True,
    state: bool = True,
    effort: str = "full",
    torch_kwargs: Mapping[str, Any] | None = None,
    flax_kwargs: Mapping[str, Any] | None = None,
    torch_params: Mapping[str, np.ndarray] | None = None,
    flax_params: Mapping[str, Any] | None = None,
    input_patterns: Mapping[int, str] | None = None,
    output_patterns: Mapping[str, str] | None = None,
    draws: Mapping[str, Draw] | None = None,
    scale: Scale | None = None,
    not_compared: Sequence[str] = (),
    device: str = "cpu",
    name: str = "",
    pair: str | None = None,
    torch_python: str | None = None,
    jax_python: str | None = None,
    timeout_s: float = DEFAULT_TIMEOUT_S,
) -> PairReport:
    """Check that a torch module and a Flax module compute the same function, gradients included, up to rounding.

    The modules, and a named pair's factory, run in this process, and what they do to it is done: one that ends or hangs
    it ends or hangs the caller. The command `python -m parity_tests run --pair` gives them a process of their own.

    Parameters are drawn at random around their own scale and given to both sides, then compared on a ladder: weights
    bit for bit through both sides; outputs; gradients of every mapped parameter and every floating-point input for a
    random cotangent; buffers that a call updates. In float64 both sides must agree to float64's rounding (the semantic
    leg); in each dtype each side must lie within rounding of its own float64 truth, and the two of each other. The
    bounds come from rounding-noise ensembles (`pair.calibration`) and are labelled `calibrated`. Integers, and what
    is not finite, must be equal. Complex numbers are judged part by part, and their gradients as torch has them,
    `dL/dRe + i dL/dIm`. Without a float64 run or a finite bound a pair is undecided, and does not hold.

    Args:
        torch_module: an `nn.Module`, in the mode (train or eval) it is to be judged in, or `f(params, *inputs)`.
        flax_module: a linen module, an nnx module, a callable pytree (an Equinox module), or `f(params, *inputs)`.
        params: `(torch name, flax path, axis pattern)` for every parameter, see `mapping.ParameterMapping`;
            `propose_mapping` writes a first version, which is taken as it is.
        inputs: one entry an argument, a shape or an array, in the torch side's layout; or a function of a NumPy
            generator that returns the arrays.
        seed: of all that is drawn.
        dtypes: storage dtypes to judge in: `float64`, `float32`, `bfloat16`, `float16`.
        gradients: whether gradients are compared.
        semantic: False leaves the float64 comparison out, for a pair that is meant to differ by a rounded constant.
        state: whether mapped buffers that a call updates (running statistics, caches) are compared as they are after
            it; False for a pair that is not to be trained on, or to part there. Others are listed as not compared.
        effort: `full`, or `quick` for a look that compares the same values by the same bounds, but watches no branches
            and formats and tries no causes.
        torch_kwargs: keyword arguments of the torch call.
        flax_kwargs: keyword arguments of the flax call (`rngs` and `mutable` as in linen's `apply`).
        torch_params: initial parameters, for a torch function.
        flax_params: initial parameters, for a JAX function (any pytree: dicts, lists, dataclasses, Equinox modules; its
            arrays are named by their paths, `layers.0.w`) or for a linen module.
        input_patterns: by position, where the layouts differ: `{0: "b c h w -> b h w c"}`.
        output_patterns: by output name (`y`, or `y.0`, ...), likewise.
        draws: by torch name, `(rng, shape) -> array` for parameters with constraints of their own.
        scale: what is drawn is multiplied by: one number for all inputs given as shapes, or numbers by input position
            and torch parameter name, `{0: 10.0}`. Notes of a report say which clamps and selections never took a
            branch: wider draws may reach it.
        not_compared: names or patterns (`"*.num_batches_tracked"`) of unmapped buffers and frozen parameters of
            either side that need not agree, though results depend on them, and of gradients (`"d_body.*"`).
        device: `cpu`, `cuda`, or `auto` for a GPU if there is one.
        name: of the pair, in reports.
        pair: `package.module:factory` in place of the modules, see `loading`;
            arguments given here win over the factory's, unless they are the defaults.
        torch_python: interpreter for the torch side, which then runs in its own process; needs `pair`.
        jax_python: the same for the flax side.
        timeout_s: seconds that one answer of such an interpreter may take.

    Returns:
        A report with `ok`, `rows`, `assert_ok()`, `to_json`, `to_junit` and `to_html`. Every row says what
        reproduces it: a command, or for a pair of objects the call with that row's seed and dtype.

    Raises:
        MappingError: if the rules are not a bijection that fits both sides.
        ValueError: for other values that do not fit.
        TypeError: for modules or inputs of another kind.
    """
    given = dict(locals())
    return _checked(given.pop("pair"), given, _ignore)


DEFAULT_ARGUMENTS = {
    name: parameter.default for name, parameter in inspect.signature(check_pair).parameters.items() if name != "pair"
}


def run_pair(spec: str, tell: Tell = _ignore, **overrides: Any) -> PairReport:
    """Check the pair that `package.module:factory` describes, in this process.

    `tell` is called with each step, a text, and with every row once it is known; `overrides` are arguments of
    `check_pair` that win over the factory's.

    Raises:
        ValueError: if the pair cannot be loaded or does not fit together; one sentence.
    """
    if unknown := sorted(set(overrides) - set(DEFAULT_ARGUMENTS)):
        raise ValueError(f"pair: expected arguments of check_pair, got {', '.join(unknown)}; leave these out.")
    try:
        return _checked(spec, DEFAULT_ARGUMENTS | overrides, tell)
    except (ImportError, TypeError) as error:
        raise ValueError(f"pair: {spec} cannot be checked: {first_line(error)}") from error


def _checked(spec: str | None, given: Mapping[str, Any], tell: Tell) -> PairReport:
    arguments = dict(given) if spec is None else merged(spec, given, tell)
    command = reproduction(spec, given, arguments)

    def tell_with_command(found: Any) -> None:
        tell(dataclasses.replace(found, command=command(found)) if isinstance(found, PairRow) else found)

    options = ("seed", "dtypes", "gradients", "semantic", "state", "effort")
    with prepared(arguments, spec, tell) as pair:
        report = judge_pair(pair, **{name: arguments[name] for name in options}, tell=tell_with_command)
    return report.with_commands(command)


def judge_pair(
    pair: Pair,
    seed: int = 0,
    dtypes: Sequence[str] = ("float32",),
    gradients: bool = True,
    semantic: bool = True,
    state: bool = True,
    effort: str = "full",
    tell: Tell = _ignore,
) -> PairReport:
    """Judge a pair whose sides are made already; see `check_pair` for the arguments and `run_pair` for `tell`."""
    if not dtypes:
        raise ValueError("dtypes: expected at least one, got none; nothing would be compared.")
    for dtype in dtypes:
        numpy_dtype(dtype)
    judge = Judge(pair, seed, gradients, semantic, state, effort)
    rows = []
    for row in judge.rows(dtypes):
        rows.append(_explained(pair, row))
        tell(rows[-1])
    wanted = effort == "full"
    if wanted and any(row.status == "mismatch" for row in rows):
        pair.announce("cause", 0)
        tell("looking for the cause")
    return PairReport(
        name=pair.name,
        rows=rows,
        not_compared=tuple(left_out(pair, judge.untrained, gradients, state)),
        likely_cause=likely_cause(pair, judge.evidence, rows) if wanted else "",
        notes=tuple(sorted({*judge.notes, *pair.notes, *judge.remarks.notes})),
        random=bool(judge.evidence.random),
    )


def _explained(pair: Pair, row: PairRow) -> PairRow:
    """Add to a gradient's mismatch that one side keeps the parameter frozen, where it does."""
    name = row.tensor.removeprefix("d_")
    if row.status != "mismatch" or row.rung != "gradients" or name not in pair.mapping.half_trained:
        return row
    kind = pair.specs["torch"][name].kind
    return dataclasses.replace(
        row, reason=f"{row.reason}; {name} is {kind} on the torch side, and the flax side trains it"
    )


def merged(spec: str, given: Mapping[str, Any], tell: Tell = _ignore) -> dict[str, Any]:
    """Return the arguments of a named pair: defaults, then the factory's, then those given that are not the defaults.

    Raises:
        ValueError: if the factory returns an unknown argument or cannot be loaded.
    """
    chosen = {name: value for name, value in given.items() if value is not DEFAULT_ARGUMENTS[name]}
    pythons = {"torch": chosen.get("torch_python"), "jax": chosen.get("jax_python")}
    parts = (*(side for side, python in pythons.items() if python is None), "pair")
    tell(f"importing {spec}")
    factory = load_factory(spec, parts)
    tell(f"calling {spec}")
    built = build(factory, parts)
    if unknown := sorted(map(str, set(built) - set(DEFAULT_ARGUMENTS))):
        raise ValueError(
            f"pair: expected {spec} to return arguments among {', '.join(DEFAULT_ARGUMENTS)}, got {', '.join(unknown)}."
        )
    return {**DEFAULT_ARGUMENTS, **built, **chosen}


@contextlib.contextmanager
def prepared(arguments: Mapping[str, Any], spec: str | None, tell: Tell = _ignore) -> Iterator[Pair]:
    """Make both sides and the mapping; end the other interpreters, if there are any, on leaving.

    Raises:
        ValueError: if something is missing.
    """
    pythons = {"torch": arguments["torch_python"], "jax": arguments["jax_python"]}
    if spec is None and any(pythons.values()):
        raise ValueError(
            "torch_python, jax_python: expected pair='package.module:factory' beside an interpreter, got None; "
            "only what can be named can be built in another process."
        )
    for name, side in _REQUIRED.items():
        if arguments[name] is None and (side is None or pythons[side] is None):
            raise ValueError(f"{name}: expected a value, got None; pass it, or a pair whose factory returns it.")
    _check_kinds(arguments)
    with contextlib.ExitStack() as stack:
        sides: dict[str, Any] = {}
        progress = Progress(tell)
        for key, python in pythons.items():
            tell(f"making the {key} side")
            if python is None or spec is None:
                sides[key] = make_side(key, arguments, arguments["device"])
            else:
                remote = RemoteSide(key, spec, python, arguments["device"], arguments["timeout_s"])
                sides[key] = stack.enter_context(remote)
            if tell is not _ignore:
                sides[key] = Told(sides[key], progress)
        progress.between()
        yield Pair(
            name=arguments["name"] or spec or f"{sides['torch'].name}-{sides['jax'].name}",
            sides=sides,
            # A proposal goes in as it is.
            rules=getattr(arguments["params"], "rules", arguments["params"]),
            source=arguments["inputs"],
            input_patterns=arguments["input_patterns"] or {},
            output_patterns=arguments["output_patterns"] or {},
            draws=arguments["draws"] or {},
            scale=arguments["scale"],
            left_out=LeftOut(arguments["not_compared"] or ()),
            announce=progress.start,
        )


def _check_kinds(arguments: Mapping[str, Any]) -> None:
    """Refuse values of another kind, which would fail somewhere below."""
    for name, (kind, expected) in _KINDS.items():
        value = getattr(arguments[name], "rules", arguments[name]) if name == "params" else arguments[name]
        if value is not None and (not isinstance(value, kind) or (isinstance(value, str) and name != "name")):
            hint = f"; for one dtype pass ({value!r},)" if name == "dtypes" else ""
            raise ValueError(f"{name}: expected {expected}, got {value!r:.80}{hint}.")
    seed = arguments["seed"]
    if not isinstance(seed, int | np.integer) or seed < 0:
        raise ValueError(f"seed: expected a non-negative integer, got {seed!r}.")
    if arguments["effort"] not in EFFORTS:
        raise ValueError(f"effort: expected one of {', '.join(EFFORTS)}, got {arguments['effort']!r}; choose one.")
    if not re.fullmatch(r"auto|cpu|cuda(:\d+)?", str(arguments["device"])):
        raise ValueError(f"device: expected cpu, cuda or auto, got {arguments['device']!r}; choose one of these.")


def reproduction(spec: str | None, given: Mapping[str, Any], arguments: Mapping[str, Any]) -> Callable[[PairRow], str]:
    """Return a function from a row to its reproduction: a command, or the call with that row's seed and dtype.

    Everything that a check draws follows from the seed and from names, in every process and whatever other dtypes are
    judged beside it: the same seed and one dtype repeat the row to the bit. A pair of objects has no name that another
    process could find: there the call has `...` for the modules, rules and inputs that the caller holds.

    Args:
        spec: `package.module:factory`, or None for objects.
        given: all other arguments, as the caller passed them.
        arguments: the same with a factory's own arguments filled in.
    """
    changed = {name for name, value in given.items() if value is not DEFAULT_ARGUMENTS[name]}
    if spec is not None and changed <= _OF_COMMAND:
        return lambda row: _command(spec, arguments, row.dtype)
    scalars = {name: arguments[name] for name in _SCALARS if arguments[name] != DEFAULT_ARGUMENTS[name]}
    options = "".join(f", {name}={value!r}" for name, value in scalars.items())
    objects = changed - _OF_COMMAND - set(_SCALARS)
    held = "".join([*([] if spec is None else [f"pair={spec!r}, "]), *(["..., "] if objects else [])])

    def call(row: PairRow) -> str:
        seed_and_dtype = f"seed={arguments['seed']}, dtypes=({row.dtype!r},)"
        return f"check_pair({held}{seed_and_dtype}{options})" + (f"  # {row.tensor}" if row.tensor else "")

    return call


def _command(spec: str, arguments: Mapping[str, Any], dtype: str) -> str:
    """Return the command that repeats a named pair's check in one dtype."""
    words = ["python", "-m", "parity_tests", "run", "--pair", spec, "--seed", str(arguments["seed"])]
    words += ["--device", arguments["device"]]
    for option in ("torch_python", "jax_python"):
        if arguments[option] is not None:
            words += [f"--{option.replace('_', '-')}", arguments[option]]
    if arguments["timeout_s"] != DEFAULT_TIMEOUT_S:
        words += ["--timeout-s", f"{arguments['timeout_s']:g}"]
    if arguments["effort"] != "full":
        words += ["--effort", arguments["effort"]]
    return shlex.join([*words, "--dtype", dtype])
