"""Which CUDA major versions the packages of an interpreter are built for; asked in the interpreter itself."""

from collections.abc import Iterable, Mapping
from importlib import metadata

# Both CUDA majors install files of the same names (nvidia/cudnn/lib/libcudnn.so.9 and others): the later one wins.
_CUDA_SUFFIXES: Mapping[str, tuple[str, ...]] = {"12": ("-cu12", "-cuda12-plugin"), "13": ("-cu13", "-cuda13-plugin")}


def cuda_packages(names: Iterable[str]) -> dict[str, list[str]]:
    """CUDA major version to the installed packages that are built for it.

    Args:
        names: names of installed distributions.
    """
    found: dict[str, list[str]] = {}
    for name in sorted({name.lower().replace("_", "-") for name in names}):
        for major, suffixes in _CUDA_SUFFIXES.items():
            if name.endswith(suffixes):
                found.setdefault(major, []).append(name)
    return found


def installed_distributions() -> list[str]:
    """Names of the distributions in this interpreter."""
    return [name for distribution in metadata.distributions() if (name := distribution.metadata["Name"])]
