"""Leaving out empty channels: smaller tensors and the same output; sums and concatenations are left alone."""

import pytest
import torch
from nets import save_traced
from torch import nn
from torch.nn import functional as F

from attrcli import formats
from attrcli.formats.spec import Sample
from attrcli.graph import passes
from attrcli.graph.build import FREE
from attrcli.graph.check import attribute
from attrcli.graph.shrink import shrink


class Chain(nn.Module):
    """conv, bn, relu, pool, conv, relu, flatten, linear, relu, linear."""

    def __init__(self):
        super().__init__()
        self.one, self.norm, self.two = nn.Conv2d(2, 6, 3, padding=1), nn.BatchNorm2d(6), nn.Conv2d(6, 5, 3)
        self.three, self.four = nn.Linear(20, 7), nn.Linear(7, 3)
        nn.init.normal_(self.norm.running_mean)
        nn.init.normal_(self.norm.bias)

    def forward(self, x):
        h = F.max_pool2d(F.relu(self.norm(self.one(x))), 2)
        return self.four(F.relu(self.three(F.relu(self.two(h)).flatten(1))))


class Residual(Chain):
    """As `Chain`, with a sum over the first layer."""

    def forward(self, x):
        h = F.relu(self.norm(self.one(x)))
        h = F.max_pool2d(h + h.flip(1), 2)
        return self.four(F.relu(self.three(F.relu(self.two(h)).flatten(1))))


class Joined(Chain):
    """As `Chain`, the second layer read twice, by the linear op and beside it."""

    def forward(self, x):
        h = F.max_pool2d(F.relu(self.norm(self.one(x))), 2)
        h = F.relu(self.two(h)).flatten(1)
        return self.four(F.relu(self.three(h))) + h.sum(1, keepdim=True)


def masked(net, tmp_path, empty):
    """The graph of a net, with channels emptied and a few elements besides."""
    torch.manual_seed(0)
    net = net().eval().requires_grad_(False)
    source = formats.load(save_traced(net, (2, 8, 8), tmp_path / "net.pt"))
    graph = source.build({source.inputs[0].name: Sample((2, 8, 8), torch.float32)}, torch.float64, FREE)
    masks = {}
    for node in graph.graph.nodes:
        if node.target is torch.ops.aten.relu.default:
            mask = torch.ones(1, *node.meta["shapes"][0][1:], dtype=torch.bool)
            mask[:, empty] = False
            mask[..., 0] &= mask.dim() == 2
            masks[node.name] = mask
    return passes.mask(graph, masks)


def all_of_them(node):
    return True


def sizes(graph):
    found = {}
    for node in graph.graph.nodes:
        if node.target in (torch.ops.aten.convolution.default, torch.ops.aten.linear.default):
            found[node.name] = tuple(attribute(graph, node.args[1].target).shape[:2])
    return list(found.values())


@pytest.mark.parametrize(
    ("net", "expected"),
    [
        (Chain, [(4, 2), (3, 4), (5, 12), (3, 5)]),
        (Residual, [(6, 2), (3, 6), (5, 12), (3, 5)]),
        (Joined, [(4, 2), (5, 4), (5, 20), (3, 5)]),
    ],
)
def test_chains_shrink_and_what_is_summed_stays(net, expected, tmp_path):
    graph = masked(net, tmp_path, [1, 3])
    small = shrink(graph, all_of_them)
    assert sizes(small) == expected
    for count in (1, 7):
        x = torch.randn(count, 2, 8, 8, dtype=torch.float64)
        torch.testing.assert_close(small(x)[0], graph(x)[0], rtol=1e-12, atol=1e-12)
        assert float((graph(x)[0]).abs().max()) > 0


def test_a_layer_that_is_empty_keeps_one_channel(tmp_path):
    graph = masked(Chain, tmp_path, slice(None))
    small = shrink(graph, all_of_them)
    assert sizes(small) == [(1, 2), (1, 1), (1, 4), (3, 1)]
    x = torch.randn(3, 2, 8, 8, dtype=torch.float64)
    torch.testing.assert_close(small(x)[0], graph(x)[0], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    ("fixed", "expected"),
    [
        (lambda node: node.target is torch.ops.aten.reshape.default, [(4, 2), (5, 4), (5, 20), (3, 5)]),
        (lambda node: node.target is torch.ops.aten.max_pool2d.default, [(6, 2), (3, 6), (5, 12), (3, 5)]),
        (lambda node: node.op == "get_attr" and "three" in node.target, [(4, 2), (5, 4), (7, 20), (3, 7)]),
    ],
)
def test_a_layer_with_a_size_that_must_stay_stays(fixed, expected, tmp_path):
    assert sizes(shrink(masked(Chain, tmp_path, [1, 3]), lambda node: not fixed(node))) == expected


def test_nothing_empty_nothing_changed(tmp_path):
    graph = masked(Chain, tmp_path, [])
    assert sizes(shrink(graph, all_of_them)) == [(6, 2), (5, 6), (7, 20), (3, 7)]
