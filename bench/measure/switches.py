"""Switches and packages of a worker's interpreter that change what it runs.

A switch that falsifies a mode or a precision (`jit` that is not compiled, IEEE fp32 that is TF32), or that makes every
call wait, is unset in the workers, with a note. A switch that a user may want measured stays, with a note. Both are in
the environment's fingerprint. Imports no framework.
"""

import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib import metadata
from importlib.util import find_spec
from types import MappingProxyType

# How the frameworks spell "off"; a switch that is set to it changes nothing.
_OFF = ("", "0", "false", "off", "no", "n", "f")


@dataclass(frozen=True)
class Switch:
    """The effect of a variable that is set."""

    frameworks: tuple[str, ...]  # whose workers read it
    effect: str  # the end of a sentence that begins with its name
    off_is_harmless: bool = True  # true if a value such as `0` is the framework's default


_TORCH, _JAX, _BOTH = ("torch",), ("jax",), ("torch", "jax")

# Unset in the workers.
UNSET: Mapping[str, Switch] = MappingProxyType(
    {
        "JAX_DISABLE_JIT": Switch(_JAX, "runs what is called `jit` without compiling it"),
        "TORCHDYNAMO_DISABLE": Switch(_TORCH, "runs what is called `compile` without compiling it"),
        "TORCH_COMPILE_DISABLE": Switch(_TORCH, "runs what is called `compile` without compiling it"),
        "JAX_DISABLE_MOST_OPTIMIZATIONS": Switch(_JAX, "compiles what is called `jit` without most optimisations"),
        "TORCH_COMPILE_OVERRIDE_BACKENDS": Switch(_TORCH, "puts another backend under the name `compile`", False),
        "TORCH_COMPILE_OVERRIDE_DYNAMO_CONFIGS": Switch(_TORCH, "overrules the settings of `compile`", False),
        "TORCH_COMPILE_OVERRIDE_INDUCTOR_CONFIGS": Switch(_TORCH, "overrules the settings of `compile`", False),
        "TORCHDYNAMO_SUPPRESS_ERRORS": Switch(_TORCH, "runs what fails to compile eagerly, under the name `compile`"),
        "TORCH_COMPILE_FORCE_DISABLE_CACHES": Switch(_TORCH, "turns the caches off whose effect is measured"),
        "TORCHINDUCTOR_FORCE_DISABLE_CACHES": Switch(_TORCH, "turns the caches off whose effect is measured"),
        "TORCH_COMPILE_DEBUG": Switch(_TORCH, "writes traces while it compiles"),
        "CUDA_LAUNCH_BLOCKING": Switch(_BOTH, "makes every launch wait for the GPU"),
        "PYTORCH_NO_CUDA_MEMORY_CACHING": Switch(_TORCH, "asks the driver for memory in every call"),
        "NVIDIA_TF32_OVERRIDE": Switch(_BOTH, "overrules the precision that is asked for", off_is_harmless=False),
        "TORCH_ALLOW_TF32_CUBLAS_OVERRIDE": Switch(_TORCH, "overrules the precision that is asked for"),
        "ONEDNN_DEFAULT_FPMATH_MODE": Switch(_TORCH, "overrules the precision that is asked for"),
        "DNNL_DEFAULT_FPMATH_MODE": Switch(_TORCH, "overrules the precision that is asked for"),
        "JAX_DEFAULT_MATMUL_PRECISION": Switch(_JAX, "overrules the precision of the stock division"),
        "JAX_ENABLE_X64": Switch(_JAX, "lets constants and sums become 64 bits wide"),
        "JAX_DEFAULT_DTYPE_BITS": Switch(_JAX, "changes the width of constants", off_is_harmless=False),
        "JAX_NUMPY_DTYPE_PROMOTION": Switch(_JAX, "changes which operands may meet", off_is_harmless=False),
        "JAX_NUMPY_RANK_PROMOTION": Switch(_JAX, "changes which operands may meet", off_is_harmless=False),
        "JAX_DEBUG_NANS": Switch(_JAX, "makes every call wait and looks for NaN in its result"),
        "JAX_DEBUG_INFS": Switch(_JAX, "makes every call wait and looks for infinities in its result"),
        "JAX_CHECK_TRACER_LEAKS": Switch(_JAX, "traces anew in every call"),
        "JAX_ENABLE_CHECKS": Switch(_JAX, "checks what it traces"),
        "JAX_NO_EXECUTION": Switch(_JAX, "computes nothing"),
        "JAX_ENABLE_PGLE": Switch(_JAX, "profiles the first calls and compiles again after them"),
        "JAX_LOG_COMPILES": Switch(_JAX, "writes a line for each program"),
        "JAX_TRANSFER_GUARD": Switch(_JAX, "refuses or reports copies between host and device", off_is_harmless=False),
        "JAX_TRANSFER_GUARD_DEVICE_TO_DEVICE": Switch(_JAX, "refuses or reports copies", off_is_harmless=False),
        "JAX_TRANSFER_GUARD_DEVICE_TO_HOST": Switch(_JAX, "refuses or reports copies", off_is_harmless=False),
        "JAX_TRANSFER_GUARD_HOST_TO_DEVICE": Switch(_JAX, "refuses or reports copies", off_is_harmless=False),
        "PYTHONDEVMODE": Switch(_BOTH, "checks what the interpreter does"),
        "PYTHONMALLOC": Switch(_BOTH, "changes how the interpreter takes memory", off_is_harmless=False),
        "PYTHONTRACEMALLOC": Switch(_BOTH, "records every allocation"),
    }
)

# Left as they are.
TOLD: Mapping[str, Switch] = MappingProxyType(
    {
        "XLA_FLAGS": Switch(_JAX, "changes what XLA compiles, in every division"),
        "LIBTPU_INIT_ARGS": Switch(_JAX, "changes what XLA compiles, in every division"),
        "JAX_OPTIMIZATION_LEVEL": Switch(_JAX, "changes how hard XLA optimises", off_is_harmless=False),
        "JAX_EXEC_TIME_OPTIMIZATION_EFFORT": Switch(_JAX, "changes how hard XLA optimises", off_is_harmless=False),
        "JAX_MEMORY_FITTING_LEVEL": Switch(_JAX, "changes how hard XLA saves memory", off_is_harmless=False),
        "JAX_MEMORY_FITTING_EFFORT": Switch(_JAX, "changes how hard XLA saves memory", off_is_harmless=False),
        "JAX_ALLOW_F16_REDUCTIONS": Switch(_JAX, "changes which reductions run in 16 bits", off_is_harmless=False),
        "JAX_NUM_CPU_DEVICES": Switch(_JAX, "divides the CPU into several devices", off_is_harmless=False),
        "JAX_PJRT_CLIENT_CREATE_OPTIONS": Switch(_JAX, "changes how the device is set up", off_is_harmless=False),
        "JAX_RAGGED_DOT_USE_GPU_PALLAS_TRITON_LOWERING": Switch(
            _JAX, "changes the kernels of `grouped_matmul`", off_is_harmless=False
        ),
        "JAX_RAGGED_DOT_USE_RAGGED_DOT_INSTRUCTION": Switch(
            _JAX, "changes the kernels of `grouped_matmul`", off_is_harmless=False
        ),
        "TORCHINDUCTOR_MAX_AUTOTUNE": Switch(_TORCH, "changes what Inductor compiles, in every division"),
        "TORCHINDUCTOR_FREEZING": Switch(_TORCH, "changes what Inductor compiles, in every division"),
        "TORCHINDUCTOR_CPP_WRAPPER": Switch(_TORCH, "changes how compiled code is called, in every division"),
        "TORCH_BLAS_PREFER_CUBLASLT": Switch(_TORCH, "chooses the library of the products"),
        "CUBLAS_WORKSPACE_CONFIG": Switch(_BOTH, "limits the kernels that cuBLAS may choose", off_is_harmless=False),
        "PYTORCH_CUDA_ALLOC_CONF": Switch(_TORCH, "changes the allocator", off_is_harmless=False),
        "PYTORCH_ALLOC_CONF": Switch(_TORCH, "changes the allocator", off_is_harmless=False),
        "XLA_PYTHON_CLIENT_ALLOCATOR": Switch(_JAX, "changes the allocator", off_is_harmless=False),
        "ATEN_CPU_CAPABILITY": Switch(_TORCH, "limits the instructions that are used", off_is_harmless=False),
        "ONEDNN_MAX_CPU_ISA": Switch(_TORCH, "limits the instructions that are used", off_is_harmless=False),
        "MKL_ENABLE_INSTRUCTIONS": Switch(_TORCH, "limits the instructions that are used", off_is_harmless=False),
        "MKL_CBWR": Switch(_TORCH, "limits the kernels that MKL may choose", off_is_harmless=False),
        "OMP_WAIT_POLICY": Switch(_TORCH, "says whether idle threads spin", off_is_harmless=False),
        "OMP_PROC_BIND": Switch(_TORCH, "binds threads to processors", off_is_harmless=False),
        "KMP_BLOCKTIME": Switch(_TORCH, "says how long idle threads spin", off_is_harmless=False),
        "KMP_AFFINITY": Switch(_TORCH, "binds threads to processors", off_is_harmless=False),
        "GOMP_SPINCOUNT": Switch(_TORCH, "says how long idle threads spin", off_is_harmless=False),
        "GLIBC_TUNABLES": Switch(_BOTH, "changes how the C library takes memory", off_is_harmless=False),
        "THP_MEM_ALLOC_ENABLE": Switch(_TORCH, "has PyTorch ask for large pages"),
        "LD_PRELOAD": Switch(_BOTH, "loads code before everything else", off_is_harmless=False),
        "CUDA_VISIBLE_DEVICES": Switch(_BOTH, "chooses the GPU", off_is_harmless=False),
        "CUDA_DEVICE_MAX_CONNECTIONS": Switch(_BOTH, "changes how launches queue", off_is_harmless=False),
    }
)

# Whatever else begins like this is read by a framework or its libraries, whose next release may have new ones.
_BEGINNINGS: Sequence[tuple[tuple[str, ...], tuple[str, ...]]] = (
    (("JAX_", "XLA_"), _JAX),
    (
        ("TORCH_", "TORCHDYNAMO_", "TORCHINDUCTOR_", "PYTORCH_", "DNNL_", "ONEDNN_", "MKL_", "OMP_", "GOMP_", "KMP_"),
        _TORCH,
    ),
    (("CUBLAS_", "CUBLASLT_", "CUDNN_", "TRITON_", "MALLOC_", "MIMALLOC_", "TCMALLOC_"), _BOTH),
)
# What is set for the workers, and what only says where files are.
_OURS = ("JAX_CPU_ENABLE_ASYNC_DISPATCH", "JAX_PLATFORMS", "XLA_PYTHON_CLIENT_PREALLOCATE")
_PLACES = ("_DIR", "_HOME", "_PATH", "_ARCH_LIST", "_VERSION")

# Given the number of processors that the workers may use, whatever the shell says.
THREADS: tuple[str, ...] = ("OMP_NUM_THREADS", "MKL_NUM_THREADS")
# What a fingerprint holds of a worker's environment.
RECORDED: tuple[str, ...] = (*THREADS, "JAX_CPU_ENABLE_ASYNC_DISPATCH", "JAX_PLATFORMS", *TOLD)


def _others(environment: Mapping[str, str]) -> dict[str, Switch]:
    """Find the variables of the frameworks and their libraries that no table here names."""
    return {
        name: Switch(frameworks, "may change what they run", off_is_harmless=False)
        for name in sorted(environment)
        for beginnings, frameworks in _BEGINNINGS
        if name.startswith(beginnings) and name not in (*UNSET, *TOLD, *THREADS, *_OURS) and not name.endswith(_PLACES)
    }


def _set(switches: Mapping[str, Switch], environment: Mapping[str, str], framework: str) -> dict[str, str]:
    return {
        name: environment[name]
        for name, switch in switches.items()
        if name in environment
        and framework in switch.frameworks
        and not (switch.off_is_harmless and environment[name].strip().lower() in _OFF)
        and environment[name] != ""
    }


def unset_for(framework: str) -> dict[str, str]:
    """Return the switches that are set and that a framework's worker does not get, with their values."""
    return _set(UNSET, os.environ, framework)


def without_unset(environment: Mapping[str, str]) -> dict[str, str]:
    """Return the environment without every switch of `UNSET`, whatever its value."""
    return {name: value for name, value in environment.items() if name not in UNSET}


def recorded(environment: Mapping[str, str]) -> dict[str, str | None]:
    """Return what a fingerprint holds of a worker's environment: name to value, or None."""
    return {name: environment.get(name) for name in (*RECORDED, *_others(environment))}


def sentences(frameworks: Sequence[str], cpus: int, environment: Mapping[str, str] | None = None) -> list[str]:
    """Return one sentence for each switch that is set and changes, or would change, the work of the workers.

    No processors (`cpus=0`) means that their number is not known.
    """
    environment = os.environ if environment is None else environment
    said = {}
    for framework in frameworks:
        for name, value in _set(UNSET, environment, framework).items():
            said[name] = f"{name}={value} is unset in the workers: it {UNSET[name].effect}."
        told = {**TOLD, **_others(environment)}
        for name, value in _set(told, environment, framework).items():
            said[name] = f"{name}={value} stays in force in the workers: it {told[name].effect}."
    for name in THREADS:
        if cpus and environment.get(name) not in (None, "", str(cpus)):
            said[name] = (
                f"{name}={environment[name]} is {cpus} in the workers: both frameworks may use the same processors; "
                "to measure with fewer, start the command under `taskset`."
            )
    return list(said.values())


PACKAGES: Mapping[str, str] = MappingProxyType(
    {
        "stock:einops.EinMix": "einops",
        "stock:equinox.filter_vmap": "equinox",
        "stock:keras.EinsumDense": "keras",
    }
)


def missing_competitors(names: Iterable[str]) -> dict[str, str]:
    """Return competitor to the reason why it cannot be run in this interpreter: a package is missing."""
    return {
        name: f"{package} is not installed; install the extra `competitors`"
        for name in names
        if (package := PACKAGES.get(name)) is not None and find_spec(package) is None
    }


# Both CUDA majors install files of the same names (nvidia/cudnn/lib/libcudnn.so.9 and others): the later one wins.
_CUDA_SUFFIXES: Mapping[str, tuple[str, ...]] = {"12": ("-cu12", "-cuda12-plugin"), "13": ("-cu13", "-cuda13-plugin")}


def cuda_packages(names: Iterable[str]) -> dict[str, list[str]]:
    """Return CUDA major version to the installed packages that are built for it."""
    found: dict[str, list[str]] = {}
    for name in sorted({name.lower().replace("_", "-") for name in names}):
        for major, suffixes in _CUDA_SUFFIXES.items():
            if name.endswith(suffixes):
                found.setdefault(major, []).append(name)
    return found


def installed_distributions() -> list[str]:
    """Return the names of the distributions in this interpreter."""
    return [name for distribution in metadata.distributions() if (name := distribution.metadata["Name"])]
