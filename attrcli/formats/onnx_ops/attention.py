"""Attention, standard and ONNX Runtime's own: one closed `scaled_dot_product_attention` wherever it means the same."""

from typing import Any

import numpy as np
import torch

from attrcli.formats.onnx_ops.base import Node, Op, Operand, Result, Table, aten, modest, padded, tensor
from attrcli.graph.build import Builder, Value


def _split_heads(b: Builder, x: Value, heads: int) -> Result:
    """(N, L, heads x D) as (N, heads, L, D); what has its heads apart stays."""
    if x.rank == 4:
        return x
    batch, length, width = b.sizes(x)
    return b.call(
        aten.permute.default, b.call(aten.reshape.default, x, [batch, length, heads, width // heads]), [0, 2, 1, 3]
    )


def _merged(b: Builder, x: Value) -> Result:
    batch, heads, length, width = b.sizes(x)
    return b.call(aten.reshape.default, b.call(aten.permute.default, x, [0, 2, 1, 3]), [batch, length, heads * width])


def _attended(
    b: Builder, query: Value, key: Value, value: Value, mask: Value | None, causal: bool, scale: float | None
) -> Result:
    return b.call(
        aten.scaled_dot_product_attention.default, query, key, value, mask, 0.0, causal, scale=scale, enable_gqa=False
    )


# -- the standard's ----------------------------------------------------------------------------------------------------


def attention(b: Builder, n: Node, *operands: Operand) -> Result:
    """Attention of 23 and later, for whole sequences; with a cache, a soft cap or windows, the standard's own body."""
    if len([item for item in operands[4:] if item is not None]) or any(n.wants(i) for i in (1, 2, 3)):
        return NotImplemented
    windows = [n.get(f"{side}_window_size", -1) for side in ("left", "right")]
    if n.get("softcap", 0.0) or windows != [-1, -1] or operands[2] is None:
        return NotImplemented
    data, keys, values, given = padded(operands, 4)[:4]
    query, key, value = (tensor(b, item) for item in (data, keys, values))
    flat, mask = query.rank == 3, None if given is None else tensor(b, given)
    if flat and not (n.get("q_num_heads") and n.get("kv_num_heads")):
        b.refuse("Attention of rank 3 without its numbers of heads")
    query = _split_heads(b, query, n.get("q_num_heads", 0))
    key, value = (_split_heads(b, item, n.get("kv_num_heads", 0)) for item in (key, value))
    groups = query.probes[0].shape[1] // key.probes[0].shape[1]
    causal, lengths = bool(n.get("is_causal", 0)), [item.probes[0].shape[2] for item in (query, key)]
    if mask is not None and mask.probes[0].shape[-1] != lengths[1]:
        return NotImplemented
    if causal and (mask is not None or lengths[0] != lengths[1]):
        mask, causal = _causal(b, mask, b.size(query, 2), b.size(key, 2)), False
    if groups > 1:
        key, value = (b.call(aten.repeat_interleave.self_int, item, groups, 1) for item in (key, value))
    result = _attended(b, query, key, value, mask, causal, n.get("scale"))
    return _merged(b, result) if flat else result


def _causal(b: Builder, mask: Value | None, rows: Any, columns: Any) -> Value:
    """A mask that also hides later keys; a query that then sees none gives zeros, as in the standard."""
    if not isinstance(rows, int) or not isinstance(columns, int):
        b.refuse("Attention over a dimension that depends on the batch size")
    modest(b, rows, columns)
    seen = b.tensor(torch.from_numpy(np.tri(rows, columns, dtype=bool)), "earlier keys")
    if mask is None:
        return seen
    if mask.dtype is torch.bool:
        return b.call(aten.logical_and.default, mask, seen)  # type: ignore[no-any-return]
    hidden = b.call(aten.full.default, [], float("-inf"), dtype=b.dtype)
    return b.call(aten.where.self, seen, mask, hidden)  # type: ignore[no-any-return]


# -- ONNX Runtime's ----------------------------------------------------------------------------------------------------


def _no_cache(b: Builder, n: Node, *caches: Operand) -> None:
    if any(item is not None for item in caches) or any(n.wants(i) for i in range(1, len(n.outputs))):
        b.refuse(f"{n.op} with a cache of past keys and values: export the model without it")


def _padding_mask(b: Builder, n: Node, given: Operand, length: int) -> Value | None:
    """What is added to the scores of keys that a mask leaves out: lengths (N), keys (N, T), or pairs (N, S, T)."""
    if given is None:
        return None
    mask = tensor(b, given)
    if mask.rank == 1:
        places = b.call(aten.unsqueeze.default, b.call(aten.arange.default, length), 0)
        mask = b.call(aten.lt.Tensor, places, b.call(aten.unsqueeze.default, mask, 1))
    if mask.rank == 2:
        mask = b.call(aten.unsqueeze.default, mask, 1)
    if mask.rank != 3:
        b.refuse(f"{n.op} with a mask of rank {mask.rank}")
    kept = b.call(aten.unsqueeze.default, b.call(aten.to.dtype, mask, b.dtype), 1)
    added: Value = b.call(aten.mul.Scalar, b.call(aten.rsub.Scalar, kept, 1), n.get("mask_filter_value", -10000.0))
    return added


def _bias_of_scores(
    b: Builder, n: Node, given: Operand, extra: Operand, query: Value, key: Value, causal: bool
) -> tuple[Value | None, bool]:
    """The mask for the scores, and whether it is left to the op that no query sees later keys."""
    rows, columns = b.size(query, 2), b.size(key, 2)
    if not isinstance(rows, int) or not isinstance(columns, int):
        b.refuse(f"{n.op} over a dimension that depends on the batch size")
    bias = _padding_mask(b, n, given, columns)
    if extra is not None:
        more = tensor(b, extra)
        bias = more if bias is None else b.call(aten.add.Tensor, bias, more)
    if bias is None or not causal:
        return bias, causal
    modest(b, rows, columns)
    later = np.triu(np.full((rows, columns), float(torch.finfo(torch.float32).min)), 1)
    return b.call(aten.add.Tensor, bias, b.tensor(torch.from_numpy(later), "later keys")), False


def contrib_attention(b: Builder, n: Node, *operands: Operand) -> Result:
    """Attention of com.microsoft: the projections and the attention in one."""
    data, weights, shift, mask, past, extra, length = padded(operands, 7)
    _no_cache(b, n, past, length)
    if n.get("do_rotary", 0):
        b.refuse("Attention with do_rotary")
    x, matrix, heads = tensor(b, data), tensor(b, weights), n.get("num_heads")
    whole = b.call(aten.matmul.default, x, matrix)
    whole = whole if shift is None else b.call(aten.add.Tensor, whole, tensor(b, shift))
    sizes = n.get("qkv_hidden_sizes") or [matrix.probes[0].shape[1] // 3] * 3
    parts = [_split_heads(b, part, heads) for part in b.call(aten.split_with_sizes.default, whole, list(sizes), 2)]
    bias, causal = _bias_of_scores(b, n, mask, extra, parts[0], parts[1], bool(n.get("unidirectional", 0)))
    return _merged(b, _attended(b, parts[0], parts[1], parts[2], bias, causal, n.get("scale") or None))


def multi_head_attention(b: Builder, n: Node, *operands: Operand) -> Result:
    """MultiHeadAttention of com.microsoft; its projections stand before it in the graph."""
    query, key, value, shift, mask, extra, *rest = padded(operands, 8)
    _no_cache(b, n, *rest)
    if key is None or value is None:
        b.refuse("MultiHeadAttention with packed keys and values")
    parts = [tensor(b, item) for item in (query, key, value)]
    if shift is not None:
        sizes = [part.probes[0].shape[-1] * (part.probes[0].shape[1] if part.rank == 4 else 1) for part in parts]
        shifts = b.call(aten.split_with_sizes.default, tensor(b, shift), sizes, 0)
        if any(part.rank != 3 for part in parts):
            b.refuse("MultiHeadAttention with a bias and its heads apart")
        parts = [b.call(aten.add.Tensor, part, own) for part, own in zip(parts, shifts, strict=True)]
    parts = [_split_heads(b, part, n.get("num_heads")) for part in parts]
    bias, causal = _bias_of_scores(b, n, mask, extra, parts[0], parts[1], bool(n.get("unidirectional", 0)))
    return _merged(b, _attended(b, parts[0], parts[1], parts[2], bias, causal, n.get("scale") or None))


def rotary_embedding(b: Builder, n: Node, x: Value, places: Value, cosines: Value, sines: Value) -> Result:
    """RotaryEmbedding of com.microsoft: pairs of features turned by the angle of their place."""
    heads, flat = n.get("num_heads", 0), x.rank == 3
    half = cosines.probes[0].shape[1]
    if flat:
        heads = heads or x.probes[0].shape[2] // (2 * half)
        x = _split_heads(b, x, heads)
    turning = n.get("rotary_embedding_dim", 0) or x.probes[0].shape[3]
    if places.probes[0].numel() == 1:
        first = b.call(aten.reshape.default, places, [1, 1])
        places = b.call(
            aten.add.Tensor, first, b.call(aten.unsqueeze.default, b.call(aten.arange.default, b.size(x, 2)), 0)
        )
    tables = [
        b.call(
            aten.unsqueeze.default, b.call(aten.embedding.default, table, b.call(aten.to.dtype, places, torch.int64)), 1
        )
        for table in (cosines, sines)
    ]
    taken = b.call(aten.slice.Tensor, x, 3, 0, turning, 1)
    if n.get("interleaved", 0):
        first, second = (b.call(aten.slice.Tensor, taken, 3, i, turning, 2) for i in (0, 1))
    else:
        first, second = b.call(aten.split_with_sizes.default, taken, [turning // 2] * 2, 3)
    products: list[Any] = [[b.call(aten.mul.Tensor, part, table) for table in tables] for part in (first, second)]
    turned = [
        b.call(aten.sub.Tensor, products[0][0], products[1][1]),
        b.call(aten.add.Tensor, products[0][1], products[1][0]),
    ]
    if n.get("interleaved", 0):
        result = b.call(aten.reshape.default, b.call(aten.stack.default, turned, -1), b.sizes(taken))
    else:
        result = b.call(aten.cat.default, turned, 3)
    if turning < x.probes[0].shape[3]:
        rest = b.call(aten.slice.Tensor, x, 3, turning, (1 << 63) - 1, 1)
        result = b.call(aten.cat.default, [result, rest], 3)
    return _merged(b, result) if flat else result


ATTENTION: Table = {"Attention": {23: Op(attention, raw=True)}}

CONTRIB_ATTENTION: Table = {
    "Attention": {1: Op(contrib_attention, raw=True)},
    "MultiHeadAttention": {1: Op(multi_head_attention, raw=True)},
    "RotaryEmbedding": {1: rotary_embedding},
}
