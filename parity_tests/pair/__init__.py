"""Parity of any user's own pair of modules: one in torch, one in Flax or JAX."""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from parity_tests.pair.check import check_pair, run_pair
    from parity_tests.pair.conversion import convert
    from parity_tests.pair.patterns import MappingError
    from parity_tests.pair.proposal import Proposal, propose_mapping
    from parity_tests.pair.report import PairReport

__all__ = ["MappingError", "PairReport", "Proposal", "check_pair", "convert", "propose_mapping", "run_pair"]

_HOMES = {
    "MappingError": "patterns",
    "PairReport": "report",
    "Proposal": "proposal",
    "check_pair": "check",
    "convert": "conversion",
    "propose_mapping": "proposal",
    "run_pair": "check",
}


def __getattr__(name: str) -> Any:
    # On first use: pytest imports the plugin below this package in every test run of an environment, which must neither
    # pay for scipy nor need it.
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    try:
        return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
    except ModuleNotFoundError as error:
        if error.name not in ("einops", "scipy"):
            raise
        raise ModuleNotFoundError(
            f"{name}: expected einops and scipy, got no {error.name}; install the extra: "
            "pip install 'partitioned-linear[pair]'.",
            name=error.name,
        ) from None
