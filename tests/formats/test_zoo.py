"""The zoo: every architecture in every format gives the file's outputs and the module's gradients, or is refused.

The slow cells are those whose export takes long, and every other one of frozen TorchScript; `bench/zoo.py` writes them
all down.
"""

import logging
import re

import pytest
import torch
from nets import quiet, ready
from zoo import EXCEPTIONS, ZOO
from zoo.cells import FIXED, FORMATS, cell, exact, inputs

from attrcli import model

QUICK = {
    "traced": set(ZOO),
    "traced_frozen": set(list(ZOO)[::2]),
    "scripted": set(ZOO),
    "scripted_frozen": set(list(ZOO)[1::2]),
    "pt2": {"resnet", "mobilenet", "convnext", "unet", "deeplab", "vit", "swin", "llama", "lstm", "bag", "siamese"},
    "pt2_fixed": {"vgg", "translator", "gru", "recommender"},
    "pt2_decomposed": {"shufflenet", "bert", "elman"},
    "onnx": {"mean_pool"},
    "onnx_legacy": {"densenet", "gru_sequence_first", "conv_gru"},
}
"""Cells of the default suite."""

CELLS = [
    pytest.param(name, how, marks=() if name in QUICK[how] else pytest.mark.slow, id=f"{name}-{how}")
    for name in ZOO
    for how in FORMATS
]


@pytest.fixture(autouse=True)
def _quiet_exporters():
    """The exporters log what they do not know yet."""
    level = logging.root.manager.disable
    logging.disable(logging.WARNING)
    yield
    logging.disable(level)


def require(name, how, folder, dtype):
    outcome = cell(name, how, folder, dtype)
    verdict, message = EXCEPTIONS.get((name, how), ("ok", ""))
    assert outcome.verdict == verdict, outcome
    assert re.search(message, outcome.message)


@pytest.mark.parametrize(("name", "how"), CELLS)
def test_outputs_are_the_files_and_gradients_the_modules(name, how, tmp_path):
    require(name, how, tmp_path, torch.float64)


@pytest.mark.parametrize("name", ["inception", "efficientnet", "vit_fused", "gru"])
def test_in_single_precision(name, tmp_path):
    require(name, "traced_frozen", tmp_path, torch.float32)


@pytest.mark.parametrize(
    ("name", "how"),
    [("lstm", "traced_frozen"), ("encoder", "traced_frozen"), ("convnext", "pt2"), ("resnet", "scripted")],
)
def test_explained_as_a_user_does(name, how, tmp_path):
    """Through the whole of `Model`: placed, in passes, with the score of a class."""
    arch, (suffix, save) = ZOO[name], FORMATS[how]
    torch.manual_seed(0)
    module, path = ready(arch.make(), dtype=torch.float32), tmp_path / f"net.{suffix}"
    with quiet():
        save(module, inputs(arch, FIXED, torch.float32), path)
    (x,) = inputs(arch, 5, torch.float32)
    gradient, score = model.load(path, device="cpu").gradient(x, model.Target(torch.tensor([0, 1, 2, 3, 0])))
    leaf = x.clone().requires_grad_()
    scores = exact(module)(leaf)[range(5), [0, 1, 2, 3, 0]]
    (expected,) = torch.autograd.grad(scores.sum(), leaf)
    assert torch.allclose(score, scores, rtol=1e-5)
    assert float((gradient - expected).abs().max() / expected.abs().max()) < 1e-5


@pytest.mark.slow
@pytest.mark.parametrize(("name", "how"), [param.values for param in CELLS if param.values not in EXCEPTIONS])
def test_in_single_precision_every_cell(name, how, tmp_path):
    require(name, how, tmp_path, torch.float32)
