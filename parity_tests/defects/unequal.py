"""Plant defects in subjects of partitions of unequal sizes: offsets, the order of the buckets, padding."""

import dataclasses

import numpy as np

from parity_tests.causes.unequal import exchanged, packed
from parity_tests.defects.subject import Defect, Outputs, Spoil
from parity_tests.judge.inputs import Case, Inputs
from parity_tests.judge.subjects import Subject

# Buckets interleave, and two of them have outputs of one size, so that exchanging these still fits.
UNEQUAL_CASE = Case("unequal defects", (64,), 7, (4, 9, 4, 1, 9, 4, 1), (3, 5, 3, 5, 5, 3, 5))
PLANTED_UNEQUAL = ("bucketed_matmul", "padded_matmul")
_SWAPPED = ((9, 5), (1, 5))


def _rolled_input(name: str) -> Spoil:
    def spoil(subject: Subject, inputs: Inputs) -> Outputs:
        return subject.vjp(dataclasses.replace(inputs, **{name: np.roll(getattr(inputs, name), -1, axis=-1)}))

    return spoil


def _rolled_output(subject: Subject, inputs: Inputs) -> Outputs:
    outputs = subject.vjp(inputs)
    return outputs | {"y": np.roll(outputs["y"], 1, axis=-1)}


def _other_order(subject: Subject, inputs: Inputs) -> Outputs:
    assert inputs.sizes is not None  # the case has unequal sizes
    return subject.vjp(dataclasses.replace(inputs, weight=packed(inputs, reversed(inputs.sizes.buckets))))


def _swapped(name: str) -> Spoil:
    def spoil(subject: Subject, inputs: Inputs) -> Outputs:
        assert inputs.sizes is not None  # the case has unequal sizes
        first, second = (inputs.sizes.buckets[size] for size in _SWAPPED)
        outputs = subject.vjp(inputs)
        return outputs | {name: exchanged(outputs[name], inputs.sizes.places(name), first, second)}

    return spoil


def _padded(subject: Subject, inputs: Inputs, factor: float) -> Outputs:
    """Add to each y what the features behind its own give, as padding that holds them would."""
    assert inputs.sizes is not None  # the case has unequal sizes
    outputs, x = subject.vjp(inputs), inputs.x.astype(np.float64)
    y = outputs["y"].astype(np.float64)
    for reads, writes in zip(inputs.sizes.places("x")[:-1], inputs.sizes.places("y"), strict=False):
        y[..., writes] += factor * x[..., reads.stop, None]
    return outputs | {"y": y.astype(outputs["y"].dtype)}


def _padded_gradient(subject: Subject, inputs: Inputs) -> Outputs:
    """Add to each partition's first gradient what its padding received."""
    assert inputs.sizes is not None  # the case has unequal sizes
    outputs = subject.vjp(inputs)
    dweight, padding = outputs["dweight"].copy(), inputs.cotangent.astype(np.float64).sum()
    for place in inputs.sizes.places("dweight")[1:]:
        dweight[place.start] += np.asarray(padding, dweight.dtype)
    return outputs | {"dweight": dweight}


UNEQUAL_DEFECTS: tuple[Defect, ...] = tuple(
    dataclasses.replace(defect, case=UNEQUAL_CASE)
    for defect in (
        Defect("x read at an offset off by one", _rolled_input("x"), "read x at offsets that are one too high"),
        Defect(
            "packed weight read at an offset off by one",
            _rolled_input("weight"),
            "the packed weight is read at offsets that are one too high",
        ),
        Defect(
            "packed bias read at an offset off by one",
            _rolled_input("bias"),
            "the packed bias is read at offsets that are one too high",
        ),
        Defect("y written at an offset off by one", _rolled_output, "y is written at offsets that are one too high"),
        Defect(
            "buckets of the packed weight in another order",
            _other_order,
            "the buckets of the packed weight are in reversed order",
        ),
        Defect("two buckets swapped in y", _swapped("y"), "the buckets 9->5 and 1->5 are swapped in y"),
        Defect("two buckets swapped in db", _swapped("dbias"), "the buckets 9->5 and 1->5 are swapped in dbias"),
        Defect("a padded entry leaks", lambda subject, inputs: _padded(subject, inputs, 0.01), "partitions"),
        Defect(
            "a padded entry leaks NaN",
            lambda subject, inputs: _padded(subject, inputs, 0.0),
            "NaN of one partition reaches others",
            isolation=True,
        ),
        Defect("the gradient of padding is kept", _padded_gradient, "partitions"),
    )
)
