"""Shared test set-up: run-time checking of shape annotations, and switches that must precede a framework's import."""

import os
import sys

# Before jax is imported: several frameworks share this process, none may take the device's whole memory.
os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")

import pytest
from jaxtyping import install_import_hook


def pytest_addoption(parser):
    parser.addoption(
        "--no-shape-checks",
        action="store_true",
        help="do not check the implementations' shape annotations at run time (torch.compile cannot trace the checks)",
    )
    parser.addoption(
        "--pair-seeds",
        type=int,
        default=2,
        help="in how many seeds each correct example pair must be accepted",
    )


def pytest_configure(config):
    if config.getoption("--no-shape-checks"):
        return
    packages = ["torch_impl.implementations", "jax_impl.implementations"]
    loaded = [name for name in packages if name in sys.modules]
    if loaded:
        raise pytest.UsageError(f"{loaded} were imported before the shape-check hook")
    install_import_hook(packages, "beartype.beartype").__enter__()


@pytest.fixture
def quick_compilation():
    """JAX leaves LLVM's optimisations out, which are most of a small program's compilation.

    XLA's own passes, where wrong arithmetic has come from, are the same. The smoke cases, the findings and every
    command are compiled in full.
    """
    if "jax" not in sys.modules:
        yield
        return
    import jax

    before = jax.config.read("jax_disable_most_optimizations")
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", before)


def pytest_collection_modifyitems(config, items):
    if config.getoption("--no-shape-checks"):
        return
    skip = pytest.mark.skip(
        reason="traced code cannot carry the shape-check hook: run with --no-shape-checks -m compile"
    )
    for item in items:
        if item.get_closest_marker("compile"):
            item.add_marker(skip)
