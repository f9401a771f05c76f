"""ONNX's own backend tests through the importer: python bench/onnx_backend.py [--markdown FILE] [PATTERN].

Every node test, the `simple`, `pytorch-converted` and `pytorch-operator` models and the `light_*` networks that the
onnx package ships. A test passes when the imported graph gives the expected outputs within the test's own tolerances.
Inputs that the operator set reads as numbers (a shape, axes, a trip count) are held constant, as they are in real
files: which inputs stay free is the first of five choices that the importer accepts.
"""

import argparse
import re
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from onnx import TensorProto, defs, helper, numpy_helper
from onnx.backend.test.loader import DATA_DIR, load_model_tests
from torch import fx

from attrcli.errors import ModelError
from attrcli.formats.onnx import Onnx
from attrcli.formats.onnx_ops.base import DTYPES

warnings.filterwarnings("ignore", message=".*quantile.*")

Arrays = Sequence[Any]


@dataclass(frozen=True)
class Case:
    """One test: a model, pairs of inputs and expected outputs, tolerances."""

    name: str
    group: str
    model: onnx.ModelProto
    data: Sequence[tuple[Arrays, Arrays]]
    rtol: float
    atol: float


@dataclass(frozen=True)
class Outcome:
    """What became of a test: 'pass', 'fail', or why it does not apply; which inputs were free; the message."""

    verdict: str
    free: tuple[str, ...] = ()
    message: str = ""


# -- the tests -------------------------------------------------------------------------------------------------------


def cases() -> Iterator[Case]:
    """Every test, node tests first."""
    with np.errstate(all="ignore"):
        nodes = load_model_tests(kind="node")
    for test in nodes:
        yield Case(test.name, "node", test.model, test.data_sets, test.rtol, test.atol)
    for group in ("simple", "pytorch-converted", "pytorch-operator"):
        for test in sorted(load_model_tests(kind=group), key=lambda test: test.name):
            folder = Path(test.model_dir)
            model = onnx.load(folder / "model.onnx")
            data = [_files(model, item) for item in sorted(folder.glob("test_data_set_*"))]
            yield Case(test.name, group, model, data, test.rtol, test.atol)
    for path in sorted((Path(DATA_DIR) / "light").glob("light_*.onnx")):
        yield _light(path)


def _files(model: onnx.ModelProto, folder: Path) -> tuple[Arrays, Arrays]:
    """The arrays of one data set; None where one is not a tensor."""
    sides = []
    for side, values in (("input", model.graph.input), ("output", model.graph.output)):
        count = len(list(folder.glob(f"{side}_*.pb")))
        arrays = []
        for i, value in zip(range(count), values, strict=False):
            proto = TensorProto()
            if value.type.WhichOneof("value") == "tensor_type":
                proto.ParseFromString((folder / f"{side}_{i}.pb").read_bytes())
            arrays.append(numpy_helper.to_array(proto) if proto.data_type else None)
        sides.append(arrays)
    return sides[0], sides[1]


def _light(path: Path) -> Case:
    """A network without its weights: they and the input are what the test's own runner makes of them."""
    model = onnx.load(path)
    held = {entry.name for entry in model.graph.initializer}
    value = next(value for value in model.graph.input if value.name not in held)
    shape = [size.dim_value for size in value.type.tensor_type.shape.dim]
    array = np.arange(np.prod(shape)).reshape(shape).astype(np.float32) / np.prod(shape)
    wanted = onnx.load_tensor(str(path).replace(".onnx", "_output_0.pb"))
    return Case(path.stem, "light", model, [([array], [numpy_helper.to_array(wanted)])], 1e-3, 1e-4)


# -- what does not apply -----------------------------------------------------------------------------------------------

_RANDOM = {"Bernoulli", "Multinomial", "RandomNormal", "RandomNormalLike", "RandomUniform", "RandomUniformLike"}
_DATA_SIZED = {"NonMaxSuppression", "Unique"}
_TEXT = {"RegexFullMatch", "StringConcat", "StringNormalizer", "StringSplit", "TfIdfVectorizer", "LabelEncoder"}
_TREES = {"TreeEnsemble", "TreeEnsembleClassifier", "TreeEnsembleRegressor"}


def not_applicable(model: onnx.ModelProto) -> str | None:
    """The class of tests that a model belongs to and that no graph of torch tensors can pass; None if to none."""
    nodes = list(_nodes(model.graph))
    values = [*model.graph.input, *model.graph.output]
    kinds = {value.type.WhichOneof("value") for value in values}
    types = {value.type.tensor_type.elem_type for value in values if value.type.WhichOneof("value") == "tensor_type"}
    types |= {a.t.data_type for node in nodes for a in node.attribute if a.HasField("t")}
    types |= {a.i for node in nodes for a in node.attribute if a.name == "to" and node.op_type.startswith("Cast")}
    ops = {node.op_type for node in nodes}
    if any(node.domain == "ai.onnx.preview.training" for node in nodes):
        return "training: gradients and optimisers as ops"
    if any(a.name == "training_mode" and a.i for node in nodes for a in node.attribute) or _trains(model):
        return "training: batch statistics or dropout"
    if TensorProto.STRING in types or ops & _TEXT:
        return "text: strings as tensors"
    if ops & _RANDOM:
        return "random generators"
    if "ImageDecoder" in ops:
        return "compressed image files as input"
    if ops & _TREES:
        return "decision trees: constant almost everywhere"
    if "BitCast" in ops:
        return "the bits of a tensor read as another type"
    if types - {0} - DTYPES.keys():
        return "types that torch does not compute with: 2, 4 and 8-bit floats and integers below 8 bits"
    if kinds - {"tensor_type", None}:
        return "sequences, optionals and maps as inputs or outputs"
    if ops & _DATA_SIZED:
        return "outputs whose size depends on the data"
    return None


def _trains(model: onnx.ModelProto) -> bool:
    """Whether a Dropout is told to train, by a constant of the file or by an input."""
    constants = {node.output[0]: node.attribute[0].t for node in model.graph.node if node.op_type == "Constant"} | {
        entry.name: entry for entry in model.graph.initializer
    }
    for node in model.graph.node:
        if node.op_type != "Dropout" or len(node.input) < 3 or not node.input[2]:
            continue
        mode = constants.get(node.input[2])
        if mode is None or bool(numpy_helper.to_array(mode)):
            return True
    return False


def _nodes(graph: onnx.GraphProto) -> Iterator[onnx.NodeProto]:
    for node in graph.node:
        yield node
        for attribute in node.attribute:
            for inner in (attribute.g, *attribute.graphs):
                yield from _nodes(inner)


# -- running one -------------------------------------------------------------------------------------------------------


def run(case: Case, folder: Path) -> Outcome:
    """Import a model and compare what its graph gives; the first choice of free inputs that the importer accepts."""
    if reason := not_applicable(case.model):
        return Outcome(reason)
    message = ""
    for free in choices(case):
        try:
            if error := _compared(case, free, folder, _floating(case.model)):
                return Outcome("fail", free, error)
        except ModelError as error:
            message = message or str(error)
            continue
        except Exception as error:
            return Outcome("fail", free, f"{type(error).__name__}: {error}".splitlines()[0])
        return Outcome("pass", free)
    return Outcome("fail", (), message)


def _compared(case: Case, free: Sequence[str], folder: Path, dtype: torch.dtype) -> str:
    for inputs, wanted in case.data:
        graph, feeds = imported(case.model, inputs, free, folder, dtype)
        with torch.no_grad():
            results = graph(*feeds)
        if error := difference(case, results, wanted):
            return error
    return ""


def choices(case: Case) -> list[tuple[str, ...]]:
    """Names of the inputs that stay free: all, those of floating type, the first of those, the first of all, none."""
    given = _given(case.model)
    floating = [value.name for value in given if DTYPES[value.type.tensor_type.elem_type].is_floating_point]
    names = tuple(value.name for value in given)
    wanted = [choice for choice in (names, tuple(floating), tuple(floating[:1]), names[:1]) if choice]
    return [*dict.fromkeys(wanted), ()]


def _given(model: onnx.ModelProto) -> list[onnx.ValueInfoProto]:
    held = {entry.name for entry in model.graph.initializer}
    return [value for value in model.graph.input if value.name not in held]


def imported(
    model: onnx.ModelProto, inputs: Arrays, free: Sequence[str], folder: Path, dtype: torch.dtype
) -> tuple[fx.GraphModule, list[torch.Tensor]]:
    """The graph with these inputs free and the others held at their values, and the values of the free ones."""
    bound = onnx.ModelProto()
    bound.CopyFrom(model)
    given = _given(model)
    values = dict(zip((value.name for value in given), inputs, strict=False))
    for value in given:
        if value.name not in free:
            bound.graph.input.remove(value)
            bound.graph.initializer.append(_tensor(values[value.name], value))
    if not free:
        bound.graph.input.append(helper.make_tensor_value_info("unused input", TensorProto.FLOAT, [1]))
    path = folder / "model.onnx"
    path.write_bytes(bound.SerializeToString())
    source = Onnx(path)
    shapes = {name: [_plain(values[name]).shape] * 2 for name in free} or {"unused input": [(1,)] * 2}
    graph = source.imported(shapes, dtype)
    feeds = [torch.from_numpy(np.array(_plain(values[name]))) for name in free] or [torch.zeros(1)]
    return graph, [feed.to(dtype) if feed.is_floating_point() else feed for feed in feeds]


def _tensor(array: Any, value: onnx.ValueInfoProto) -> TensorProto:
    if isinstance(array, TensorProto):
        array = numpy_helper.to_array(array)
    return numpy_helper.from_array(np.asarray(array), value.name)


def _plain(array: Any) -> Any:
    """An array in a type that torch can read: bfloat16 is numpy's only by extension."""
    array = numpy_helper.to_array(array) if isinstance(array, TensorProto) else np.asarray(array)
    return array.astype(np.float32) if array.dtype.name == "bfloat16" else array


def _floating(model: onnx.ModelProto) -> torch.dtype:
    values = [*model.graph.input, *model.graph.output]
    types = {value.type.tensor_type.elem_type for value in values} | {t.data_type for t in model.graph.initializer}
    return torch.float64 if TensorProto.DOUBLE in types else torch.float32


_TWO_ULPS = {TensorProto.BFLOAT16: 2**-6, TensorProto.FLOAT16: 2**-9}


_ROUNDING = 1e-6
"""Of the largest element: what a sum that cancels leaves in float32, in the expected outputs themselves too."""


def difference(case: Case, results: Sequence[torch.Tensor], wanted: Arrays) -> str:
    """What is wrong with the outputs, in one line; nothing if all are within the test's tolerances."""
    if len(results) != len(wanted):
        return f"{len(results)} outputs, not {len(wanted)}"
    for i, (result, expected) in enumerate(zip(results, wanted, strict=True)):
        kind = case.model.graph.output[i].type.tensor_type.elem_type
        expected = _plain(expected)
        if tuple(result.shape) != expected.shape:
            return f"output {i} has shape {tuple(result.shape)}, not {expected.shape}"
        ours, theirs = result.detach().numpy().astype(np.float64), expected.astype(np.float64)
        rtol, atol = 0.0, 0.0
        if expected.dtype.kind == "f":
            rtol = max(case.rtol, _TWO_ULPS.get(kind, 0.0))  # for bfloat16 as the package's own runner has it
            atol = max(case.atol, _ROUNDING * np.abs(theirs[np.isfinite(theirs)]).max(initial=0))
        close = np.isclose(ours, theirs, rtol=rtol, atol=atol, equal_nan=True)
        if not close.all():
            return f"output {i} is off by {np.nanmax(np.abs(ours - theirs)):.3g} at {int((~close).sum())} elements"
    return ""


# -- the table ---------------------------------------------------------------------------------------------------------


def run_all(pattern: str = "", tests: Iterable[Case] | None = None) -> dict[str, tuple[Case, Outcome]]:
    """Every test whose name matches, with what became of it."""
    found = {}
    with tempfile.TemporaryDirectory() as folder:
        for case in cases() if tests is None else tests:
            if re.search(pattern, case.name):
                found[f"{case.group}/{case.name}"] = (replace(case, data=()), run(case, Path(folder)))
    return found


def markdown(found: dict[str, tuple[Case, Outcome]], seconds: float) -> str:
    """The table of counts, the classes that do not apply, and the failures by name."""
    groups = ["node", "simple", "pytorch-converted", "pytorch-operator", "light"]
    counts = Counter((case.group, _column(outcome)) for case, outcome in found.values())
    free = sum(bool(outcome.free) for _, outcome in found.values())
    lines = [
        "# ONNX backend tests",
        "",
        "Written by `python bench/onnx_backend.py --markdown bench/onnx_backend.md`. A test passes when the imported",
        "graph gives its expected outputs within its own tolerances (two units in the last place for bfloat16 and",
        f"float16, and {_ROUNDING:g} of the largest element where sums cancel). {free} pass with an input free, the",
        "others have constants only.",
        "",
        f"onnx {onnx.__version__}, opsets up to {defs.onnx_opset_version()}; {len(found)} tests in {seconds:.0f} s.",
        "",
        "| tests | pass | not applicable | fail |",
        "|---|---|---|---|",
    ]
    for group in groups:
        lines.append(f"| {group} | " + " | ".join(str(counts[group, c]) for c in ("pass", "n/a", "fail")) + " |")
    sums = [sum(counts[group, column] for group in groups) for column in ("pass", "n/a", "fail")]
    lines += [f"| all | {sums[0]} | {sums[1]} | {sums[2]} |", "", "| not applicable because of | tests |", "|---|---|"]
    reasons = Counter(outcome.verdict for _, outcome in found.values() if _column(outcome) == "n/a")
    lines += [f"| {reason} | {count} |" for reason, count in reasons.most_common()]
    failed = [(name, outcome) for name, (_, outcome) in found.items() if outcome.verdict == "fail"]
    lines += ["", *(f"- {name}: {outcome.message}" for name, outcome in failed)] if failed else []
    return "\n".join(lines) + "\n"


def _column(outcome: Outcome) -> str:
    return outcome.verdict if outcome.verdict in ("pass", "fail") else "n/a"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("pattern", nargs="?", default="", help="only tests whose name matches")
    parser.add_argument("--markdown", type=Path, help="write the table there as well")
    options = parser.parse_args()
    torch.set_num_threads(1)
    start = time.perf_counter()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = run_all(options.pattern)
    text = markdown(found, time.perf_counter() - start)
    print(text, end="")
    if options.markdown:
        options.markdown.write_text(text)


if __name__ == "__main__":
    main()
