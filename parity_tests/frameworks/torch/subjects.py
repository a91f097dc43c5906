"""PyTorch subjects: every implementation of the table through the public function, and both layer classes."""

import dataclasses
import sys
from collections.abc import Mapping, Sequence

import numpy as np
import torch

from parity_tests.frameworks.torch.arrays import to_torch
from parity_tests.frameworks.torch.modes import WRAPPERS
from parity_tests.frameworks.torch.sharded import ShardedTorchSubject
from parity_tests.frameworks.torch.subject import eager_subjects, plain_linear_subject
from parity_tests.judge.modes import DEFAULT_MODES
from parity_tests.judge.subjects import Subject, check_precision
from torch_impl import PartitionedLinear, export_parameters, import_parameters


def round_trip(arrays: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Puts canonical arrays into the layer and takes them out again."""
    n, i, o = arrays["weight"].shape
    dtype = to_torch(arrays["weight"][:0], torch.device("cpu")).dtype
    layer = PartitionedLinear(n, i, o, bias="bias" in arrays, dtype=dtype)
    import_parameters(layer, dict(arrays))
    return export_parameters(layer)


def resolve_device(device: str) -> torch.device:
    """Turns `auto`, `cpu` or `cuda` into a device.

    Raises:
        ValueError: if the device is not there.
    """
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device == "cuda" and not torch.cuda.is_available():
        raise ValueError("device: expected a CUDA device visible to torch, got none; use --device cpu or auto.")
    return torch.device(device)


def plain_linear(device: str = "auto") -> Subject:
    """Returns `torch.nn.Linear` as a subject, for inputs with one partition."""
    return plain_linear_subject(resolve_device(device))


def subjects(device: str = "auto", modes: Sequence[str] = (), precision: str | None = None) -> list[Subject]:
    """Returns every PyTorch subject, in every mode that is asked for; in the default mode if none is.

    On a GPU it sets PyTorch's switches for fp32 products and convolutions: what is judged is the formulation, not the
    default of rounding the operands of convolutions to TF32.
    """
    target = resolve_device(device)
    check_precision(precision, has_tf32=target.type == "cuda")
    if target.type == "cuda":
        torch.set_float32_matmul_precision("high" if precision == "tf32" else "highest")
        torch.backends.cudnn.allow_tf32 = precision == "tf32"
    sources = eager_subjects(target)
    found: list[Subject] = []
    for mode in modes or (DEFAULT_MODES["torch"],):
        if mode == "sharded":
            found += [ShardedTorchSubject(source) for source in sources]
        else:
            found += [
                dataclasses.replace(source, mode=mode, prepare=WRAPPERS[mode](source.prepare)) for source in sources
            ]
    return found


def release_programs() -> None:
    """Drops all compiled programs, if any was compiled."""
    if "torch._dynamo" in sys.modules:
        torch.compiler.reset()
