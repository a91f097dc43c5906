"""`check_pair`: from its arguments to both sides, to the judge, and to a report whose rows say what reproduces them."""

import contextlib
import dataclasses
import inspect
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from parity_tests.causes.pair import diagnosis
from parity_tests.causes.place import Findings
from parity_tests.interpreters.interpreter import DEFAULT_TIMEOUT_S
from parity_tests.judge.dtypes import numpy_dtype
from parity_tests.pair.calls import Layouts
from parity_tests.pair.draws import Draw, InputSource, Scale
from parity_tests.pair.inspection import left_out
from parity_tests.pair.judge import Judge
from parity_tests.pair.layouts import Outputs
from parity_tests.pair.legs import Pair
from parity_tests.pair.loading import RemoteSide, build, load_factory, make_side
from parity_tests.pair.mapping import Rule
from parity_tests.pair.patterns import LeftOut
from parity_tests.pair.progress import Progress, Told
from parity_tests.pair.report import EFFORTS, VALUES, PairReport, PairRow, Tell, reproduction
from parity_tests.report.text import first_line

_REQUIRED = {"torch_module": "torch", "flax_module": "jax", "params": None, "inputs": None}
_KINDS = {
    "params": (Sequence, "a sequence of rules or a proposal"),
    "dtypes": (Sequence, "a tuple of dtypes"),
    "name": (str, "a string"),
    **dict.fromkeys(("gradients", "semantic", "state", "dtypes_equal"), (bool | np.bool_, "True or False")),
    "timeout_s": (int | float, "a number of seconds"),
    **dict.fromkeys(("torch_kwargs", "flax_kwargs"), (Mapping, "a dict of keyword arguments")),
    **dict.fromkeys(("torch_params", "draws"), (Mapping, "a dict by name")),
    **dict.fromkeys(("input_patterns", "output_patterns"), (Mapping, "a dict by position or name")),
}


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
    dtypes_equal: bool = False,
    effort: str = "full",
    values: str = "drawn",
    torch_kwargs: Mapping[str, Any] | None = None,
    flax_kwargs: Mapping[str, Any] | None = None,
    torch_params: Mapping[str, np.ndarray] | None = None,
    flax_params: Mapping[str, Any] | None = None,
    torch_call: Callable[..., Any] | None = None,
    flax_call: Callable[..., Any] | None = None,
    input_patterns: Layouts | None = None,
    output_patterns: Layouts | None = None,
    outputs: Outputs | None = None,
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
        inputs: one entry an argument, in the torch side's layout: a shape, an array, or a dict, list, tuple or
            dataclass of these; numbers, texts and None go in as they are. A dict has arguments by name, positional ones
            by number: `{0: (5, 16), "mask": mask}`. Or a function of a NumPy generator that returns the arrays.
        seed: of all that is drawn.
        dtypes: storage dtypes to judge in: `float64`, `float32`, `bfloat16`, `float16`.
        gradients: whether gradients are compared.
        semantic: False leaves the float64 comparison out, for a pair that is meant to differ by a rounded constant.
        state: whether mapped buffers that a call updates (running statistics, caches) are compared as they are after
            it; False for a pair that is not to be trained on, or to part there. Others are listed as not compared.
        dtypes_equal: True to fail an output that the two sides return in different dtypes (a bfloat16 port that returns
            float32), which is a note otherwise.
        effort: `full`, or `quick` for a look that compares the same values, but watches no branches and formats, tries
            no causes, and measures the flax side's rounding noise only if it does not keep the torch side's bounds.
        values: `"given"` judges the pair a second time on the torch module's own values, mapped through the rules to
            the flax side (a trained checkpoint, say): a function may differ only where drawn ones do not come.
        torch_kwargs: keyword arguments of the torch call.
        flax_kwargs: keyword arguments of the flax call (`rngs` and `mutable` as in linen's `apply`).
        torch_params: initial parameters, for a torch function.
        flax_params: initial parameters, for a JAX function (any pytree: dicts, lists, dataclasses, Equinox modules; its
            arrays are named by their paths, `layers.0.w`) or for a linen module.
        torch_call: `(call, *inputs) -> outputs`, where the torch side takes other names, another order or nesting:
            `lambda call, x, mask: call(x, attention_mask=mask)["logits"]`.
        flax_call: the same for the flax side.
        input_patterns: by position or name, where the layouts differ: `{0: "b c h w -> b h w c"}`, or with lengths
            `{"mask": ("b (h w) -> b h w", {"h": 4})}`.
        output_patterns: by position or name of an output (`0`, `"logits"`; `"y"` where there is one), likewise.
        outputs: the outputs that are compared, by names or pairs `(torch name, flax name)`: `[("0", "logits")]`;
            None for all, which then have the same names on both sides.
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
    if spec is not None and not isinstance(spec, str):
        raise ValueError(f"pair: expected package.module:factory, got {spec!r:.80}; name a function of a module.")
    arguments = dict(given) if spec is None else merged(spec, given, tell)
    command = reproduction(spec, given, arguments, DEFAULT_ARGUMENTS)

    def tell_with_command(found: Any) -> None:
        tell(dataclasses.replace(found, command=command(found)) if isinstance(found, PairRow) else found)

    options = ("seed", "dtypes", "gradients", "semantic", "state", "dtypes_equal", "effort", "values")
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
    dtypes_equal: bool = False,
    effort: str = "full",
    values: str = "drawn",
    tell: Tell = _ignore,
) -> PairReport:
    """Judge a pair whose sides are made already; see `check_pair` for the arguments and `run_pair` for `tell`."""
    if not dtypes:
        raise ValueError("dtypes: expected at least one, got none; nothing would be compared.")
    for dtype in dtypes:
        numpy_dtype(dtype)
    if values not in VALUES:
        raise ValueError(f"values: expected {' or '.join(map(repr, VALUES))}, got {values!r}; choose one of these.")
    rows: list[PairRow] = []
    judges: list[tuple[Pair, Judge, list[PairRow]]] = []
    for subject in (pair, pair.with_given_values())[: 1 + (values == "given")]:
        judges.append((subject, Judge(subject, seed, gradients, semantic, state, dtypes_equal, effort), []))
        for row in judges[-1][1].rows(dtypes):
            judges[-1][2].append(_explained(subject, row))
            tell(judges[-1][2][-1])
        rows += judges[-1][2]
    failed = [found for found in judges if any(row.status == "mismatch" for row in found[2])]
    found = Findings()
    if failed and effort == "full":
        pair.announce("cause", 0)
        subject, judge, own_rows = failed[0]
        found = diagnosis(subject, judge.evidence, own_rows, tell)
    subject, judge, _ = (failed or judges)[0]
    notes = {note for subject, judge, _ in judges for note in (*judge.notes, *subject.notes, *judge.remarks.notes)}
    return PairReport(
        name=pair.name,
        rows=rows,
        not_compared=tuple(left_out(pair, judges[0][1].untrained, gradients, state)),
        likely_cause=found.cause,
        places=found.places,
        unmatched=found.unmatched,
        ladder=found.ladder,
        notes=tuple(sorted(notes)),
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
            outputs=arguments["outputs"],
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
    if unknown := [dtype for dtype in arguments["dtypes"] or () if not isinstance(dtype, str)]:
        raise ValueError(f"dtypes: expected names such as 'bfloat16', got {unknown[0]!r:.80}; choose by name.")
    if not arguments["timeout_s"] > 0:
        raise ValueError(f"timeout_s: expected a number of seconds above 0, got {arguments['timeout_s']!r}.")
    seed = arguments["seed"]
    if isinstance(seed, bool) or not isinstance(seed, int | np.integer) or seed < 0:
        raise ValueError(f"seed: expected a non-negative integer, got {seed!r}.")
    if arguments["effort"] not in EFFORTS:
        raise ValueError(f"effort: expected one of {', '.join(EFFORTS)}, got {arguments['effort']!r}; choose one.")
    if not re.fullmatch(r"auto|cpu|cuda(:\d+)?", str(arguments["device"])):
        raise ValueError(f"device: expected cpu, cuda or auto, got {arguments['device']!r}; choose one of these.")
