"""The shapes that are timed: the catalogue by name, and every point of a sweep by its name."""

from collections.abc import Mapping
from difflib import get_close_matches
from types import MappingProxyType

from bench.plan.catalogue import catalogue
from bench.plan.shapes import LAYOUTS, Workload
from bench.plan.sweeps import parse_sweep, sweep

__all__ = ["LAYOUTS", "WORKLOADS", "UnknownWorkloadError", "Workload", "sweep", "workload"]

WORKLOADS: Mapping[str, Workload] = MappingProxyType({found.name: found for found in catalogue()})


class UnknownWorkloadError(ValueError):
    """A name that is neither in the catalogue nor a point of a sweep."""


def workload(name: str) -> Workload:
    """The workload that a name means.

    Args:
        name: a name of the catalogue, or `sweep-b<B>-n<n>-i<in>-o<out>`.

    Raises:
        UnknownWorkloadError: with the names that look alike.
    """
    found = WORKLOADS.get(name) or parse_sweep(name)
    if found is None:
        close = get_close_matches(name, WORKLOADS, n=3, cutoff=0.5)
        alike = f"perhaps {' or '.join(close)}; " if close else ""
        raise UnknownWorkloadError(
            f"expected a name of the catalogue or sweep-b<B>-n<n>-i<in>-o<out>, got {name!r}; {alike}see `bench list`."
        )
    return found
