"""Guided backpropagation and deconvnet: what is a ReLU, and what it lets through."""

import copy

import pytest
import torch
from method_nets import away, batch, open_net, target
from nets import ready
from torch import Tensor, nn
from torch.nn import functional as F
from zoo import ZOO

from attrcli import methods
from attrcli.errors import UnsupportedOp

captum = pytest.importorskip("captum.attr")
SHAPE = (2, 8, 10)
ORACLES = {"guided_backprop": captum.GuidedBackprop, "deconvnet": captum.Deconvolution}


class Net(nn.Module):
    """Two convolutions with an activation after each, a max pool, a linear layer."""

    def __init__(self, act, *, pool: bool = True) -> None:
        super().__init__()
        self.one, self.two = nn.Conv2d(2, 5, 3, padding=1), nn.Conv2d(5, 4, 3, padding=1)
        self.norm, self.last = nn.BatchNorm2d(5), nn.Linear(4 * (20 if pool else 80), 3)
        self.first, self.second, self.pool = act, copy.deepcopy(act), pool

    def forward(self, x: Tensor) -> Tensor:
        x = self.second(self.two(self.first(self.norm(self.one(x)))))
        return self.last((F.max_pool2d(x, 2) if self.pool else x).flatten(1))


class Written(nn.Module):
    """An activation written as a function; of tensors that the model stores, too."""

    zero: Tensor

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how = how
        self.register_buffer("zero", torch.zeros(1))

    def forward(self, x: Tensor) -> Tensor:
        if self.how == "functional":
            return F.relu(x)
        if self.how == "in place":
            return (x + 0).relu_()
        if self.how == "clamp_min":
            return x.clamp_min(0)
        if self.how == "clamp":
            return x.clamp(0, None)
        if self.how == "threshold":
            return F.threshold(x, 0.0, 0.0)
        if self.how == "maximum":
            return torch.maximum(self.zero, x)
        if self.how == "maximum of zeros":
            return torch.maximum(x, torch.zeros_like(x))
        if self.how == "where":
            return torch.where(x > 0, x, torch.zeros_like(x))
        if self.how == "where below":
            return torch.where(x <= 0, self.zero, x)
        if self.how == "mask":
            return x * (x > 0)
        return x.masked_fill(x < 0, 0)


WAYS = ["functional", "in place", "clamp_min", "clamp", "threshold", "maximum", "maximum of zeros", "where"]
WAYS += ["where below", "mask", "masked_fill"]


def explain(name, net, x, folder, **options):
    """A method's map of a net that is traced, with the note."""
    model = open_net(net, folder, tuple(x.shape[1:]))
    result = methods.load(name, options).attribute(model, x, target(*[i % 3 for i in range(len(x))]), None)
    return result.values, result.note


def oracle(name, net, x):
    """Captum, which knows nn.ReLU modules only."""
    leaf = x.clone().requires_grad_()
    return ORACLES[name](net).attribute(leaf, torch.arange(len(x)) % 3).detach()


@pytest.mark.filterwarnings("ignore:Setting")
@pytest.mark.parametrize("name", ORACLES)
def test_as_captum_for_modules(name, tmp_path):
    torch.manual_seed(0)
    net, x = Net(nn.ReLU()).double().eval(), batch(4, *SHAPE)
    values, note = explain(name, net, x, tmp_path)
    assert away(values, oracle(name, net, x)) < 1e-12
    assert note is None
    assert away(values, explain("gradient", net, x, tmp_path)[0]) > 0.1


@pytest.mark.filterwarnings("ignore:Setting")
@pytest.mark.parametrize("name", ORACLES)
@pytest.mark.parametrize("how", WAYS)
def test_a_relu_is_told_by_what_it_computes(how, name, tmp_path):
    torch.manual_seed(0)
    net, x = Net(nn.ReLU()).double().eval(), batch(3, *SHAPE)
    expected = oracle(name, net, x)
    net.first = net.second = Written(how).double()  # one module, used twice
    assert away(explain(name, net, x, tmp_path)[0], expected) < 1e-12


@pytest.mark.parametrize(
    ("act", "slope"),
    [
        (nn.ReLU6(), lambda z: ((z > 0) & (z < 6)).double()),
        (nn.Hardtanh(0, 1), lambda z: ((z > 0) & (z < 1)).double()),
        (nn.LeakyReLU(0.1), lambda z: torch.where(z > 0, torch.ones_like(z), torch.full_like(z, 0.1))),
        (nn.PReLU(5), lambda z: torch.where(z > 0, torch.ones_like(z), torch.full_like(z, 0.25))),
    ],
    ids=["relu6", "hardtanh", "leaky relu", "prelu"],
)
def test_a_ceiling_or_a_leak_counts(act, slope, tmp_path):
    """By hand: through the linear layer and the one activation before it."""

    class One(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.act, self.last = nn.Conv2d(2, 5, 3), act, nn.Linear(240, 3)

        def forward(self, x):
            return self.last(self.act(self.conv(x)).flatten(1))

    torch.manual_seed(0)
    net, x = One().double().eval(), 3 * batch(3, *SHAPE)
    z = net.conv(x.requires_grad_()).detach()
    arrives = net.last.weight[[0, 1, 2]].reshape(3, *z.shape[1:]).clamp_min(0)
    for name, given in (("guided_backprop", slope(z) * arrives), ("deconvnet", arrives)):
        (expected,) = torch.autograd.grad(net.conv(x), x, given)
        assert (
            away(explain(name, net, x.detach(), tmp_path)[0], expected) < 1e-7
            if isinstance(act, nn.LeakyReLU)
            else 1e-12
        )


def test_deconvnet_without_pools_does_not_look_at_the_input(tmp_path):
    torch.manual_seed(0)
    net, x = Net(nn.ReLU(), pool=False), batch(3, *SHAPE)
    to, model = target(1, 1, 1), open_net(net, tmp_path, SHAPE)
    values = methods.load("deconvnet").attribute(model, x, to, None).values
    assert away(values[1:], values[:1].expand(2, *SHAPE)) < 1e-12
    assert values.abs().max() > 0


def test_where_all_later_weights_are_positive_guided_is_the_gradient(tmp_path):
    torch.manual_seed(0)
    net, x = Net(nn.ReLU()), batch(3, *SHAPE)
    net.two.weight.data.abs_(), net.last.weight.data.abs_()
    assert away(explain("guided_backprop", net, x, tmp_path)[0], explain("gradient", net, x, tmp_path)[0]) < 1e-12


def test_a_larger_row_of_the_head_scales_the_map_and_its_negative_does_not(tmp_path):
    torch.manual_seed(0)
    net, x = Net(nn.ReLU()), batch(1, *SHAPE)
    once, _ = explain("guided_backprop", net, x, tmp_path)
    net.last.weight.data *= 3
    assert away(explain("guided_backprop", net, x, tmp_path)[0], 3 * once) < 1e-12
    net.last.weight.data *= -1
    assert away(explain("guided_backprop", net, x, tmp_path)[0], -3 * once) > 0.1


@pytest.mark.parametrize(
    "act", [nn.Sigmoid(), nn.Tanh(), nn.SiLU(), nn.GELU(), nn.Hardswish(), nn.ELU(), nn.Mish()], ids=str
)
def test_all_activations_on_demand_and_none_by_default(act, tmp_path):
    torch.manual_seed(0)
    net, x = Net(act, pool=False).double(), batch(3, *SHAPE)
    kind = type(act).__name__.lower()
    with pytest.raises(
        UnsupportedOp, match=rf"no ReLU lies between .*plain gradient; its nonlinearities: 2 {kind}; -o acts"
    ):
        explain("guided_backprop", net, x, tmp_path)
    values, _ = explain("guided_backprop", net, x, tmp_path, acts="all")
    first = net.norm.eval()(net.one(x)).detach().requires_grad_()
    second = net.two(act(first)).detach().requires_grad_()
    arrives = net.last.weight[[0, 1, 2]].reshape(second.shape)
    for z, before in ((second, lambda: net.two(act(first))), (first, None)):
        (slope,) = torch.autograd.grad(act(z).sum(), z)
        arrives = slope.clamp_min(0) * arrives.clamp_min(0)
        if before is not None:
            inner = act(first).detach().requires_grad_()
            (arrives,) = torch.autograd.grad(net.two(inner), inner, arrives)
    leaf = x.clone().requires_grad_()
    (expected,) = torch.autograd.grad(net.norm(net.one(leaf)), leaf, arrives)
    assert away(values, expected) < 1e-12


def test_what_keeps_its_gradient_is_said(tmp_path):
    torch.manual_seed(0)
    net = Net(nn.ReLU())
    net.second = nn.SiLU()
    _, note = explain("guided_backprop", net, batch(2, *SHAPE), tmp_path)
    assert note == ("1 activations guided; by their gradient: 1 silu",) * 2


class Swish(nn.Module):
    def forward(self, x):
        return x * torch.sigmoid(x)


@pytest.mark.parametrize(
    ("net", "acts", "match"),
    [
        (nn.Sequential(nn.Flatten(), nn.Linear(160, 3)), "relu", "it has no nonlinearity"),
        (nn.Sequential(nn.Flatten(), nn.Linear(160, 3)), "all", "it has no nonlinearity"),
        (nn.Sequential(nn.Flatten(), nn.Linear(160, 5), Swish(), nn.Linear(5, 3)), "all", "node 'mul' is op aten.mul"),
    ],
)
def test_refused(net, acts, match, tmp_path):
    with pytest.raises(UnsupportedOp, match=match):
        explain("guided_backprop", net, batch(2, *SHAPE), tmp_path, acts=acts)


def test_folding_batch_norm_changes_nothing(tmp_path, monkeypatch):
    from attrcli.graph import engine

    torch.manual_seed(0)
    net, x = ready(ZOO["resnet"].make()), batch(3, 3, 16, 16)
    expected, _ = explain("guided_backprop", net, x, tmp_path)
    monkeypatch.setattr(engine, "HEAVY", 0)
    assert away(explain("guided_backprop", net, x, tmp_path)[0], expected) < 1e-10
