"""A mask of truth values is a constant factor to every rule: as if the weights on both its sides were zero."""

import pytest
import torch
from nets import quiet, save_exported
from torch import nn
from torch.nn import functional as F

from attrcli import methods
from attrcli import model as models

METHODS = [
    ("gradient", {}),
    ("input_x_gradient", {}),
    ("integrated_gradients", {"steps": 8}),
    ("deeplift", {}),
    ("deeplift", {"rule": "revealcancel"}),
    ("deeplift", {"rule": "genomics"}),
    ("lrp", {"composite": "epsilon"}),
    ("lrp", {"composite": "epsilon_plus"}),
    ("lrp", {"composite": "epsilon_alpha2_beta1"}),
    ("guided_backprop", {}),
    ("deconvnet", {}),
    ("excitation_backprop", {}),
    ("prune_grad", {"sparsity": 0.6}),
]


class Masked(nn.Module):
    """Two convolutions, one masked in front of its ReLU, one behind it."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.one, self.two = nn.Conv2d(2, 10, 3, padding=1), nn.Conv2d(10, 8, 3)
        self.three = nn.Linear(8, 3)
        self.register_buffer("before", torch.rand(10, 1, 1) > 0.3)
        self.register_buffer("behind", torch.rand(1, 8, 1, 1) > 0.3)

    def forward(self, x):
        h = F.relu(self.two(F.relu(self.one(x) * self.before))) * self.behind
        return self.three(h.mean((2, 3)))


class Zeroed(Masked):
    """The same function without masks."""

    def __init__(self):
        super().__init__()
        with torch.no_grad():
            self.one.weight *= self.before[..., None]
            self.one.bias *= self.before.flatten()
            self.three.weight *= self.behind.flatten()

    def forward(self, x):
        return self.three(F.relu(self.two(F.relu(self.one(x)))).mean((2, 3)))


def loaded(net, suffix, tmp_path):
    path = tmp_path / f"{type(net).__name__}{suffix}"
    net = net.double().eval()
    if suffix == ".pt2":
        save_exported(net, (2, 6, 6), path)
    else:
        with quiet():
            torch.jit.script(net).save(path)
    model = models.load(path, precision="float64")
    model.bind()
    return model


@pytest.mark.parametrize("suffix", [".pt", ".pt2"])
@pytest.mark.parametrize(("name", "options"), METHODS)
def test_as_if_the_weights_were_zero(name, options, suffix, tmp_path):
    x = torch.randn(3, 2, 6, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    found = []
    for net in (Masked(), Zeroed()):
        model = loaded(net, suffix, tmp_path)
        target = models.Target(torch.tensor([0, 1, 2]))
        found.append(methods.load(name, options).attribute(model, x, target, torch.full_like(x, 0.1)).values)
    assert float(found[1].abs().max()) > 1e-3
    torch.testing.assert_close(found[0], found[1], rtol=1e-10, atol=1e-12)
