"""RevealCancel: equal to dense algebra on MLPs, complete on every architecture, and what it promises of signs."""

import pytest
import torch
from method_nets import Kinked, Linear, architecture, away, batch, open_net, target
from test_deeplift import ALONE, ARCHITECTURES, EXACT, Least, alone, baselines, gap, points
from torch import Tensor, nn

from attrcli import methods
from attrcli.model import Target

RULES = ("rescale", "revealcancel", "genomics")
DEEPLIFT = {rule: methods.load("deeplift", {"rule": rule}) for rule in RULES}


def mlp(activations, *, positive: bool = False, bias: bool = True) -> nn.Sequential:
    torch.manual_seed(3)
    layers = [nn.Flatten()]
    for activation in activations:
        layers += [nn.Linear(6, 6, bias), activation]
    net = nn.Sequential(*layers, nn.Linear(6, 3, bias)).double()
    if positive:
        for layer in net[1::2]:
            nn.init.uniform_(layer.weight)
    return net


def quotient(f, change: Tensor, part: Tensor, z: Tensor, other: Tensor, beside: float) -> Tensor:
    """What a part is multiplied with; of a part that is nothing, the limit from the side that it has."""
    slopes = torch.func.vmap(torch.func.grad(f))
    limit = (slopes(z + beside) + slopes(z + other + beside)) / 2
    return torch.where(part == 0, limit, change / part)


def oracle(net: nn.Sequential, x: Tensor, r: Tensor, index: Tensor) -> Tensor:
    """Multipliers of one row by section 3.5 of the paper, in matrices; x and r are vectors."""
    linears, functions = list(net[1::2]), list(net[2::2])
    steps, up, down = [], x, r
    for linear, f in zip(linears, functions, strict=False):
        w, d = linear.weight, up - down
        plus, minus = w.clamp_min(0), w.clamp_max(0)
        p = plus @ d.clamp_min(0) + minus @ d.clamp_max(0)
        n = minus @ d.clamp_min(0) + plus @ d.clamp_max(0)
        z = linear(down)
        first = (f(z + p) - f(z) + f(z + n + p) - f(z + n)) / 2
        second = (f(z + n) - f(z) + f(z + n + p) - f(z + p)) / 2
        steps.append((plus, minus, d, quotient(f, first, p, z, n, 1e-12), quotient(f, second, n, z, p, -1e-12)))
        up, down = f(linear(up)), f(z)
    m = linears[-1].weight[index]
    for plus, minus, d, one, two in reversed(steps):
        a, b = m * one, m * two
        rising, falling = plus.T @ a + minus.T @ b, minus.T @ a + plus.T @ b
        m = torch.where(d > 0, rising, torch.where(d < 0, falling, (rising + falling) / 2))
    return m


def test_the_worked_example(tmp_path):
    model = open_net(Least(), tmp_path, (2,))
    x = torch.tensor([[5.0, 2.0]]).double()
    for rule, expected in zip(RULES, ([0, 2], [1, 1], [0, 2]), strict=True):
        assert away(DEEPLIFT[rule].attribute(model, x, target(0), x * 0).values, torch.tensor([expected])) < 1e-15


@pytest.mark.parametrize("f", [nn.ReLU(), nn.Sigmoid(), nn.Tanh(), nn.GELU(), nn.LeakyReLU(0.2)], ids=str)
def test_equals_dense_algebra_multipliers_at_no_difference_included(f, tmp_path):
    net = mlp([f, nn.Tanh(), f]).requires_grad_(False)
    x, r, index = batch(4, 6), batch(4, 6, seed=1), torch.tensor([0, 1, 2, 0])
    r[:, 2] = x[:, 2]
    expected = torch.stack([oracle(net, *row) for row in zip(x, r, index, strict=True)])
    result = DEEPLIFT["revealcancel"].attribute(open_net(net, tmp_path, (6,)), x, Target(index), r)
    assert away(result.multipliers, expected) < 1e-10
    assert away(result.values, expected * (x - r)) < 1e-10


def test_a_part_that_is_nothing_has_the_multiplier_of_one_that_is_almost_nothing(tmp_path):
    net = mlp([nn.ReLU(), nn.ReLU(), nn.ReLU()], bias=False).requires_grad_(False)
    x = batch(20, 6)
    x[1, 1:] = 0  # one input alone: of its parts in the first layer one is 0
    expected = torch.stack([oracle(net, row, row * 0, torch.tensor(0)) for row in x])  # all ReLUs are at their kink
    result = DEEPLIFT["revealcancel"].attribute(open_net(net, tmp_path, (6,)), x, target(*[0] * 20), x * 0)
    assert away(result.multipliers, expected) < 1e-10


def test_where_all_parts_share_one_sign_it_is_rescale(tmp_path):
    model = open_net(mlp([nn.ReLU(), nn.Tanh()], positive=True), tmp_path, (6,))
    r = batch(3, 6)
    x = r + batch(3, 6, seed=1).abs()
    both = [DEEPLIFT[rule].attribute(model, x, target(0, 1, 2), r).values for rule in RULES[:2]]
    assert away(both[1], both[0]) < 1e-12


def test_where_nothing_differs_it_is_the_gradient(tmp_path):
    model = open_net(mlp([nn.Sigmoid(), nn.GELU()]), tmp_path, (6,))
    x = batch(3, 6)
    result = DEEPLIFT["revealcancel"].attribute(model, x, target(0, 1, 2), x)
    gradient, _ = model.gradient(x, target(0, 1, 2))
    assert not result.values.any()
    assert away(result.multipliers, gradient) < 1e-12


@pytest.mark.parametrize("name", ["minimum", "maximum", "product"])
def test_inputs_that_play_the_same_part_get_the_same(name, tmp_path):
    class Symmetric(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            a, b = x[:, :1], x[:, 1:]
            return {"minimum": a - torch.relu(a - b), "maximum": b + torch.relu(a - b), "product": a * b}[name]

    model = open_net(Symmetric(), tmp_path, (2,))
    x = batch(5, 2).abs()
    values, other = (
        DEEPLIFT["revealcancel"].attribute(model, each, target(*[0] * 5), x * 0).values for each in (x, x.flip(1))
    )
    assert away(other.flip(1), values) < 1e-12


class Two(nn.Module):
    """A convolution, then a dense layer; each with an activation."""

    def __init__(self, conv_only: bool = False) -> None:
        super().__init__()
        self.conv, self.dense, self.last = nn.Conv1d(2, 3, 3), nn.Linear(15, 8), nn.Linear(8, 3)
        self.cut = (lambda z: z) if conv_only else torch.relu

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.cut(self.dense(torch.relu(self.conv(x)).flatten(1))))


def test_genomics_is_rescale_after_convolutions_and_revealcancel_after_dense_layers(tmp_path):
    torch.manual_seed(0)
    model, x = open_net(Two(), tmp_path, (2, 7)), batch(4, 2, 7)
    ruled = {rule: DEEPLIFT[rule].ruled(model, x).rules for rule in RULES}
    names = {rule: sorted(node.name for node in rules) for rule, rules in ruled.items()}
    assert len(names["rescale"]) == 2
    assert set(names["genomics"]) == {*names["rescale"], "linear"}
    assert len(names["revealcancel"]) == 4
    values = [DEEPLIFT[rule].attribute(model, x, target(0, 1, 2, 0), x.flip(0)).values for rule in RULES]
    assert all(away(values[i], values[j]) > 1e-3 for i, j in ((0, 1), (0, 2), (1, 2)))
    model = open_net(Two(conv_only=True), tmp_path, (2, 7))
    values = [DEEPLIFT[rule].attribute(model, x, target(0, 1, 2, 0), x.flip(0)).values for rule in RULES]
    assert torch.equal(values[0], values[2])
    assert away(values[1], values[0]) > 1e-3


def test_a_batch_norm_is_the_same_folded_or_not(tmp_path):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 35, 3))
    nn.init.normal_(net[1].weight)  # below zero, too
    nn.init.normal_(net[1].running_mean)
    x, r = batch(3, 2, 7, 9), batch(3, 2, 7, 9, seed=1)
    apart = DEEPLIFT["revealcancel"].attribute(open_net(net, tmp_path, (2, 7, 9)), x, target(0, 1, 2), r).values
    folded = nn.utils.fusion.fuse_conv_bn_eval(net[0], net[1])
    whole = nn.Sequential(folded, *net[2:])
    together = DEEPLIFT["revealcancel"].attribute(open_net(whole, tmp_path, (2, 7, 9)), x, target(0, 1, 2), r).values
    assert away(together, apart) < 1e-11


@pytest.mark.parametrize("rule", RULES[1:])
@pytest.mark.parametrize("name", ALONE)
def test_differences_add_up_for_every_op_alone(name, rule):
    model, shape = alone(name)
    x = points(*shape)
    for baseline in (points(*shape, seed=1), x * (x > 0)):
        assert gap(model, x, target(0, 1, 0), baseline, DEEPLIFT[rule]) < EXACT


@pytest.mark.parametrize("rule", RULES[1:])
def test_differences_add_up_in_residual_nets_with_pools(rule, tmp_path):
    torch.manual_seed(0)
    model = open_net(Kinked(), tmp_path, (2, 9, 13))
    x, r = batch(4, 2, 9, 13), batch(4, 2, 9, 13, seed=1)
    for baseline in (r, r[:1].expand_as(x), x * 0):
        assert gap(model, x, target(0, 1, 2, 0), baseline, DEEPLIFT[rule]) < EXACT


@pytest.mark.parametrize("rule", RULES[1:])
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_differences_add_up_for_every_architecture(name, rule):
    model, x, to = architecture(name)
    for baseline in baselines(x):
        assert gap(model, x, to, baseline, DEEPLIFT[rule]) < EXACT


def test_a_linear_net_is_its_weights(tmp_path):
    net = Linear(6)
    model, x, r = open_net(net, tmp_path, (6,)), batch(3, 6), batch(3, 6, seed=1)
    for rule in RULES:
        values = DEEPLIFT[rule].attribute(model, x, target(0, 1, 2), r).values
        assert away(values, net.layer.weight * (x - r)) < 1e-12
