"""What a reader must know of rows that hold: branches that no draw took, and formats wider than the one judged in."""

import dataclasses
from collections.abc import Iterable

from parity_tests.judge.casts import as_stored, format_name, is_inexact
from parity_tests.judge.dtypes import numpy_dtype
from parity_tests.judge.failures import first_line
from parity_tests.pair.legs import Pair, Values
from parity_tests.pair.report import PairRow
from parity_tests.pair.side import Arrays

_SIDE = {"torch": "torch", "jax": "flax"}
# What a side raises where it cannot be watched; it runs, as its results have shown.
_CANNOT = (NotImplementedError, RuntimeError, TypeError, ValueError)


class Remarks:
    """Collects the remarks on a pair's runs, and puts them on its rows.

    Args:
        pair: as judged.

    Attributes:
        notes: every remark once, for the report.
    """

    def __init__(self, pair: Pair) -> None:
        self._pair = pair
        self._branches: dict[str, tuple[str, ...]] = {}
        # By side and dtype, then by tensor: a format that is not the dtype's; and what works in wider ones.
        self._returned: dict[tuple[str, str], dict[str, str]] = {}
        self._wider: dict[tuple[str, str], str] = {}
        self.notes: dict[str, None] = {}

    def on_branches(self, values: Values) -> None:
        """Ask both sides which branches these values never took."""
        for key, side in self._pair.sides.items():
            try:
                found = side.unexercised(values.parameters[key], values.inputs[key])
            except _CANNOT as error:
                self.notes[f"the branches of the {_SIDE[key]} side were not watched: {first_line(error)}"] = None
                continue
            self._branches[key] = tuple(f"{_SIDE[key]}: {sentence}" for sentence in found)
            self.notes |= dict.fromkeys(self._branches[key])

    def on_formats(self, key: str, values: Values, *results: Arrays) -> None:
        """Look at the formats in which a side returned and computed.

        Args:
            key: the side.
            values: that it was given.
            results: its results, of every way in which it was run.
        """
        dtype = values.dtype
        stored = numpy_dtype(dtype)
        formats = {
            name: format_name(array.dtype)
            for found in results
            for name, array in found.items()
            # There are no complex numbers of 16-bit parts.
            if is_inexact(array) and format_name(array.dtype) != (format_name(as_stored(array, stored).dtype))
        }
        self._returned[key, dtype] = formats
        for name in sorted(set(formats.values())):
            tensors = [tensor for tensor, returned in formats.items() if returned == name]
            self.notes[f"{_SIDE[key]} returns {_listed(tensors)} in {name} where {dtype} is judged"] = None
        if dtype == "float64":
            return
        side = self._pair.sides[key]
        try:
            found = side.wider_operations(values.parameters[key], values.inputs[key], dtype)
        except _CANNOT as error:
            self.notes[f"the formats of the {_SIDE[key]} side were not watched: {first_line(error)}"] = None
            return
        if found:
            wider = f"{_SIDE[key]} computes in more than the {dtype} that is judged: {_listed(found)}"
            self._wider[key, dtype] = wider
            self.notes[wider] = None

    def added(self, row: PairRow) -> PairRow:
        """Return the row with what there is to say of it."""
        said = []
        for key in self._pair.sides:
            if row.framework not in (key, "torch+jax"):
                continue
            if row.rung == "forward":
                said += self._branches.get(key, ())
                said += filter(None, [self._wider.get((key, row.dtype))])
            if (returned := self._returned.get((key, row.dtype), {}).get(row.tensor)) and not row.mode:
                said.append(f"{_SIDE[key]} returns {row.tensor} in {returned} where {row.dtype} is judged")
        return dataclasses.replace(row, note="; ".join(said)) if said else row


def _listed(names: Iterable[str], most: int = 5) -> str:
    names = list(names)
    return ", ".join(names[:most]) + f" and {len(names) - most} more" * (len(names) > most)
