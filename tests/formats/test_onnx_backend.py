"""ONNX's own backend tests, all of them, through the importer; gradients of the differentiable ones."""

import importlib.util
import re
import sys
import warnings
from collections import Counter
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch

BENCH = Path(__file__).parents[2] / "bench" / "onnx_backend.py"


@pytest.fixture(scope="module")
def backend() -> ModuleType:
    """The script that writes the table, as a module."""
    spec = importlib.util.spec_from_file_location("onnx_backend", BENCH)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["onnx_backend"] = module
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the arithmetic by which the package makes its data
        spec.loader.exec_module(module)
        module.CASES = list(module.cases())
    return module


@pytest.mark.slow
def test_every_applicable_backend_test_passes(backend: ModuleType) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = backend.run_all(tests=backend.CASES)
    verdicts = Counter(outcome.verdict for _, outcome in found.values())
    failed = [f"{name}: {outcome.message}" for name, (_, outcome) in found.items() if outcome.verdict == "fail"]
    assert not failed, "\n".join(failed)
    assert verdicts["pass"] > 1700
    assert len(found) - verdicts["pass"] < 300  # what does not apply; a class that swallows more would show here
    bound = [name for name, (_, outcome) in found.items() if outcome.verdict == "pass" and not outcome.free]
    assert len(bound) < 40, "tests that pass only with every input a constant: constants, windows, absent optionals"


# Piecewise constant, or not differentiable at what the data holds: ties, kinks, the edge of the domain, a row of
# attention that sees no key.
NOT_SMOOTH = (
    r"acos$|asin$|atanh$|structural_empty|robustness_expanded|cast|round|ceil|floor|sign|quantize|qlinear|integer|equal|greater|less|"
    r"arg_?m|hardmax|one_?hot|isnan|isinf|not_|_and|or\d|xor|bit|_shape|_size|eye|range|nonzero|_mod|window|mel|top_k|"
    r"nearest|binarizer|dropout|optional|det_|reduce_l1|reduce_l2_do|reduce_max|reduce_min|maxpool|shrink|thresholded|"
    r"hard|relu|abs|clip|pow_types|sequence"
)


@pytest.mark.slow
def test_gradients_equal_finite_differences(backend: ModuleType, tmp_path: Path) -> None:
    """The smooth node tests with small inputs, in float64."""
    checked, wrong = 0, []
    for case in backend.CASES:
        if case.group != "node" or backend.not_applicable(case.model) or re.search(NOT_SMOOTH, case.name):
            continue
        if sum(np.size(backend._plain(item)) for item in case.data[0][0] if item is not None) > 400:
            continue
        checked += 1
        if error := _gradient_error(backend, case, tmp_path):
            wrong.append(f"{case.name}: {error}")
    assert not wrong, "\n".join(wrong)
    assert checked > 600


def _gradient_error(backend: ModuleType, case: Any, folder: Path) -> str:
    inputs, _ = case.data[0]
    for free in backend.choices(case):
        try:
            graph, feeds = backend.imported(case.model, inputs, free, folder, torch.float64)
        except backend.ModelError:
            continue
        places = [i for i, feed in enumerate(feeds) if feed.is_floating_point() and feed.numel()]
        if not places or not free:
            return ""
        if "batchnorm" in case.name:  # torch has no derivative by running statistics, which are constants in files
            places = places[:1]

        def run(*values: torch.Tensor, graph: Any = graph, feeds: Any = feeds, places: Any = places) -> torch.Tensor:
            held = list(feeds)
            for place, value in zip(places, values, strict=True):
                held[place] = value
            smooth = [item.reshape(-1) for item in graph(*held) if item.is_floating_point() and item.requires_grad]
            return torch.cat(smooth) if smooth else values[0].sum() * 0

        # Off the kinks, which round numbers lie on: zeros, places between two pixels.
        generator = torch.Generator().manual_seed(0)
        moved = [feeds[place] + 0.02 * torch.rand(feeds[place].shape, generator=generator) for place in places]
        values = tuple(value.double().requires_grad_() for value in moved)
        try:
            torch.autograd.gradcheck(run, values, fast_mode=True, atol=1e-4, rtol=1e-3)
        except RuntimeError as error:
            return str(error).splitlines()[0]
        return ""
    return "not imported"
