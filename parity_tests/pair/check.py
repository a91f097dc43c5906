"""``check_pair``: are a torch module and a Flax module the same function, gradients included, up to rounding?"""

import inspect
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from parity_tests.harness.dtypes import numpy_dtype
from parity_tests.harness.failures import first_line
from parity_tests.pair.assembly import merged, prepared
from parity_tests.pair.causes import likely_cause
from parity_tests.pair.draws import Draw, InputSource
from parity_tests.pair.judge import Judge
from parity_tests.pair.legs import Pair
from parity_tests.pair.mapping import Rule
from parity_tests.pair.report import PairReport
from parity_tests.pair.reproduction import reproduction


def judge_pair(
    pair: Pair,
    seed: int = 0,
    dtypes: Sequence[str] = ("float32",),
    gradients: bool = True,
    semantic: bool = True,
    state: bool = True,
) -> PairReport:
    """Judges a pair whose sides are there already; see ``check_pair`` for the arguments."""
    if not dtypes:
        raise ValueError("dtypes: expected at least one, got none; nothing would be compared.")
    for dtype in dtypes:
        numpy_dtype(dtype)
    judge = Judge(pair, seed, gradients, semantic, state)
    rows = list(judge.rows(dtypes))
    held = tuple(f"{text} is held at zero" for text in pair.mapping.held_at_zero)
    return PairReport(
        name=pair.name,
        rows=rows,
        not_compared=(*_buffers_left_out(pair, state), *held),
        likely_cause=likely_cause(pair, judge.evidence, rows),
        notes=tuple(sorted(judge.notes)),
        random=bool(judge.evidence.random),
    )


def _buffers_left_out(pair: Pair, state: bool) -> Iterator[str]:
    """Names the buffers that are not compared, and says which of them a call updates."""
    changed = [
        f"{side} buffer {name}" for key, side in (("torch", "torch"), ("jax", "flax")) for name in pair.changed(key)
    ]
    unmapped = pair.mapping.not_compared
    for text in dict.fromkeys((*unmapped, *(() if state else changed))):
        yield f"{text}, which a call updates" if text in changed else text


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
    device: str = "cpu",
    name: str = "",
    pair: str | None = None,
    torch_python: str | None = None,
    jax_python: str | None = None,
) -> PairReport:
    """Checks that a torch module and a Flax module compute the same function.

    Parameters are drawn at random around their own scale and given to both sides, then compared on a ladder: weights
    bit for bit through both sides; outputs; gradients of every mapped parameter and every floating-point input for a
    random cotangent; buffers that a call updates. In float64 both sides must agree to float64's rounding (the semantic
    leg); in each dtype each side must lie within rounding of its own float64 truth, and the two of each other. The
    bounds come from rounding-noise ensembles (``pair.calibration``) and are labelled ``calibrated``. Integers, and what
    is not finite, must be equal. Complex numbers are judged part by part, and their gradients as torch has them,
    ``dL/dRe + i dL/dIm``. Without a float64 run or a finite bound a pair is undecided, and does not hold.

    Args:
        torch_module: an ``nn.Module``, in the mode (train or eval) it is to be judged in, or ``f(params, *inputs)``.
        flax_module: a linen module, an nnx module, or ``f(params, *inputs)``.
        params: ``(torch name, flax path, axis pattern)`` for every parameter, see ``mapping.ParameterMapping``;
            ``propose_mapping`` writes a first version.
        inputs: one entry an argument, a shape or an array, in the torch side's layout; or a function of a NumPy
            generator that returns the arrays.
        seed: of all that is drawn.
        dtypes: storage dtypes to judge in: ``float64``, ``float32``, ``bfloat16``, ``float16``.
        gradients: whether gradients are compared.
        semantic: False leaves the float64 comparison out, for a pair that is meant to differ by a rounded constant.
        state: whether mapped buffers that a call updates (running statistics, caches) are compared as they are after
            it; False for a pair that is not to be trained on, or to part there. Others are listed as not compared.
        torch_kwargs: keyword arguments of the torch call.
        flax_kwargs: keyword arguments of the flax call (``rngs`` and ``mutable`` as in linen's ``apply``).
        torch_params: initial parameters, for a torch function.
        flax_params: initial parameters, for a JAX function.
        input_patterns: by position, where the layouts differ: ``{0: "b c h w -> b h w c"}``.
        output_patterns: by output name (``y``, or ``y.0``, ...), likewise.
        draws: by torch name, ``(rng, shape) -> array`` for parameters with constraints of their own.
        device: ``cpu``, ``cuda``, or ``auto`` for a GPU if there is one.
        name: of the pair, in reports.
        pair: ``package.module:factory`` in place of the modules, see ``loading``;
            arguments given here win over the factory's, unless they are the defaults.
        torch_python: interpreter for the torch side, which then runs in its own process; needs ``pair``.
        jax_python: the same for the flax side.

    Returns:
        A report with ``ok``, ``rows``, ``assert_ok()``, ``to_json``, ``to_junit`` and ``to_html``. Every row says what
        reproduces it: a command, or for a pair of objects the call with that row's seed and dtype.

    Raises:
        MappingError: if the rules are not a bijection that fits both sides.
        ValueError: for other values that do not fit.
        TypeError: for modules or inputs of another kind.
    """
    given = dict(locals())
    given.pop("pair")
    arguments = given if pair is None else merged(pair, given, DEFAULT_ARGUMENTS)
    with prepared(arguments, pair) as sides_and_rules:
        report = judge_pair(
            sides_and_rules,
            seed=arguments["seed"],
            dtypes=arguments["dtypes"],
            gradients=arguments["gradients"],
            semantic=arguments["semantic"],
            state=arguments["state"],
        )
    return report.with_commands(reproduction(pair, given, arguments, DEFAULT_ARGUMENTS))


DEFAULT_ARGUMENTS = {
    name: parameter.default for name, parameter in inspect.signature(check_pair).parameters.items() if name != "pair"
}


def run_pair(spec: str, **overrides: Any) -> PairReport:
    """Checks the pair that ``package.module:factory`` describes.

    Args:
        spec: see ``loading``.
        overrides: arguments of ``check_pair`` that win over the factory's.

    Raises:
        ValueError: if the pair cannot be loaded or does not fit together; one sentence.
    """
    try:
        return check_pair(pair=spec, **overrides)
    except (ImportError, TypeError) as error:
        raise ValueError(f"pair: {spec} cannot be checked: {first_line(error)}") from error
