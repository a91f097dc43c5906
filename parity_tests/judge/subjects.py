"""Define subjects and the modes they run in, and load them without importing a framework that was not asked for.

A mode says how a call is run (operation by operation, compiled, mapped, cast, spread over devices), never which
formulation it runs. `modes.py` of each framework does what is declared here.
"""

import dataclasses
import importlib
import importlib.util
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Protocol

import numpy as np

from parity_tests.judge.dtypes import STORAGE_DTYPES, numpy_dtype
from parity_tests.judge.inputs import CASE_SETS, Case, Inputs
from parity_tests.judge.tolerance import PRECISION_OF_DTYPE, Arithmetic, declared_arithmetic

FRAMEWORKS: tuple[str, ...] = ("torch", "jax")
EQUAL, UNEQUAL = "equal", "unequal"
SHARDS = 8


# --- modes ---


@dataclass(frozen=True)
class Mode:
    """One way to run a call."""

    name: str  # short and unique
    frameworks: tuple[str, ...]  # that have it
    sentence: str  # one line for help and reports
    # The set of cases that it runs under `--cases full` where it is not its framework's default; a mode that was asked
    # for by name runs the set that was asked for
    cases: str = "default"
    dtypes: tuple[str, ...] = STORAGE_DTYPES  # storage dtypes for which it is another program than the default
    # Format that operands, bias and cotangent are cast to first, or None to compute as stored
    computes_in: str | None = None


_TABLE = (
    Mode("eager", ("torch", "jax"), "operation by operation, without a compiler", "smoke"),
    Mode("jit", ("jax",), "one program by jax.jit"),
    Mode("compile", ("torch",), "one program by torch.compile and Inductor", "smoke"),
    Mode("vmap", ("torch", "jax"), "an ensemble of layers, mapped by torch.func.vmap or jax.vmap"),
    Mode("autocast", ("torch",), "torch.autocast to bfloat16", dtypes=("float32",), computes_in="bfloat16"),
    Mode(
        "policy",
        ("jax",),
        "Flax's dtype policy dtype=bfloat16, param_dtype=float32",
        dtypes=("float32",),
        computes_in="bfloat16",
    ),
    Mode("sharded", ("torch", "jax"), f"partitions divided over up to {SHARDS} processes or devices"),
)
MODES: Mapping[str, Mode] = MappingProxyType({mode.name: mode for mode in _TABLE})
DEFAULT_MODES: Mapping[str, str] = MappingProxyType({"torch": "eager", "jax": "jit"})
# Modes of torch and JAX that are compared with each other.
COUNTERPARTS: tuple[tuple[str, str], ...] = (
    ("eager", "jit"),
    ("compile", "jit"),
    ("vmap", "vmap"),
    ("autocast", "policy"),
    ("sharded", "sharded"),
)


def modes_of(framework: str) -> tuple[str, ...]:
    """Name of a framework's modes, in the table's order."""
    return tuple(mode.name for mode in _TABLE if framework in mode.frameworks)


def arithmetic_of(mode: str, dtype: str, representable: bool = False, precision: str | None = None) -> Arithmetic:
    """Return the arithmetic that a subject in this mode may use.

    Where the mode casts, the operands are rounded on their way in, sums are kept in fp32, and the gradients, rounded to
    the cast's format, are handed out in the storage dtype.

    Args:
        mode: a name of `MODES`.
        dtype: storage dtype of the inputs.
        representable: the inputs come from `as_cast`, so that the cast rounds nothing.
        precision: `tf32` in place of fp32's own; other dtypes keep their promise.
    """
    cast = MODES[mode].computes_in
    if cast is None:
        return declared_arithmetic((dtype == "float32" and precision) or PRECISION_OF_DTYPE[dtype])
    promised = declared_arithmetic(PRECISION_OF_DTYPE[cast])
    return dataclasses.replace(promised, casts=not representable, gradients_in=dtype)


def as_cast(mode: str, inputs: Inputs) -> Inputs | None:
    """Return the inputs rounded to the dtype that the mode casts to, in the storage dtype; None where it casts nothing.

    Rounding the operands may move a sum as much as keeping it in 16 bits would. On numbers that the cast leaves alone
    only the sum is left to judge, and a compiler that drops the cast changes nothing.
    """
    cast = MODES[mode].computes_in
    if cast is None:
        return None
    return inputs.changed(lambda array, axis: array.astype(numpy_dtype(cast)).astype(array.dtype))


def covered(framework: str, mode: str, case: Case) -> bool:
    """Return True if `--cases full` runs this case in this mode."""
    return mode == DEFAULT_MODES[framework] or case in CASE_SETS[MODES[mode].cases]


def shards_of(num_partitions: int) -> int:
    """Return the number of devices for n partitions: the largest divisor of n up to `SHARDS`."""
    return max(size for size in range(1, SHARDS + 1) if num_partitions % size == 0)


def members_of(num_partitions: int) -> int:
    """Return the number of layers in an ensemble with n partitions in all: the smallest divisor of n beyond 1."""
    return next((size for size in range(2, num_partitions + 1) if num_partitions % size == 0), 1)


def split_members(inputs: Inputs) -> Sequence[Inputs]:
    """Split inputs among the members of an ensemble: E layers with n/E partitions are one map with n."""
    n = inputs.num_partitions
    size = n // members_of(n)
    return [inputs.partitions(range(start, start + size)) for start in range(0, n, size)]


# --- subjects ---


class Subject(Protocol):
    """One implementation in one framework.

    Attributes:
        framework: `torch` or `jax`.
        implementation: a name of the framework's table, or the name of a layer class's subject.
        mode: the way in which calls are run, a name of `MODES`.
        isolates_partitions: True if a NaN in one partition leaves the others untouched.
    """

    @property
    def framework(self) -> str: ...  # noqa: D102

    @property
    def implementation(self) -> str: ...  # noqa: D102

    @property
    def mode(self) -> str: ...  # noqa: D102

    @property
    def isolates_partitions(self) -> bool: ...  # noqa: D102

    def unsupported_reason(self, case: Case, dtype: str) -> str | None:
        """Return one sentence if this subject cannot run the case in this dtype, else None."""
        ...

    def forward(self, inputs: Inputs) -> np.ndarray:
        """Return y, in the storage dtype or the one that the mode computes in."""
        ...

    def vjp(self, inputs: Inputs) -> dict[str, np.ndarray]:
        """Return `y`, `dx`, `dweight` and, with a bias, `dbias`, in the storage dtype."""
        ...


def sizes_of(subject: Subject) -> str:
    """Return `UNEQUAL` for a subject of unequal partitions, else `EQUAL`; most subjects need not say it."""
    return getattr(subject, "sizes", EQUAL)


def sizes_reason(mode: str, sizes: str) -> str | None:
    """Return one sentence if a mode divides partitions, which takes those of one size, else None."""
    if sizes == EQUAL or mode not in ("vmap", "sharded"):
        return None
    return f"mode {mode}: expected partitions of one size, which it divides, got unequal ones; it has no such call."


def takes(subject: Subject, case: Case) -> bool:
    """Return True if the subject is one for the sizes of a case, equal or unequal: the same name is two subjects."""
    return sizes_of(subject) == (EQUAL if case.sizes is None else UNEQUAL)


def framework_available(framework: str) -> bool:
    """Return True if the framework can be imported here, without importing it."""
    packages = {"torch": ("torch",), "jax": ("jax", "flax")}[framework]
    return all(package_available(package) for package in packages)


def package_available(name: str) -> bool:
    """Return True if a package can be found here, without importing it."""
    try:
        return importlib.util.find_spec(name) is not None
    except (ImportError, ValueError):  # an import hook that forbids it, or a stand-in that says nothing about itself
        return False


def check_precision(precision: str | None, has_tf32: bool) -> None:
    """Refuse TF32 where there is none: a bound for it would only be too wide.

    Raises:
        ValueError: in one sentence.
    """
    if precision == "tf32" and not has_tf32:
        raise ValueError(
            "precision: expected ieee_fp32 on a CPU, which has no TF32 arithmetic, got 'tf32'; leave it out, or use "
            "--device cuda where there is a GPU."
        )


def load_subjects(
    framework: str,
    device: str = "auto",
    modes: Sequence[str] = (),
    precision: str | None = None,
    sizes: str = EQUAL,
) -> Sequence[Subject]:
    """Import a framework and return all its subjects.

    Args:
        framework: `torch` or `jax`.
        device: `auto` (a GPU if there is one), `cpu` or `cuda`.
        modes: of the framework, see `modes_of`; none for its default.
        precision: `tf32` to let products of fp32 arrays round their operands to TF32; None for fp32's own.
        sizes: `EQUAL` for partitions of one size, `UNEQUAL` for partitions whose sizes are sequences.

    Raises:
        ValueError: for another framework, a device that is not there, or TF32 on a CPU.
        ImportError: if the framework is not installed.
    """
    if framework not in FRAMEWORKS:
        raise ValueError(f"framework: expected one of {', '.join(FRAMEWORKS)}, got {framework!r}; choose one of these.")
    room = importlib.import_module(f"parity_tests.frameworks.{framework}.subjects")
    return room.subjects(device, modes, precision, sizes)


def absent_reasons(framework: str, device: str) -> Mapping[str, str]:
    """Return the implementations of a framework that its subjects on a device lack, each with what it needs."""
    room = importlib.import_module(f"parity_tests.frameworks.{framework}.subjects")
    # All of JAX's run everywhere.
    return room.absent(device) if hasattr(room, "absent") else {}


def release_programs() -> None:
    """Drop the compiled programs of the frameworks that were loaded.

    JAX keeps every program, and a program for a CPU takes memory maps, one or more for each of its products: after some
    hundred cells a process would have as many as Linux allows (65530) and crash.
    """
    for framework in FRAMEWORKS:
        module = sys.modules.get(f"parity_tests.frameworks.{framework}.subjects")
        if module is not None:
            module.release_programs()
