"""The torch side of a pair: an `nn.Module` as it is, or a function `f(parameters, *inputs)`."""

import contextlib
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from parity_tests.frameworks.torch.ensemble import Record, run_members
from parity_tests.frameworks.torch.modes import Held, holding, registered_children, resolve_device, to_numpy, to_torch
from parity_tests.frameworks.torch.noise import DoublePrecision
from parity_tests.frameworks.torch.recorder import record
from parity_tests.frameworks.torch.truth import MovedConstants, Recorder, double_default, machine_limits
from parity_tests.frameworks.torch.watch import BranchWatch, FirstUses, FormatWatch
from parity_tests.judge.dtypes import FORMATS, differ_beyond, is_inexact, storage_format, widened
from parity_tests.pair.calibration import (
    MEMBERS,
    Member,
    collect_ensemble,
    constants_spread,
    moved_constant,
    was_rounded,
)
from parity_tests.pair.calls import Layout, checked_call, named_outputs, no_array, refuse_module
from parity_tests.pair.side import CANNOT_RUN, Arrays, Constants, Ensemble, ParameterSpec, Variant, named_state
from parity_tests.pair.trace import Change, Trace

Function = Callable[..., Any]


@contextlib.contextmanager
def seeded(seed: int, devices: Sequence[torch.device] = ()) -> Iterator[None]:
    """Seed torch, and restores the generators on leaving.

    Args:
        seed: non-negative.
        devices: GPUs whose generators are restored beside the CPU's.
    """
    with torch.random.fork_rng(devices=list(devices)):
        torch.manual_seed(seed)
        yield


class TorchSide:
    """One torch module or function; see `side.Side`.

    Args:
        module: an `nn.Module` (its training mode is left as it is), or a function of a dict of tensors and inputs.
        kwargs: keyword arguments of every call.
        initial: initial parameters of a function; None for a module.
        adapter: `(call, *inputs) -> outputs`, see `calls.Call`.
        device: `cpu`, `cuda` or `auto`.

    Raises:
        TypeError: for anything else, or a function without initial parameters.
        ValueError: if the device is not there.
    """

    framework = "torch"

    def __init__(
        self,
        module: torch.nn.Module | Function,
        kwargs: Mapping[str, Any] | None = None,
        initial: Mapping[str, np.ndarray] | None = None,
        adapter: Callable[..., Any] | None = None,
        device: str = "cpu",
    ) -> None:
        refuse_module(module, "torch", "an nn.Module or a function")
        if not isinstance(module, torch.nn.Module) and not callable(module):
            raise TypeError(f"torch_module: expected an nn.Module or a function, got {type(module).__name__}.")
        if isinstance(module, torch.nn.Module) != (initial is None):
            told = ("None beside a module, which holds its own", "a dict; leave it out")
            wanted = told if initial is not None else ("a dict of initial arrays for a function", "None; pass one")
            raise TypeError(f"torch_params: expected {wanted[0]}, got {wanted[1]}.")
        self.name = getattr(module, "__name__", type(module).__name__)
        self._call, self._initial = checked_call(kwargs, adapter, "torch"), initial
        self._device, self._chosen = resolve_device(device), None
        self._module = module if isinstance(module, torch.nn.Module) else None
        self._function = module
        self._recorder = Recorder()
        self._trained = {name for name, spec in self.parameters(()).items() if spec.trainable}
        self._numbers: tuple[str, ...] = ()
        self._captures = False  # whether the last truth used tensors that are no parameters, buffers or inputs

    def function(self, tensors: dict[str, torch.Tensor], *inputs: torch.Tensor) -> Any:
        """Run the module on parameters and the arrays of its inputs."""

        def run(*arguments: Any, **named: Any) -> Any:
            if self._module is None:
                return self._function(tensors, *arguments, **named)
            if isinstance(self._module, torch.jit.ScriptModule):
                with holding(self._module, tensors):
                    return self._module(*arguments, **named)
            return torch.func.functional_call(self._module, tensors, arguments, named)

        try:
            return self._call(run, inputs)
        except RuntimeError as error:
            if torch.is_grad_enabled() or "does not require grad" not in str(error):
                raise
        # What differentiates itself (a gradient penalty, a force) does not run without gradients.
        with torch.enable_grad():
            return self._call(run, inputs)

    def arrange(self, layout: Layout, outputs: tuple[str, ...] | None) -> None:
        """Keep both for every call."""
        self._call, self._chosen = self._call.arranged(layout, "torch"), outputs

    def parameters(self, inputs: tuple[np.ndarray, ...]) -> dict[str, ParameterSpec]:
        """Return parameters, then buffers; a parameter with `requires_grad=False` is frozen."""
        if self._module is None:
            assert self._initial is not None
            if unnamed := [name for name in self._initial if not isinstance(name, str)]:
                raise TypeError(f"torch_params: expected names as keys, got {unnamed[0]!r}; write it as a string.")
            found = {name: _parameter_spec(name, value) for name, value in self._initial.items()}
        else:
            found = {name: _parameter_spec(name, value) for name, value in self._module.named_parameters()}
            found |= {name: ParameterSpec(to_numpy(b), False) for name, b in self._module.named_buffers()}
        return found

    def outline(self, parameters: Arrays, inputs: tuple[np.ndarray, ...]) -> dict[str, np.ndarray]:
        """Run the module for its shapes."""
        return {name: np.zeros_like(value) for name, value in self.forward(parameters, inputs).items()}

    def round_trip(self, parameters: Arrays) -> dict[str, np.ndarray]:
        """Copy to tensors on the device and back."""
        return {name: to_numpy(tensor) for name, tensor in self._tensors(parameters).items()}

    def forward(self, parameters: Arrays, inputs: tuple[np.ndarray, ...]) -> dict[str, np.ndarray]:
        """Run without gradients, which may take other paths (fast paths for inference)."""
        with torch.no_grad(), self._seeded(0):
            tensors = self._tensors(parameters)
            outputs = self.function(tensors, *self._inputs(inputs))
            return self._results(tensors, self._leaves(outputs, tensors))

    def vjp(self, parameters: Arrays, inputs: tuple[np.ndarray, ...], cotangents: Arrays) -> dict[str, np.ndarray]:
        """Run through autograd."""
        with self._seeded(0):
            return self._run(self._tensors(parameters), self._inputs(inputs), cotangents)

    def truth(
        self,
        parameters: Arrays,
        inputs: tuple[np.ndarray, ...],
        cotangents: Arrays | None = None,
        variant: str = "",
    ) -> dict[str, np.ndarray]:
        """Run in float64; a variant rewrites operations on the way."""
        mode = DoublePrecision(rewrite=self._recorder.rewrite(variant))
        found = self._double(parameters, inputs, cotangents, lambda tensors: mode)
        self._captures = mode.captured
        return found

    def constants(
        self,
        parameters: Arrays,
        inputs: tuple[np.ndarray, ...],
        cotangents: Arrays | None,
        buffers: Mapping[str, str],
        computed: bool,
    ) -> Constants:
        """Run with constant buffers and captured tensors moved."""
        wide = {name: widened(parameters[name]) for name in buffers}
        moving = [name for name, array in wide.items() if was_rounded(array, buffers[name])]
        if not (moving or self._captures or computed):
            return Constants({})
        whole = {name for name, array in parameters.items() if name in buffers or not is_inexact(array)}
        stored = {f"buffer {name}" for name in moving}

        def run(member: int) -> dict[str, np.ndarray]:
            def mode(tensors: dict[str, torch.Tensor]) -> MovedConstants:
                constants = [tensor for name, tensor in tensors.items() if name in whole or name not in parameters]
                modes.append(MovedConstants(member, computed, constants, self._device))
                return modes[-1]

            modes: list[MovedConstants] = []
            moved = {name: moved_constant(wide[name], member, buffers[name]) for name in moving}
            found = self._double({**parameters, **moved}, inputs, cotangents, mode, leg=parameters)
            stored.update(modes[0].stored)
            return found

        spread = constants_spread(run)
        return Constants(spread, tuple(sorted(stored)), (), MEMBERS) if stored or computed else Constants({})

    def ensemble(
        self, parameters: Arrays, inputs: tuple[np.ndarray, ...], cotangents: Arrays | None, dtype: str, seed: int
    ) -> Ensemble:
        """Run under the dispatch mode, all but the first members together where they can be."""
        notes: set[str] = set()

        def run(member: Member, record: Record | None) -> dict[str, np.ndarray]:
            mode = DoublePrecision(dtype, member.number, member.amplitude, self._device, record=record)
            outputs = self._double(parameters, inputs, cotangents, lambda tensors: mode)
            notes.update(mode.notes)
            return outputs

        result = collect_ensemble(functools.partial(run_members, run), seed)
        return replace(result, notes=tuple(sorted(notes)))

    def variants(self) -> tuple[Variant, ...]:
        """Return other epsilons and the other gelu, where the last truth used one."""
        return self._recorder.variants()

    def record(
        self,
        parameters: Arrays,
        inputs: tuple[np.ndarray, ...],
        cotangents: Arrays | None = None,
        changes: tuple[Change, ...] = (),
        wanted: tuple[int, ...] | None = None,
        asked: tuple[int, ...] = (),
        noisy: bool = True,
    ) -> Trace:
        """Run in float64, taking note of every value; `changes` are made on the way."""
        names = {} if self._module is None else {id(child): name for name, child in self._module.named_modules()}
        given = {f"parameter:{name}": array for name, array in parameters.items()}
        given |= {f"input:{k}": array for k, array in enumerate(inputs)}
        given |= {f"cotangent:{name}": array for name, array in (cotangents or {}).items()}
        return record(
            lambda mode: self._double(parameters, inputs, cotangents, mode),
            names,
            given,
            changes,
            wanted,
            asked,
            noisy,
            self._device,
        )

    def notes(self) -> tuple[str, ...]:
        """Return none."""
        return ()

    def is_random(self, parameters: Arrays, inputs: tuple[np.ndarray, ...]) -> bool:
        """Compare two seeds of torch's generator.

        A kernel may round differently from call to call, by the place of its data in memory. In float64 such results
        differ by less than float32 rounds; results that depend on drawn numbers do not.
        """

        def differ(parameters: Arrays, inputs: tuple[np.ndarray, ...], roundoff: float) -> bool:
            found = []
            for seed in (0, 1):
                with torch.no_grad(), self._seeded(seed):
                    tensors = self._tensors(parameters)
                    outputs = self.function(tensors, *self._inputs(inputs))
                    found.append({name: to_numpy(y) for name, y in self._leaves(outputs, tensors).items()})
            return found[0].keys() != found[1].keys() or any(
                differ_beyond(y, found[1][name], roundoff) for name, y in found[0].items()
            )

        if not differ(parameters, inputs, 0.0):
            return False
        wide = {name: widened(array) for name, array in parameters.items()}
        try:
            with double_default():
                return differ(wide, tuple(map(widened, inputs)), FORMATS["float32"].roundoff)
        except CANNOT_RUN:
            return True

    def numbers(self) -> tuple[str, ...]:
        """Return what the last call has returned as `item()` does."""
        return self._numbers

    def unexercised(
        self, parameters: Arrays, inputs: tuple[np.ndarray, ...], cotangents: Arrays | None
    ) -> tuple[str, ...]:
        """Watch a float64 run, and what users wrote of its backward pass."""
        names = {} if self._module is None else {id(child): name for name, child in self._module.named_modules()}
        watch = BranchWatch(names)
        self._double(parameters, inputs, cotangents, lambda tensors: DoublePrecision(), watch=watch)
        return watch.branches.sentences()

    def wider_operations(self, parameters: Arrays, inputs: tuple[np.ndarray, ...], dtype: str) -> tuple[str, ...]:
        """Watch a run without gradients."""
        watch = FormatWatch(dtype)
        with torch.no_grad(), self._seeded(0), watch:
            self.function(self._tensors(parameters), *self._inputs(inputs))
        return watch.found()

    def first_uses(self, parameters: Arrays, inputs: tuple[np.ndarray, ...]) -> tuple[str, ...]:
        """Watch a run without gradients."""
        tensors = self._tensors(parameters)
        watch = FirstUses(tensors)
        with torch.no_grad(), self._seeded(0), sdpa_kernel(SDPBackend.MATH), watch:
            self.function(tensors, *self._inputs(inputs))
        return tuple(watch.order)

    def _seeded(self, seed: int) -> contextlib.AbstractContextManager[None]:
        return seeded(seed, [self._device] if self._device.type == "cuda" else [])

    def _tensors(self, parameters: Arrays) -> dict[str, torch.Tensor]:
        return {name: to_torch(array, self._device) for name, array in parameters.items()}

    def _inputs(self, inputs: tuple[np.ndarray, ...]) -> list[torch.Tensor]:
        return [to_torch(array, self._device) for array in inputs]

    def _leaves(self, outputs: Any, tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Return the arrays and numbers of an output by name."""
        found = named_outputs(outputs, self._chosen, registered_children, "torch")
        self._numbers = tuple(name for name, leaf in found.items() if isinstance(leaf, float | complex))
        wide = any(tensor.dtype in (torch.float64, torch.complex128) for tensor in tensors.values())
        for name, leaf in found.items():
            if name in self._numbers:
                # Stored in the format of the parameters, which is one rounding, as of a product.
                with double_default() if wide else contextlib.nullcontext():
                    found[name] = torch.as_tensor(leaf, device=self._device) * 1.0
            elif isinstance(leaf, np.ndarray | np.generic | bool | int):
                found[name] = torch.as_tensor(leaf, device=self._device)
            elif not isinstance(leaf, torch.Tensor):
                raise no_array(name, leaf, "torch")
        return found

    def _buffers(self) -> set[str]:
        return set() if self._module is None else {name for name, _ in self._module.named_buffers()}

    def _results(self, tensors: dict[str, torch.Tensor], leaves: dict[str, torch.Tensor]) -> dict[str, np.ndarray]:
        # functional_call leaves in its dict what a module has put in a buffer's place; most are updated where they are.
        after = named_state({name: to_numpy(tensors[name]) for name in sorted(self._buffers())})
        return {name: to_numpy(leaf) for name, leaf in leaves.items()} | after

    def _double(
        self,
        parameters: Arrays,
        inputs: tuple[np.ndarray, ...],
        cotangents: Arrays | None,
        mode: Callable[[dict[str, torch.Tensor]], DoublePrecision],
        leg: Arrays | None = None,
        watch: BranchWatch | None = None,
    ) -> dict[str, np.ndarray]:
        """Run under a mode, made for the parameters and integer inputs; `leg` has the parameters' own dtypes."""
        tensors = self._tensors({name: widened(array) for name, array in parameters.items()})
        arguments = self._inputs(tuple(map(widened, inputs)))
        integers = {f"inputs[{k}]": tensor for k, tensor in enumerate(arguments) if not is_inexact(inputs[k])}
        wide = None if cotangents is None else {name: widened(array) for name, array in cotangents.items()}
        stored = np.zeros((), storage_format([*(leg or parameters).values(), *inputs]))
        limits = machine_limits(to_torch(stored, self._device).dtype)
        # Fused attention kernels hide their operations from the mode.
        with contextlib.ExitStack() as stack:
            for context in (self._seeded(0), double_default(), sdpa_kernel(SDPBackend.MATH), limits):
                stack.enter_context(context)
            stack.enter_context(mode(tensors | integers))
            if watch is not None:
                stack.enter_context(watch.of([*tensors.values(), *arguments]))
            return self._run(tensors, arguments, wide)

    def _run(
        self, tensors: dict[str, torch.Tensor], inputs: list[torch.Tensor], cotangents: Arrays | None
    ) -> dict[str, np.ndarray]:
        """Return outputs and gradients; the module holds the tensors until the backward pass has ended."""
        if self._module is None or isinstance(self._module, torch.jit.ScriptModule):
            return self._differentiated(tensors, inputs, cotangents)
        held = Held(self._module, lambda: self._differentiated(tensors, inputs, cotangents))
        return torch.func.functional_call(held, {f"module.{name}": tensor for name, tensor in tensors.items()}, ())

    def _differentiated(
        self, tensors: dict[str, torch.Tensor], inputs: list[torch.Tensor], cotangents: Arrays | None
    ) -> dict[str, np.ndarray]:
        sources = {f"d_{name}": tensor for name, tensor in tensors.items() if name in self._trained}
        sources |= {f"d_{name}": tensor for name, tensor in zip(self._call.names(inputs), inputs, strict=True)}
        inexact = {
            name: tensor for name, tensor in sources.items() if tensor.is_floating_point() or tensor.is_complex()
        }
        sources = {name: tensor.requires_grad_() for name, tensor in inexact.items()}
        # Copies, because a leaf that requires a gradient must not be changed in place, as the first operation may do.
        leaves = self._leaves(self.function(tensors, *(tensor.clone() for tensor in inputs)), tensors)
        result = self._results(tensors, leaves)
        if cotangents is None:
            return result
        used = {name: leaf for name, leaf in leaves.items() if leaf.requires_grad and name in cotangents}
        if used:
            weights = [to_torch(cotangents[name], self._device).to(leaf.dtype) for name, leaf in used.items()]
            gradients = torch.autograd.grad(list(used.values()), list(sources.values()), weights, allow_unused=True)
        else:
            gradients = [None] * len(sources)
        for (name, source), gradient in zip(sources.items(), gradients, strict=True):
            result[name] = to_numpy(torch.zeros_like(source) if gradient is None else gradient)
        return result


def _parameter_spec(name: str, value: Any) -> ParameterSpec:
    if isinstance(value, torch.Tensor):
        # A plain tensor is a value; only a parameter says whether it is trained.
        trained = value.requires_grad or not isinstance(value, torch.nn.Parameter)
        trained = trained and (value.is_floating_point() or value.is_complex())
        return ParameterSpec(to_numpy(value), trained, frozen=not trained)
    array = np.asarray(value)
    if array.dtype == object:
        raise TypeError(f"torch_params[{name!r}]: expected an array or a tensor, got {type(value).__name__}.")
    return ParameterSpec(array, array.dtype.kind not in "iub", frozen=array.dtype.kind in "iub")
