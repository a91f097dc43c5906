"""The competitors of a cell. Their names come from the workers: no second list can drift from the registries."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType

from bench.plan.workloads import SHARED, Workload

EAGER, COMPILE, JIT = "eager", "compile", "jit"
REDUCE_OVERHEAD, MAX_AUTOTUNE, CUDA_GRAPH = "compile-reduce-overhead", "compile-max-autotune", "cuda-graph"
# `torch.cuda.make_graphed_callables`: forward and backward are a graph each, with autograd and the optimiser around.
GRAPHED_CALLABLES = "graphed-callables"
# Eager with `torch.autograd.set_multithreading_enabled(False)`: a GPU's backward runs in the thread that asks for it.
ONE_THREAD = "eager-one-thread"
# A call of the compiled program itself, and a step that gives its old parameters and optimiser state up.
AOT, DONATE = "aot", "jit-donate"
# `nnx.jit` of a layer that holds the parameters: the program of `jit`, after more work in Python at each call. Whoever
# wonders what that costs asks for it by name; in a ranking of formulations it would only stand for `jit` again.
NNX_JIT = "nnx-jit"
# XLA's command buffers are CUDA graphs under another name. JAX records them by default on a GPU, for programs of five
# kernels or more; the matched division turns them off for `jit`, as torch's eager mode has none. `jit-graph` records
# programs of any length, and meets `cuda-graph` in both divisions that compare graphs.
JIT_GRAPH = "jit-graph"
COMPILED_MODES: frozenset[str] = frozenset(
    {COMPILE, REDUCE_OVERHEAD, MAX_AUTOTUNE, JIT, JIT_GRAPH, AOT, DONATE, NNX_JIT}
)
# On a GPU these replay recorded graphs, as two of `torch.compile`'s modes do. What JAX's `jit` does in
# the stock and tuned divisions is XLA's choice: it records programs of five kernels and more.
_GRAPH_MODES: frozenset[str] = frozenset({CUDA_GRAPH, GRAPHED_CALLABLES, REDUCE_OVERHEAD, MAX_AUTOTUNE, JIT_GRAPH})
# On a GPU the way of launching decides: these run in every mode of launching there, where the tree has them.
LAUNCHED: tuple[str, ...] = ("matmul", "fused", "bucketed_matmul")
CALLS, GRAPHS = "calls", "graphs"
IMPLEMENTATION, STOCK, YARDSTICK = "implementation", "stock", "yardstick"
_NO_LAYER: frozenset[tuple[str, str]] = frozenset({(NNX_JIT, STOCK), (NNX_JIT, YARDSTICK)})
# What a user of the framework would type; the mode that every competitor of that framework is timed in.
DEFAULT_MODE: Mapping[str, str] = {"torch": EAGER, "jax": JIT}
FRAMEWORKS: tuple[str, ...] = tuple(DEFAULT_MODE)
MODES: tuple[str, ...] = (EAGER, COMPILE, REDUCE_OVERHEAD, MAX_AUTOTUNE, CUDA_GRAPH, GRAPHED_CALLABLES, ONE_THREAD)
MODES += (JIT, JIT_GRAPH, AOT, DONATE, NNX_JIT)


def launch(mode: str, device: str) -> str:
    """Return how a mode starts its kernels: `GRAPHS` where it replays a recorded graph, else `CALLS`."""
    return GRAPHS if device == "cuda" and mode in _GRAPH_MODES else CALLS


@dataclass(frozen=True)
class Competitor:
    """One way of computing the map.

    Attributes:
        framework: `torch` or `jax`.
        implementation: a name of the tree's registry, `stock:...` for what users write instead, or `dense`.
        mode: one of `MODES`.
        kind: `implementation`, `stock` or `yardstick` (computes another function; never ranked).
    """

    framework: str
    implementation: str
    mode: str
    kind: str = IMPLEMENTATION

    @property
    def label(self) -> str:
        """One readable name, for example `torch matmul (eager)`."""
        return f"{self.framework} {self.implementation} ({self.mode})"


@dataclass(frozen=True)
class Catalogue:
    """The competitors that one framework's worker can run, as it reports them.

    Attributes:
        framework: `torch` or `jax`.
        implementations: names of the tree's registry, in its order.
        stock: what users of the framework write instead.
        yardsticks: functions that are timed for orientation only.
        missing: what users write instead, but cannot be run there, each with the reason.
        unequal: names of the tree's registry for partitions of unequal sizes.
        unequal_stock: what users write instead for these.
        shared: names of the tree's registry with one dense product for an input that all partitions share. What users
            write instead is the same as without, on an input that is expanded.
        only_on: names that not every device runs, each with the devices that do. Elsewhere they take part only where
            they are asked for by name, with the reason why not in their record.
    """

    framework: str
    implementations: tuple[str, ...]
    stock: tuple[str, ...]
    yardsticks: tuple[str, ...]
    missing: Mapping[str, str] = field(default_factory=dict)
    unequal: tuple[str, ...] = ()
    unequal_stock: tuple[str, ...] = ()
    shared: tuple[str, ...] = ()
    only_on: Mapping[str, Sequence[str]] = field(default_factory=dict)

    def kinds(self, workload: Workload | None = None) -> dict[str, str]:
        """Return name to kind, in the order in which competitors are listed.

        Args:
            workload: that they are to compute; None for all names.
        """
        equal = (self.implementations, self.stock, self.yardsticks)
        if workload is None:
            found = (self.implementations + self.unequal, self.stock + self.unequal_stock, self.yardsticks)
        elif workload.unequal:
            found = (self.unequal, self.unequal_stock, self.yardsticks)
        else:
            found = (self.shared, self.stock, ()) if workload.layout == SHARED else equal
        kinds = zip((IMPLEMENTATION, STOCK, YARDSTICK), found, strict=True)
        return {name: kind for kind, names in kinds for name in names}


def competitors_for(
    catalogues: Sequence[Catalogue],
    *,
    compiled: Sequence[str] = (),
    modes: Mapping[str, Sequence[str]] = MappingProxyType({}),
    launched: Sequence[str] = (),
    launches: Mapping[str, Sequence[str]] = MappingProxyType({}),
    device: str | None = None,
    only: Sequence[str] = (),
    without: Sequence[str] = (),
    only_modes: Sequence[str] = (),
    workload: Workload | None = None,
) -> tuple[Competitor, ...]:
    """List the competitors of a cell.

    Args:
        catalogues: one for each framework that takes part.
        compiled: names that run in the further modes as well.
        modes: framework to its further modes.
        launched: names that run in some of the further modes only.
        launches: framework to these modes.
        device: leaves out what it does not run; None leaves out nothing.
        only: names to keep; empty keeps all but `without`.
        without: names that take part only if `only` holds them.
        only_modes: modes to keep, in which every competitor then runs; empty keeps `compiled` to the further ones.
        workload: that they compute, see `Catalogue.kinds`.

    Returns:
        Competitors, framework by framework, each in its default mode first.
    """
    found: list[Competitor] = []
    for catalogue in catalogues:
        kinds = {
            name: kind
            for name, kind in catalogue.kinds(workload).items()
            if (
                name in only
                if only
                else name not in without and device in (None, *catalogue.only_on.get(name, (device,)))
            )
        }
        mode = DEFAULT_MODE[catalogue.framework]
        found.extend(Competitor(catalogue.framework, name, mode, kind) for name, kind in kinds.items())
        for names, further in ((kinds if only_modes else compiled, modes), (launched, launches)):
            found.extend(
                Competitor(catalogue.framework, name, other, kinds[name])
                for name in names
                if name in kinds
                for other in further.get(catalogue.framework, ())
            )
    kept = (competitor for competitor in found if not only_modes or competitor.mode in only_modes)
    # What users write instead is no layer of this project's.
    kept = (competitor for competitor in kept if (competitor.mode, competitor.kind) not in _NO_LAYER)
    return tuple(dict.fromkeys(kept))


def further_modes(
    division: str,
    device: str,
    *,
    compile_gradients: bool,
    direction: str | None = None,
    named: Sequence[str] = (),
) -> dict[str, tuple[str, ...]]:
    """Return framework to the modes beside the default one that a division compares.

    stock: `torch.compile` with its defaults. matched: the same, a program that JAX compiled ahead of time, a training
    step that gives its old parameters up, and on a GPU CUDA graphs on both sides and a backward pass in one thread.
    tuned: all that the frameworks offer for speed.

    Args:
        division: of the cell.
        device: of the cell.
        compile_gradients: false leaves out what `torch.compile` takes most of the time of a cell for; a GPU runs
            `reduce-overhead`, one of its graphs, all the same.
        direction: of the cell; None for all modes that any direction has.
        named: modes that were asked for by name, which alone adds `nnx-jit`.
    """
    torch: tuple[str, ...] = (COMPILE,) if compile_gradients else ()
    jax: tuple[str, ...] = ()
    if division == "tuned" and compile_gradients:
        torch += (MAX_AUTOTUNE,)
    if division != "stock":
        # A CPU's backward runs in one thread anyway.
        if device == "cuda":
            torch += (CUDA_GRAPH,) if direction != "train_step" else ()
            torch += (GRAPHED_CALLABLES, REDUCE_OVERHEAD, *((ONE_THREAD,) if direction != "forward" else ()))
            jax += (JIT_GRAPH,)
        jax += (AOT, *((DONATE,) if direction in (None, "train_step") else ()))
    if NNX_JIT in named:
        jax += (NNX_JIT,)
    return {"torch": torch, "jax": jax}


def offered_modes(division: str, device: str, frameworks: Sequence[str] = FRAMEWORKS) -> tuple[str, ...]:
    """Return all modes of some frameworks that a division compares on a device."""
    further = further_modes(division, device, compile_gradients=True, named=MODES)
    return tuple(mode for name in frameworks for mode in (DEFAULT_MODE[name], *further[name]))
