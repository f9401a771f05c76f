"""LRP: every rule against dense algebra, composites against an implementation of its own, and what the rules keep."""

import dense_lrp
import pytest
import torch
from dense_lrp import COMPOSITES
from lrp_nets import EXACT, TINY, Residual, chain, gap, gradient_times_input, lrp, quietly
from method_nets import away, batch, open_net, target
from torch import Tensor, nn
from torch.nn import functional as F

from attrcli import methods
from attrcli.graph.rules import PLAIN
from attrcli.methods._lrp_linear import Layer, is_layer, rule_of, zbox
from attrcli.model import Target

# -- each rule on each kind of layer


LAYERS = {
    "linear": (lambda: nn.Linear(7, 5), (7,)),
    "linear over rows": (lambda: nn.Linear(4, 5), (3, 4)),
    "dilated": (lambda: nn.Conv1d(3, 4, 3, dilation=2, padding=1), (3, 9)),
    "grouped": (lambda: nn.Conv2d(4, 6, 3, stride=2, padding=1, groups=2), (4, 6, 7)),
    "depthwise": (lambda: nn.Conv2d(4, 4, 3, padding=1, groups=4, bias=False), (4, 5, 5)),
    "transposed": (lambda: nn.ConvTranspose2d(4, 6, 3, stride=2, padding=1, output_padding=1, groups=2), (4, 4, 3)),
    "volume": (lambda: nn.Conv3d(2, 3, 2, stride=(1, 2, 1), padding=(1, 0, 0)), (2, 3, 4, 3)),
}
RULES = ("epsilon", "zplus", "alpha2beta1", "gamma", "flat", "wsquare", "zbox")


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("kind", LAYERS)
def test_every_rule_equals_dense_algebra(kind, rule, tmp_path):
    make, shape = LAYERS[kind]
    torch.manual_seed(3)
    layer, x = make().requires_grad_(False), batch(3, *shape).clamp(-3, 3)
    x[:, ..., 0] = 0  # a zero among them
    model = quietly(nn.Sequential(layer, nn.Flatten()), tmp_path, *shape)
    box = (-3.5 * x.new_ones(1), 3 * x.new_ones(1))

    def choose(node, varying):
        return rule_of(rule, 1e-6, 0.4, lambda step: box) if is_layer(node, varying) else PLAIN

    ruled, index, weight = model.ruled(x, choose, "lrp"), torch.tensor([0, 2, 4]), torch.tensor([[2.0], [-1.0], [0.5]])
    values, _ = model.gradient(x, Target(index, weight=weight), ruled=ruled)
    remainder = ruled.remainder(3)
    for i, k in enumerate(index):
        given = torch.zeros_like(layer(x[:1])).detach().flatten()
        given[k] = weight[i, 0]
        expected = dense_lrp.linear(
            rule, layer, x[i : i + 1], given, epsilon=1e-6, gamma=0.4, box=box, connected=dense_lrp.ones(layer)
        )
        assert float((values[i] - expected[0]).abs().max()) < EXACT * float(expected.abs().max().clamp_min(1))
        assert float(remainder[i]) == pytest.approx(float(weight[i, 0] - expected.sum()), abs=1e-10)


@pytest.mark.parametrize("composite", ["deep_taylor", "epsilon_plus"])
def test_dense_layers_behind_the_first(composite, tmp_path):
    torch.manual_seed(0)
    layers = nn.Sequential(nn.Linear(6, 9), nn.Tanh(), nn.Linear(9, 8), nn.ReLU(), nn.Linear(8, 3))
    model = open_net(layers, tmp_path, (6,))
    model.bounds = box = (torch.tensor(-4.0).double(), torch.tensor(4.0).double())
    x, chain = batch(3, 6), [nn.Identity() if isinstance(item, nn.Tanh) else item for item in layers]
    values = lrp(model, x, target(0, 1, 2), composite=composite).values
    for i in range(3):
        expected = _through_tanh(layers, chain, x[i], i, composite, box)
        assert away(values[i : i + 1], expected[None]) < EXACT


def _through_tanh(layers, chain, x, index, composite, box) -> Tensor:
    """The rest of the net from its activation on, then the first layer."""
    a = layers[1](layers[0](x))
    behind = {"deep_taylor": "zplus", "epsilon_plus": "epsilon"}[composite]
    last = layers[4](layers[3](layers[2](a)))
    start = torch.zeros(1, 3).double()
    start[0, index] = last[index]
    middle = layers[3](layers[2](a))[None]
    given = dense_lrp.linear(behind, layers[4], middle, start, epsilon=1e-6)
    given = dense_lrp.linear(behind, layers[2], a[None], given, epsilon=1e-6)
    first = {"deep_taylor": "zbox", "epsilon_plus": "epsilon"}[composite]
    return dense_lrp.linear(first, layers[0], x[None], given, epsilon=1e-6, box=box)[0]


# -- composites


@pytest.mark.parametrize("composite", COMPOSITES)
def test_composites_equal_an_implementation_of_their_own(composite, tmp_path):
    torch.manual_seed(2)
    layers = chain()
    model = open_net(layers, tmp_path, (2, 10, 11))
    model.bounds = box = (torch.tensor([-5.0, -4.0]).double().reshape(2, 1, 1), torch.full((2, 1, 1), 5.0).double())
    x, to = batch(3, 2, 10, 11), target(0, 1, 2)
    result = lrp(model, x, to, composite=composite)
    expected = [dense_lrp.sequential(list(layers), x[i], i, composite, box=box) for i in range(3)]
    assert away(result.values, torch.stack([values for values, _ in expected])) < EXACT
    for i, (values, score) in enumerate(expected):
        assert abs(float(result.remainder[i]) - (score - float(values.sum()))) < 1e-10 * abs(score)
    assert gap(model, result, x, to) < 1e-12


def test_every_composite_is_tested():
    described = next(o for o in methods.description("lrp").options if o.name == "composite")
    assert described.type.split(" | ") == list(COMPOSITES)


def test_a_first_layer_is_one_that_no_layer_comes_before_whatever_is_registered_first(tmp_path):
    class Backwards(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.second, self.first, self.other = nn.Linear(6, 3), nn.Linear(5, 6), nn.Linear(5, 6)

        def forward(self, x: Tensor) -> Tensor:
            return self.second(F.relu(self.first(x)) + F.relu(self.other(x)))

    model, x = open_net(Backwards(), tmp_path, (5,)), batch(2, 5)
    values = lrp(model, x, target(0, 1)).values
    assert away(values, values.mean(1, keepdim=True).expand_as(values)) < 1e-12  # flat in both stems


# -- identities


def test_with_epsilon_alone_it_is_gradient_times_input(tmp_path):
    torch.manual_seed(0)
    model, x, to = open_net(Residual(), tmp_path, (2, 9, 11)), batch(4, 2, 9, 11), target(0, 1, 2, 0)
    assert away(lrp(model, x, to, **TINY).values, gradient_times_input(model, x, to)) < 1e-8


class Bare(nn.Module):
    """No biases."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(2, 6, 3, bias=False), nn.Conv2d(6, 6, 3, padding=1, bias=False)
        self.last = nn.Linear(6 * 7 * 9, 3, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        h = F.relu(self.first(x))
        return self.last(torch.tanh(h + self.second(h)).flatten(1))


@pytest.mark.parametrize("composite", ["epsilon", "epsilon_plus", "epsilon_gamma", "epsilon_plus_wsquare"])
def test_without_biases_nothing_remains(composite, tmp_path):
    torch.manual_seed(0)
    model, x, to = open_net(Bare(), tmp_path, (2, 9, 11)), batch(3, 2, 9, 11), target(0, 1, 2)
    result = lrp(model, x, to, composite=composite, epsilon=1e-12)
    assert float((result.values.flatten(1).sum(1) - model.scores(x, to)).abs().max()) < 1e-7
    if composite == "epsilon":
        deeplift = methods.load("deeplift").attribute(model, x, to, torch.zeros_like(x)).values
        assert away(result.values, deeplift) < 1e-7


@pytest.mark.parametrize("composite", COMPOSITES)
def test_scaling_a_unit_up_and_its_readers_down_changes_nothing(composite, tmp_path):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv1d(2, 5, 3), nn.ReLU(), nn.Conv1d(5, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(20, 3))
    x, found = batch(3, 2, 9), []
    for factor in (1.0, 7.0):
        with torch.no_grad():
            net[0].weight[1] *= factor
            net[0].bias[1] *= factor
            net[2].weight[:, 1] /= factor
        model = open_net(net, tmp_path, (2, 9))
        model.bounds = (torch.tensor(-5.0).double(), torch.tensor(5.0).double())
        found.append(lrp(model, x, target(0, 1, 2), composite=composite, epsilon=1e-13).values)
    assert away(found[1], found[0]) < 1e-8


def test_the_remainder_is_the_share_of_biases_and_of_epsilon(tmp_path):
    torch.manual_seed(0)
    layer, epsilon, index = nn.Linear(5, 3), 0.1, torch.tensor([0, 1, 2, 0])
    model, x = open_net(layer, tmp_path, (5,)), batch(4, 5)
    z, b = model.scores(x, Target(index)), layer.bias.detach()[index]
    remainder = lrp(model, x, Target(index), composite="epsilon", epsilon=epsilon).remainder
    away_from_zero = epsilon * dense_lrp.sign(z)
    assert away(remainder[:, None], (z * (b + away_from_zero) / (z + away_from_zero))[:, None]) < 1e-12


def test_flat_depends_on_the_input_through_relevance_alone(tmp_path):
    net = nn.Linear(5, 3)
    model, x = open_net(net, tmp_path, (5,)), batch(4, 5)
    to = target(0, 1, 2, 0)
    values = lrp(model, x, to).values
    assert away(values, model.scores(x, to)[:, None].expand(4, 5) / 5) < 1e-6


def test_zplus_gives_nothing_to_a_unit_that_nothing_excites(tmp_path):
    class Dead(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Conv1d(1, 1, 1), nn.Conv1d(1, 1, 1)
            nn.init.constant_(self.second.weight, -1.0)
            nn.init.constant_(self.second.bias, 0.0)

        def forward(self, x: Tensor) -> Tensor:
            return self.second(F.relu(self.first(x))).mean(2)

    model, x = open_net(Dead(), tmp_path, (1, 6)), batch(3, 1, 6)
    result = lrp(model, x, target(0, 0, 0), composite="epsilon_plus")
    assert not result.values.any()
    assert away(result.remainder[:, None], model.scores(x, target(0, 0, 0))[:, None]) < 1e-12


def test_z_box_is_positive_and_keeps_all(tmp_path):
    torch.manual_seed(0)
    layer, x = nn.Conv2d(3, 8, 3, padding=1).double(), torch.rand(4, 3, 6, 6).double()
    low, high = torch.zeros(1, 3, 1, 1).double(), torch.ones(1, 3, 1, 1).double()

    def run(u: Tensor, w: Tensor, b: Tensor | None) -> Tensor:
        return F.conv2d(u, w, b, padding=1)

    given = torch.rand(4, 8, 6, 6).double()
    found = zbox(Layer(run, x, layer.weight.detach(), layer.bias.detach()), low, high, given, 1e-12)
    assert bool((found >= 0).all())
    assert away(found.sum((1, 2, 3))[:, None], given.sum((1, 2, 3))[:, None]) < 1e-9
