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


def optimised(path: Path, level: LEVELS) -> Path:
    """An optimised file beside the one that it is made of, since it may read the same file of weights."""
    made = path.with_name(f"{path.stem}-{level.name}.onnx")
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = level
    options.optimized_model_filepath = str(made)
    options.log_severity_level = 4
    onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    return made


@pytest.mark.parametrize("dynamo", [True, False], ids=["dynamo", "legacy"])
@pytest.mark.parametrize("kind", [Residual, Transformer])
def test_an_optimised_file_equals_the_module(kind: type[nn.Module], dynamo: bool) -> None:
    network, path = exported(kind, dynamo=dynamo)
    torch.manual_seed(0)
    source = Onnx(optimised(path, LEVELS.ORT_ENABLE_EXTENDED))
    assert any(name.startswith("com.microsoft.") for name in source.operations())
    graph = built(source)
    for batch in (1, 3):
        x = torch.randn(batch, 3, 16, 16, requires_grad=True)
        ours, theirs = graph(x)[0], network(x)
        assert torch.allclose(ours, theirs, rtol=0, atol=1e-5)
        gradients = [torch.autograd.grad(y.square().sum(), x)[0] for y in (ours, theirs)]
        assert torch.allclose(*gradients, rtol=0, atol=1e-5 * float(gradients[1].abs().max()))


def test_a_file_laid_out_for_one_processor_says_what_to_do() -> None:
    source = Onnx(optimised(exported(Residual, dynamo=False)[1], LEVELS.ORT_ENABLE_ALL))
    if not any("nchwc" in name for name in source.operations()):
        pytest.skip("this processor's layout is the plain one")
    with pytest.raises(UnsupportedOp, match="save the optimised model at the level 'extended'"):
        built(source)


def quantised(path: Path, folder: Path, how: str) -> Path:
    name = Onnx(path).inputs[0].name
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

        if how == "dynamic":
            quantize_dynamic(path, folder / "quantised.onnx")
        else:
            style = QuantFormat.QDQ if how == "pairs" else QuantFormat.QOperator
            quantize_static(
                path,
                folder / "quantised.onnx",
                Reader(),
                quant_format=style,
                per_channel=how == "pairs",
            )
    logging.disable(logging.NOTSET)
    return folder / "quantised.onnx"


@pytest.mark.parametrize(
    ("kind", "how"),
    [
        (Residual, "dynamic"),
        (Residual, "pairs"),
        (Residual, "operators"),
        (Transformer, "dynamic"),
        pytest.param(Transformer, "pairs", marks=pytest.mark.slow),
        (Transformer, "operators"),
    ],
)
def test_a_quantised_file(kind: type[nn.Module], how: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    network, path = exported(kind, dynamo=False)
    source = Onnx(quantised(path, tmp_path, how))
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
    path = quantised(exported(Transformer, dynamo=False)[1], tmp_path, "pairs")
    x = torch.randn(32, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    model, options = models.load(path), onnxruntime.SessionOptions()
    options.graph_optimization_level = LEVELS.ORT_DISABLE_ALL
    plain = onnxruntime.InferenceSession(path, options).run(None, {model.input: x.numpy()})[0]
    with pytest.warns(AttrcliWarning, match="it is run as it says, with its QuantizeLinear nodes one by one"):
        outputs = model.logits(x).numpy()
    assert np.median(np.abs(outputs - plain)) < 1e-6 * np.abs(plain).max()
    assert np.mean(np.abs(outputs - plain) > 1e-4 * np.abs(plain).max()) < 0.05  # rows that hold a tie
