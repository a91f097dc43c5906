"""JAX's persistent compilation cache, in a folder."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from types import MappingProxyType
from typing import Any

import jax
from jax.experimental.compilation_cache import compilation_cache

_FOLDER = "jax_compilation_cache_dir"
# However quickly it was compiled and however small it is; and without caches of XLA's own, whose options would make the
# program another one than the user's.
_EVERYTHING: Mapping[str, Any] = MappingProxyType(
    {
        "jax_enable_compilation_cache": True,
        "jax_persistent_cache_min_compile_time_secs": 0.0,
        "jax_persistent_cache_min_entry_size_bytes": -1,
        "jax_persistent_cache_enable_xla_caches": "none",
    }
)


@contextmanager
def kept_in(folder: str) -> Iterator[None]:
    """Keeps what is compiled in a folder, and takes it from there; the user's own cache is put back afterwards.

    Args:
        folder: an existing folder; an empty one makes the compilation a cold one.
    """
    wanted = {**_EVERYTHING, _FOLDER: folder}
    before = {name: getattr(jax.config, name) for name in wanted}
    _configure(wanted)
    try:
        yield
    finally:
        _configure(before)


def _configure(values: Mapping[str, Any]) -> None:
    for name, value in values.items():
        jax.config.update(name, value)
    # JAX decides once whether it uses a cache, and which.
    compilation_cache.reset_cache()
