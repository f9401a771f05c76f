"""Files that ONNX Runtime's optimiser and quantiser wrote: imported, equal to ONNX Runtime, with useful gradients."""

import logging
import warnings
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import torch
from onnx_cases import built, reference
from onnx_nets import Residual, Transformer, exported
from torch import nn

from attrcli import model as models
from attrcli.errors import AttrcliWarning, UnsupportedOp
from attrcli.formats.onnx import Onnx

LEVELS = onnxruntime.GraphOptimizationLevel


@pytest.fixture(params=[Residual, Transformer])
def network(request: pytest.FixtureRequest) -> nn.Module:
    torch.manual_seed(0)
    return request.param().eval()


def optimised(network: nn.Module, folder: Path, level: LEVELS, dynamo: bool) -> Path:
    exported(network, folder / "net.onnx", dynamo=dynamo)
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = level
    options.optimized_model_filepath = str(folder / "optimised.onnx")
    options.log_severity_level = 4
    onnxruntime.InferenceSession(str(folder / "net.onnx"), options, providers=["CPUExecutionProvider"])
    return folder / "optimised.onnx"


@pytest.mark.parametrize("dynamo", [True, False], ids=["dynamo", "legacy"])
def test_an_optimised_file_equals_the_module(network: nn.Module, dynamo: bool, tmp_path: Path) -> None:
    source = Onnx(optimised(network, tmp_path, LEVELS.ORT_ENABLE_EXTENDED, dynamo))
    assert any(name.startswith("com.microsoft.") for name in source.operations())
    graph = built(source)
    for batch in (1, 3):
        x = torch.randn(batch, 3, 16, 16, requires_grad=True)
        ours, theirs = graph(x)[0], network(x)
        assert torch.allclose(ours, theirs, rtol=0, atol=1e-5)
        gradients = [torch.autograd.grad(y.square().sum(), x)[0] for y in (ours, theirs)]
        assert torch.allclose(*gradients, rtol=0, atol=1e-5 * float(gradients[1].abs().max()))


def test_a_file_laid_out_for_one_processor_says_what_to_do(tmp_path: Path) -> None:
    source = Onnx(optimised(Residual().eval(), tmp_path, LEVELS.ORT_ENABLE_ALL, dynamo=False))
    if not any("nchwc" in name for name in source.operations()):
        pytest.skip("this processor's layout is the plain one")
    with pytest.raises(UnsupportedOp, match="save the optimised model at the level 'extended'"):
        built(source)


def quantised(network: nn.Module, folder: Path, kind: str) -> Path:
    exported(network, folder / "net.onnx", dynamo=False)
    name = Onnx(folder / "net.onnx").inputs[0].name
    generator = np.random.default_rng(0)
    logging.disable(logging.WARNING)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from onnxruntime.quantization import CalibrationDataReader, QuantFormat, quantize_dynamic, quantize_static

        class Reader(CalibrationDataReader):
            def __init__(self) -> None:
                arrays = [generator.standard_normal((4, 3, 16, 16)).astype(np.float32) for _ in range(4)]
                self.rows: Iterator[dict[str, np.ndarray]] = iter([{name: array} for array in arrays])

            def get_next(self) -> dict[str, np.ndarray] | None:
                return next(self.rows, None)

        if kind == "dynamic":
            quantize_dynamic(folder / "net.onnx", folder / "quantised.onnx")
        else:
            style = QuantFormat.QDQ if kind == "pairs" else QuantFormat.QOperator
            quantize_static(
                folder / "net.onnx",
                folder / "quantised.onnx",
                Reader(),
                quant_format=style,
                per_channel=kind == "pairs",
            )
    logging.disable(logging.NOTSET)
    return folder / "quantised.onnx"


@pytest.mark.parametrize("kind", ["dynamic", "pairs", "operators"])
def test_a_quantised_file(network: nn.Module, kind: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    source = Onnx(quantised(network, tmp_path, kind))
    graph = built(source)
    x = torch.randn(3, 3, 16, 16, generator=torch.Generator().manual_seed(0), requires_grad=True)
    ours, theirs = graph(x)[0], network(x)
    wanted = reference(source.proto_bytes(), {source.inputs[0].name: x.detach()})[0]
    scale = float(np.abs(wanted).max())
    assert np.abs(ours.detach().numpy() - wanted).max() < 0.02 * scale  # an element on the edge between two levels
    assert np.median(np.abs(ours.detach().numpy() - wanted)) < 1e-5 * scale
    gradients = [torch.autograd.grad(y.square().sum(), x)[0].flatten() for y in (ours, theirs)]
    assert torch.cosine_similarity(*gradients, dim=0) > 0.95


def test_pairs_of_quantisation_are_run_as_the_file_says(tmp_path: Path) -> None:
    torch.manual_seed(0)
    path = quantised(Transformer().eval(), tmp_path, "pairs")
    x = torch.randn(32, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    model, options = models.load(path), onnxruntime.SessionOptions()
    options.graph_optimization_level = LEVELS.ORT_DISABLE_ALL
    plain = onnxruntime.InferenceSession(path, options).run(None, {model.input: x.numpy()})[0]
    with pytest.warns(AttrcliWarning, match="it is run as it says, with its QuantizeLinear nodes one by one"):
        outputs = model.logits(x).numpy()
    assert np.median(np.abs(outputs - plain)) < 1e-6 * np.abs(plain).max()
    assert np.mean(np.abs(outputs - plain) > 1e-4 * np.abs(plain).max()) < 0.05  # rows that hold a tie
