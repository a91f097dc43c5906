"""Parity of any user's own pair of modules: one in torch, one in Flax or JAX."""

from parity_tests.pair.check import check_pair, run_pair
from parity_tests.pair.patterns import MappingError
from parity_tests.pair.proposal import Proposal, propose_mapping
from parity_tests.pair.report import PairReport

__all__ = ["MappingError", "PairReport", "Proposal", "check_pair", "propose_mapping", "run_pair"]
