"""Write the code of a competitor as a user would paste it: complete, and in the mode that was timed."""

from collections.abc import Mapping
from typing import NamedTuple

from bench.plan.cells import DEVICES, Cell
from bench.plan.competitors import (
    AOT,
    COMPILE,
    CUDA_GRAPH,
    DONATE,
    FRAMEWORKS,
    GRAPHED_CALLABLES,
    IMPLEMENTATION,
    JIT_GRAPH,
    MAX_AUTOTUNE,
    MODES,
    NNX_JIT,
    ONE_THREAD,
    REDUCE_OVERHEAD,
    Competitor,
)
from bench.plan.presets import STEPPED_OPTIMIZERS


class _Spelling(NamedTuple):
    """The lines that a competitor needs, and the expression of its result."""

    result: str  # of x, and of weight and bias or of what `setup` made
    imports: tuple[str, ...] = ()
    setup: tuple[str, ...] = ()  # lines after x, weight and bias
    # In torch the tensors whose gradients are asked for; in JAX the tree of parameters.
    parameters: str = ""


_COMPILE_MODES: Mapping[str, str] = {
    COMPILE: "",
    REDUCE_OVERHEAD: ', mode="reduce-overhead"',
    MAX_AUTOTUNE: ', mode="max-autotune"',
}
_TORCH: Mapping[str, _Spelling] = {
    "stock:bmm+bias": _Spelling("torch.bmm(x.transpose(0, 1), weight).transpose(0, 1) + bias"),
    "stock:baddbmm": _Spelling("torch.baddbmm(bias[:, None], x.transpose(0, 1), weight).transpose(0, 1)"),
    "stock:einsum": _Spelling('torch.einsum("bni,nio->bno", x, weight) + bias'),
    "stock:torch.func": _Spelling(
        "torch.vmap(member, in_dims=(0, 0, 1), out_dims=1)(weight, bias, x)",
        setup=(
            'base = torch.nn.Linear({i}, {o}, device="meta")',
            "",
            "",
            "def member(weight, bias, rows):",
            '    return torch.func.functional_call(base, {{"weight": weight.mT, "bias": bias}}, (rows,))',
        ),
    ),
    "stock:einops.EinMix": _Spelling(
        "module(x)",
        ("from einops.layers.torch import EinMix",),
        (
            'module = EinMix("b n i -> b n o", weight_shape="n i o", bias_shape="n o", n={n}, i={i}, o={o})',
            "module = module.to(device, dtype)",
        ),
        "tuple(module.parameters())",
    ),
    "stock:keras.EinsumDense": _Spelling(
        "layer.stateless_call([weight, bias], [], x)[0]",
        ("import os", "", 'os.environ["KERAS_BACKEND"] = "torch"', "import keras"),
        (
            'sizes = {{"output_shape": ({n}, {o}), "bias_axes": "no", "dtype": "{dtype}"}}',
            'layer = keras.layers.EinsumDense("bni,nio->bno", **sizes)',
            "layer.build(x.shape)",
        ),
    ),
}
_JAX: Mapping[str, _Spelling] = {
    "stock:nnx.Einsum": _Spelling(
        "nnx.merge(graph, parameters)(x)",
        ("from flax import nnx",),
        (
            "module = nnx.Einsum(",
            '    "bni,nio->bno", ({n}, {i}, {o}), ({n}, {o}), param_dtype=dtype, rngs=nnx.Rngs(0)',
            ")",
            "graph, parameters = nnx.split(module)",
        ),
        "parameters",
    ),
    "stock:nnx.LinearGeneral": _Spelling(
        "jnp.swapaxes(nnx.merge(graph, parameters)(jnp.swapaxes(x, 0, 1)), 0, 1)",
        ("from flax import nnx",),
        (
            "module = nnx.LinearGeneral({i}, {o}, batch_axis={{0: {n}}}, param_dtype=dtype, rngs=nnx.Rngs(0))",
            "graph, parameters = nnx.split(module)",
        ),
        "parameters",
    ),
    "stock:linen.DenseGeneral": _Spelling(
        "jnp.swapaxes(module.apply(parameters, jnp.swapaxes(x, 0, 1)), 0, 1)",
        ("from flax import linen",),
        (
            "module = linen.DenseGeneral({o}, batch_dims=(0,), param_dtype=dtype)",
            "parameters = module.init(jax.random.key(1), jnp.swapaxes(x, 0, 1))",
        ),
        "parameters",
    ),
    "stock:einops.EinMix": _Spelling(
        "module.apply(parameters, x)",
        ("from einops.layers.flax import EinMix",),
        (
            'sizes = {{"n": {n}, "i": {i}, "o": {o}}}',
            'module = EinMix("b n i -> b n o", weight_shape="n i o", bias_shape="n o", sizes=sizes)',
            "parameters = module.init(jax.random.key(1), x)",
            "parameters = jax.tree.map(lambda array: array.astype(dtype), parameters)",
        ),
        "parameters",
    ),
    "stock:equinox.filter_vmap": _Spelling(
        "eqx.filter_vmap(lambda one, rows: jax.vmap(one)(rows), in_axes=(eqx.if_array(0), 1), out_axes=1)"
        "(eqx.combine(parameters, static), x)",
        ("import equinox as eqx",),
        (
            "keys = jax.random.split(jax.random.key(1), {n})",
            "module = eqx.filter_vmap(lambda key: eqx.nn.Linear({i}, {o}, dtype=dtype, key=key))(keys)",
            "parameters, static = eqx.partition(module, eqx.is_array)",
        ),
        "parameters",
    ),
    "stock:keras.EinsumDense": _Spelling(
        "layer.stateless_call(parameters, [], x)[0]",
        ("import os", "", 'os.environ["KERAS_BACKEND"] = "jax"', "import keras"),
        (
            'sizes = {{"output_shape": ({n}, {o}), "bias_axes": "no", "dtype": "{dtype}"}}',
            'layer = keras.layers.EinsumDense("bni,nio->bno", **sizes)',
            "layer.build(x.shape)",
            "parameters = [weight, bias]",
        ),
        "parameters",
    ),
}
# To the precision that the matched and tuned divisions ask for, in each framework's own words.
_PRECISION: Mapping[str, Mapping[str, str]] = {
    "torch": {"ieee_fp32": "highest", "tf32": "high"},
    "jax": {"ieee_fp32": "highest", "tf32": "tensorfloat32", "fp64": "highest"},
}


def _optimiser(cell: Cell) -> list[str]:
    known = cell.optimizer in STEPPED_OPTIMIZERS
    return [f"# The optimiser's step follows; `{cell.optimizer}` was timed."] if known else []


def code_to_paste(competitor: Competitor, cell: Cell) -> str | None:
    """Return a program that runs as it stands, with random rows and weights of the cell's sizes.

    Returns:
        None for a competitor whose spelling is not known, such as one of a later version.
    """
    framework = competitor.framework
    # A record may have been edited by hand, and what is printed here will be run.
    if competitor.mode not in MODES or framework not in FRAMEWORKS or cell.device not in DEVICES:
        return None
    if competitor.kind == IMPLEMENTATION and competitor.implementation.isidentifier():
        call = f'partitioned_linear(x, weight, bias, implementation="{competitor.implementation}")'
        known = _Spelling(call, (f"from {framework}_impl import partitioned_linear",))
    else:
        known = {"torch": _TORCH, "jax": _JAX}[framework].get(competitor.implementation)
    if known is None:
        return None
    write = {"torch": _torch, "jax": _jax}[framework]
    return "\n".join(write(known, competitor.mode, cell)) + "\n"


def _sizes(cell: Cell) -> dict[str, object]:
    w = cell.workload
    return {"b": w.batch, "n": w.num_partitions, "i": w.in_features, "o": w.out_features, "dtype": cell.dtype}


def _ordered(framework: tuple[str, ...], imports: tuple[str, ...]) -> list[str]:
    """Put what must be set before an import before the framework's own."""
    return [*imports, *framework] if imports[:1] == ("import os",) else [*framework, *imports]


def _torch(known: _Spelling, mode: str, cell: Cell) -> list[str]:
    sizes, gradients = _sizes(cell), cell.direction != "forward"
    lines = [*_ordered(("import torch",), known.imports), ""]
    if cell.division != "stock" and (precision := _PRECISION["torch"].get(cell.precision)):
        lines += [f'torch.set_float32_matmul_precision("{precision}")']
    lines += [
        f'device, dtype = "{cell.device}", torch.{cell.dtype}',
        "x = torch.randn({b}, {n}, {i}, device=device, dtype=dtype)  # (rows, n, in)".format(**sizes),
    ]
    if not known.parameters:
        lines += [
            "weight = torch.randn({n}, {i}, {o}, device=device, dtype=dtype)  # (n, in, out)".format(**sizes),
            "bias = torch.randn({n}, {o}, device=device, dtype=dtype)".format(**sizes),
        ]
    lines += [line.format(**sizes) for line in known.setup]
    parameters = known.parameters or "(weight, bias)"
    if gradients:
        lines += [f"leaves = (x, *{parameters})", "for leaf in leaves:", "    leaf.requires_grad_()"]
        lines += ["dy = torch.ones({b}, {n}, {o}, device=device, dtype=dtype)".format(**sizes)]
    elif known.parameters:
        lines += ["module.requires_grad_(False)"]
    given = "x" if known.parameters else "x, weight, bias"
    lines += ["", "", f"def linear({given}):", f"    return {known.result}", "", ""]
    if mode in _COMPILE_MODES:
        lines += [f"linear = torch.compile(linear, dynamic=False{_COMPILE_MODES[mode]})", "", ""]
    if mode == GRAPHED_CALLABLES and known.parameters:
        # Of a function the arguments alone are recorded.
        lines += ["linear = torch.cuda.make_graphed_callables(module, (x,))", "", ""]
    elif mode == GRAPHED_CALLABLES:
        lines += [f"linear = torch.cuda.make_graphed_callables(linear, ({given}))", "", ""]
    if mode == ONE_THREAD:
        lines += ["torch.autograd.set_multithreading_enabled(False)  # for the whole program", "", ""]
    lines += ["def step():"]
    if gradients:
        lines += [f"    y = linear({given})", "    return y, *torch.autograd.grad(y, leaves, dy)"]
    else:
        lines += [f"    return linear({given})"]
    lines += ["", ""]
    if mode == CUDA_GRAPH:
        lines += [
            "stream = torch.cuda.Stream()",
            "stream.wait_stream(torch.cuda.current_stream())",
            "with torch.cuda.stream(stream):",
            "    for _ in range(3):",
            "        step()",
            "torch.cuda.current_stream().wait_stream(stream)",
            "graph = torch.cuda.CUDAGraph()",
            "with torch.cuda.graph(graph, stream=stream):",
            "    results = step()",
            "graph.replay()  # results are those of what x holds: put new rows there with x.copy_",
        ]
    else:
        lines += ["results = step()"]
    lines += ["y, *gradients = results" if gradients else "y = results"]
    return lines + _optimiser(cell)


def _jax(known: _Spelling, mode: str, cell: Cell) -> list[str]:
    sizes, gradients = _sizes(cell), cell.direction != "forward"
    lines = [*_ordered(("import jax", "import jax.numpy as jnp"), known.imports), ""]
    if cell.dtype == "float64":
        lines += ['jax.config.update("jax_enable_x64", True)']
    if cell.division != "stock" and (precision := _PRECISION["jax"].get(cell.precision)):
        lines += [f'jax.config.update("jax_default_matmul_precision", "{precision}")']
    lines += [
        f"dtype = jnp.{cell.dtype}",
        "x = jax.random.normal(jax.random.key(0), ({b}, {n}, {i}), dtype)  # (rows, n, in)".format(**sizes),
    ]
    keras = "parameters = [weight, bias]" in known.setup
    if not known.parameters or keras:
        lines += [
            "weight = jax.random.normal(jax.random.key(1), ({n}, {i}, {o}), dtype)  # (n, in, out)".format(**sizes),
            "bias = jax.random.normal(jax.random.key(2), ({n}, {o}), dtype)".format(**sizes),
        ]
    lines += [line.format(**sizes) for line in known.setup]
    given = "x, parameters" if known.parameters else "x, weight, bias"
    lines += ["", "", f"def linear({given}):", f"    return {known.result}", "", ""]
    options = ', compiler_options={"xla_gpu_graph_min_graph_size": 1}' if mode == JIT_GRAPH else ""
    if mode == NNX_JIT:
        lines += ["# Timed was `nnx.jit` of a layer that holds the parameters: this program after more work in Python."]
    if not gradients:
        lines += [f"step = jax.jit(linear{options})"]
        lines += [f"step = step.lower({given}).compile()"] if mode == AOT else []
        return [*lines, f"y = step({given})"]
    lines += [
        f"def forward_backward({given}, dy):",
        f"    y, vjp = jax.vjp(linear, {given})",
        "    return y, *vjp(dy)",
        "",
        "",
        f"step = jax.jit(forward_backward{options})",
        "dy = jnp.ones(({b}, {n}, {o}), dtype)".format(**sizes),
    ]
    lines += [f"step = step.lower({given}, dy).compile()"] if mode == AOT else []
    lines += [f"y, *gradients = step({given}, dy)"]
    if mode == DONATE:
        lines += ["# Timed was one jitted step with the update in it, `donate_argnums` on parameters and state."]
    return lines + _optimiser(cell)
