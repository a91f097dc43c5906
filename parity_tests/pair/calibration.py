"""Calibrated bounds: how far a correct evaluation may lie from its float64 truth, from a rounding-noise ensemble.

Every member of the ensemble evaluates the graph in float64 and lets each operation err at random, by `u xi` relative
to its result, u being the unit roundoff that the operation works with and xi a standard normal variable. A rounding
error is at most u, so that independent roundings of zero mean are sub-Gaussian with the very variance the ensemble
shows (Hoeffding), to first order in u. That is where the confidence comes from, not from the size of an observed error.

A sum of K products p in a random order has partial sums `E s_j^2 = (j/K)^2 s^2 + (j/K)(1 - j/K)(Q - s^2/K)`,
`Q = sum p^2`; each is rounded at u_acc, so that `Var = u_acc^2 (K s^2 / 3 + K Q / 6 + Q)`. The noise of an
operation that contracts or reduces has this variance beside that of rounding its output.

The same value is rounded the same way wherever it occurs: xi is a function of the value's bits, of the operation and of
the member, so that equal rows err coherently, as they do in a real run.

The exception is a compiler's: two products that cancel do so up to the rounding of one of them, anew in every kernel
that needs their difference (`frameworks.jax.ensemble`).

Infinities and NaN are not rounded. What is not finite in the truth has to be equal, place and sign included; where
rounding alone decides whether a number is finite, there is no bound.

A constant that was rounded before the graph was evaluated (a float32 table beside a computed one, `0.1` in a module
that is fixed to float32) errs in float64 too: by at most u, so that members that move it by u, up or down at random,
show the variance of the result exactly, to first order.

Sources: Higham and Mary (2019) for rounding errors as random variables; Smyth (2004), Linear models and empirical Bayes
methods, for variances moderated across elements.
"""

import math
import zlib
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

import numpy as np
from scipy import special

from parity_tests.judge.dtypes import FORMATS, from_parts, is_inexact, looks_rounded, parts
from parity_tests.judge.tolerance import FALSE_ALARM_RATE
from parity_tests.judge.variances import fit_prior
from parity_tests.pair.side import Arrays, Ensemble

MEMBERS = 16
# Runs with amplified noise find what linear scaling cannot: kinks (a relu's derivative) and vanishing first orders. An
# element d spreads away from its kink is crossed by the real run with probability Q(d), and missed by all runs of both
# kinds with ((1 - Q(d)) (1 - Q(d / 8)))^16: the product is at most 5e-6, near d = 2. On a smooth function their largest
# deviation is about 8 * 2.4 spreads, no more than twice what the confidence grants anyway.
KINK_AMPLITUDE = 8.0
KINK_MEMBERS = 16
# Of a batch of members that are run together.
BATCH_BYTES = 1 << 28
# The semantic leg: float64 rounds 2^-29 times as coarsely as float32.
SEMANTIC_SCALE = FORMATS["float64"].roundoff / FORMATS["float32"].roundoff


class Member(NamedTuple):
    """One run of an ensemble."""

    number: int  # what its noise is drawn from
    amplitude: float  # of the noise; 0 for none


def moderated_spread(spread: np.ndarray, members: int) -> tuple[np.ndarray, float]:
    """Shrink the elements' spreads towards the tensor's, so far as the tensor's elements are alike.

    A spread estimated from few runs may be small by luck. With prior degrees of freedom d0 and prior variance s0^2
    fitted to all elements, `s~^2 = (d0 s0^2 + m s^2) / (d0 + m)` has `d0 + m` degrees of freedom.

    Args:
        spread: estimates with `members` degrees of freedom each; zeros are exact and stay zero.
        members: m.

    Returns:
        The moderated spreads and their degrees of freedom.
    """
    positive = spread[(spread > 0) & np.isfinite(spread)]
    if positive.size < members:  # too few elements to say how alike they are
        return spread, float(members)
    variance, degrees = fit_prior(2 * np.log(positive), members)
    if math.isinf(degrees):
        # Elements that do not differ beyond chance share one variance: as many degrees of freedom as all of them have.
        degrees = float(members * positive.size)
        variance *= math.exp(float(special.digamma(degrees / 2)) - math.log(degrees / 2))
    moderated = np.sqrt((degrees * variance + members * spread**2) / (degrees + members))
    return np.where(spread > 0, moderated, 0.0), degrees + members


def confidence(elements: int, freedom: float) -> float:
    """Return Student's t quantile that any of `elements` exceeds with probability `FALSE_ALARM_RATE`, two-sided."""
    return -float(special.stdtrit(freedom, FALSE_ALARM_RATE / (2 * max(elements, 1))))


def calibrated_bound(
    truth: np.ndarray, spread: np.ndarray, kinks: np.ndarray, members: int, dtype: str, scale: float = 1.0
) -> np.ndarray:
    """Return the bound on `|value - truth|`, element by element; of complex numbers, part by part.

    `B = max(t s~, kink) + u |z| + eta` where anything moved at all, else 0: t is the confidence, kink the largest
    deviation under amplified noise, u and eta the rounding and underflow of the output. 0 where the truth is not
    finite; infinite, which is no bound, where a member of the ensemble is not and the truth is.

    Args:
        truth: z, in float64 or complex128.
        spread: see `Ensemble`.
        kinks: see `Ensemble`.
        members: behind `spread`.
        dtype: format that the value is stored in.
        scale: of the noise; `SEMANTIC_SCALE` turns fp32 noise into float64 noise, far too small to reach a kink.
    """
    semantic = scale == SEMANTIC_SCALE
    fmt = FORMATS["float64" if semantic else dtype]
    z, spread, kinks = parts(truth), parts(spread), parts(kinks)
    moderated, freedom = moderated_spread(spread, members)
    explained = scale * confidence(z.size, freedom) * moderated
    limit = explained if semantic else np.maximum(explained, kinks)
    limit = limit + fmt.roundoff * np.abs(z) + fmt.smallest_normal
    moved = np.isfinite(z) & ((spread > 0) | (kinks > 0))
    return from_parts(np.where(moved, limit, 0.0), truth)


def constants_bound(spread: np.ndarray, members: int) -> np.ndarray:
    """Return how far constants rounded beforehand may move a result; of complex numbers, part by part."""
    values = parts(spread)
    moderated, freedom = moderated_spread(values, members)
    return from_parts(confidence(values.size, freedom) * moderated, spread)


def moved_constant(array: np.ndarray, member: int, name: str) -> np.ndarray:
    """Move the numbers of a constant by the roundoff of its format, each up or down, equal ones alike.

    Args:
        array: float64 or complex128, as it is stored; numbers that were not rounded stay.
        member: number of the run; 0 moves nothing.
        name: of the format that rounded them; what no narrower format has rounded stays.
    """
    if member == 0 or name not in FORMATS or name == "float64":
        return array
    values = parts(array)
    distinct, where = np.unique(values, return_inverse=True)
    rng = np.random.default_rng([member, zlib.crc32(distinct.tobytes())])
    moved = FORMATS[name].roundoff * rng.choice([-1.0, 1.0], distinct.shape)
    step = np.where(looks_rounded(distinct, name), moved, 0.0)[where].reshape(values.shape)
    with np.errstate(invalid="ignore"):
        return from_parts(np.where(np.isfinite(values), values * (1.0 + step), values), array)


def was_rounded(array: np.ndarray, name: str) -> bool:
    """Tell whether a constant, as for `moved_constant`, holds numbers that its format has rounded."""
    return not np.array_equal(moved_constant(array, 1, name), array, equal_nan=True)


def collect_ensemble(
    run: Callable[[Sequence[Member]], Iterable[Arrays]],
    seed: int = 0,
    members: int = MEMBERS,
    kink_members: int = KINK_MEMBERS,
) -> Ensemble:
    """Run an ensemble and keep its statistics of the real and complex tensors, of these part by part.

    A deviation is infinite where a run is not finite and the centre is, or is not finite in another way.

    Args:
        run: returns the results of several members in turn.
        seed: of the noise.
        members: runs with amplitude 1.
        kink_members: runs with amplitude `KINK_AMPLITUDE`.
    """
    first = seed * (members + kink_members)
    amplitudes = [0.0, *[1.0] * members, *[KINK_AMPLITUDE] * kink_members]
    drawn = [Member(first + k, amplitude) for k, amplitude in enumerate(amplitudes)]
    found = iter(run(drawn))
    centre = {name: value.copy() for name, value in next(found).items() if is_inexact(value)}
    squares = {name: np.zeros(parts(value).shape) for name, value in centre.items()}
    kinks = {name: np.zeros(parts(value).shape) for name, value in centre.items()}
    for member in drawn[1:]:
        arrays = next(found)
        for name in centre:
            deviation = _deviation(arrays[name], centre[name])
            if member.amplitude == 1.0:
                deviation *= deviation
                squares[name] += deviation
            else:
                np.maximum(kinks[name], deviation, out=kinks[name])
        del arrays  # as large as all gradients, while the next member runs
    for name, total in squares.items():  # in place: each is as large as all gradients
        total /= members
        np.sqrt(total, out=total)
        squares[name], kinks[name] = from_parts(total, centre[name]), from_parts(kinks[name], centre[name])
    return Ensemble(centre, squares, kinks, members)


def constants_spread(run: Callable[[int], Arrays]) -> dict[str, np.ndarray]:
    """Return the root mean square of the deviations of `MEMBERS` runs with moved constants; of complex, by part."""
    return dict(collect_ensemble(lambda members: (run(member.number) for member in members), kink_members=0).spread)


def _deviation(value: np.ndarray, centre: np.ndarray) -> np.ndarray:
    value, centre = parts(value), parts(centre)
    same = (value == centre) | (np.isnan(value) & np.isnan(centre))
    with np.errstate(invalid="ignore", over="ignore"):
        difference = np.abs(value - centre)
    # Beyond the square root of the largest number its square, and so the spread, would be infinite anyway.
    return np.where(same, 0.0, np.where(difference < 1e154, difference, np.inf))
