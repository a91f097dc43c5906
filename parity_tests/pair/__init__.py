"""Parity of any user's own pair of modules: one in torch, one in Flax or JAX."""

from parity_tests.pair.check import check_pair
from parity_tests.pair.patterns import MappingError
from parity_tests.pair.report import PairReport

__all__ = ["MappingError", "PairReport", "check_pair"]
