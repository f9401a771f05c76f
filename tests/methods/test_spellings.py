"""The same net in other words: one ReLU however it is written, and indices that an exporter counts from the end."""

import warnings

import pytest
import torch
from method_nets import away, batch, target
from torch import Tensor, nn
from torch.nn import functional as F

from attrcli import methods
from attrcli import model as models

RELUS = {
    "relu": F.relu,
    "clamp": lambda z: z.clamp(min=0),
    "maximum": lambda z: torch.maximum(z, torch.zeros((), dtype=z.dtype)),
    "where": lambda z: torch.where(z > 0, z, 0.0),
    "product": lambda z: z * (z > 0),
}


class Twice(nn.Module):
    """A ReLU behind a ReLU: what the second one's derivative is at zero matters to RevealCancel."""

    def __init__(self, relu) -> None:
        super().__init__()
        self.first, self.second, self.last = nn.Linear(6, 9), nn.Linear(9, 9), nn.Linear(9, 3)
        self.relu = relu

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.relu(F.relu(self.second(self.relu(self.first(x))))))


class Picked(nn.Module):
    """Reads places that the data choose."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(6, 6), nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        y = torch.tanh(self.first(x))
        return self.last(torch.gather(y * y, 1, y.topk(3, 1).indices))


def traced(net: nn.Module, path):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.jit.save(torch.jit.trace(net.double().eval(), batch(2, 6)), path)
    return models.load(path, precision="float64")


@pytest.mark.parametrize("rule", ["rescale", "revealcancel", "genomics"])
@pytest.mark.parametrize("spelling", RELUS)
def test_deeplift_knows_a_relu_by_what_it_computes(rule: str, spelling: str, tmp_path) -> None:
    x, baseline, to = batch(3, 6), batch(3, 6, seed=1), target(0, 1, 2)
    found = []
    for name in ("relu", spelling):
        torch.manual_seed(0)
        model = traced(Twice(RELUS[name]), tmp_path / f"{name}.pt")
        found.append(methods.load("deeplift", {"rule": rule}).attribute(model, x, to, baseline))
    assert away(found[1].values, found[0].values) < 1e-12
    assert all(float(each.remainder.abs().max()) == 0 for each in found)


def test_deeplift_through_places_that_the_data_choose_is_that_of_torchscript_in_onnx(tmp_path) -> None:
    x, to = batch(3, 6), target(0, 1, 2)
    net = Picked()
    expected = methods.load("deeplift").attribute(traced(net, tmp_path / "net.pt"), x, to, torch.zeros_like(x))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(
            net, (x,), tmp_path / "net.onnx", dynamo=False, input_names=["x"], dynamic_axes={"x": {0: "n"}}
        )
    model = models.load(tmp_path / "net.onnx", precision="float64")
    found = methods.load("deeplift").attribute(model, x, to, torch.zeros_like(x))
    assert away(found.values, expected.values) < 1e-12
    torch.testing.assert_close(found.remainder, expected.remainder)
    assert float(found.remainder.abs().min()) > 0
