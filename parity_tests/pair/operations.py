"""Tables of operation names for the rounding models of both frameworks."""


def names(text: str) -> frozenset[str]:
    """Names separated by white space."""
    return frozenset(text.split())


# A copy, a choice or a rearrangement: nothing is rounded. Views are found by their schema instead.
TORCH_EXACT = names("""
clone copy_ detach neg abs relu threshold threshold_backward where max min amax amin maximum minimum clamp clamp_min
clamp_max gather index index_select embedding masked_fill masked_fill_ cat stack constant_pad_nd flip roll repeat
sign floor ceil round trunc fill_ zero_ zeros_like ones_like full_like new_zeros new_ones new_full new_empty
empty_like empty zeros ones full scalar_tensor arange sort topk max_pool2d_with_indices max_pool3d_with_indices
adaptive_max_pool2d adaptive_max_pool3d fractional_max_pool2d fractional_max_pool3d max_unpool2d max_unpool3d sgn
complex _conj_physical conj_physical slice_backward select_backward split_with_sizes_copy as_strided_scatter
slice_scatter select_scatter tril triu lift_fresh _unsafe_index bernoulli_ isnan isinf max_dim resize_ set_ tril_ triu_
transpose_ t_ squeeze_ unsqueeze_ unsafe_split unsafe_chunk broadcast_in_dim convert_element_type reflection_pad1d
reflection_pad2d reflection_pad3d replication_pad1d replication_pad2d replication_pad3d _local_scalar_dense
_reshape_copy _unsafe_view _to_copy diagonal_backward eq ne lt le gt ge logical_not logical_and scatter cummax cummin
median nanmedian kthvalue mode eye diag_embed new_empty_strided pixel_shuffle pixel_unshuffle im2col index_fill
softshrink_backward hardshrink_backward upsample_nearest1d upsample_nearest2d upsample_nearest3d
_upsample_nearest_exact1d _upsample_nearest_exact2d _upsample_nearest_exact3d
""")
# Sums of products or of terms: linear in each tensor argument. Windows of a pool may overlap, so that their backward
# adds what several of them send back to one element.
TORCH_SUMS = names("""
mm bmm dot mv convolution convolution_backward sum cumsum embedding_dense_backward index_add index_add_ index_put
index_put_ _index_put_impl_ scatter_add scatter_add_ scatter_reduce avg_pool2d avg_pool2d_backward avg_pool3d
avg_pool3d_backward _adaptive_avg_pool2d _adaptive_avg_pool2d_backward _adaptive_avg_pool3d
_adaptive_avg_pool3d_backward trace col2im max_pool2d_with_indices_backward max_pool3d_with_indices_backward
adaptive_max_pool2d_backward adaptive_max_pool3d_backward fractional_max_pool2d_backward
fractional_max_pool3d_backward unfold_backward reflection_pad1d_backward reflection_pad2d_backward
reflection_pad3d_backward replication_pad1d_backward replication_pad2d_backward replication_pad3d_backward
upsample_nearest1d_backward upsample_nearest2d_backward upsample_nearest3d_backward
_upsample_nearest_exact1d_backward _upsample_nearest_exact2d_backward _upsample_nearest_exact3d_backward
""")
# Fourier transforms: sums whose terms all have the modulus of their input.
TORCH_TRANSFORMS = names("""
_fft_r2c _fft_c2r _fft_c2c
""")
# Whether the product is rounded before the addend comes differs between kernels: rounded is the worse case.
TORCH_SUMS_WITH_ADDEND = names("""
addmm addmv addbmm baddbmm
""")
# Taken apart into simpler operations.
TORCH_FUSED = names("""
gelu gelu_backward silu silu_backward elu elu_backward leaky_relu_backward softplus softplus_backward hardswish
hardswish_backward hardsigmoid hardsigmoid_backward mish mish_backward log_sigmoid_forward log_sigmoid_backward
sigmoid_backward tanh_backward _softmax _softmax_backward_data _safe_softmax _log_softmax _log_softmax_backward_data
logsumexp native_layer_norm native_layer_norm_backward native_group_norm native_group_norm_backward native_batch_norm
native_batch_norm_backward _native_batch_norm_legit _native_batch_norm_legit_no_training _fused_rms_norm
_fused_rms_norm_backward addcmul addcdiv lerp var_mean std_mean std mse_loss mse_loss_backward smooth_l1_loss
binary_cross_entropy binary_cross_entropy_with_logits nll_loss_forward nll_loss_backward glu glu_backward rsub
native_dropout native_dropout_backward linalg_vector_norm hardtanh_backward norm
""")
# Resampling: the weights come from coordinates that the kernel computes in its own format.
TORCH_RESAMPLING = names("""
upsample_linear1d upsample_bilinear2d upsample_trilinear3d upsample_bicubic2d upsample_linear1d_backward
upsample_bilinear2d_backward upsample_trilinear3d_backward upsample_bicubic2d_backward _upsample_bilinear2d_aa
_upsample_bilinear2d_aa_backward _upsample_bicubic2d_aa _upsample_bicubic2d_aa_backward grid_sampler_2d
grid_sampler_2d_backward grid_sampler_3d grid_sampler_3d_backward
""")
# Elementary functions, which are not always correctly rounded.
TORCH_FUNCTIONS = names("""
exp exp2 expm1 log log1p log2 log10 tanh sigmoid erf erfc sin cos tan asin acos atan sinh cosh asinh acosh atanh
sqrt rsqrt reciprocal div pow atan2 lgamma digamma exp_ tanh_ sigmoid_ sqrt_ rsqrt_ reciprocal_ div_ pow_
""")
# Of complex numbers, or into them.
TORCH_COMPLEX_FUNCTIONS = TORCH_FUNCTIONS | names("""
abs sgn sign angle polar square
""")

# A copy, a choice or a rearrangement: nothing is rounded.
JAX_EXACT = names("""
reshape transpose broadcast_in_dim slice dynamic_slice dynamic_update_slice gather concatenate pad rev select_n max
min neg abs sign squeeze expand_dims copy stop_gradient reduce_max reduce_min argmax argmin sort top_k clamp floor
ceil round iota split select_and_gather_add reduce_window_max reduce_window_min is_finite optimization_barrier
device_put cummax cummin reduce_and reduce_or reduce_xor real imag complex conj random_seed random_wrap random_unwrap
random_bits random_fold_in random_split threefry2x32 shift_right_logical sharding_constraint scatter scatter-min
scatter-max nextafter pvary stack unstack
""")
# Calls, whose program is evaluated in place.
JAX_INLINED = names("""
pjit jit closed_call core_call remat remat2 checkpoint custom_jvp_call custom_vjp_call custom_vjp_call_jaxpr
custom_lin
""")
# Element by element, operands of size 1 stretched.
JAX_ARITHMETIC = names("""
add sub mul div add_any integer_pow square pow rem scatter-mul
""")
# Elementary functions, which are not always correctly rounded.
JAX_FUNCTIONS = names("""
exp exp2 expm1 log log1p tanh logistic erf erfc erf_inv sin cos tan asin acos atan sinh cosh asinh acosh atanh sqrt
rsqrt cbrt pow atan2 div integer_pow lgamma digamma
""")
# Of complex numbers: real ones have an exact absolute value and sign, and a product of one rounding.
JAX_COMPLEX_FUNCTIONS = JAX_FUNCTIONS | names("""
abs sign square
""")
# What a processor may join with an addition.
JAX_MULTIPLICATIONS = names("""
mul square integer_pow
""")
# Products of many factors: one rounding each.
JAX_PRODUCTS = names("""
reduce_prod cumprod
""")
