"""One process of a sharded PyTorch subject: places its partitions, computes, and rank 0 hands back whole tensors."""

import dataclasses
import os
import signal
from multiprocessing.connection import Connection

import numpy as np
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Shard

from parity_tests.frameworks.torch.arrays import lay_out, to_numpy, to_torch
from parity_tests.frameworks.torch.subject import eager_subjects
from parity_tests.judge.inputs import Inputs
from torch_impl import PartitionedLinear, import_parameters
from torch_impl.registry import IMPLEMENTATIONS
from torch_impl.sharding import shard_inputs, shard_partitions

_CPU = torch.device("cpu")


def _whole(tensor: torch.Tensor, axis: int, size: int) -> np.ndarray:
    # Gathered, and only now: a result that came back whole was not computed in shards.
    if not isinstance(tensor, DTensor) or tensor.to_local().shape[axis] * size != tensor.shape[axis]:
        raise RuntimeError("a result is not divided over the processes")
    return to_numpy(tensor.full_tensor())


def _sharded(mesh: DeviceMesh, implementation: str, inputs: Inputs, gradients: bool) -> dict[str, np.ndarray]:
    """The whole layer on DTensors."""
    n, i, o = inputs.weight.shape
    arrays = {"weight": inputs.weight} | ({} if inputs.bias is None else {"bias": inputs.bias})
    dtype = to_torch(inputs.weight[:0], _CPU).dtype
    layer = PartitionedLinear(n, i, o, bias=inputs.bias is not None, implementation=implementation, dtype=dtype)
    import_parameters(layer, arrays)
    shard_partitions(layer, mesh)
    x = shard_inputs(lay_out(to_torch(inputs.x, _CPU), inputs.layout), mesh).requires_grad_(gradients)
    size = mesh.size()
    if not gradients:
        with torch.no_grad():
            return {"y": _whole(layer(x), -2, size)}
    y = layer(x)
    cotangent = shard_inputs(to_torch(inputs.cotangent, _CPU), mesh)
    found = torch.autograd.grad([y], [x, *layer.parameters()], [cotangent])
    named = zip(("dx", "dweight", "dbias"), (-2, 0, 0), found, strict=False)
    return {"y": _whole(y, -2, size)} | {name: _whole(tensor, axis, size) for name, axis, tensor in named}


def _by_itself(mesh: DeviceMesh, implementation: str, inputs: Inputs, gradients: bool) -> dict[str, np.ndarray]:
    """Each process calls the implementation with its own partitions; the results are gathered."""
    size, rank = mesh.size(), mesh.get_rank()
    share = len(inputs.weight) // size
    own = slice(rank * share, (rank + 1) * share)
    mine = dataclasses.replace(
        inputs,
        x=inputs.x[..., own, :],
        weight=inputs.weight[own],
        bias=None if inputs.bias is None else inputs.bias[own],
        cotangent=inputs.cotangent[..., own, :],
    )
    (subject,) = [found for found in eager_subjects(_CPU) if found.implementation == implementation]
    found = subject.vjp(mine) if gradients else {"y": subject.forward(mine)}

    def gathered(name: str, value: np.ndarray) -> np.ndarray:
        axis = value.ndim - 2 if name in ("y", "dx") else 0
        return _whole(DTensor.from_local(to_torch(value, _CPU), mesh, [Shard(axis)]), axis, size)

    return {name: gathered(name, value) for name, value in found.items()}


def _evaluate(mesh: DeviceMesh, implementation: str, inputs: Inputs, gradients: bool) -> dict[str, np.ndarray]:
    if implementation == "layer":
        return _sharded(mesh, "auto", inputs, gradients)
    entry = IMPLEMENTATIONS.get(implementation)
    run = _sharded if entry is not None and entry.shards_partitions else _by_itself
    return run(mesh, implementation, inputs, gradients)


def serve(rank: int, size: int, store: str, connection: Connection) -> None:
    """Answers tasks until the other end closes.

    Args:
        rank: of this process.
        size: of the group.
        store: file through which the group finds itself.
        connection: brings `(implementation, inputs, gradients)`; rank 0 sends arrays by name back, or a sentence.
    """
    # An interruption is the parent's to handle: it reports what it has, and ends its children.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=size)
    mesh = init_device_mesh("cpu", (size,))
    while True:
        try:
            implementation, inputs, gradients = connection.recv()
        except EOFError:
            return
        try:
            answer: dict[str, np.ndarray] | str = _evaluate(mesh, implementation, inputs, gradients)
        except Exception as error:
            answer = f"{type(error).__name__}: {error}"
        if rank == 0:
            connection.send(answer)
