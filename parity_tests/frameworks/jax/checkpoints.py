"""Orbax checkpoints: their arrays by name, one at a time, and a tree of arrays as a new checkpoint."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np

from parity_tests.frameworks.jax.modules import named_arrays


def _orbax() -> Any:
    try:
        import orbax.checkpoint

        return orbax.checkpoint
    except ModuleNotFoundError as error:
        raise ValueError(f"orbax: expected the package orbax-checkpoint, got none ({error}); install it.") from None


def opened(path: Path) -> tuple[dict[str, tuple[tuple[int, ...], np.dtype]], Callable[[str], np.ndarray]]:
    """Return shapes and formats of a checkpoint's arrays by name, and a function that reads one of them.

    Raises:
        ValueError: if it is no checkpoint, or orbax is not installed.
    """
    ocp = _orbax()
    folder = next((found for found in (path / "default", path) if (found / "_METADATA").exists()), path)
    handler = ocp.PyTreeCheckpointHandler()
    try:
        tree = handler.metadata(folder.resolve()).tree
    except Exception as error:
        raise ValueError(f"source: expected an orbax checkpoint, got {path} ({type(error).__name__}).") from None
    leaves, structure = jax.tree.flatten(tree)
    outline = jax.tree.unflatten(structure, [jax.ShapeDtypeStruct(leaf.shape, leaf.dtype) for leaf in leaves])
    named, filled = named_arrays(outline)
    how = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), outline)

    def load(name: str) -> np.ndarray:
        one = filled({name: np.zeros((), named[name].dtype)})
        item = jax.tree.map(lambda leaf: leaf if isinstance(leaf, np.ndarray) else ocp.PLACEHOLDER, one)
        found = handler.restore(folder.resolve(), args=ocp.args.PyTreeRestore(item=item, restore_args=how))
        return next(np.asarray(leaf) for leaf in jax.tree.leaves(found) if isinstance(leaf, np.ndarray))

    return {name: (tuple(leaf.shape), np.dtype(leaf.dtype)) for name, leaf in named.items()}, load


def save(path: str | Path, tree: Any) -> None:
    """Write a tree of arrays to a new folder.

    Raises:
        ValueError: if orbax is not installed, or the folder is there already.
    """
    if Path(path).exists():
        raise ValueError(f"out: expected a new folder, got {str(path)!r}, which exists; choose another name.")
    with _orbax().StandardCheckpointer() as checkpointer:
        checkpointer.save(Path(path).resolve(), tree)
