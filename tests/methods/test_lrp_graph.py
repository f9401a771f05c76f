"""LRP on graphs: gates, spellings, residuals, batch norm; what libraries that hook modules get wrong."""

import math

import dense_lrp
import pytest
import torch
from lrp_nets import EXACT, TINY, chain, gap, gradient_times_input, lrp
from method_nets import away, batch, open_net, target
from torch import Tensor, nn
from torch.nn import functional as F

from attrcli import methods
from attrcli.model import Target

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


class Product(nn.Module):
    """Two linear maps of the input, combined; without biases."""

    def __init__(self, combine) -> None:
        super().__init__()
        self.one, self.two, self.last = nn.Linear(5, 6, bias=False), nn.Linear(5, 6, bias=False), nn.Linear(6, 3, False)
        self.combine = combine

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.combine(self.one(x), self.two(x)))


def slope(f, z: Tensor) -> Tensor:
    """f as a multiple of its argument, held constant."""
    return z * (f(z) / z).detach()


PRODUCTS = {  # what is combined, and a form whose gradient times the input is its relevance
    "neither a gate": (lambda a, b: a * b, lambda a, b: (a * b.detach() + a.detach() * b) / 2),
    "itself": (lambda a, b: a * a, lambda a, b: a * a.detach()),
    "tanh beside sigmoid": (
        lambda a, b: torch.tanh(a) * torch.sigmoid(b), lambda a, b: slope(torch.tanh, a) * torch.sigmoid(b).detach()
    ),
    "signal beside tanh": (lambda a, b: torch.tanh(a) * b, lambda a, b: torch.tanh(a).detach() * b),
    "quotient": (lambda a, b: a / (1 + b * b), lambda a, b: a / (1 + b * b).detach()),
    "inverse root": (lambda a, b: a * (1 + b.abs()).rsqrt(), lambda a, b: a * (1 + b.abs()).rsqrt().detach()),
    "silu by parts": (lambda a, b: a * torch.sigmoid(a), lambda a, b: slope(F.silu, a)),
    "gelu by parts": (lambda a, b: a * 0.5 * (1 + torch.erf(a / math.sqrt(2))), lambda a, b: slope(F.gelu, a)),
    "larger": (lambda a, b: torch.maximum(a, b), lambda a, b: torch.where(a >= b, a, b)),
    "difference": (lambda a, b: a - 2 * b, lambda a, b: a - 2 * b),
    "joined": (lambda a, b: torch.cat([a[:, :2], b[:, 2:]], 1), lambda a, b: torch.cat([a[:, :2], b[:, 2:]], 1)),
}  # fmt: skip


@pytest.mark.parametrize("kind", PRODUCTS)
def test_two_that_meet_share_as_the_table_says(kind, tmp_path):
    torch.manual_seed(0)
    combine, form = PRODUCTS[kind]
    net = Product(combine)
    model, x = open_net(net, tmp_path, (5,)), batch(3, 5)
    values = lrp(model, x, target(0, 1, 2), **TINY).values
    net.combine, leaf = form, x.clone().requires_grad_()
    (grad,) = torch.autograd.grad(net(leaf)[range(3), range(3)].sum(), leaf)
    assert away(values, grad * x) < 1e-8
    assert away(values.sum(1)[:, None], model.scores(x, target(0, 1, 2))[:, None]) < 1e-8


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


def test_a_product_and_a_sum_are_one_layer(tmp_path):
    class Written(nn.Module):
        def __init__(self, apart: bool) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.layer, self.last, self.apart = nn.Linear(4, 6), nn.Linear(18, 3), apart

        def forward(self, x: Tensor) -> Tensor:
            apart = x @ self.layer.weight.t() + self.layer.bias
            return self.last(F.relu(apart if self.apart else self.layer(x)).flatten(1))

    x, found = batch(3, 3, 4), []
    for apart in (False, True):
        model = open_net(Written(apart), tmp_path, (3, 4))
        model.bounds = (torch.tensor(-5.0).double(), torch.tensor(5.0).double())
        found.append(lrp(model, x, target(0, 1, 2), composite="epsilon_plus_wsquare").values)
    assert away(found[1], found[0]) < 1e-12


def test_batch_norm_in_front_of_padding_stays(tmp_path):
    torch.manual_seed(1)
    model = open_net(Normed(nn.Conv2d(4, 6, 3, padding=1), 4, False, False), tmp_path, (4, 5, 5))
    x, to = batch(3, 4, 5, 5), target(0, 3, 5)
    ruled = methods.load("lrp").ruled(model, x)
    assert sum("batch_norm" in str(node.target) for node in ruled.nodes) == 1
    assert away(lrp(model, x, to, **TINY).values, gradient_times_input(model, x, to)) < 1e-8
