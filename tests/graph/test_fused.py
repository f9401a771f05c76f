"""Fused attention and recurrent layers, and the overloads that are refused."""

import pytest
import torch
import torch.nn.functional as F
from nets import assert_same

from attrcli.errors import UnsupportedOp
from attrcli.graph.build import FREE, Builder

aten = torch.ops.aten


def built(function, shape):
    """The graph of function(builder, x), for samples of this shape."""
    b = Builder(torch.float64)
    b.where = "net.py:3"
    x = b.placeholder("x", [(batch, *shape) for batch in FREE], torch.float64)
    return b.finish({"output": function(b, x)})


KERNELS = {
    "cpu": lambda b, x: b.call(
        aten._scaled_dot_product_flash_attention_for_cpu.default, x, x, x, 0.0, True, attn_mask=None, scale=0.5
    ),
    "flash": lambda b, x: b.call(
        aten._scaled_dot_product_flash_attention.default, x, x, x, 0.0, True, False, scale=0.5
    ),
    "efficient": lambda b, x: b.call(
        aten._scaled_dot_product_efficient_attention.default, x, x, x, None, False, 0.0, True, scale=0.5
    ),
}


@pytest.mark.parametrize("name", KERNELS)
def test_kernels_of_attention_become_the_one_op(name):
    graph = built(lambda b, x: KERNELS[name](b, x)[0], (2, 4, 6))
    assert aten.scaled_dot_product_attention.default in {node.target for node in graph.graph.nodes}
    assert_same(graph, lambda x: F.scaled_dot_product_attention(x, x, x, is_causal=True, scale=0.5), (2, 4, 6))
    outputs = {"cpu": 2, "flash": 9, "efficient": 4}[name]
    b = Builder(torch.float64)
    assert len(KERNELS[name](b, b.literal([[[[1.0]]]]))) == outputs


def recurrent(b, x, dropout, train, layers=2):
    weights = [
        b.literal(torch.rand(*shape).tolist()) for shape in ((6, 3), (6, 6), (6,), (6,), (6, 6), (6, 6), (6,), (6,))
    ]
    state = b.call(aten.zeros.default, [layers, b.size(x, 0), 6])
    return b.call(aten.rnn_tanh.input, x, state, weights[: 4 * layers], True, layers, dropout, train, False, True)[0]


REFUSED = {
    "attention that drops out": (
        lambda b, x: b.call(aten.scaled_dot_product_attention.default, x, x, x, None, 0.1),
        r"attention with dropout of 0.1: pass dropout_p=0 in inference \(net\.py:3\)",
    ),
    "a recurrent layer in training": (
        lambda b, x: recurrent(b, x, 0.5, True),
        "dropout in training mode: save the model",
    ),
    "nested tensors": (
        lambda b, x: b.call(aten._nested_tensor_from_mask.default, x, b.call(aten.gt.Scalar, x, 0)),
        "enable_nested_tensor=False",
    ),
    "a shape that the data makes": (
        lambda b, x: b.call(aten.nonzero.default, x),
        "op aten.nonzero, whose result has no shape before it has data, is not supported",
    ),
    "the memory of a tensor": (
        lambda b, x: b.call(aten.as_strided.default, x, [b.size(x, 0), 4], [12, 1], 0),
        "op aten.as_strided is not supported",
    ),
    "numbers that torch takes for symbols": (
        lambda b, x: b.call(aten.roll.default, x, [-(1 << 63)], [1]),
        r"aten.roll.default: argument 'shifts' is \[-9223372036854775808\]",
    ),
    "padding around twice": (
        lambda b, x: b.call(aten._pad_circular.default, x, [0, 4]),
        "circular padding of 3 elements by 4",
    ),
    "counts that are data": (
        lambda b, x: b.call(aten.repeat_interleave.self_Tensor, x, b.call(aten.to.dtype, x, torch.int64), 1),
        "by counts that are no constants",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused_by_name(name):
    function, message = REFUSED[name]
    with pytest.raises(UnsupportedOp, match=message):
        built(function, (4, 3))


def test_dropout_that_is_between_no_layers_is_none():
    graph = built(lambda b, x: recurrent(b, x, 0.5, True, layers=1), (4, 3))
    node = next(node for node in graph.graph.nodes if node.target is aten.rnn_tanh.input)
    assert node.args[5:7] == (0.0, False)


def test_a_change_of_strides_alone_is_left_out():
    def function(b, x):
        mean = b.call(aten.mean.dim, x, [2, 3], True)
        return b.call(aten.as_strided.default, mean, [b.size(x, 0), 3, 1, 1], [3, 1, 3, 3])

    graph = built(function, (3, 4, 5))
    assert_same(graph, lambda x: x.mean((2, 3), True), (3, 4, 5))
