"""Shared test set-up: run-time checking of shape annotations, and switches that must precede a framework's import."""

import os
import sys
from collections import Counter

# Before jax is imported: several frameworks share this process, none may take the device's whole memory.
os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")

import pytest
from hypothesis import HealthCheck, settings
from jaxtyping import install_import_hook

# How many examples hypothesis draws for each relation.
SEARCH_PROFILES = {"quick": 2, "thorough": 200}


# More are drawn in parts of as many, which can be run one by one.
DRAWN_CALLS_A_TEST = 200
EVERY_TEST = "EVERY_TEST" in os.environ


def load_search_profile(name):
    """Registers the profiles and loads one, before any test module draws from it."""
    if name not in SEARCH_PROFILES:
        raise pytest.UsageError(
            f"HYPOTHESIS_PROFILE: expected one of {', '.join(SEARCH_PROFILES)}, got {name!r}; set it to one of these."
        )
    # Compilation makes single examples slow.
    checks = [HealthCheck.too_slow, HealthCheck.function_scoped_fixture]
    for profile, examples in SEARCH_PROFILES.items():
        settings.register_profile(
            profile,
            max_examples=examples,
            # By default a failure that was seen once is seen again.
            derandomize=profile == "quick",
            deadline=None,
            suppress_health_check=checks,
            database=None,
        )
    settings.load_profile(name)


def pytest_runtest_setup(item):
    """Skip what PyTorch 2.9 lacks, and nothing else: the layer says there that it does."""
    functional = sys.modules.get("torch.nn.functional")
    if functional is None or hasattr(functional, "grouped_mm") or not item.path.name.startswith("test_torch_"):
        return
    if "grouped_matmul" in item.name or item.get_closest_marker("grouped_mm"):
        pytest.skip("this PyTorch has no torch.nn.functional.grouped_mm")


def pytest_addoption(parser):
    parser.addoption(
        "--no-shape-checks",
        action="store_true",
        help="do not check the implementations' shape annotations at run time (torch.compile cannot trace the checks)",
    )
    parser.addoption(
        "--pair-seeds",
        type=int,
        default=2 if EVERY_TEST else 1,
        help="in how many seeds each correct example pair must be accepted",
    )
    parser.addoption(
        "--pair-families",
        action="store_true",
        help="judge every family of pairs, not only a sample",
    )
    parser.addoption(
        "--drawn-calls",
        type=int,
        default=DRAWN_CALLS_A_TEST if EVERY_TEST else DRAWN_CALLS_A_TEST // 2,
        help="how many calls of each tree are drawn, right and wrong ones",
    )


def pytest_generate_tests(metafunc):
    if "drawn_calls" in metafunc.fixturenames:
        count = metafunc.config.getoption("--drawn-calls")
        parts = [range(k, min(k + DRAWN_CALLS_A_TEST, count)) for k in range(0, count, DRAWN_CALLS_A_TEST)]
        metafunc.parametrize("drawn_calls", parts, ids=[f"from {part.start}" for part in parts])


def pytest_configure(config):
    if config.getoption("--drawn-calls") < 1:
        raise pytest.UsageError(f"--drawn-calls: expected at least 1, got {config.getoption('--drawn-calls')}.")
    load_search_profile(os.environ.get("HYPOTHESIS_PROFILE", "quick"))
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


@pytest.fixture
def fresh_programs():
    """Calls that nobody jits are compiled by the rules of this test, and no other test runs their programs."""
    if "jax" not in sys.modules:
        yield
        return
    from jax_impl import functional

    functional._compiled.clear_cache()
    yield
    functional._compiled.clear_cache()


def pytest_collection_modifyitems(config, items):
    if not EVERY_TEST:
        skip, seen = pytest.mark.skip(reason="another one is of this kind: run with EVERY_TEST=1"), Counter()
        for item in items:
            sample = item.get_closest_marker("sample")
            if item.get_closest_marker("every") or (sample and seen[item.parent, item.originalname] % sample.args[0]):
                item.add_marker(skip)
            seen[item.parent, item.originalname] += 1
    if config.getoption("--no-shape-checks"):
        return
    skip = pytest.mark.skip(
        reason="traced code cannot carry the shape-check hook: run with --no-shape-checks -m compile"
    )
    for item in items:
        if item.get_closest_marker("compile"):
            item.add_marker(skip)
