"""Divide the partitions of a PyTorch subject over processes: the subject, its processes, and what each of them does.

A group of processes is started when it is first asked for, and again when more partitions ask for a larger one; fewer
shards take the first processes of the group.
"""

import atexit
import dataclasses
import functools
import os
import uuid
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.torch
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard

from parity_tests.frameworks.torch.modes import lay_out, to_numpy, to_torch
from parity_tests.interpreters.interpreter import Channel, Interpreter
from parity_tests.interpreters.process import ProcessError
from parity_tests.judge.inputs import Case, Inputs
from parity_tests.judge.subjects import Subject, shards_of
from parity_tests.judge.tolerance import TENSORS
from parity_tests.report.files import ScratchFolder
from torch_impl import PartitionedLinear, import_parameters
from torch_impl.registry import IMPLEMENTATIONS
from torch_impl.sharding import shard_inputs, shard_partitions

_CHILD = "parity_tests.frameworks.torch.subjects"  # its `main` calls `serve` with the subjects that it knows
_TIMEOUT_S = 120.0
_CPU = torch.device("cpu")
_ARRAYS = ("x", "weight", "bias", "cotangent")


def _packed(arrays: Mapping[str, np.ndarray]) -> bytes:
    return safetensors.torch.save({name: to_torch(array, _CPU) for name, array in arrays.items()})


def _unpacked(payload: bytes) -> dict[str, np.ndarray]:
    return {name: to_numpy(tensor) for name, tensor in safetensors.torch.load(payload).items()}


# --- the parent's end ---


@functools.cache
def _folder() -> ScratchFolder:
    """Return the folder of this process for the files through which groups find themselves."""
    return ScratchFolder("shards")


class _Shards:
    """Processes of one group: each is sent every task, the first one answers with whole tensors."""

    def __init__(self, size: int) -> None:
        self.size = size
        store = str(Path(_folder().name) / f"store-{uuid.uuid4().hex}")
        self._children: list[Interpreter] = []
        try:
            for rank in range(size):
                arguments, who = [str(rank), str(size), store], f"process {rank} of {size}"
                self._children.append(Interpreter(_CHILD, arguments, who=who, timeout_s=_TIMEOUT_S))
        except BaseException:
            self.close()
            raise

    def run(self, message: dict[str, Any], payload: bytes) -> dict[str, np.ndarray]:
        """Send a task to every process and return the answer of the first one.

        Raises:
            RuntimeError: if there is none in time, a process has ended, or the task failed; one sentence.
        """
        try:
            for child in self._children:
                child.send(message, payload)
                # Confirmed one by one: a large task is still being written while its reader is waited for.
                child.receive()
            answer = self._children[0].receive()
        except ProcessError as error:
            close_shards()
            raise RuntimeError(f"shards: expected an answer, but {error}.") from None
        if "error" in answer:
            close_shards()  # the other processes may still wait for the one that failed
            raise RuntimeError(f"shards: expected tensors, got the error {answer['error']}")
        found = _unpacked(answer["payload"])
        # In the order of every other subject, which the file format does not keep.
        return {name: found[name] for name in TENSORS if name in found}

    def close(self) -> None:
        for child in self._children:
            child.kill()
        for child in self._children:
            child.end()


_running: list[_Shards] = []


def close_shards() -> None:
    """End the processes, if any run."""
    while _running:
        _running.pop().close()


@functools.cache
def _close_at_exit() -> None:
    atexit.register(close_shards)


def _shards(size: int) -> _Shards:
    if not _running or _running[0].size < size:
        close_shards()
        _close_at_exit()
        _running.append(_Shards(size))
    return _running[0]


@dataclass(frozen=True)
class ShardedTorchSubject:
    """A subject with its partitions divided over processes; see `judge.subjects.Subject`.

    Where the implementation runs on DTensors the whole layer is sharded, as a user would have it. Where it does not,
    each process calls it with its own partitions as ordinary tensors, and only the results are put together.
    """

    source: Subject  # the same subject without shards
    device: torch.device  # where the source runs
    framework: str = "torch"
    mode: str = "sharded"

    @property
    def implementation(self) -> str:
        """The name of the implementation that each process calls."""
        return self.source.implementation

    @property
    def isolates_partitions(self) -> bool:
        """True as without shards; between two processes everything is isolated."""
        return self.source.isolates_partitions

    def unsupported_reason(self, case: Case, dtype: str) -> str | None:
        """Return one sentence if nothing can be divided here, else None."""
        if self.device.type != "cpu":
            return f"mode sharded: expected processes on CPUs, got {self.device.type}; use --device cpu."
        if not (dist.is_available() and dist.is_gloo_available()):
            return "mode sharded: this PyTorch was built without gloo."
        shards = shards_of(case.num_partitions)
        if shards == 1:
            return f"mode sharded: {case.num_partitions} partitions are divided by no number of devices at hand."
        own = dataclasses.replace(case, num_partitions=case.num_partitions // shards)
        return self.source.unsupported_reason(own, dtype)

    def forward(self, inputs: Inputs) -> np.ndarray:
        """Return y."""
        return self._run(inputs, gradients=False)["y"]

    def vjp(self, inputs: Inputs) -> dict[str, np.ndarray]:
        """Return y, dx, dweight and dbias."""
        return self._run(inputs, gradients=True)

    def _run(self, inputs: Inputs, gradients: bool) -> dict[str, np.ndarray]:
        shards = shards_of(len(inputs.weight))
        message = {
            "implementation": self.implementation,
            "gradients": gradients,
            "shards": shards,
            "dtype": inputs.dtype,
            "layout": inputs.layout,
        }
        arrays = {name: array for name in _ARRAYS if (array := getattr(inputs, name)) is not None}
        return _shards(shards).run(message, _packed(arrays))


# --- the child's end ---


def serve(channel: Channel, alone: Mapping[str, Subject], rank: int, size: int, store: str) -> None:
    """Answer tasks until the parent closes the connection.

    Args:
        channel: brings tasks; the process of rank 0 sends the results back.
        alone: subjects by name, for implementations that do not run on DTensors.
        rank: of this process.
        size: of the group.
        store: file through which the group finds itself.
    """
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=size)
    meshes: dict[int, DeviceMesh] = {}
    while (task := channel.receive()) is not None:
        channel.send({"received": True})
        shards = task["shards"]
        if shards not in meshes:
            # Every process of the group takes part, also one that the mesh leaves out.
            meshes[shards] = DeviceMesh("cpu", torch.arange(shards))
        if rank >= shards:
            continue
        found = _unpacked(task["payload"])
        arrays = (found["x"], found["weight"], found.get("bias"), found["cotangent"])
        inputs = Inputs(*arrays, task["dtype"], task["layout"])
        try:
            results = _evaluate(meshes[shards], task["implementation"], inputs, task["gradients"], alone)
            message, payload = {}, _packed(results)
        except Exception as error:
            message, payload = {"error": f"{type(error).__name__}: {error}"}, None
        if rank == 0:
            channel.send(message, payload)


def _evaluate(
    mesh: DeviceMesh, implementation: str, inputs: Inputs, gradients: bool, alone: Mapping[str, Subject]
) -> dict[str, np.ndarray]:
    if implementation == "layer":
        return _sharded(mesh, "auto", inputs, gradients)
    entry = IMPLEMENTATIONS.get(implementation)
    if entry is not None and entry.shards_partitions:
        return _sharded(mesh, implementation, inputs, gradients)
    return _by_itself(mesh, alone[implementation], inputs, gradients)


def _whole(tensor: torch.Tensor, axis: int, size: int) -> np.ndarray:
    # Gathered, and only now: a result that came back whole was not computed in shards.
    if not isinstance(tensor, DTensor) or tensor.to_local().shape[axis] * size != tensor.shape[axis]:
        raise RuntimeError("a result is not divided over the processes")
    return to_numpy(tensor.full_tensor())


def _sharded(mesh: DeviceMesh, implementation: str, inputs: Inputs, gradients: bool) -> dict[str, np.ndarray]:
    """Run the whole layer on DTensors."""
    n, i, o = inputs.weight.shape
    dtype = to_torch(inputs.weight[:0], _CPU).dtype
    layer = PartitionedLinear(n, i, o, bias=inputs.bias is not None, implementation=implementation, dtype=dtype)
    import_parameters(layer, inputs.parameters)
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


def _by_itself(mesh: DeviceMesh, subject: Subject, inputs: Inputs, gradients: bool) -> dict[str, np.ndarray]:
    """Call the implementation with this process's own partitions, and gather the results."""
    size, rank = mesh.size(), mesh.get_rank()
    share = len(inputs.weight) // size
    mine = inputs.partitions(range(rank * share, (rank + 1) * share))
    found = subject.vjp(mine) if gradients else {"y": subject.forward(mine)}

    def gathered(name: str, value: np.ndarray) -> np.ndarray:
        axis = value.ndim - 2 if name in ("y", "dx") else 0
        return _whole(DTensor.from_local(to_torch(value, _CPU), mesh, [Shard(axis)]), axis, size)

    return {name: gathered(name, value) for name, value in found.items()}
