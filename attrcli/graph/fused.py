"""Attention and recurrent layers: torch's fused operations, which have no derivative, as those that have one."""

import math
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from attrcli.graph.build import Builder

aten = torch.ops.aten


def attention(
    b: "Builder", q: Any, k: Any, v: Any, mask: Any = None, dropout: float = 0.0, causal: bool = False, **options: Any
) -> Any:
    """Scaled dot product attention. Refused with dropout, which this function applies in inference too."""
    if dropout:
        b.refuse(f"attention with dropout of {dropout}: pass dropout_p=0 in inference")
    return b.emit(aten.scaled_dot_product_attention.default, q, k, v, mask, 0.0, causal, **options)


def flash_attention_for_cpu(
    b: "Builder",
    q: Any,
    k: Any,
    v: Any,
    dropout: float = 0.0,
    causal: bool = False,
    *,
    attn_mask: Any = None,
    scale: Any = None,
) -> Any:
    """The same by the kernel that a decomposed export names; its logarithms are for its backward only."""
    return [attention(b, q, k, v, attn_mask, dropout, causal, scale=scale), None]


def flash_attention(
    b: "Builder",
    q: Any,
    k: Any,
    v: Any,
    dropout: float = 0.0,
    causal: bool = False,
    debug: bool = False,
    *,
    scale: Any = None,
) -> Any:
    """The same by a kernel of CUDA."""
    return [attention(b, q, k, v, None, dropout, causal, scale=scale), *[None] * 8]


def efficient_attention(
    b: "Builder",
    q: Any,
    k: Any,
    v: Any,
    bias: Any,
    logs: bool,
    dropout: float = 0.0,
    causal: bool = False,
    *,
    scale: Any = None,
) -> Any:
    """The same by another kernel of CUDA."""
    return [attention(b, q, k, v, bias, dropout, causal, scale=scale), *[None] * 3]


_ATTENTION_MASK, _PADDING_MASK = 0, 1
"""Kinds of masks: (L, L) and (N, L); any other has a dimension for each of (N, heads, L, L)."""


def multi_head_attention(
    b: "Builder", q: Any, k: Any, v: Any, width: int, heads: int, w_in: Any, b_in: Any, w_out: Any, b_out: Any,
    mask: Any = None, need_weights: bool = True, average: bool = True, kind: Any = None,
) -> Any:  # fmt: skip
    """nn.MultiheadAttention's fast path: (N, L, width) and, if needed, the weights, (N, heads, L, L) or their mean."""
    q, k, v = (_heads(b, x, heads) for x in _projected(b, q, k, v, width, w_in, b_in))
    if mask is not None:
        mask = _taking_part(b, mask, kind)
    weights = None
    if need_weights:
        scores = b.call(aten.matmul.default, q, b.call(aten.transpose.int, k, -2, -1))
        scores = b.call(aten.mul.Scalar, scores, 1 / math.sqrt(width // heads))
        if mask is not None:
            scores = b.call(aten.masked_fill.Scalar, scores, b.call(aten.logical_not.default, mask), -math.inf)
        weights = b.call(aten.softmax.int, scores, -1)
        mixed = b.call(aten.matmul.default, weights, v)
        weights = b.call(aten.mean.dim, weights, [1]) if average else weights
    else:
        mixed = attention(b, q, k, v, mask)
    mixed = b.call(aten.flatten.using_ints, b.call(aten.transpose.int, mixed, 1, 2), 2)
    return [b.call(aten.linear.default, mixed, w_out, b_out), weights]


def _projected(b: "Builder", q: Any, k: Any, v: Any, width: int, weight: Any, bias: Any) -> list[Any]:
    if q is k and k is v:
        return list(b.call(aten.chunk.default, b.call(aten.linear.default, q, weight, bias), 3, 2))
    weights, biases = (b.call(aten.chunk.default, packed, 3, 0) for packed in (weight, bias))
    return [b.call(aten.linear.default, x, w, c) for x, w, c in zip((q, k, v), weights, biases, strict=True)]


def _heads(b: "Builder", x: Any, heads: int) -> Any:
    """(N, L, heads x D) -> (N, heads, L, D)."""
    return b.call(aten.transpose.int, b.call(aten.unflatten.int, x, 2, [heads, -1]), 1, 2)


def _taking_part(b: "Builder", mask: Any, kind: int | None) -> Any:
    """Where a mask is False, in a shape that broadcasts to (N, heads, L, L)."""
    open_ = b.call(aten.logical_not.default, b.call(aten.to.dtype, mask, torch.bool))
    if kind == _PADDING_MASK:
        return b.call(aten.unsqueeze.default, b.call(aten.unsqueeze.default, open_, 1), 1)
    return open_


def encoder_layer(
    b: "Builder", x: Any, width: int, heads: int, w_in: Any, b_in: Any, w_out: Any, b_out: Any, gelu: bool,
    norm_first: bool, eps: float, scale1: Any, shift1: Any, scale2: Any, shift2: Any, w1: Any, b1: Any, w2: Any,
    b2: Any, mask: Any = None, kind: Any = None,
) -> Any:  # fmt: skip
    """nn.TransformerEncoderLayer's fast path."""

    def attended(y: Any) -> Any:
        return multi_head_attention(b, y, y, y, width, heads, w_in, b_in, w_out, b_out, mask, False, True, kind)[0]

    def fed_forward(y: Any) -> Any:
        activation = aten.gelu.default if gelu else aten.relu.default
        return b.call(aten.linear.default, b.call(activation, b.call(aten.linear.default, y, w1, b1)), w2, b2)

    for part, scale, shift in ((attended, scale1, shift1), (fed_forward, scale2, shift2)):
        if norm_first:
            x = b.call(aten.add.Tensor, x, part(b.call(aten.layer_norm.default, x, [width], scale, shift, eps)))
        else:
            x = b.call(aten.layer_norm.default, b.call(aten.add.Tensor, x, part(x)), [width], scale, shift, eps)
    return x


def _nested(b: "Builder", *_: Any) -> Any:
    return b.refuse(
        "op aten._nested_tensor_from_mask, a TransformerEncoder's way to skip padding, is not supported: make the "
        "encoder with enable_nested_tensor=False, or trace it with gradients enabled"
    )


def recurrent(op: Any) -> Any:
    """LSTM, GRU or RNN over a whole sequence, without the dropout between its layers."""

    def rewrite(
        b: "Builder", x: Any, state: Any, weights: Any, biased: bool, layers: int, dropout: float, train: bool,
        both_ways: bool, batch_first: bool,
    ) -> Any:  # fmt: skip
        if train and dropout and layers > 1:
            b.refuse("dropout in training mode: save the model after model.eval()")
        return b.emit(op, x, state, weights, biased, layers, 0.0, False, both_ways, batch_first)

    return rewrite


FUSED = {
    aten.scaled_dot_product_attention.default: attention,
    aten._scaled_dot_product_flash_attention_for_cpu.default: flash_attention_for_cpu,
    aten._scaled_dot_product_flash_attention.default: flash_attention,
    aten._scaled_dot_product_efficient_attention.default: efficient_attention,
    aten._native_multi_head_attention.default: multi_head_attention,
    aten._transformer_encoder_layer_fwd.default: encoder_layer,
    aten._nested_tensor_from_mask.default: _nested,
    aten.lstm.input: recurrent(aten.lstm.input),
    aten.gru.input: recurrent(aten.gru.input),
    aten.rnn_tanh.input: recurrent(aten.rnn_tanh.input),
    aten.rnn_relu.input: recurrent(aten.rnn_relu.input),
}
"""Rewrites of fused operations."""
