import math
import warnings
from pathlib import Path

import captum.attr
import numpy as np
import pytest
import torch
from method_nets import NETS, Constant, Kinked, Linear, away, batch, images, open_net, predicted, sample, script, target
from torch import Tensor

from attrcli import methods
from attrcli import model as models
from attrcli.errors import UsageError
from attrcli.graph.engine import Engine
from attrcli.model import Model
from attrcli.score import Target


def occlude(model: Model, x: Tensor, to: Target, baseline: Tensor, **options: object) -> Tensor:
    return methods.load("occlusion", options).attribute(model, x, to, baseline).values


def by_hand(model: Model, x: Tensor, to: Target, baseline: Tensor, patch: int, stride: int) -> Tensor:
    """The definition, window by window, for (N, C, H, W)."""
    total, count = torch.zeros_like(x), torch.zeros(x.shape[2:], dtype=x.dtype)
    steps = [math.ceil((size - patch) / stride) + 1 if size > patch else 1 for size in x.shape[2:]]
    for i in range(steps[0]):
        for j in range(steps[1]):
            window = (..., slice(i * stride, i * stride + patch), slice(j * stride, j * stride + patch))
            masked = x.clone()
            masked[window] = baseline[window]
            total[window] += (model.scores(x, to) - model.scores(masked, to))[:, None, None, None]
            count[window[1:]] += 1
    return total / count


# -- closed forms --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(7,), (1, 11), (1, 4, 5)], ids=["F", "CL", "CHW"])
def test_of_a_linear_score_single_elements_are_exact_and_complete(shape: tuple[int, ...], tmp_path) -> None:
    net = Linear(math.prod(shape))
    model, x, baseline, to = open_net(net, tmp_path, shape), batch(2, *shape), batch(2, *shape, seed=1), target(2, 0)
    values = occlude(model, x, to, baseline, patch=1)
    assert away(values, (x - baseline) * net.layer.weight[[2, 0]].reshape(2, *shape)) < 1e-13
    delta = model.scores(x, to) - model.scores(baseline, to)
    assert torch.allclose(values.flatten(1).sum(1), delta, rtol=1e-12)


def test_a_window_covers_all_channels(tmp_path) -> None:
    net = Linear(3 * 4 * 5)
    x, baseline = batch(2, 3, 4, 5), batch(2, 3, 4, 5, seed=1)
    values = occlude(open_net(net, tmp_path, (3, 4, 5)), x, target(0, 1), baseline, patch=1)
    fall = ((x - baseline) * net.layer.weight[:2].reshape(2, 3, 4, 5)).sum(1, keepdim=True)
    assert away(values, fall.expand(-1, 3, -1, -1)) < 1e-13


def test_of_a_linear_score_overlapping_windows_average(tmp_path) -> None:
    net = Linear(7)
    x, baseline = batch(1, 7), torch.zeros(1, 7, dtype=torch.float64)
    values = occlude(open_net(net, tmp_path, (7,)), x, target(0), baseline, patch=3, stride=2)
    c = (x * net.layer.weight[:1])[0].tolist()
    falls = [sum(c[0:3]), sum(c[2:5]), sum(c[4:7])]
    expected = [falls[k] for k in (0, 0)] + [(falls[0] + falls[1]) / 2, falls[1], (falls[1] + falls[2]) / 2]
    assert away(values, torch.tensor([[*expected, falls[2], falls[2]]], dtype=torch.float64)) < 1e-13


@pytest.mark.parametrize("patch", [9, 13, 50])
def test_a_window_over_everything_gives_every_element_the_whole_fall(patch: int, tmp_path) -> None:
    torch.manual_seed(0)
    model = open_net(Kinked(), tmp_path, (2, 9, 13))
    x, baseline, to = batch(2, 2, 9, 13), batch(2, 2, 9, 13, seed=1), target(0, 1)
    values = occlude(model, x, to, baseline, patch=max(patch, 13))
    delta = model.scores(x, to) - model.scores(baseline, to)
    assert away(values, delta[:, None, None, None].expand_as(x)) < 1e-12


def test_what_does_not_change_gets_zero(tmp_path) -> None:
    torch.manual_seed(0)
    model, x = open_net(Kinked(), tmp_path, (2, 9, 13)), batch(3, 2, 9, 13)
    assert occlude(model, x, target(0, 1, 2), x, patch=4).abs().max() < 1e-13
    constant = open_net(Constant(reads=True), tmp_path, (2, 9, 13))
    assert (occlude(constant, x, target(0, 1, 2), torch.zeros_like(x), patch=4) == 0).all()


# -- windows -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("shape", "options", "starts"),
    [
        ((10,), {"patch": 4, "stride": 3}, [(0, 4), (3, 7), (6, 10)]),
        ((10,), {"patch": 4, "stride": 4}, [(0, 4), (4, 8), (8, 10)]),
        ((3, 5), {"patch": 9, "stride": 2}, [(0, 5)]),
        ((3, 4), {"patch": 1}, [(0, 1), (1, 2), (2, 3), (3, 4)]),
        ((6,), {}, [(k, k + 1) for k in range(6)]),
        ((4, 40), {}, [(k, min(k + 5, 40)) for k in range(0, 36, 2)] + [(36, 40)]),
    ],
)
def test_windows_start_at_multiples_of_the_stride_and_the_last_is_clipped(
    shape: tuple[int, ...], options: dict[str, object], starts: list[tuple[int, int]]
) -> None:
    windows = methods.load("occlusion", options).windows(shape)
    assert [(window[-1].start, window[-1].stop) for window in windows] == starts
    assert all(len(window) == len(shape) for window in windows)


@pytest.mark.parametrize("shape", [(1, 28, 28), (3, 64, 72), (3, 7, 300), (2, 5, 6, 7)])
@pytest.mark.parametrize("options", [{}, {"patch": 5, "stride": 3}, {"patch": 3, "stride": 1}, {"patch": 6}])
def test_every_element_is_covered(shape: tuple[int, ...], options: dict[str, object]) -> None:
    method = methods.load("occlusion", options)
    count = np.zeros(shape)
    for window in method.windows(shape):
        count[window] += 1
    assert count.min() >= 1
    assert method.passes(shape) == (1 + len(method.windows(shape)), 0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"patch": 0}, "patch=0 must be at least 1"),
        ({"stride": -1}, "stride=-1 must be at least 1"),
        ({"patch": 3, "stride": 4}, "stride=4 is larger than patch=3 and leaves gaps"),
    ],
)
def test_options_out_of_range(options: dict[str, object], message: str) -> None:
    with pytest.raises(UsageError, match=f"occlusion: {message}"):
        methods.load("occlusion", options)


def test_a_stride_beyond_the_automatic_patch_is_refused() -> None:
    with pytest.raises(UsageError, match="stride=9 is larger than the patch, 3, and leaves gaps"):
        methods.load("occlusion", {"stride": 9}).windows((1, 28, 28))


def test_a_baseline_is_needed(tmp_path) -> None:
    with pytest.raises(UsageError, match="occlusion needs a baseline"):
        methods.load("occlusion").attribute(open_net(Linear(5), tmp_path, (5,)), batch(2, 5), target(0, 1), None)


# -- against the definition and Captum -----------------------------------------------------------------------------

SIZES = [(1, 1), (3, 2), (4, 4), (5, 3)]


@pytest.mark.parametrize(("patch", "stride"), SIZES)
def test_equals_the_definition_and_captum_with_clipped_edges(patch: int, stride: int, tmp_path) -> None:
    torch.manual_seed(0)
    net = Kinked()
    model = open_net(net, tmp_path, (2, 9, 13))
    x, baseline, to = batch(3, 2, 9, 13), batch(3, 2, 9, 13, seed=1), target(0, 1, 2)
    values = occlude(model, x, to, baseline, patch=patch, stride=stride)
    assert away(values, by_hand(model, x, to, baseline, patch, stride)) < 1e-12
    theirs = captum.attr.Occlusion(net).attribute(
        x, (2, patch, patch), (2, stride, stride), baselines=baseline, target=to.index
    )
    assert away(values, theirs) < 1e-6  # Captum sums in float32


@pytest.mark.parametrize(("patch", "stride"), [(1, 1), (4, 3)])
@pytest.mark.parametrize("shape", [(11,), (3, 11)], ids=["F", "CL"])
def test_equals_captum_on_tables_and_sequences(shape: tuple[int, ...], patch: int, stride: int, tmp_path) -> None:
    torch.manual_seed(0)
    net = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(math.prod(shape), 8), torch.nn.Tanh())
    x, baseline = batch(3, *shape), batch(3, *shape, seed=1)
    model = open_net(net, tmp_path, shape)
    window, step = ((patch,), (stride,)) if len(shape) == 1 else ((3, patch), (3, stride))
    theirs = captum.attr.Occlusion(net).attribute(x, window, step, baselines=baseline, target=torch.tensor([0, 4, 7]))
    assert away(occlude(model, x, target(0, 4, 7), baseline, patch=patch, stride=stride), theirs) < 1e-6


@pytest.mark.parametrize("suffix", [".pt", ".onnx"])
@pytest.mark.parametrize("net", NETS)
def test_equals_captum_on_bundled_images(net: str, suffix: str) -> None:
    """The ONNX file runs in ONNX Runtime."""
    x, baseline = (part[:4] for part in images())
    index = predicted(net)[:4]
    with torch.no_grad():
        theirs = captum.attr.Occlusion(script(net)).attribute(
            x, (1, 5, 5), (1, 3, 3), baselines=baseline, target=index, perturbations_per_eval=16
        )
    assert away(occlude(sample(net, suffix), x, Target(index), baseline, patch=5, stride=3), theirs) < 1e-5


def test_an_onnx_file_needs_no_torch_pass(monkeypatch) -> None:
    model, (x, baseline) = sample("fashion_mlp", ".onnx"), images()
    methods.load("occlusion", {"patch": 14, "stride": 14}).attribute(model, x[:2], target(0, 1), baseline[:2])
    monkeypatch.setattr(Engine, "__call__", None)
    assert occlude(model, x[:2], target(0, 1), baseline[:2], patch=14, stride=14).shape == x[:2].shape


def test_integers_are_explained_as_well(tmp_path) -> None:
    """Occlusion asks for no gradient, so a model of counts or tokens can be explained."""

    class Lookup(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table = torch.nn.Parameter(torch.tensor([[0.0, 1.0], [2.0, 5.0], [-1.0, 3.0]]))

        def forward(self, ids: Tensor) -> Tensor:
            return torch.nn.functional.embedding(ids, self.table).sum(1)

    ids = torch.tensor([[0, 1, 2, 1], [2, 2, 0, 1]])
    model = open_integer_net(Lookup(), tmp_path, ids)
    values = occlude(model, ids, target(0, 1), torch.zeros_like(ids), patch=1)
    assert values.tolist() == [[0, 2, -1, 2], [2, 2, 0, 4]]


def open_integer_net(net: torch.nn.Module, folder: Path, ids: Tensor) -> Model:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        torch.jit.save(torch.jit.trace(net.eval().requires_grad_(False), ids), folder / "ids.pt")
    model = models.load(folder / "ids.pt")
    model.bind(dtype=torch.int64)
    return model
