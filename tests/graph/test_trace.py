"""Where a NaN or an infinity comes from, forward and backward."""

import math

import pytest
import torch

from attrcli.graph.build import FREE, Builder
from attrcli.graph.trace import first_nonfinite

aten = torch.ops.aten


def traced(function, *values, score=lambda y: y):
    """What is said of function(builder, x) at these values."""
    b = Builder(torch.float64)
    b.where = "net.py:1"
    x = b.placeholder("pixels", [(batch, len(values)) for batch in FREE], torch.float32)
    graph = b.finish({"output": function(b, x)})
    return first_nonfinite(graph, {"pixels": torch.tensor([values], dtype=torch.float64)}, "pixels", score)


FORWARD = {
    "the log of a negative number": (
        lambda b, x: b.call(aten.tanh.default, b.call(aten.log.default, b.call(aten.sub.Scalar, x, 1))),
        "node 'log' (aten.log.default, net.py:1) outputs NaN",
    ),
    "an overflow": (
        lambda b, x: b.call(aten.mul.Scalar, b.call(aten.exp.default, b.call(aten.mul.Scalar, x, 1e6)), 2),
        "node 'exp' (aten.exp.default, net.py:1) outputs Inf",
    ),
    "infinity less infinity": (
        lambda b, x: b.call(aten.sub.Tensor, *[b.call(aten.exp.default, b.call(aten.mul.Scalar, x, 1e6))] * 2),
        "node 'sub' (aten.sub.Tensor, net.py:1) outputs NaN",
    ),
    "a mask that is meant": (
        lambda b, x: b.call(
            aten.log.default,
            b.call(
                aten.neg.default,
                b.call(
                    aten.softmax.int,
                    b.call(aten.masked_fill.Scalar, x, b.call(aten.gt.Scalar, x, 0.6), -math.inf),
                    1,
                ),
            ),
        ),
        "node 'log' (aten.log.default, net.py:1) outputs NaN",
    ),
    "through a split": (
        lambda b, x: b.call(
            aten.neg.default, b.call(aten.split_with_sizes.default, b.call(aten.log.default, x), [1, 1], 1)[1]
        ),
        "node 'log' (aten.log.default, net.py:1) outputs NaN",
    ),
    "a stored infinity": (
        lambda b, x: b.call(aten.add.Tensor, x, b.tensor(torch.tensor([0.0, math.inf]), "layer.bias")),
        "stored tensor 'layer.bias' holds Inf",
    ),
}


@pytest.mark.parametrize("name", FORWARD)
def test_the_first_node_that_made_it_is_named(name):
    function, message = FORWARD[name]
    assert traced(function, 0.5, -0.7 if name in ("through a split",) else 0.7) == message


def test_an_input_that_is_not_finite_is_named():
    assert traced(lambda b, x: b.call(aten.relu.default, x), 0.5, math.nan) == "input 'pixels' holds NaN"
    assert traced(lambda b, x: b.call(aten.neg.default, x), 0.5, math.inf) == "input 'pixels' holds Inf"


BACKWARD = {
    "the root of zero": (
        lambda b, x: b.call(aten.neg.default, b.call(aten.sqrt.default, b.call(aten.relu.default, x))),
        "the gradient of node 'sqrt' (aten.sqrt.default, net.py:1) is not finite",
    ),
    "beside a harmless consumer that comes later": (
        lambda b, x: b.call(
            aten.add.Tensor,
            b.call(aten.sqrt.default, y := b.call(aten.relu.default, x)),
            b.call(aten.mul.Scalar, y, 2),
        ),
        "the gradient of node 'sqrt' (aten.sqrt.default, net.py:1) is not finite",
    ),
    "beside a harmless consumer that comes first": (
        lambda b, x: b.call(
            aten.add.Tensor,
            b.call(aten.mul.Scalar, y := b.call(aten.relu.default, x), 2),
            b.call(aten.sqrt.default, y),
        ),
        "the gradient of node 'sqrt' (aten.sqrt.default, net.py:1) is not finite",
    ),
    "the power of zero": (
        lambda b, x: b.call(aten.pow.Tensor_Scalar, b.call(aten.relu.default, x), 0.5),
        "the gradient of node 'pow_1' (aten.pow.Tensor_Scalar, net.py:1) is not finite",
    ),
}


@pytest.mark.parametrize("name", BACKWARD)
def test_the_node_whose_gradient_is_not_finite_is_named(name):
    function, message = BACKWARD[name]
    assert traced(function, 0.5, 0.0) == message


def test_only_the_explained_score_counts():
    def function(b, x):
        return b.call(aten.cat.default, [b.call(aten.sqrt.default, x), x], 1)

    assert "node 'sqrt'" in traced(function, 0.0, score=lambda y: y[:, 0])
    assert "no single node" in traced(lambda b, x: b.call(aten.neg.default, x), 0.5, score=lambda y: y * math.inf)
