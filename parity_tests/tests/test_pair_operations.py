"""Operations that users' models are made of: a faithful port of each holds, and one with a small bug does not.

A sample runs always, all of them with `--pair-families`.
"""

import functools
import itertools

import numpy as np
import pytest

pytest.importorskip("einops", reason="einops is not installed here")
pytest.importorskip("torch", reason="torch is not installed here")
pytest.importorskip("flax", reason="flax is not installed here")

import jax
import jax.numpy as jnp
import jax.scipy.linalg
import torch
import torch.nn.functional as F
from jax import lax
from torch.utils.checkpoint import checkpoint

from parity_tests.frameworks.torch import operations
from parity_tests.frameworks.torch.noise import DoublePrecision
from parity_tests.pair import check_pair

D = 4
W = {"w": np.random.default_rng(0).standard_normal((D, D)).astype(np.float32)}
ROWS = ((3, D),)
ALWAYS = {"solve", "cumprod", "scan", "custom gradient", "sort"}
TABLE = {}


def operation(name, torch_side, flax_side, bug, inputs=ROWS, dtypes=("float32", "bfloat16"), arrays=W, **options):
    """Add a row: functions of parameters and inputs on both sides, and one with a bug."""
    TABLE[name] = torch_side, flax_side, bug, inputs, dtypes, arrays, options


def linear_algebra(name, torch_side, flax_side, bug, **options):
    """Add a function of a well-conditioned matrix, which has no 16-bit kernel."""

    def of(function, eye, transposed):
        def run(p, x):
            m = p["w"] @ transposed(p["w"])
            return function(m + 2 * eye(D, dtype=m.dtype), x)

        return run

    made = [of(torch_side, torch.eye, lambda w: w.mT)]
    made += [of(function, jnp.eye, lambda w: w.T) for function in (flax_side, bug)]
    operation(name, *made, dtypes=("float32",), **options)


linear_algebra(
    "solve",
    lambda m, x: torch.linalg.solve(m, x.mT),
    lambda m, x: jnp.linalg.solve(m, x.T),
    lambda m, x: jnp.linalg.solve(m + 1e-6 * jnp.eye(D, dtype=m.dtype), x.T),
)
linear_algebra(
    "triangular solve",
    lambda m, x: torch.linalg.solve_triangular(m.tril(), x.mT, upper=False),
    lambda m, x: jax.scipy.linalg.solve_triangular(jnp.tril(m), x.T, lower=True),
    lambda m, x: jax.scipy.linalg.solve_triangular(jnp.tril(m), x.T, lower=True, unit_diagonal=True),
)
linear_algebra(
    "inv", lambda m, x: torch.linalg.inv(m) @ x.mT, lambda m, x: jnp.linalg.inv(m) @ x.T, lambda m, x: m @ x.T
)
linear_algebra(
    "det",
    lambda m, x: torch.linalg.det(m) * x,
    lambda m, x: jnp.linalg.det(m) * x,
    lambda m, x: jnp.linalg.det(m * 1.0000001) * x,
)
linear_algebra(
    "slogdet",
    lambda m, x: torch.linalg.slogdet(m).logabsdet * x,
    lambda m, x: jnp.linalg.slogdet(m)[1] * x,
    lambda m, x: jnp.linalg.slogdet(m)[1] / 2 * x,
)
linear_algebra(
    "expm",
    lambda m, x: torch.linalg.matrix_exp(m / 8) @ x.mT,
    lambda m, x: jax.scipy.linalg.expm(m / 8) @ x.T,
    lambda m, x: jax.scipy.linalg.expm(m / 8 + 1e-7) @ x.T,
)
linear_algebra(
    "cholesky",
    lambda m, x: torch.linalg.cholesky(m) @ x.mT,
    lambda m, x: jnp.linalg.cholesky(m) @ x.T,
    lambda m, x: jnp.linalg.cholesky(m).T @ x.T,
)
linear_algebra(
    "eigenvalues",
    lambda m, x: torch.linalg.eigvalsh(m) * x,
    lambda m, x: jnp.linalg.eigvalsh(m) * x,
    lambda m, x: jnp.linalg.eigvalsh(m)[::-1] * x,
)
linear_algebra(
    "projector on an eigenvector",
    lambda m, x: x @ torch.linalg.eigh(m).eigenvectors[:, -1:] @ torch.linalg.eigh(m).eigenvectors[:, -1:].mT,
    lambda m, x: x @ jnp.linalg.eigh(m)[1][:, -1:] @ jnp.linalg.eigh(m)[1][:, -1:].T,
    lambda m, x: x @ jnp.linalg.eigh(m)[1][:, :1] @ jnp.linalg.eigh(m)[1][:, :1].T,
)
linear_algebra(
    "singular values",
    lambda m, x: torch.linalg.svdvals(m[:3]) * x[:, :3],
    lambda m, x: jnp.linalg.svd(m[:3], compute_uv=False) * x[:, :3],
    lambda m, x: jnp.linalg.svd(m[:3], compute_uv=False) ** 2 * x[:, :3],
)
linear_algebra(
    "qr",
    lambda m, x: (lambda q: q @ q.mT @ x.mT)(torch.linalg.qr(m[:, :2]).Q),
    lambda m, x: (lambda q: q @ q.T @ x.T)(jnp.linalg.qr(m[:, :2])[0]),
    lambda m, x: (lambda q: q @ q.T @ x.T)(jnp.linalg.qr(m[:, 1:3])[0]),
)
linear_algebra(
    "pinv",
    lambda m, x: torch.linalg.pinv(m[:, :3]) @ x.mT,
    lambda m, x: jnp.linalg.pinv(m[:, :3]) @ x.T,
    lambda m, x: m[:, :3].T @ x.T,
)

# --- Order, sums, indices ---------------------------------------------------------------------------------------------


def both(torch_side, flax_side):
    """Return functions of `x @ w` on both sides."""
    return lambda p, x: torch_side(x @ p["w"]), lambda p, x: flax_side(x @ p["w"])


def of_product(name, torch_side, flax_side, bug, **options):
    first, second = both(torch_side, flax_side)
    operation(name, first, second, lambda p, x: bug(x @ p["w"]), **options)


of_product("sort", lambda y: y.sort(-1).values, lambda y: jnp.sort(y, -1), lambda y: -jnp.sort(-y, -1))
of_product("argsort", lambda y: (y, y.argsort(-1)), lambda y: (y, jnp.argsort(y, -1)), lambda y: (y, jnp.argsort(-y)))
of_product(
    "top-k",
    lambda y: y.topk(2).values * y.topk(2).indices,
    lambda y: lax.top_k(y, 2)[0] * lax.top_k(y, 2)[1],
    lambda y: lax.top_k(-y, 2)[0] * lax.top_k(-y, 2)[1],
)
of_product("argmax", lambda y: (y, y.argmax(0)), lambda y: (y, y.argmax(0)), lambda y: (y, y.argmin(0)))
of_product("cumsum", lambda y: y.cumsum(0), lambda y: jnp.cumsum(y, 0), lambda y: jnp.cumsum(y, 0) - y)
of_product("cumprod", lambda y: y.cumprod(0), lambda y: jnp.cumprod(y, 0), lambda y: jnp.cumprod(y, 1))
of_product(
    "logcumsumexp",
    lambda y: y.logcumsumexp(0),
    lambda y: lax.cumlogsumexp(y, 0),
    lambda y: lax.cumlogsumexp(y, 0, reverse=True),
)
of_product("cummax", lambda y: y.cummax(0).values, lambda y: lax.cummax(y, 0), lambda y: lax.cummin(y, 0))
ORDER = np.asarray([2, 0, 1])
of_product(
    "gather",
    lambda y: y.gather(0, torch.tensor(ORDER)[:, None].expand(3, D)),
    lambda y: jnp.take_along_axis(y, ORDER[:, None], 0),
    lambda y: y[ORDER[::-1]],
)
of_product(
    "scatter_add",
    lambda y: torch.zeros(2, D, dtype=y.dtype).index_add(0, torch.tensor([0, 1, 0]), y),
    lambda y: jnp.zeros((2, D), y.dtype).at[jnp.asarray([0, 1, 0])].add(y),
    lambda y: jnp.zeros((2, D), y.dtype).at[jnp.asarray([0, 1, 0])].set(y),
)
of_product(
    "index_copy",
    lambda y: y.index_copy(0, torch.tensor([0, 2]), 2 * y[:2]),
    lambda y: y.at[jnp.asarray([0, 2])].set(2 * y[:2]),
    lambda y: y.at[jnp.asarray([0, 1])].set(2 * y[:2]),
)
of_product(
    "dynamic slice",
    lambda y: y.narrow(0, int(y.detach().argmax(0)[0].clamp(max=1)), 2),
    lambda y: lax.dynamic_slice_in_dim(y, jnp.minimum(y.argmax(0)[0], 1), 2, 0),
    lambda y: lax.dynamic_slice_in_dim(y, 1 - jnp.minimum(y.argmax(0)[0], 1), 2, 0),
)
of_product("prod", lambda y: y.prod(-1), lambda y: jnp.prod(y, -1), lambda y: jnp.prod(y[:, 1:], -1))
of_product(
    "logsumexp",
    lambda y: y.logsumexp(-1),
    lambda y: jax.nn.logsumexp(y, -1),
    lambda y: jax.nn.logsumexp(y, -1) - jnp.log(4.0).astype(y.dtype) * 1e-6,
)
of_product(
    "std",
    lambda y: y.std(-1),
    lambda y: jnp.std(y, -1, ddof=1),
    lambda y: jnp.std(y, -1),
)
of_product(
    "cross",
    lambda y: torch.linalg.cross(y[:, :3], y[:, 1:]),
    lambda y: jnp.cross(y[:, :3], y[:, 1:]),
    lambda y: jnp.cross(y[:, 1:], y[:, :3]),
)
of_product(
    "cdist",
    lambda y: torch.cdist(y, y[:2] + 1),
    lambda y: jnp.sqrt(jnp.sum((y[:, None] - (y[:2] + 1)[None]) ** 2, -1)),
    lambda y: jnp.sum(jnp.abs(y[:, None] - (y[:2] + 1)[None]), -1),
    dtypes=("float32",),
)
of_product(
    "prelu",
    lambda y: F.prelu(y, y.new_tensor([0.25])),
    lambda y: jnp.where(y >= 0, y, 0.25 * y),
    lambda y: jnp.where(y >= 0, y, 0.2500001 * y),
)
of_product(
    "huber loss",
    lambda y: F.huber_loss(y, torch.zeros_like(y), delta=0.5),
    lambda y: jnp.mean(jnp.where(jnp.abs(y) <= 0.5, 0.5 * y * y, 0.5 * (jnp.abs(y) - 0.25))),
    lambda y: jnp.mean(jnp.where(jnp.abs(y) <= 1.0, 0.5 * y * y, jnp.abs(y) - 0.5)),
)
of_product(
    "polar",
    lambda y: torch.view_as_real(torch.polar(y[:, :2].abs(), y[:, 2:])),
    lambda y: jnp.stack([jnp.abs(y[:, :2]) * jnp.cos(y[:, 2:]), jnp.abs(y[:, :2]) * jnp.sin(y[:, 2:])], -1),
    lambda y: jnp.stack([jnp.abs(y[:, :2]) * jnp.sin(y[:, 2:]), jnp.abs(y[:, :2]) * jnp.cos(y[:, 2:])], -1),
    dtypes=("float32",),
)
operation(
    "einsum",
    lambda p, x: torch.einsum("bi,ij,bj->b", x, p["w"], x),
    lambda p, x: jnp.einsum("bi,ij,bj->b", x, p["w"], x),
    lambda p, x: jnp.einsum("bi,ij,bi->b", x, p["w"], x),
)

# --- Loops, branches, gradients of one's own --------------------------------------------------------------------------


def torch_scan(p, x):
    h, found = torch.zeros(D, dtype=x.dtype), []
    for row in x:
        h = torch.tanh(row + h @ p["w"])
        found.append(h)
    return torch.stack(found)


def scan(p, x, start=0.0, dtype=None):
    def step(h, row):
        h = jnp.tanh(row + h.astype(row.dtype) @ p["w"])
        return h.astype(dtype or row.dtype), h

    return lax.scan(step, jnp.full(D, start, dtype or x.dtype), x)[1]


operation("scan", torch_scan, scan, functools.partial(scan, start=1e-6))
operation(
    "scan with a carry in float32",
    torch_scan,
    functools.partial(scan, dtype=jnp.float32),
    functools.partial(scan, start=1e-6, dtype=jnp.float32),
)
operation(
    "fori_loop",
    lambda p, x: functools.reduce(lambda y, k: torch.tanh(y @ p["w"]), range(3), x),
    lambda p, x: lax.fori_loop(0, 3, lambda k, y: jnp.tanh(y @ p["w"]), x),
    lambda p, x: lax.fori_loop(0, 4, lambda k, y: jnp.tanh(y @ p["w"]), x),
)


def torch_halved(p, x):
    y = x @ p["w"]
    while float(y.detach().abs().max()) > 1.0:
        y = y / 2
    return y


def halved(p, x, limit=1.0):
    return lax.while_loop(lambda y: jnp.max(jnp.abs(y)) > limit, lambda y: y / 2, x @ p["w"])


operation("while_loop", torch_halved, halved, functools.partial(halved, limit=0.5), gradients=False)
of_product(
    "cond",
    lambda y: y.sin() if float(y.detach().sum()) > 0 else y.cos(),
    lambda y: lax.cond(y.sum() > 0, jnp.sin, jnp.cos, y),
    lambda y: lax.cond(y.sum() < 0, jnp.sin, jnp.cos, y),
)
of_product(
    "switch",
    lambda y: (torch.sin, torch.cos, torch.tanh)[int(y.detach()[:, 0].argmax())](y),
    lambda y: lax.switch(y[:, 0].argmax(), (jnp.sin, jnp.cos, jnp.tanh), y),
    lambda y: lax.switch(y[:, 0].argmax(), (jnp.tanh, jnp.sin, jnp.cos), y),
)


class Straight(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x.sign()

    @staticmethod
    def backward(ctx, *grads):
        (x,) = ctx.saved_tensors
        return grads[0] * (x.abs() < 1)


def straight(window):
    @jax.custom_vjp
    def function(x):
        return jnp.sign(x)

    function.defvjp(lambda x: (jnp.sign(x), x), lambda x, g: (g * (jnp.abs(x) < window),))
    return function


def smooth(slope):
    @jax.custom_jvp
    def function(x):
        return jnp.sign(x)

    function.defjvp(lambda x, t: (jnp.sign(x[0]), slope * t[0] * (jnp.abs(x[0]) < 1)))
    return function


of_product("custom gradient", Straight.apply, straight(1.0), straight(2.0))
of_product("custom jvp", Straight.apply, smooth(1.0), smooth(1.01))
of_product(
    "checkpoint",
    lambda y: checkpoint(lambda z: z.tanh().sin(), y, use_reentrant=False),
    jax.checkpoint(lambda y: jnp.sin(jnp.tanh(y))),
    jax.checkpoint(lambda y: jnp.tanh(jnp.sin(y))),
)

# --- Convolutions, resampling, embeddings, attention, norms of weights ------------------------------------------------

IMAGE = {"inputs": ((1, 2, 6, 5),)}


def convolution(name, torch_side, shape, **options):
    def run(p, x, **changed):
        given = {"window_strides": (1, 1), "padding": "VALID"} | options | changed
        return lax.conv_general_dilated(x, p["w"], dimension_numbers=("NCHW", "OIHW", "NCHW"), **given)

    arrays = {"w": np.random.default_rng(1).standard_normal(shape).astype(np.float32)}
    wrong = functools.partial(run, padding=((1, 0), (0, 1))) if "padding" not in options else None
    wrong = wrong or functools.partial(run, padding=tuple(pads[::-1] for pads in options["padding"]))
    operation(name, lambda p, x: torch_side(x, p["w"]), run, wrong, arrays=arrays, **IMAGE)


convolution("conv2d", F.conv2d, (3, 2, 3, 3))
convolution("grouped conv2d", lambda x, w: F.conv2d(x, w, groups=2), (4, 1, 3, 3), feature_group_count=2)
convolution("dilated conv2d", lambda x, w: F.conv2d(x, w, dilation=2), (3, 2, 2, 2), rhs_dilation=(2, 2))
convolution(
    "strided conv2d",
    lambda x, w: F.conv2d(F.pad(x, (1, 0, 1, 0)), w, stride=2),
    (3, 2, 3, 3),
    window_strides=(2, 2),
    padding=((1, 0), (1, 0)),
)
KERNEL = {"w": np.random.default_rng(1).standard_normal((2, 3, 3, 3)).astype(np.float32)}


def transposed(p, x, flipped=True):
    w = jnp.flip(p["w"], (2, 3)) if flipped else p["w"]
    return lax.conv_general_dilated(
        x, jnp.swapaxes(w, 0, 1), (1, 1), ((2, 2), (2, 2)), (2, 2), dimension_numbers=("NCHW", "OIHW", "NCHW")
    )


operation(
    "conv_transpose2d",
    lambda p, x: F.conv_transpose2d(x, p["w"], stride=2),
    transposed,
    functools.partial(transposed, flipped=False),
    arrays=KERNEL,
    **IMAGE,
)
of_product(
    "nearest resampling",
    lambda y: F.interpolate(y[None], scale_factor=2, mode="nearest")[0],
    lambda y: jnp.repeat(y, 2, -1),
    lambda y: jnp.roll(jnp.repeat(y, 2, -1), 1, -1),
)
of_product(
    "linear resampling",
    lambda y: F.interpolate(y[None], size=7, mode="linear")[0],
    lambda y: jax.image.resize(y, (3, 7), "linear"),
    lambda y: jax.image.resize(y, (3, 7), "cubic"),
    dtypes=("float32",),
)
operation(
    "embedding bag",
    lambda p, ids: F.embedding_bag(ids, p["w"], mode="mean"),
    lambda p, ids: p["w"][ids].mean(1),
    lambda p, ids: p["w"][ids].sum(1),
    inputs=lambda rng: (rng.integers(0, D, (3, 2)),),
)


def attention(p, x, scale=D**-0.5):
    q = x @ p["w"]
    s = jnp.where(jnp.tril(jnp.ones((3, 3), bool)), jnp.einsum("bid,bjd->bij", q, x) * scale, -jnp.inf)
    return jax.nn.softmax(s, -1) @ x


operation(
    "scaled_dot_product_attention",
    lambda p, x: F.scaled_dot_product_attention(x @ p["w"], x, x, is_causal=True),
    attention,
    functools.partial(attention, scale=1 / D),
    inputs=((2, 3, D),),
)


def normed(p, x, axis=1):
    return x @ (p["w"] / jnp.linalg.norm(p["w"], axis=axis, keepdims=True)).T


operation(
    "weight norm",
    lambda p, x: x @ torch._weight_norm(p["w"], p["w"].norm(dim=1, keepdim=True) * 0 + 1, 0).mT,
    normed,
    functools.partial(normed, axis=0),
)
operation(
    "spectral norm",
    lambda p, x: x @ (p["w"] / torch.linalg.matrix_norm(p["w"], 2)),
    lambda p, x: x @ (p["w"] / jnp.linalg.norm(p["w"], 2)),
    lambda p, x: x @ (p["w"] / jnp.linalg.norm(p["w"])),
    dtypes=("float32",),
)


def check(name, flax_side, dtypes, **changed):
    torch_side, _, _, inputs, _, arrays, options = TABLE[name]
    given = {"torch_params": arrays, "flax_params": arrays, "params": [(key, key) for key in arrays], "inputs": inputs}
    return check_pair(
        torch_module=torch_side, flax_module=flax_side, dtypes=dtypes, name=name, **given, **(options | changed)
    )


@pytest.mark.parametrize(("name", "faithful"), list(itertools.product(TABLE, (True, False))))
def test_operation(name, faithful, request):
    if name not in ALWAYS and not request.config.getoption("--pair-families"):
        pytest.skip("a sample of the operations runs without --pair-families")
    _, flax_side, bug, _, dtypes, _, options = TABLE[name]
    if faithful:
        report = check(name, flax_side, dtypes)
        assert report.ok, report
        assert {row.dtype for row in report.rows if row.status == "ok"} >= set(dtypes)
    else:
        gradients = options.get("gradients", "custom" in name)
        report = check(name, bug, ("float32",), gradients=gradients, effort="quick")
        assert not report.ok, report
        assert not report.undecided, report


HARD = {"w": np.random.default_rng(3).standard_normal((24, 24)).astype(np.float32)}  # of a condition of a hundred
HARD_PAIRS = {
    "solve": (lambda p, x: torch.linalg.solve(p["w"], x.mT), lambda p, x: jnp.linalg.solve(p["w"], x.T)),
    "triangular solve": (
        lambda p, x: torch.linalg.solve_triangular(p["w"].tril(), x.mT, upper=False),
        lambda p, x: jax.scipy.linalg.solve_triangular(jnp.tril(p["w"]), x.T, lower=True),
    ),
    "svd": (
        lambda p, x: torch.linalg.svdvals(p["w"]) * x,
        lambda p, x: jnp.linalg.svd(p["w"], compute_uv=False) * x,
    ),
    "expm": (
        lambda p, x: torch.linalg.matrix_exp(p["w"] / 4) @ x.mT,
        lambda p, x: jax.scipy.linalg.expm(p["w"] / 4) @ x.T,
    ),
}


@pytest.mark.parametrize("name", HARD_PAIRS)
def test_badly_conditioned_matrices_are_granted_what_they_amplify(name, request):
    if name != "solve" and not request.config.getoption("--pair-families"):
        pytest.skip("a sample of the operations runs without --pair-families")
    torch_side, flax_side = HARD_PAIRS[name]
    arguments = {"torch_params": HARD, "flax_params": HARD, "params": [("w", "w")], "inputs": ((3, 24),)}
    report = check_pair(torch_module=torch_side, flax_module=flax_side, **arguments, effort="quick")
    assert report.ok, report
    assert not any("rounding model" in note for note in report.notes), report.notes
    wrong = check_pair(
        torch_module=torch_side,
        flax_module=lambda p, x: flax_side({"w": p["w"] * (1 + 1e-9)}, x),
        **arguments,
        effort="quick",
        gradients=False,
    )
    assert wrong.first_failing_rung == "forward"


def smooth_l1(p, x):
    d = jnp.abs(x - p["w"][:3])
    return jnp.where(d < 0.5, d**2, d - 0.25).mean()


MODELLED = {
    "rot90": (lambda p, x: torch.rot90(p["w"]) * x[0], lambda p, x: jnp.rot90(p["w"]) * x[0]),
    "vdot": (lambda p, x: torch.vdot(p["w"][0], x[0]), lambda p, x: jnp.vdot(p["w"][0], x[0])),
    "smooth l1": (lambda p, x: F.smooth_l1_loss(x, p["w"][:3], beta=0.5), smooth_l1),
}


@pytest.mark.parametrize("name", MODELLED)
def test_a_rearrangement_a_sum_and_a_loss_have_rounding_models(name):
    torch_side, flax_side = MODELLED[name]
    report = check_pair(
        torch_module=torch_side,
        flax_module=flax_side,
        torch_params=W,
        flax_params=W,
        params=[("w", "w")],
        inputs=ROWS,
        effort="quick",
    )
    assert report.ok, report
    assert not any("rounding model" in note for note in report.notes), report.notes


@pytest.mark.parametrize(("name", "expected"), [("native_layer_norm_backward", "bfloat16"), ("_softmax", "float32")])
def test_the_accumulator_does_not_depend_on_the_luck_of_a_few_elements(monkeypatch, name, expected):
    """torch sums a layer norm's gradients of weight and bias in bf16: ten of them seem right in one draw of some."""
    monkeypatch.setattr(operations, "_accumulators", {})
    func, found = getattr(torch.ops.aten, name).default, []

    def noisy(member, args, kwargs):
        with DoublePrecision("bfloat16", member, 1.0, measure=False):
            return func(*args, **kwargs)

    for seed in range(8):
        operations._accumulators.clear()
        generator = torch.Generator().manual_seed(seed)
        x, dy = (torch.randn(6, 10, dtype=torch.float64, generator=generator) for _ in range(2))
        weight, bias = (torch.randn(10, dtype=torch.float64, generator=generator) for _ in range(2))
        mean, rstd = x.mean(1, keepdim=True), (x.var(1, correction=0, keepdim=True) + 1e-5).rsqrt()
        arguments = (
            (dy, x, [10], mean, rstd, weight, bias, [True, True, True]) if expected == "bfloat16" else (x, 1, False)
        )
        found.append(operations.accumulator(func, arguments, {}, "bfloat16", noisy))
    assert set(found) == {expected}


def matern(m, smooth, x):
    """Return a kernel of the distances between rows, whose square root is guarded where they are zero."""
    d2 = ((x[:, None] - x[None]) ** 2).sum(-1)
    r = m.where(d2 > 0, m.sqrt(m.where(d2 > 0, d2, m.ones_like(d2))), m.zeros_like(d2))
    return (1 + r) * m.exp(-r) if smooth else m.exp(-r)


def judged_matern(seed, smooth=True, port=None):
    def scaled(m):
        return lambda p, x: matern(m, smooth, x / p["w"])

    width = {"w": np.full(3, 0.2, np.float32)}
    return check_pair(
        torch_module=scaled(torch),
        flax_module=port or scaled(jnp),
        torch_params=width,
        flax_params=width,
        params=[("w", "w")],
        inputs=((7, 3),),
        effort="quick",
        seed=seed,
    )


@pytest.mark.parametrize("seed", [1, 7])
def test_equal_products_that_a_compiler_does_not_cancel_are_granted_their_rounding(seed):
    """A kernel that fuses `x / w` into the difference makes it 1e-7 on the diagonal, and zero in the next kernel."""
    report = judged_matern(seed)
    assert report.ok, report


def test_another_kernel_of_equal_products_is_no_rounding():
    report = judged_matern(4, port=lambda p, x: matern(jnp, True, x / p["w"] * (1 + 1e-8)))
    assert report.first_failing_rung == "forward", report


def test_a_gradient_that_is_lost_where_equal_products_do_not_cancel_is_a_note():
    """The direction of a distance of zero is none, that of 1e-7 has length 1."""
    report = judged_matern(4, smooth=False)
    assert any("rounding alone may change d_" in note and "jnp.eye" in note for note in report.notes), report.notes
    eye = jnp.eye(7, dtype=bool)

    def by_position(p, x):
        x = x / p["w"]
        d2 = jnp.where(eye, 1.0, ((x[:, None] - x[None]) ** 2).sum(-1))
        return jnp.exp(-jnp.where(eye, 0.0, jnp.sqrt(d2)))

    report = judged_matern(4, port=by_position, smooth=False)
    assert report.ok, report
    assert not any("equal products" in note for note in report.notes), report.notes
