"""Inductor's and Triton's caches, in a folder. Imports Inductor, which takes seconds: only where something compiles."""

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from torch._inductor.utils import clear_caches


@contextmanager
def kept_in(folder: str) -> Iterator[None]:
    """Keeps what is compiled in a folder, and takes it from there; nothing is taken from the process's own memory.

    Args:
        folder: an existing folder; an empty one makes the compilation a cold one.
    """
    wanted = {"TORCHINDUCTOR_CACHE_DIR": folder, "TRITON_CACHE_DIR": os.path.join(folder, "triton")}
    before = {name: os.environ.get(name) for name in wanted}
    # Modules that were loaded stay loaded for whoever holds them.
    clear_caches()
    _set_variables(wanted)
    try:
        yield
    finally:
        _set_variables(before)
        clear_caches()


def _set_variables(values: Mapping[str, str | None]) -> None:
    for name, value in values.items():
        if value is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = value
