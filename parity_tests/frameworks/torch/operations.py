"""torch's operations: how each of them rounds, how far its kernels err, and what 16-bit kernels accumulate in.

Errors and accumulators are measured on the device at hand. Most kernels sum 16-bit numbers in float32 and round once;
some (convolution gradients that go through columns, some norm gradients) round to the 16-bit format on the way. Neither
is documented, and both are correct torch: the noise model must know which. float32 is not measured: it promises
float32 sums, so that TF32 counts as a mismatch.
"""

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch.utils._pytree import tree_leaves, tree_map

from parity_tests.judge.dtypes import FORMATS

_DTYPES = {"float64": torch.float64, "float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_KINDS = ("tensor", "complex")
_POINTS = 4099  # a vectorised body and a tail
# As measured, by operation and arguments.
_errors: dict[tuple, float] = {}
_accumulators: dict[tuple, str] = {}
_MEMBERS = 16
# Errors of a result that tell one accumulator from another, and how often a small result is drawn to have so many.
_ENOUGH, _MOST_DRAWS = 128, 8
Noisy = Callable[[int, tuple, dict], Any]


def names(text: str) -> frozenset[str]:
    """Return the names in a text, separated by white space."""
    return frozenset(text.split())


# A copy, a choice or a rearrangement: nothing is rounded. Views are found by their schema instead.
EXACT = names("""
clone copy_ detach neg abs relu threshold threshold_backward where max min amax amin maximum minimum clamp clamp_min
clamp_max gather index index_select embedding masked_fill masked_fill_ cat stack constant_pad_nd flip roll repeat
rot90 sign floor ceil round trunc fill_ zero_ zeros_like ones_like full_like new_zeros new_ones new_full new_empty
empty_like empty zeros ones full scalar_tensor arange sort topk max_pool2d_with_indices max_pool3d_with_indices
adaptive_max_pool2d adaptive_max_pool3d fractional_max_pool2d fractional_max_pool3d max_unpool2d max_unpool3d sgn
complex _conj_physical conj_physical slice_backward select_backward split_with_sizes_copy as_strided_scatter
slice_scatter select_scatter tril triu lift_fresh _unsafe_index bernoulli_ isnan isinf max_dim resize_ set_ tril_ triu_
transpose_ t_ squeeze_ unsqueeze_ unsafe_split unsafe_chunk broadcast_in_dim convert_element_type reflection_pad1d
reflection_pad2d reflection_pad3d replication_pad1d replication_pad2d replication_pad3d _local_scalar_dense
_reshape_copy _unsafe_view _to_copy diagonal_backward eq ne lt le gt ge logical_not logical_and scatter cummax cummin
median nanmedian kthvalue mode eye diag_embed new_empty_strided pixel_shuffle pixel_unshuffle im2col index_fill
index_copy softshrink_backward hardshrink_backward upsample_nearest1d upsample_nearest2d upsample_nearest3d
_upsample_nearest_exact1d _upsample_nearest_exact2d _upsample_nearest_exact3d
""")
# Sums of products or of terms: linear in each tensor argument. Windows of a pool may overlap, so that their backward
# adds what several of them send back to one element.
SUMS = names("""
mm bmm dot vdot mv convolution convolution_backward sum cumsum embedding_dense_backward index_add index_add_ index_put
index_put_ _index_put_impl_ scatter_add scatter_add_ scatter_reduce avg_pool2d avg_pool2d_backward avg_pool3d
avg_pool3d_backward _adaptive_avg_pool2d _adaptive_avg_pool2d_backward _adaptive_avg_pool3d
_adaptive_avg_pool3d_backward trace col2im max_pool2d_with_indices_backward max_pool3d_with_indices_backward
adaptive_max_pool2d_backward adaptive_max_pool3d_backward fractional_max_pool2d_backward
fractional_max_pool3d_backward unfold_backward reflection_pad1d_backward reflection_pad2d_backward
reflection_pad3d_backward replication_pad1d_backward replication_pad2d_backward replication_pad3d_backward
upsample_nearest1d_backward upsample_nearest2d_backward upsample_nearest3d_backward
_upsample_nearest_exact1d_backward _upsample_nearest_exact2d_backward _upsample_nearest_exact3d_backward
_embedding_bag _embedding_bag_forward_only _embedding_bag_backward _embedding_bag_dense_backward
""")
# Fourier transforms: sums whose terms all have the modulus of their input.
TRANSFORMS = names("""
_fft_r2c _fft_c2r _fft_c2c
""")
# Kernels differ in whether they round the product before the addend comes: rounded is the worse case.
SUMS_WITH_ADDEND = names("""
addmm addmv addbmm baddbmm
""")
# Taken apart into simpler operations.
FUSED = names("""
gelu gelu_backward silu silu_backward elu elu_backward leaky_relu_backward softplus softplus_backward hardswish
hardswish_backward hardsigmoid hardsigmoid_backward mish mish_backward log_sigmoid_forward log_sigmoid_backward
sigmoid_backward tanh_backward _softmax _softmax_backward_data _safe_softmax _log_softmax _log_softmax_backward_data
logsumexp native_layer_norm native_layer_norm_backward native_group_norm native_group_norm_backward native_batch_norm
native_batch_norm_backward _native_batch_norm_legit _native_batch_norm_legit_no_training _fused_rms_norm
_fused_rms_norm_backward addcmul addcdiv lerp var_mean std_mean std mse_loss mse_loss_backward smooth_l1_loss
smooth_l1_loss_backward binary_cross_entropy binary_cross_entropy_with_logits nll_loss_forward nll_loss_backward glu
glu_backward rsub native_dropout native_dropout_backward linalg_vector_norm hardtanh_backward norm huber_loss
huber_loss_backward _prelu_kernel _prelu_kernel_backward polar linalg_cross
_weight_norm_interface _weight_norm_interface_backward
""")
# Products of many factors: one rounding each.
PRODUCTS = names("""
prod cumprod
""")
# Algorithms of linear algebra, whose results are right for a matrix that is off by roundings; iterative ones by more.
BACKWARD_STABLE = names("""
_linalg_solve_ex linalg_lu_solve linalg_lu_factor_ex linalg_lu linalg_solve_triangular triangular_solve linalg_inv_ex
_linalg_det _linalg_slogdet linalg_matrix_exp linalg_cholesky_ex cholesky_solve cholesky_inverse _linalg_eigh
_linalg_eigvals linalg_eig _linalg_svd linalg_qr geqrf linalg_householder_product ormqr linalg_pinv linalg_lstsq
""")
ITERATIVE = names("""
_linalg_eigh _linalg_eigvals linalg_eig _linalg_svd linalg_pinv linalg_lstsq linalg_matrix_exp
""")
# Resampling: the weights come from coordinates that the kernel computes in its own format.
RESAMPLING = names("""
upsample_linear1d upsample_bilinear2d upsample_trilinear3d upsample_bicubic2d upsample_linear1d_backward
upsample_bilinear2d_backward upsample_trilinear3d_backward upsample_bicubic2d_backward _upsample_bilinear2d_aa
_upsample_bilinear2d_aa_backward _upsample_bicubic2d_aa _upsample_bicubic2d_aa_backward grid_sampler_2d
grid_sampler_2d_backward grid_sampler_3d grid_sampler_3d_backward
""")
# Elementary functions, which are not always correctly rounded.
FUNCTIONS = names("""
exp exp2 expm1 log log1p log2 log10 tanh sigmoid erf erfc sin cos tan asin acos atan sinh cosh asinh acosh atanh
sqrt rsqrt reciprocal div pow atan2 lgamma digamma exp_ tanh_ sigmoid_ sqrt_ rsqrt_ reciprocal_ div_ pow_
""")
# Of complex numbers, or into them.
COMPLEX_FUNCTIONS = FUNCTIONS | names("""
abs sgn sign angle polar square
""")


def _grid(dtype: torch.dtype, device: torch.device, positive: bool) -> torch.Tensor:
    generator = torch.Generator().manual_seed(7)
    size = torch.exp(torch.empty(_POINTS, dtype=torch.float64).uniform_(-9, 4, generator=generator))
    sign = 1.0 if positive else torch.randint(0, 2, (_POINTS,), generator=generator) * 2 - 1
    return (size * sign).to(device=device, dtype=dtype)


def function_error(func: Any, args: tuple, kwargs: dict, dtype: str) -> float:
    """Return the largest error of an elementary function in units of u, at least 1.

    Of a complex result the modulus of the error counts, in units of sqrt(2) u of the modulus.
    """
    name = func._schema.name.removeprefix("aten::")
    in_plane = name == "polar" or any(isinstance(leaf, torch.Tensor) and leaf.is_complex() for leaf in args)
    if name not in (COMPLEX_FUNCTIONS if in_plane else FUNCTIONS) or dtype == "float64":
        return 1.0
    dtype = "float32" if in_plane else dtype
    device = next(leaf.device for leaf in args if isinstance(leaf, torch.Tensor))
    shown = tuple(_kind(leaf) if isinstance(leaf, torch.Tensor) else leaf for leaf in args)
    key = (func, shown, tuple(kwargs.items()), dtype, device)
    if key not in _errors:
        fmt, worst = FORMATS[dtype], 1.0
        for positive in (False, True):
            points = [_grid(_DTYPES[dtype], device, positive).roll(k) for k in range(len(args))]

            def run(exact: bool, points: list[torch.Tensor] = points) -> torch.Tensor:
                filled = []
                for point, leaf in zip(points, shown, strict=True):
                    # A quarter turn of the points is a grid of its own for the imaginary part.
                    value = torch.complex(point, point.roll(_POINTS // 4)) if leaf == "complex" else point
                    wide = torch.complex128 if value.is_complex() else torch.float64
                    filled.append(value.to(wide if exact else value.dtype, copy=True) if leaf in _KINDS else leaf)
                result = func(*filled, **kwargs)
                return result.to(torch.complex128 if result.is_complex() else torch.float64)

            exact, rounded = run(True), run(False)
            modulus = exact.abs()
            usable = torch.isfinite(exact) & (modulus < 2.0**15) & (modulus > 2.0**10 * fmt.smallest_normal)
            error = ((rounded - exact).abs() / modulus)[usable & torch.isfinite(rounded)]
            unit = fmt.roundoff * (2**0.5 if exact.is_complex() else 1.0)
            worst = max(worst, float(error.max()) / unit if error.numel() else 1.0)
        _errors[key] = worst
    return _errors[key]


def kernel_errors(func: Any, args: tuple, kwargs: dict, dtype: str) -> list[float]:
    """Return the largest absolute errors of a kernel's results, on its arguments as they are in the format.

    Args:
        func: the operation.
        args: float64 arguments.
        kwargs: keyword arguments.
        dtype: format to measure in; where it has no such kernel its 32-bit one counts.
    """

    def results(to: torch.dtype | None, narrow: torch.dtype) -> list[torch.Tensor]:
        def cast(leaf: Any) -> Any:
            if not isinstance(leaf, torch.Tensor) or not leaf.is_floating_point():
                return leaf
            return leaf.to(narrow).to(to or narrow)

        found = func(*map(cast, args), **{key: cast(value) for key, value in kwargs.items()})
        leaves = found if isinstance(found, tuple | list) else (found,)
        return [leaf.double() for leaf in leaves if isinstance(leaf, torch.Tensor) and leaf.is_floating_point()]

    narrow = _DTYPES[dtype]
    try:
        rounded = results(None, narrow)
    except (NotImplementedError, RuntimeError):
        narrow = torch.float32
        rounded = results(None, narrow)
    exact = results(torch.float64, narrow)
    return [
        float((r - e).abs().nan_to_num(0.0).max()) if r.numel() else 0.0 for r, e in zip(rounded, exact, strict=True)
    ]


def _kind(tensor: torch.Tensor) -> str:
    return "complex" if tensor.is_complex() else "tensor"


def accumulator(func: Any, args: tuple, kwargs: dict, dtype: str, noisy: Noisy) -> str:
    """Return `float32` where the kernel errs as a float32 accumulator explains, else `dtype`.

    The model's spread is an upper bound on the root mean square of the errors it describes (roundings are uniform, the
    model takes their largest size), so that errors above it come from a coarser accumulator.

    Args:
        func: the operation.
        args: float64 arguments, as they occur.
        kwargs: keyword arguments.
        dtype: storage format; 16 bits, or there is nothing to measure.
        noisy: runs the operation with the noise of a float32 accumulator, for a member's number and its arguments.
    """
    if dtype not in ("bfloat16", "float16"):
        return dtype
    key = (func, dtype, *(_outline(leaf) for leaf in tree_leaves((args, kwargs))))
    if key not in _accumulators:
        _accumulators[key] = "float32" if _explained(func, args, kwargs, dtype, noisy) else dtype
    return _accumulators[key]


def _outline(leaf: Any) -> Any:
    return (tuple(leaf.shape), leaf.dtype, leaf.device) if isinstance(leaf, torch.Tensor) else str(leaf)


def _explained(func: Any, args: tuple, kwargs: dict, dtype: str, noisy: Noisy) -> bool:
    def cast(leaf: Any, to: torch.dtype) -> Any:
        return leaf.to(to) if isinstance(leaf, torch.Tensor) and leaf.is_floating_point() else leaf

    generator, draws, drawn = torch.Generator().manual_seed(0xACC), 1, 0
    while drawn < draws:
        # Some operations update an argument (running statistics): what is measured must leave the caller's alone.
        given = tree_map(functools.partial(_redrawn, drawn=drawn, generator=generator), (args, kwargs))
        stored = tree_map(lambda leaf: cast(leaf, _DTYPES[dtype]), given)
        wide = tree_map(lambda leaf: cast(leaf, torch.float64), stored)
        try:
            received = _floats(func(*stored[0], **stored[1]))
        except RuntimeError:
            return False  # the kernel wants mixed formats (statistics in float32): the coarser model covers it
        exact = _floats(func(*wide[0], **wide[1]))
        squares = [torch.zeros_like(value) for value in exact]
        middle = _floats(func(*given[0], **given[1]))
        for member in range(_MEMBERS):
            for total, value, centre in zip(squares, _floats(noisy(member, *given)), middle, strict=True):
                total += (value - centre) ** 2 / _MEMBERS
        for value, centre, variance in zip(received, exact, squares, strict=True):
            usable = torch.isfinite(value) & (variance > 0) & (centre.abs() > FORMATS[dtype].smallest_normal)
            ratios = ((value - centre) ** 2 / variance)[usable]
            if ratios.numel() and float(ratios.mean()) > 1.0:
                return False
            # A few elements, such as the gradient of a bias, may err little by luck: they are drawn again.
            draws = max(draws, min(_MOST_DRAWS, -(-_ENOUGH // max(1, ratios.numel()))))
        drawn += 1
    return True


def _redrawn(leaf: Any, drawn: int, generator: torch.Generator) -> Any:
    """Copy a tensor; of numbers, and not in the first draw, each is made smaller by another factor of a half to one."""
    if not isinstance(leaf, torch.Tensor) or not drawn or not leaf.is_floating_point():
        return leaf.clone() if isinstance(leaf, torch.Tensor) else leaf
    factors = 0.5 + 0.5 * torch.rand(leaf.shape, generator=generator, dtype=torch.float64)
    return leaf * factors.to(leaf.device)


def _floats(result: Any) -> list[torch.Tensor]:
    leaves = result if isinstance(result, tuple | list) else (result,)
    return [leaf.double() for leaf in leaves if isinstance(leaf, torch.Tensor) and leaf.is_floating_point()]
