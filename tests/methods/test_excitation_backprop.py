"""Excitation backpropagation: a mass that is handed down, none of it lost unseen."""

import pytest
import torch
from grid_nets import Gap, Tail
from method_nets import away, batch, open_net, target
from nets import ready
from torch import Tensor, nn
from torch.nn import functional as F
from zoo import ZOO

from attrcli import methods
from attrcli.errors import UnsupportedOp, UsageError
from attrcli.graph import engine
from attrcli.methods._grid import upsampled
from attrcli.model import Target

SHAPE = (3, 12, 12)


def explain(net, x, folder, index=(0, 1, 2), **options):
    opened = open_net(net, folder, tuple(x.shape[1:]))
    return methods.load("excitation_backprop", options).attribute(opened, x, target(*index), None)


def mass(result, factor):
    """What a map sums to before each cell became `factor`, and what was dropped."""
    return result.values.sum((1, 2, 3)) / factor + result.remainder


def shared(a: Tensor, w: Tensor, p: Tensor) -> Tensor:
    """One linear layer by dense algebra: p_i = a_i sum_j w+_ji p_j / sum_k a_k w+_jk."""
    z = a @ w.clamp_min(0).T
    return a * (torch.where(z > 0, p / z, 0) @ w.clamp_min(0))


def by_hand(net: Tail, x: Tensor, index: list[int]) -> Tensor:
    """Two layers of a net by dense algebra, the convolution as the matrix that autograd says it is."""
    features = net.features(x)
    flat = features.flatten(1)
    eye = torch.eye(flat.shape[1], dtype=x.dtype).reshape(-1, *features.shape[1:])
    matrix = F.conv2d(eye, net.second.weight, None, 1, 1).flatten(1).T
    hidden = F.relu(flat @ matrix.T)
    start = F.one_hot(torch.tensor(index), 5).to(x)
    return shared(flat, matrix, shared(hidden, net.head.weight, start)).reshape(features.shape).sum(1)


def test_as_dense_algebra(tmp_path):
    torch.manual_seed(0)
    net, x = Tail(side=6).double(), batch(3, *SHAPE)
    result = explain(net, x, tmp_path, node="relu")
    assert away(result.values, upsampled(by_hand(net, x, [0, 1, 2]), SHAPE)) < 1e-12
    assert away(mass(result, 4)[:, None], torch.ones(3, 1)) < 1e-12
    assert (result.values >= 0).all()


def test_biases_and_scales_have_no_part(tmp_path):
    """Scaling a layer's weights, and its features staying as they are, changes nothing."""
    torch.manual_seed(0)
    net, x = Gap().double(), batch(3, *SHAPE)
    before = explain(net, x, tmp_path).values
    net.head.bias.data += 3
    net.head.weight.data *= 7
    assert away(explain(net, x, tmp_path).values, before) < 1e-12


def test_what_excites_nothing_is_booked(tmp_path):
    torch.manual_seed(0)
    net, x = Tail(side=6).double(), batch(3, *SHAPE)
    net.head.weight.data[1] = -net.head.weight.data[1].abs()
    result = explain(net, x, tmp_path, node="relu")
    assert result.remainder.tolist() == pytest.approx([0, 1, 0], abs=1e-12)
    assert away(mass(result, 4)[:, None], torch.ones(3, 1)) < 1e-12
    assert not result.values[1].any()


def test_contrastive_takes_away_the_negative_head(tmp_path):
    """Before what is below zero is cut off it sums to nothing, and turns its sign with the weights."""
    torch.manual_seed(0)
    net, x = Gap(maps=6).double(), batch(3, *SHAPE)
    a = net.features(x).detach().mean((2, 3))
    w = net.head.weight.detach()[:3]
    parts = [a * s.clamp_min(0) / (a * s.clamp_min(0)).sum(1, keepdim=True) for s in (w, -w)]
    difference = parts[0] - parts[1]
    assert float(difference.sum(1).abs().max()) < 1e-12
    shares = net.features(x).detach() / net.features(x).detach().sum((2, 3), keepdim=True)
    expected = upsampled((difference[..., None, None] * shares).sum(1).clamp_min(0), SHAPE)
    result = explain(net, x, tmp_path, contrastive=True)
    assert away(result.values, expected) < 1e-12
    net.head.weight.data *= -1
    opposite = upsampled((-difference[..., None, None] * shares).sum(1).clamp_min(0), SHAPE)
    assert away(explain(net, x, tmp_path, contrastive=True).values, opposite) < 1e-12


class Residual(nn.Module):
    """Features and twice themselves, added, concatenated, gated, pooled by maximum."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.gate, self.head = nn.Conv2d(3, 4, 3, 2, 1), nn.Linear(4, 4), nn.Linear(8 * 9, 5)

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.conv(x))
        y = y + y * 2
        y = y * torch.sigmoid(self.gate(y.mean((2, 3))))[:, :, None, None]
        return self.head(torch.cat([F.max_pool2d(y, 2), F.avg_pool2d(y, 2)], 1).flatten(1))


def test_no_mass_is_lost_or_made(tmp_path):
    torch.manual_seed(0)
    result = explain(Residual(), batch(3, *SHAPE), tmp_path, node="relu")
    assert away(mass(result, 4)[:, None], torch.ones(3, 1)) < 1e-12
    assert not result.remainder.any()


@pytest.mark.parametrize("name", ["vgg", "resnet", "densenet"])
def test_mass_of_the_zoo(name, tmp_path, monkeypatch):
    """All of it is there; and batch norm is the file's, folded for speed or not."""
    torch.manual_seed(0)
    net, x = ready(ZOO[name].make()), batch(3, 3, 16, 16)
    result = explain(net, x, tmp_path)
    side = int(result.note[0].rpartition("grid ")[2].split("x")[0])
    assert away(mass(result, (16 / side) ** 2)[:, None], torch.ones(3, 1)) < 1e-10
    monkeypatch.setattr(engine, "HEAVY", 0)
    assert away(explain(net, x, tmp_path).values, result.values) < 1e-10


@pytest.mark.parametrize(
    ("layer", "match"),
    [
        (nn.GELU(), "node 'gelu' is op aten.gelu"),
        (nn.SiLU(), "node 'silu' is op aten.silu"),
        (nn.Softmax(1), "node 'softmax' is op aten.softmax"),
        (nn.LayerNorm((4, 6, 6)), "node 'layer_norm' is op aten.layer_norm"),
    ],
    ids=str,
)
def test_refused(layer, match, tmp_path):
    net = nn.Sequential(nn.Conv2d(3, 4, 3, 2, 1), nn.ReLU(), layer, nn.Flatten(), nn.Linear(144, 5))
    with pytest.raises(
        UnsupportedOp, match=match + ".* excitation_backprop has no rule for it; .* grad_cam needs none"
    ):
        explain(net, batch(3, *SHAPE), tmp_path, node="relu")


def test_it_starts_at_a_logit(tmp_path):
    opened = open_net(Gap(), tmp_path, SHAPE)
    method = methods.load("excitation_backprop")
    with pytest.raises(UsageError, match="starts at a logit; --score prob is none"):
        method.attribute(opened, batch(1, *SHAPE), Target(torch.tensor([0]), score="prob"), None)
