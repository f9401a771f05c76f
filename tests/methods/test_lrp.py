"""LRP: every rule against dense algebra, composites against an implementation of its own, and what the rules keep."""

import dense_lrp
import pytest
import torch
from dense_lrp import COMPOSITES
from method_nets import SAMPLES, Kinked, away, batch, images, open_net, sample, target
from nets import save_traced
from torch import Tensor, nn
from torch.nn import functional as F

from attrcli import methods
from attrcli import model as models
from attrcli.config import Config
from attrcli.errors import UnsupportedOp, UsageError
from attrcli.explain import explain
from attrcli.graph.rules import PLAIN
from attrcli.methods._lrp_linear import Layer, is_layer, rule_of, zbox
from attrcli.model import Target
from attrcli.plan import Plan
from attrcli.store import RunFile

EXACT = 1e-10
TINY = {"composite": "epsilon", "epsilon": 1e-13}
"""LRP-0, to rounding."""


def lrp(model, x: Tensor, to: Target, **options):
    return methods.load("lrp", options).attribute(model, x, to, None)


def gap(model, result, x: Tensor, to: Target) -> float:
    """|sum + remainder - score|, of the sum of |relevance| and the score."""
    score = model.scores(x, to)
    missed = (result.values.double().flatten(1).sum(1) + result.remainder - score).abs()
    return float((missed / (score.abs() + result.values.double().abs().flatten(1).sum(1))).max())


def gradient_times_input(model, x: Tensor, to: Target) -> Tensor:
    return methods.load("input_x_gradient").attribute(model, x, to, None).values


def quietly(net: nn.Module, folder, *shape: int):
    """Opened as `open_net` does, for layers whose trace warns of sizes that it bakes in."""
    return models.load(save_traced(net.double().eval(), shape, folder / "net.pt"), precision="float64")


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


def chain(padded: bool = True) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(2, 5, 3, padding=1), nn.ReLU(), nn.MaxPool2d(3, 2, 1, ceil_mode=True),
        nn.Conv2d(5, 6, 3, groups=1), nn.ReLU(), nn.AvgPool2d(2, 1, padding=1 if padded else 0),
        nn.AdaptiveAvgPool2d((2, 3)), nn.Flatten(), nn.Linear(36, 10), nn.ReLU(), nn.Linear(10, 3),
    )  # fmt: skip


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


class Residual(nn.Module):
    """Biases, batch norm folded and not, residuals, overlapping windows with ceil mode, average pooling."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm = nn.Conv2d(2, 6, 3, padding=1), nn.BatchNorm2d(6)
        self.before, self.second = nn.BatchNorm2d(6), nn.Conv2d(6, 6, 3, padding=1)
        self.last = nn.Linear(6 * 3 * 4, 3)
        for norm in (self.norm, self.before):
            nn.init.normal_(norm.running_mean, std=0.3)
            nn.init.uniform_(norm.running_var, 0.5, 2)
            nn.init.normal_(norm.weight)
            nn.init.normal_(norm.bias)

    def forward(self, x: Tensor) -> Tensor:
        h = F.leaky_relu(self.norm(self.first(x)), 0.1)
        h = h + self.second(F.relu(self.before(h)))
        h = F.max_pool2d(F.relu(h), 3, 2, ceil_mode=True)
        return self.last(F.avg_pool2d(h, 2, 1, 0).flatten(1))


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


# -- gates, functions, residuals: what hook libraries get wrong


class Excite(nn.Module):
    """A squeeze-and-excitation block, or the same with the gate held at its values."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(2, 4, 3)
        self.squeeze, self.excite, self.last = nn.Linear(4, 2), nn.Linear(2, 4), nn.Linear(4 * 5 * 6, 3)

    def gate(self, h: Tensor) -> Tensor:
        return torch.sigmoid(self.excite(F.relu(self.squeeze(h.mean((2, 3))))))[:, :, None, None]

    def forward(self, x: Tensor) -> Tensor:
        h = F.relu(self.first(x))
        return self.last((h * self.gate(h)).flatten(1))


def test_a_gate_gets_nothing_and_its_signal_all(tmp_path):
    torch.manual_seed(0)
    net = Excite()
    model, x = open_net(net, tmp_path, (2, 7, 8)), batch(3, 2, 7, 8)
    result = lrp(model, x, target(0, 1, 2), **TINY)
    leaf = x.clone().requires_grad_()
    h = F.relu(net.first(leaf))
    score = net.last((h * net.gate(h).detach()).flatten(1))[range(3), range(3)]
    (grad,) = torch.autograd.grad(score.sum(), leaf)
    assert away(result.values, grad * x) < 1e-9
    assert gap(model, result, x, target(0, 1, 2)) < 1e-12


ACTIVATIONS = {
    "functional": lambda z: F.relu(z),
    "in place": lambda z: F.relu_(z.clone()),
    "clamp_min": lambda z: z.clamp_min(0),
    "clamp": lambda z: z.clamp(min=0),
    "maximum": lambda z: torch.maximum(z, torch.zeros_like(z)),
    "threshold": lambda z: F.threshold(z, 0, 0),
    "where": lambda z: torch.where(z > 0, z, torch.zeros_like(z)),
    "masked": lambda z: z * (z > 0),
}


class Spelled(nn.Module):
    """A net whose ReLUs are spelled by a function; `None` is one module, used twice."""

    def __init__(self, spelling: str | None) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = nn.Conv2d(2, 4, 3), nn.Conv2d(4, 4, 3, padding=1)
        self.last = nn.Linear(4 * 7 * 7, 3)
        self.act = nn.ReLU() if spelling is None else ACTIVATIONS[spelling]

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.act(self.second(self.act(self.first(x)))).flatten(1))


@pytest.mark.parametrize("spelling", ACTIVATIONS)
def test_a_relu_is_a_relu_however_it_is_spelled(spelling, tmp_path):
    x, to = batch(3, 2, 9, 9), target(0, 1, 2)
    one, other = (lrp(open_net(Spelled(name), tmp_path, (2, 9, 9)), x, to).values for name in (None, spelling))
    assert away(other, one) < 1e-12


@pytest.mark.parametrize("inserted", [nn.Identity(), nn.Dropout(0.3), nn.Flatten()])
def test_what_does_nothing_changes_nothing(inserted, tmp_path):
    torch.manual_seed(0)
    x, layers = batch(3, 6), [nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 3)]
    one, other = (
        lrp(open_net(nn.Sequential(*net), tmp_path, (6,)), x, target(0, 1, 2)).values
        for net in (layers, [inserted, layers[0], inserted, *layers[1:]])
    )
    assert away(other, one) < 1e-12


def test_a_residual_is_shared_and_not_doubled(tmp_path):
    class Added(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.two, self.last = (nn.Linear(6, 6, bias=False) for _ in range(3))

        def forward(self, x: Tensor) -> Tensor:
            return self.last(self.one(x) + self.two(x))

    model, x, to = open_net(Added(), tmp_path, (6,)), batch(3, 6), target(0, 1, 2)
    assert away(lrp(model, x, to, **TINY).values.sum(1)[:, None], model.scores(x, to)[:, None]) < 1e-9


def test_a_layer_that_is_used_twice_is_two_nodes(tmp_path):
    class Reused(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer, self.last = nn.Linear(6, 6), nn.Linear(6, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.last(F.relu(self.layer(F.relu(self.layer(x)))))

    torch.manual_seed(0)
    model, x, to = open_net(Reused(), tmp_path, (6,)), batch(3, 6), target(0, 1, 2)
    assert away(lrp(model, x, to, **TINY).values, gradient_times_input(model, x, to)) < 1e-8


def test_a_window_that_cancels_stays_finite_and_is_accounted_for(tmp_path):
    net = nn.Sequential(nn.AvgPool1d(2), nn.Flatten(), nn.Linear(2, 3))
    model, to = open_net(net, tmp_path, (1, 4)), target(0, 1)
    x = torch.tensor([[[1.0, -1.0, 2.0, 1.0]], [[3.0, -3.0, 0.0, 0.0]]]).double()
    result = lrp(model, x, to)
    assert bool(torch.isfinite(result.values).all())
    assert gap(model, result, x, to) < 1e-12


def test_permuted_channels_permute_relevance(tmp_path):
    torch.manual_seed(0)
    net, order = chain(), torch.tensor([1, 0])
    x, to = batch(3, 2, 10, 11), target(0, 1, 2)
    one = lrp(open_net(net, tmp_path, (2, 10, 11)), x, to, composite="epsilon_gamma").values
    with torch.no_grad():
        net[0].weight.copy_(net[0].weight[:, order].clone())
    other = lrp(open_net(net, tmp_path, (2, 10, 11)), x[:, order], to, composite="epsilon_gamma").values
    assert away(other[:, order], one) < 1e-10


def test_relevance_of_a_node_inside_the_net(tmp_path):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv1d(2, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(28, 5), nn.ReLU(), nn.Linear(5, 3))
    model, x = open_net(net, tmp_path, (2, 9)), batch(3, 2, 9)
    node = next(n.name for n in model.engine((2, 9)).graph.graph.nodes if "relu" in n.name)
    inside, to = model.at(node, (2, 9)), Target(torch.arange(3), held=model.arguments(x))
    a = model.activation(node, x)
    result = lrp(inside, a, to, **TINY)
    assert gap(inside, result, a, to) < 1e-12
    leaf = a.clone().requires_grad_()
    (grad,) = torch.autograd.grad(net[2:](leaf)[range(3), range(3)].sum(), leaf)
    assert away(result.values, grad * a) < 1e-8


@pytest.mark.parametrize(
    "make",
    [
        lambda: nn.Sequential(nn.Upsample(scale_factor=2), nn.Conv2d(2, 3, 3), nn.GELU(), nn.AdaptiveMaxPool2d(2)),
        lambda: nn.Sequential(nn.Identity(), nn.Conv2d(2, 3, 1), nn.SiLU(), nn.AdaptiveAvgPool2d(2)),
        lambda: nn.Sequential(nn.Upsample(scale_factor=2, mode="bilinear"), nn.ReLU6(), nn.Conv2d(2, 3, 1)),
        lambda: nn.Sequential(nn.Conv2d(2, 4, 3), nn.Hardswish(), nn.PixelShuffle(2), nn.PReLU()),
    ],
)
def test_layers_that_others_refuse(make, tmp_path):
    torch.manual_seed(0)
    net = nn.Sequential(make(), nn.Flatten(), nn.LazyLinear(3))
    net(torch.zeros(1, 2, 5, 5))
    model, x, to = open_net(net, tmp_path, (2, 5, 5)), batch(3, 2, 5, 5), target(0, 1, 2)
    result = lrp(model, x, to, composite="epsilon_plus")
    assert gap(model, result, x, to) < 1e-12
    assert bool(result.values.flatten(1).any(1).all())


def test_biases_of_any_sign_count_once(tmp_path):
    """zennit #53 and #107: with inputs (1, 1) of weights (1, -1), bias -1 or 1."""
    for bias in (-1.0, 1.0):
        layer = nn.Conv1d(2, 1, 1)
        with torch.no_grad():
            layer.weight.copy_(torch.tensor([[[1.0], [-1.0]]]))
            layer.bias.fill_(bias)
        model = open_net(nn.Sequential(layer, nn.Flatten()), tmp_path, (2, 1))
        x = torch.ones(1, 2, 1).double()
        values = lrp(model, x, target(0), composite="epsilon_alpha2_beta1", epsilon=1e-12).values.flatten()
        # score = bias; P = 1 + bias+, N = -1 + bias-: 2 R / P and -(-R / N)
        expected = [2 * bias / (1 + max(bias, 0)), -bias * -1 / (-1 + min(bias, 0))]
        assert values.tolist() == pytest.approx(expected, abs=1e-9)


def test_zplus_takes_inputs_of_either_sign_captum_does_not(tmp_path):
    layer = nn.Conv1d(3, 2, 1, bias=False)
    with torch.no_grad():
        layer.weight.copy_(torch.tensor([[1.0, -1.0, 0.5], [-0.5, -2.0, 1.0]])[:, :, None])
    x = torch.tensor([1.0, -1.0, 1.0]).double()[None, :, None]
    net = nn.Sequential(layer, nn.Flatten(), nn.Linear(2, 1))
    model = open_net(net, tmp_path, (3, 1))
    values = lrp(model, x, target(0), composite="epsilon_plus").values[0]
    expected, _ = dense_lrp.sequential(list(net), x[0], 0, "epsilon_plus")
    assert away(values[None], expected[None]) < EXACT
    assert values[1].abs() > 0  # with the weights alone clamped, the negative input would get nothing


# -- batch norm


class Normed(nn.Module):
    """A layer with batch norm behind it, or in front of it."""

    def __init__(self, layer: nn.Module, channels: int, after: bool, merged: bool) -> None:
        super().__init__()
        rank = layer.weight.dim() - 2
        kind = (nn.BatchNorm1d, nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)[rank]
        self.layer, self.norm, self.after, self.merged = layer, kind(channels), after, merged
        for tensor in (self.norm.weight, self.norm.bias, self.norm.running_mean):
            nn.init.normal_(tensor)
        nn.init.uniform_(self.norm.running_var, 0.5, 2)

    def forward(self, x: Tensor) -> Tensor:
        made = self.norm(self.layer(x)) if self.after else self.layer(self.norm(x))
        return (made * made.new_ones(1)).flatten(1)


NORMED = {
    "convolution": (lambda: nn.Conv2d(4, 6, 3, groups=2, padding=1), (4, 5, 5), 6, True),
    "transposed": (lambda: nn.ConvTranspose2d(4, 6, 3, stride=2, groups=2), (4, 4, 4), 6, True),
    "linear": (lambda: nn.Linear(5, 6), (5,), 6, True),
    "in front": (lambda: nn.Conv2d(4, 6, 3, groups=2), (4, 5, 5), 4, False),
    "in front of linear": (lambda: nn.Linear(5, 6), (5,), 5, False),
}


@pytest.mark.parametrize("kind", NORMED)
def test_batch_norm_is_folded_on_either_side(kind, tmp_path):
    make, shape, channels, after = NORMED[kind]
    torch.manual_seed(1)
    net = Normed(make(), channels, after, False)
    model, x = open_net(net, tmp_path, shape), batch(3, *shape)
    ruled = methods.load("lrp").ruled(model, x)
    assert not any("batch_norm" in str(node.target) for node in ruled.nodes)
    assert away(ruled(x)[0], model.logits(x)) < 1e-12
    # the rules see the folded weights: w-square of the function, whose matrix tells
    index = [0, 3, 5]
    values = lrp(model, x, target(*index), composite="epsilon_plus_wsquare").values
    for i, k in enumerate(index):
        w, b = dense_lrp.matrix(lambda one: net(one), x[i : i + 1])
        squares = (w * w)[k]
        expected = squares / (squares.sum() + b[k] ** 2 + 1e-6) * model.scores(x, target(*index))[i]
        assert away(values[i : i + 1], expected.reshape(1, *shape)) < 1e-6


def test_batch_norm_in_front_of_padding_stays(tmp_path):
    torch.manual_seed(1)
    model = open_net(Normed(nn.Conv2d(4, 6, 3, padding=1), 4, False, False), tmp_path, (4, 5, 5))
    x, to = batch(3, 4, 5, 5), target(0, 3, 5)
    ruled = methods.load("lrp").ruled(model, x)
    assert sum("batch_norm" in str(node.target) for node in ruled.nodes) == 1
    assert away(lrp(model, x, to, **TINY).values, gradient_times_input(model, x, to)) < 1e-8


# -- bounds, scores, refusals


def test_z_box_is_refused_without_bounds(tmp_path):
    model = open_net(Kinked(), tmp_path, (2, 9, 13))
    with pytest.raises(
        UsageError, match=r"composite=epsilon_gamma_box needs the lowest and the highest.*model\.bounds"
    ):
        lrp(model, batch(2, 2, 9, 13), target(0, 1), composite="epsilon_gamma_box")


def test_bounds_go_through_what_comes_before_the_first_layer(tmp_path):
    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Conv1d(2, 3, 2)
            self.register_buffer("scale", torch.tensor([[2.0], [-3.0]]))

        def forward(self, x: Tensor) -> Tensor:
            return self.layer((x - 0.5) * self.scale).flatten(1)

    torch.manual_seed(0)
    net = Scaled()
    model, x = open_net(net, tmp_path, (2, 4)), torch.rand(2, 2, 4).double()
    model.bounds = (torch.tensor(0.0).double(), torch.tensor(1.0).double())
    values = lrp(model, x, target(0, 4), composite="epsilon_gamma_box").values
    low = torch.tensor([[-1.0], [-1.5]]).double()
    for i, k in enumerate((0, 4)):
        given = torch.zeros(9).double()
        given[k] = model.scores(x, target(0, 4))[i]
        a = (x[i : i + 1] - 0.5) * net.scale
        inner = dense_lrp.linear("zbox", net.layer, a, given, epsilon=1e-6, box=(low, -low))
        # a constant subtracted takes its share: (x - .5) keeps x / (x - .5) of it
        shift = x[i] - 0.5
        expected = inner[0] * x[i] / (shift + 1e-6 * dense_lrp.sign(shift))
        assert away(values[i : i + 1], expected[None]) < 1e-9


def test_bounds_come_from_the_preprocessing_of_images(tmp_path):
    config = Config(
        str(SAMPLES / "fashion_cnn.onnx"), (str(SAMPLES / "images" / "test"),), "lrp", str(tmp_path / "x.h5"),
        options={"composite": "epsilon_gamma_box"},
    )  # fmt: skip
    low, high = Plan(config).model.bounds
    x, black = images()
    assert float(low) == pytest.approx(float(black.min()))
    assert float(high) == pytest.approx(float(x.max()))  # some pixel is white


def test_a_run_file_holds_what_adds_up(tmp_path):
    out = tmp_path / "x.h5"
    config = Config(
        str(SAMPLES / "fashion_cnn.onnx"), (str(SAMPLES / "images" / "test" / "Bag"),), "lrp", str(out),
        options={"composite": "epsilon_gamma_box"}, precision="float64",
    )  # fmt: skip
    explain(Plan(config))
    with RunFile(out) as run:
        total = run["attribution"][:].reshape(6, -1).sum(1) + run["remainder"][:]
        score = run["score"][:]
    assert total == pytest.approx(score, rel=1e-5)  # scores and remainders are stored in float32


def test_scores_that_are_no_logits_are_refused():
    model, x = sample("fashion_mlp"), images()[0][:1]
    with pytest.raises(UsageError, match=r"lrp explains logits.*--score prob"):
        lrp(model, x, Target(torch.tensor([0]), "prob"))


@pytest.mark.parametrize(("options", "message"), [({"epsilon": 0}, "a positive number"), ({"gamma": -1}, "zero or a")])
def test_options_out_of_range_are_refused(options, message):
    with pytest.raises(UsageError, match=message):
        methods.load("lrp", options)


def test_a_contrast_starts_with_both_scores(tmp_path):
    torch.manual_seed(0)
    model, x = open_net(Residual(), tmp_path, (2, 9, 11)), batch(2, 2, 9, 11)
    one, other = target(0, 1), target(2, 0)
    both = lrp(model, x, Target(one.index, minus=other.index)).values
    assert away(both, lrp(model, x, one).values - lrp(model, x, other).values) < 1e-12


class Refused(nn.Module):
    def __init__(self, function) -> None:
        super().__init__()
        self.function, self.first, self.last = function, nn.Linear(6, 6), nn.LazyLinear(3)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.function(self.first(x)).flatten(1))


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (lambda z: z.prod(2, keepdim=True), r"node 'prod' is op aten\.prod.*lrp has no rule.*integrated_gradients"),
        (lambda z: z.softmax(2), "node 'softmax'.*only with -o attention=attnlrp or -o attention=cp"),
        (lambda z: F.layer_norm(z, (6,)), "node 'layer_norm'.*only with -o attention"),
        (lambda z: F.rms_norm(z, (6,)), "node 'rms_norm'.*only with -o attention"),
        (lambda z: F.group_norm(z, 2), "node 'group_norm'.*only with -o attention"),
        (lambda z: z @ z.transpose(1, 2), "node 'matmul'.*only with -o attention"),
        (lambda z: F.scaled_dot_product_attention(z, z, z), "'scaled_dot_product_attention'.*only with -o attention"),
        (lambda z: z.std(2, keepdim=True), "node 'std'.*lrp has no rule"),
    ],
)
def test_what_has_no_rule_is_refused_by_name(function, message, tmp_path):
    net = Refused(function)
    net(torch.zeros(1, 4, 6))
    with pytest.raises(UnsupportedOp, match=message):
        lrp(quietly(net, tmp_path, 4, 6), batch(2, 4, 6), target(0, 1))


def test_a_recurrent_layer_is_refused(tmp_path):
    class Recurrent(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.lstm, self.last = nn.LSTM(3, 4, batch_first=True), nn.Linear(4, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.last(self.lstm(x)[0][:, -1])

    with pytest.raises(UnsupportedOp, match=r"lstm.*lrp has no rule"):
        lrp(quietly(Recurrent(), tmp_path, 5, 3), batch(2, 5, 3), target(0, 1))
