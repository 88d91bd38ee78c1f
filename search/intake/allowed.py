"""What an uploaded graph may call. Anything that is not here is refused by name.

Kept out on purpose: whatever reads files or the process (``from_file``), hands out uninitialised memory (``empty``,
``resize_``, ``set_``), raises Python integers to powers, depends on data for its shapes, or trusts its shape arguments.
"""

__all__ = ["ATEN", "DROPPED", "HIGHER_ORDER", "PYTHON_OPS", "aten_allowed"]


def _names(text: str) -> frozenset[str]:
    return frozenset(text.split())


ATEN = _names(
    """
    conv1d conv2d conv3d convolution conv_transpose1d conv_transpose2d conv_transpose3d linear addmm mm bmm baddbmm
    matmul einsum dot mv outer bilinear tensordot chain_matmul batch_norm instance_norm layer_norm group_norm
    rms_norm _native_batch_norm_legit_no_training native_layer_norm native_group_norm embedding lstm gru rnn_tanh
    rnn_relu lstm_cell gru_cell rnn_tanh_cell rnn_relu_cell dropout dropout_ feature_dropout feature_dropout_
    alpha_dropout alpha_dropout_ feature_alpha_dropout feature_alpha_dropout_ scaled_dot_product_attention
    _weight_norm relu relu_ relu6 relu6_ leaky_relu leaky_relu_ prelu elu elu_ selu selu_ celu celu_ gelu silu silu_
    mish mish_ hardtanh hardtanh_ hardswish hardswish_ hardsigmoid hardsigmoid_ softplus softshrink hardshrink
    threshold threshold_ sigmoid sigmoid_ log_sigmoid tanh tanh_ softmax _softmax log_softmax _log_softmax glu
    max_pool1d max_pool2d max_pool3d max_pool2d_with_indices avg_pool1d avg_pool2d avg_pool3d adaptive_avg_pool1d
    adaptive_avg_pool2d adaptive_avg_pool3d adaptive_max_pool1d adaptive_max_pool2d _adaptive_avg_pool2d pad
    constant_pad_nd reflection_pad1d reflection_pad2d replication_pad1d replication_pad2d upsample_nearest1d
    upsample_nearest2d upsample_nearest3d upsample_bilinear2d upsample_linear1d upsample_bicubic2d
    upsample_trilinear3d pixel_shuffle pixel_unshuffle channel_shuffle grid_sampler affine_grid_generator im2col
    col2im add add_ sub sub_ mul mul_ div div_ neg neg_ abs abs_ sign reciprocal sqrt sqrt_ rsqrt rsqrt_ square pow
    pow_ exp exp_ exp2 expm1 log log_ log2 log10 log1p sin cos tan asin acos atan atan2 sinh cosh erf erfc floor
    ceil round trunc frac fmod remainder floor_divide true_divide rsub addcmul addcdiv lerp clamp clamp_ clamp_min
    clamp_max clamp_min_ clamp_max_ clip maximum minimum fmax fmin nan_to_num xlogy addbmm addmv addr hypot sinc
    logaddexp logit eq ne lt le gt ge logical_and logical_or logical_not logical_xor bitwise_and bitwise_or
    bitwise_not bitwise_xor __and__ __or__ isnan isinf isfinite where masked_fill masked_fill_ tril triu sum mean
    var std var_mean amax amin max min prod argmax argmin all any norm linalg_vector_norm logsumexp cumsum diff
    cumprod topk sort argsort median nansum view reshape _unsafe_view flatten unflatten squeeze squeeze_ unsqueeze
    unsqueeze_ transpose transpose_ permute t numpy_T mT movedim swapaxes expand expand_as expand_copy repeat
    repeat_interleave tile cat concat stack hstack vstack split split_with_sizes chunk unbind narrow slice select
    index index_select gather take_along_dim scatter vdot diag_embed scatter_ scatter_add_ index_add_
    _upsample_nearest_exact1d _upsample_nearest_exact2d _upsample_nearest_exact3d _upsample_bilinear2d_aa
    _upsample_bicubic2d_aa fft_fft fft_ifft fft_rfft fft_irfft fft_fft2 fft_ifft2 fft_rfft2 fft_irfft2 rrelu rrelu_
    scatter_add index_add index_copy index_put index_put_ slice_scatter select_scatter roll flip rot90 diagonal
    unfold contiguous clone alias detach detach_ copy_ fill_ zero_ lift_fresh_copy view_as reshape_as
    adaptive_max_pool3d broadcast_to broadcast_tensors meshgrid one_hot cdist cosine_similarity pairwise_distance to
    _to_copy type_as zeros ones full zeros_like ones_like full_like new_zeros new_ones new_full arange linspace
    scalar_tensor eye rand randn rand_like randn_like bernoulli bernoulli_ sym_size sym_numel sym_stride
    view_as_complex view_as_real complex polar real imag conj
    """
)
"""Names of aten operators (any overload that does not write to a caller's buffer)."""

DROPPED = _names(
    """
    _assert_tensor_metadata _assert_scalar _assert_async sym_constrain_range sym_constrain_range_for_size
    """
)
"""Checks without a result: they are left out of what is written anew."""

PYTHON_OPS = _names(
    """
    _operator.add _operator.sub _operator.mul _operator.floordiv _operator.mod _operator.truediv _operator.neg
    _operator.eq _operator.ne _operator.lt _operator.le _operator.gt _operator.ge _operator.and_ _operator.or_
    torch.sym_max torch.sym_min torch.sym_int torch.sym_float torch.sym_not
    """
)
"""Arithmetic on sizes. No power: a size is a Python integer, and powers of those never end."""

HIGHER_ORDER = frozenset(
    {"torch.ops.higher_order.wrap_with_set_grad_enabled", "torch.ops.higher_order.wrap_with_autocast"}
)


def aten_allowed(packet: str, overload: str) -> bool:
    """``aten.<packet>.<overload>``; overloads that write to a caller's buffer or take names and generators are out."""
    return packet in ATEN and not {"out", "names", "dimname", "generator", "source"} & set(overload.split("_"))
