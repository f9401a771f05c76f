"""The op table and the one spelling per operation."""

import inspect

import pytest
import torch

from attrcli.graph import ops
from attrcli.graph.build import FREE, Builder
from attrcli.graph.canonical import REWRITES, canonical_name

aten = torch.ops.aten
NAMES = [name for names in ops._NAMES.values() for name in names.split()]


def test_every_name_in_the_table_is_an_overload_and_stands_once():
    assert [name for name in NAMES if ops._resolve(name) is None] == []
    assert len(set(NAMES)) == len(NAMES) == len(ops.TABLE)


def test_no_op_in_the_table_writes_in_place():
    assert [str(op) for op in ops.TABLE if op._schema.is_mutable] == []


def test_a_spelling_that_always_becomes_another_is_not_in_the_table():
    """What a method sees is the canonical spelling; only these rewrites may end in the op itself."""
    emits_itself = {
        aten.batch_norm.default, aten.instance_norm.default, aten.to.dtype, aten.squeeze.dims, aten.chunk.default,
        aten.max_pool1d_with_indices.default, aten.max_pool2d_with_indices.default,
        aten.max_pool3d_with_indices.default, aten.split.Tensor, aten.add.Tensor, aten.sub.Tensor, aten.mul.Tensor,
        aten.div.Tensor, aten.scaled_dot_product_attention.default, aten.lstm.input, aten.gru.input,
        aten.rnn_tanh.input, aten.rnn_relu.input, aten.dropout.default,
    }  # fmt: skip
    assert {op for op in REWRITES if op in ops.TABLE} == emits_itself


def test_rewrites_take_what_the_schema_gives():
    for op, rewrite in REWRITES.items():
        parameters = list(inspect.signature(rewrite).parameters.values())[1:]
        if any(parameter.kind == parameter.VAR_POSITIONAL for parameter in parameters):
            continue
        named = sum(parameter.kind == parameter.POSITIONAL_OR_KEYWORD for parameter in parameters)
        given = sum(not argument.kwarg_only for argument in op._schema.arguments)
        assert named >= given, op


def test_classes_and_names():
    assert ops.classify(aten.relu.default) is ops.OpClass.KINKED
    assert ops.classify(aten.sym_size.int) is ops.classify(max) is ops.OpClass.SHAPE
    assert ops.classify(aten.linalg_inv.default) is None
    assert canonical_name(aten.relu.default) == "aten.relu"
    assert canonical_name(aten.add.Tensor) == "aten.add.Tensor"


SPELLINGS = {
    "convolution": (
        (3, 6, 6),
        lambda b, x, w: [
            b.call(aten.conv2d.default, x, w, None, 1, 1),
            b.call(aten.conv2d.padding, x, w, None, [1, 1], "same"),
            b.call(aten._convolution_mode.default, x, w, None, [1, 1], "same", [1, 1], 1),
            b.call(aten.convolution.default, x, w, None, [1, 1], [1, 1], [1, 1], False, [0, 0], 1),
            b.call(
                aten._convolution.default,
                x,
                w,
                None,
                [1, 1],
                [1, 1],
                [1, 1],
                False,
                [0, 0],
                1,
                False,
                False,
                True,
                True,
            ),
        ],
    ),
    "reshape": (
        (3, 4),
        lambda b, x, w: [
            b.call(aten.flatten.using_ints, x, 1),
            b.call(aten.view.default, x, [b.size(x, 0), 12]),
            b.call(aten._unsafe_view.default, x, [b.size(x, 0), 12]),
            b.call(aten.reshape.default, x, [b.size(x, 0), 12]),
        ],
    ),
    "split_with_sizes": (
        (4,),
        lambda b, x, w: [
            b.call(aten.chunk.default, x, 2, 1)[1],
            b.call(aten.split.Tensor, x, 2, 1)[1],
            b.call(aten.split.sizes, x, [2, 2], 1)[1],
            b.call(aten.split_with_sizes.default, x, [2, 2], 1)[1],
        ],
    ),
    "softmax": (
        (4,),
        lambda b, x, w: [b.call(aten.softmax.int, x, 1), b.call(aten._softmax.default, x, 1, False)],
    ),
    "constant_pad_nd": (
        (4,),
        lambda b, x, w: [
            b.call(aten.pad.default, x, [1, 2], "constant", None),
            b.call(aten.constant_pad_nd.default, x, [1, 2], 0),
        ],
    ),
}


@pytest.mark.parametrize("name", SPELLINGS)
def test_spellings_of_one_operation_become_one(name):
    shape, function = SPELLINGS[name]
    b = Builder()
    x = b.placeholder("x", [(batch, *shape) for batch in FREE], torch.float32)
    weight = b.tensor(torch.ones(2, 3, 3, 3), "weight")
    calls = []
    for value in function(b, x, weight):
        node = value.node.args[0] if value.node.name.startswith("getitem") else value.node
        assert node.target._schema.name == f"aten::{name}"
        calls.append(torch.fx.map_arg(node.args, lambda item: item.target))
    assert calls == calls[:1] * len(calls)
