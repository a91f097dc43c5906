"""Which competitors need a package that neither the framework nor this project brings. Imports none of them."""

from collections.abc import Iterable, Mapping
from importlib.util import find_spec
from types import MappingProxyType

PACKAGES: Mapping[str, str] = MappingProxyType(
    {
        "stock:einops.EinMix": "einops",
        "stock:equinox.filter_vmap": "equinox",
        "stock:keras.EinsumDense": "keras",
    }
)


def missing_competitors(names: Iterable[str]) -> dict[str, str]:
    """Competitor to the reason why it cannot be run in this interpreter; empty where every package is installed.

    Args:
        names: the competitors that a framework knows.
    """
    return {
        name: f"{package} is not installed; install the extra `competitors`"
        for name in names
        if (package := PACKAGES.get(name)) is not None and find_spec(package) is None
    }
