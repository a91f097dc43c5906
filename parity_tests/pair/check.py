"""`check_pair`: are a torch module and a Flax module the same function, gradients included, up to rounding?"""

import dataclasses
import inspect
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from parity_tests.causes.pair import likely_cause
from parity_tests.interpreters.interpreter import DEFAULT_TIMEOUT_S
from parity_tests.judge.dtypes import numpy_dtype
from parity_tests.pair.assembly import Tell, merged, prepared, tell_nobody
from parity_tests.pair.draws import Draw, InputSource, Scale
from parity_tests.pair.judge import Judge
from parity_tests.pair.legs import Pair
from parity_tests.pair.mapping import SIDES, Rule
from parity_tests.pair.report import PairReport, PairRow
from parity_tests.pair.reproduction import reproduction
from parity_tests.report.text import first_line


def judge_pair(
    pair: Pair,
    seed: int = 0,
    dtypes: Sequence[str] = ("float32",),
    gradients: bool = True,
    semantic: bool = True,
    state: bool = True,
    tell: Tell = tell_nobody,
) -> PairReport:
    """Judges a pair whose sides are there already; see `check_pair` for the arguments; `tell` is told every row."""
    if not dtypes:
        raise ValueError("dtypes: expected at least one, got none; nothing would be compared.")
    for dtype in dtypes:
        numpy_dtype(dtype)
    judge = Judge(pair, seed, gradients, semantic, state)
    rows = []
    for row in judge.rows(dtypes):
        rows.append(_explained(pair, row))
        tell(rows[-1])
    if any(row.status == "mismatch" for row in rows):
        tell("looking for the cause")
    return PairReport(
        name=pair.name,
        rows=rows,
        not_compared=tuple(_left_out(pair, judge, gradients, state)),
        likely_cause=likely_cause(pair, judge.evidence, rows),
        notes=tuple(sorted({*judge.notes, *pair.notes, *judge.remarks.notes})),
        random=bool(judge.evidence.random),
    )


def _explained(pair: Pair, row: PairRow) -> PairRow:
    """Adds to a gradient's mismatch that the parameter is frozen on one side, which is all there is to say about it."""
    name = row.tensor.removeprefix("d_")
    if row.status != "mismatch" or row.rung != "gradients" or name not in pair.mapping.half_trained:
        return row
    kind = pair.specs["torch"][name].kind
    return dataclasses.replace(
        row, reason=f"{row.reason}; {name} is {kind} on the torch side, and the flax side trains it"
    )


def _left_out(pair: Pair, judge: Judge, gradients: bool, state: bool) -> Iterator[str]:
    """Names what is not compared, and says which buffers a call updates."""
    mapping, covers = pair.mapping, pair.left_out.covers
    changed = {side: pair.changed(key) for key, side in (("torch", "torch"), ("jax", "flax"))}
    names = {side: dict.fromkeys((*mapping.unmapped[side], *(() if state else changed[side]))) for side in SIDES}
    for side, key in zip(SIDES, ("torch", "jax"), strict=True):
        for name in names[side]:
            kind = "frozen parameter" if pair.specs[key][name].frozen else "buffer"
            updates = ", which a call updates" if name in changed[side] else ""
            consent = ", left out by not_compared=" if name in mapping.unmapped[side] and covers(name) else ""
            constant = ", a constant whose own values results depend on" if (side, name) in pair.tables else ""
            yield f"{side} {kind} {name}{updates}{constant}{consent}"
    yield from (f"{text} is held at zero" for text in mapping.held_at_zero)
    yield from (f"{text} keeps its own values" for text in mapping.kept)
    if gradients:
        untrained = [name for name in mapping.torch_names if name in {*mapping.untrained, *judge.untrained}]
        if untrained:
            yield f"the gradients of {', '.join(untrained)}, which neither side trains"
        trained = [name for name in mapping.trained if name not in untrained and covers(f"d_{name}")]
        yield from (f"the gradient of {name}, left out by not_compared=" for name in trained)
        positions = range(len(pair.shapes))
        yield from (f"the gradient of input{k}, left out by not_compared=" for k in positions if covers(f"d_input{k}"))


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
    """Checks that a torch module and a Flax module compute the same function.

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
    return _checked(given.pop("pair"), given, tell_nobody)


def _checked(spec: str | None, given: Mapping[str, Any], tell: Tell) -> PairReport:
    """Checks a pair; `tell` is called with what happens next, and with every row once it is known."""
    arguments = dict(given) if spec is None else merged(spec, given, DEFAULT_ARGUMENTS, tell)
    command = reproduction(spec, given, arguments, DEFAULT_ARGUMENTS)

    def tell_with_command(found: Any) -> None:
        tell(dataclasses.replace(found, command=command(found)) if isinstance(found, PairRow) else found)

    with prepared(arguments, spec, tell) as sides_and_rules:
        report = judge_pair(
            sides_and_rules,
            seed=arguments["seed"],
            dtypes=arguments["dtypes"],
            gradients=arguments["gradients"],
            semantic=arguments["semantic"],
            state=arguments["state"],
            tell=tell_with_command,
        )
    return report.with_commands(command)


DEFAULT_ARGUMENTS = {
    name: parameter.default for name, parameter in inspect.signature(check_pair).parameters.items() if name != "pair"
}


def run_pair(spec: str, tell: Tell = tell_nobody, **overrides: Any) -> PairReport:
    """Checks the pair that `package.module:factory` describes, in this process.

    Args:
        spec: see `loading`.
        tell: is called with what happens next, a text, and with every row once it is known.
        overrides: arguments of `check_pair` that win over the factory's.

    Raises:
        ValueError: if the pair cannot be loaded or does not fit together; one sentence.
    """
    if unknown := sorted(set(overrides) - set(DEFAULT_ARGUMENTS)):
        raise ValueError(f"pair: expected arguments of check_pair, got {', '.join(unknown)}; leave these out.")
    try:
        return _checked(spec, DEFAULT_ARGUMENTS | overrides, tell)
    except (ImportError, TypeError) as error:
        raise ValueError(f"pair: {spec} cannot be checked: {first_line(error)}") from error
