"""The value and the gradient of a node inside a model: one forward pass, and backward only as far as there."""

import pytest
import torch
from nets import quiet
from torch import nn

from attrcli import model
from attrcli.errors import UsageError
from attrcli.graph import engine
from attrcli.graph.rules import PLAIN, REFUSE
from attrcli.model import Target


class Net(nn.Module):
    """A residual block: what is read lies beside a way around it."""

    def __init__(self):
        super().__init__()
        self.one, self.norm, self.two = nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.Conv2d(4, 4, 3, padding=1)
        self.last = nn.Linear(4, 3)

    def forward(self, x):
        y = torch.tanh(self.norm(self.one(x)))
        return self.last((y + torch.sigmoid(self.two(y))).mean((2, 3)))


@pytest.fixture
def opened(tmp_path):
    torch.manual_seed(0)
    net = Net().double().eval()
    nn.init.normal_(net.norm.running_mean)
    with quiet():
        torch.jit.save(torch.jit.trace(net, torch.randn(2, 2, 6, 7).double()), tmp_path / "net.pt")
    return net, model.load(tmp_path / "net.pt", precision="float64")


@pytest.mark.parametrize("heavy", [False, True])
@pytest.mark.parametrize("name", ["convolution", "batch_norm", "tanh", "sigmoid"])
def test_value_and_gradient_are_autograds(name, heavy, opened, monkeypatch):
    net, loaded = opened
    monkeypatch.setattr(engine, "HEAVY", 0 if heavy else 1e9)
    x = torch.randn(3, 2, 6, 7).double()
    ruled = loaded.ruled(x, lambda node, varying: PLAIN, "test", at=name)
    passes = []
    loaded.on_pass = passes.append
    value, gradient, score = loaded.gradient_at(x, Target(torch.tensor([0, 1, 2])), ruled)
    assert passes == [3]
    one = net.one(x)
    steps = {"convolution": one, "batch_norm": net.norm(one), "tanh": torch.tanh(net.norm(one))}
    steps["sigmoid"] = torch.sigmoid(net.two(steps["tanh"]))
    leaf = steps[name].detach().requires_grad_()
    y = steps["tanh"] if name == "sigmoid" else torch.tanh({"convolution": net.norm}.get(name, lambda t: t)(leaf))
    y = leaf if name == "tanh" else y
    logits = net.last((y + (leaf if name == "sigmoid" else torch.sigmoid(net.two(y)))).mean((2, 3)))
    (expected,) = torch.autograd.grad(logits[range(3), [0, 1, 2]].sum(), leaf)
    for found, right in ((value, steps[name]), (gradient, expected), (score, logits[range(3), [0, 1, 2]])):
        assert torch.allclose(found, right, rtol=1e-10, atol=1e-12)
        assert not found.requires_grad


def test_only_what_follows_needs_rules(opened):
    _, loaded = opened
    asked = []

    def choose(node, varying):
        asked.append(node.name)
        return REFUSE if node.name == "tanh" else PLAIN

    loaded.ruled(torch.zeros(1, 2, 6, 7).double(), choose, "test", at="tanh")
    assert asked == ["convolution_1", "sigmoid", "add", "mean", "linear"]


def test_no_such_node(opened):
    with pytest.raises(UsageError, match="no node 'tanhh' in the graph; did you mean 'tanh'"):
        opened[1].ruled(torch.zeros(1, 2, 6, 7).double(), lambda node, varying: PLAIN, "test", at="tanhh")
