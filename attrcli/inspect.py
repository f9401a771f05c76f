"""inspect: what is in a model file or in a run file. Plain functions that return facts; nothing is printed."""

import math
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from attrcli import methods
from attrcli.errors import AttrcliError, UnsupportedOp, UsageError
from attrcli.preprocess import Preprocess
from attrcli.sidecar import find, from_mapping, parse_embedded, to_toml
from attrcli.store import RunFile, Status, is_run_file

if TYPE_CHECKING:
    import torch

    from attrcli.formats.spec import TensorSpec
    from attrcli.model import Model

__all__ = ["is_run_file", "model_file", "run_file", "write_sidecar"]

Shape = Sequence[int]


# -- run files -----------------------------------------------------------------------------------------------------


def run_file(path: Path) -> dict[str, Any]:
    """Method, options, counts by status and gap statistics of a run file. Raises UsageError if it is none."""
    with RunFile(path) as run:
        counts = Counter(Status(int(code)).name.lower() for code in run.status)
        facts: dict[str, Any] = {
            "run_file": str(path),
            "complete": run.complete,
            "rows": len(run),
            **{f"rows_{name}": count for name, count in sorted(counts.items())},
        }
        for key in (
            *("method", "options", "target", "score", "baseline", "input", "output", "at", "model", "model_format"),
            *("model_sha256", "inputs_root", "precision", "seed", "batch_size", "device", "versions"),
        ):
            facts[key] = run.attributes.get(key)
        facts["attribution"] = tuple(run.layout.attribution)
        facts.update(_gaps(run))
        failed = [(run.ids[i], run.messages[i]) for i in np.flatnonzero(run.status == Status.ERROR)[:10]]
        if failed:
            facts["errors"] = [message if name in message else f"{name}: {message}" for name, message in failed]
        return facts


def _gaps(run: RunFile) -> dict[str, Any]:
    """|gap| relative to the sum of |attribution|: median, 95 %, largest and where; nothing for other methods."""
    relative = run.gaps()
    known = relative[~np.isnan(relative)]
    if not known.size:
        return {}
    worst = int(np.nanargmax(relative))
    return {
        "gap_median": float(f"{np.quantile(known, 0.5, method='higher'):.2g}"),
        "gap_p95": float(f"{np.quantile(known, 0.95, method='higher'):.2g}"),
        "gap_max": float(f"{relative[worst]:.2g}"),
        "gap_max_id": run.ids[worst],
    }


# -- model files ---------------------------------------------------------------------------------------------------


def model_file(
    path: Path, shape: Shape | None = None, *, preprocess: str | None = None, trusted: bool = False
) -> dict[str, Any]:
    """Format, inputs, outputs, parameters, operations, final activation, and which methods work and why not.

    `shape` of one sample, channels first, is needed where neither the file nor the sidecar tells; without it
    operations are counted from the file. `preprocess` names a preset or the sidecar. Raises ModelError for a file that
    cannot be opened, UsageError for a shape that no memory holds.
    """
    from attrcli import model as models

    model = models.load(path, trusted=trusted)
    source = model.source
    sidecar, where = _sidecar(model, preprocess)
    facts: dict[str, Any] = {
        "model": str(path),
        "format": model.format,
        "sha256": model.sha256,
        "inputs": models.describe(source.inputs),
        "parameters": source.parameter_count(),
        "preprocessing": f"{sidecar.kind}, from {where}"
        if sidecar is not None
        else "none: explain needs --preprocess, or a sidecar (--write-sidecar)",
    }
    problem, runs = None, False
    explained = _explained(model)
    known = tuple(shape) if shape else _known_shape(explained, sidecar)
    if unsaid := _unsaid(model, explained, known):
        facts["outputs"] = models.describe(source.outputs) if source.outputs else "unknown until the size is"
    elif known is not None:
        _require_room(known)
        try:
            facts.update(_graph_facts(model, explained, sidecar, known))
        except AttrcliError as error:
            problem, runs = str(error), model.format == "onnx" and isinstance(error, UnsupportedOp)
    facts["operations"] = dict(sorted(source.operations().items(), key=lambda item: -item[1]))
    if problem or unsaid:
        facts["note"] = problem or unsaid
    if problem:
        facts["methods"] = _without_graph(f"no: {problem}", runs=runs)
    else:
        facts["methods"] = _methods(model, known, f"not known: {unsaid}" if unsaid else None)
    return facts


def _sidecar(model: "Model", preprocess: str | None) -> tuple[Preprocess | None, str]:
    """The preprocessing that `explain` would find, and where."""
    embedded = parse_embedded(model.source.metadata.get("attrcli.toml"), str(model.path))
    beside = model.path.with_suffix(".toml")
    where = preprocess or (beside.name if beside.is_file() else "the file itself")
    return find(model.path, preprocess, embedded), where


def _explained(model: "Model") -> "TensorSpec":
    """The input that is likely explained: the first that has gradients."""
    inputs = model.source.inputs
    return next((spec for spec in inputs if spec.dtype.is_floating_point), inputs[0])


def _known_shape(spec: "TensorSpec", sidecar: Preprocess | None) -> tuple[int, ...] | None:
    """Shape of one sample, channels first, from the sidecar or else the file."""
    if sidecar is not None and sidecar.sample_shape is not None:
        return sidecar.channels_first(sidecar.sample_shape)
    if spec.shape is None or None in spec.shape[1:]:
        return None
    return tuple(size for size in spec.shape[1:] if size is not None)


def _unsaid(model: "Model", explained: "TensorSpec", known: Shape | None) -> str:
    """What the file does not say though it must be known before a graph is built, and what to do; '' for nothing."""
    others = [spec for spec in model.source.inputs if spec.name != explained.name]
    sizeless = next((spec.name for spec in others if spec.shape is None or None in spec.shape[1:]), None)
    if sizeless is not None:
        fixes = " ".join(f"--fix {spec.name}=FILE" for spec in others)
        return f"the file does not say the size of '{sizeless}': try explain with --input {explained.name} {fixes}"
    if known is None:
        return "the file does not say the size of its input: give --shape C,H,W, or a sidecar with size"
    return ""


def _require_room(shape: Shape) -> None:
    """Raise UsageError for a shape of which memory cannot hold the few samples that a graph is built with."""
    from attrcli.graph.engine import free_memory

    if 16 * math.prod(shape) > free_memory():
        raise UsageError(f"a sample of {'x'.join(map(str, shape))} does not fit into memory; give a smaller shape")


def _graph_facts(model: "Model", explained: "TensorSpec", sidecar: Preprocess | None, shape: Shape) -> dict[str, Any]:
    """What the graph tells, for samples of this shape. Raises AttrcliError where it cannot be built."""
    from attrcli.graph import ops

    outputs = _bind(model, explained, sidecar, tuple(shape))
    engine = model.engine(tuple(shape))
    nodes = [node for node in engine.graph.graph.nodes if node.op == "call_function"]
    kinds: Counter[str] = Counter()
    for node in nodes:
        kind = ops.classify(node.target)
        kinds[kind.value if kind else "?"] += 1
    return {
        "sample_shape": tuple(shape),
        "outputs": ", ".join(f"{name} {'x'.join(map(str, size)) or '1'}" for name, size in outputs.items()),
        "batch": "free" if engine.batch is None else f"frozen at {engine.batch}: samples run {engine.batch} at a time",
        "final_activation": engine.head,
        "graph_nodes": len(nodes),
        "op_classes": dict(kinds.most_common()),
        "nodes": [node.name for node in nodes if node.meta.get("fractions")],  # those that --at can take
        "activation_bytes": engine.activation_bytes,
    }


def _bind(
    model: "Model", explained: "TensorSpec", sidecar: Preprocess | None, shape: tuple[int, ...]
) -> dict[str, tuple[int, ...]]:
    """Bind the first output, the other inputs at zero; return the outputs with their shapes per sample."""
    import torch

    from attrcli.formats.spec import Sample

    p = sidecar or Preprocess("array", dtype=str(explained.dtype).removeprefix("torch."))
    dtype = getattr(torch, p.dtype)
    taken = (*shape[1:], shape[0]) if p.channels_last else shape
    samples = {explained.name: Sample((math.prod(taken),) if p.flat else taken, dtype)}
    fixed = {}
    for spec in model.source.inputs:
        if spec.name == explained.name:
            continue
        size = [size for size in (spec.shape or ())[1:] if size is not None]
        fixed[spec.name] = torch.zeros(size, dtype=spec.dtype)
        samples[spec.name] = Sample(tuple(fixed[spec.name].shape), spec.dtype)
    declared = None if p.activation == "none" else p.activation
    layout = "NHWC" if p.channels_last else "NCHW"
    try:
        model.bind(input=explained.name, fixed=fixed, dtype=dtype, declared=declared, layout=layout, flat=p.flat)  # type: ignore[arg-type]
        engine = model.engine(shape)
        return {engine.output: engine.output_shape}
    except UsageError:  # several outputs
        shapes = model.source.build(samples, model.dtype, (2, 3)).meta["output_shapes"]
        model.bind(
            input=explained.name,
            output=next(iter(shapes)),
            fixed=fixed,
            dtype=dtype,
            declared=declared,  # type: ignore[arg-type]
            layout=layout,
            flat=p.flat,
        )
        return {name: tuple(pair[0][1:]) for name, pair in shapes.items()}


def _without_graph(answer: str, *, runs: bool) -> dict[str, str]:
    """The `answer` for every method where no graph can be built, but for those that do without if the file `runs`."""
    needs = {name: methods.description(name).needs for name in methods.METHODS}
    forward = {name for name, held in needs.items() if "gradient" not in held and "rules" not in held}
    return {name: "works, in ONNX Runtime" if runs and name in forward else answer for name in needs}


def _methods(model: "Model", shape: Shape | None, answer: str | None) -> dict[str, str]:
    """Which methods work on this model, and why not; the `answer` where that is not known."""
    dtype = model.input_dtype or _explained(model).dtype
    more = ", ".join(
        flag
        for flag, several in (
            ("--input and --fix", len(model.source.inputs) > 1),
            ("--output", model.output is not None),
        )
        if several
    )
    works = {}
    for name in methods.METHODS:
        gradient = "gradient" in methods.description(name).needs
        if gradient and not dtype.is_floating_point:
            works[name] = f"no: the input is {str(dtype).removeprefix('torch.')}; explain at a node with --at NODE"
        elif answer is None and shape is not None:
            refusal = _refusal(model, name, shape, dtype)
            works[name] = f"no: {refusal}" if refusal else f"works, with {more}" if more else "works"
        else:
            works[name] = str(answer)
    return works


def _refusal(model: "Model", name: str, shape: Shape, dtype: "torch.dtype") -> str:
    """Why a method cannot explain samples of this shape; '' where it can."""
    import torch

    from attrcli import outputs

    kind = model.dtype if dtype.is_floating_point else dtype
    try:
        outputs.require(model, methods.load(name), torch.zeros(1, *shape, dtype=kind, device=model.device))
    except AttrcliError as error:
        return str(error)
    return ""


# -- sidecars ------------------------------------------------------------------------------------------------------

_HEADER = "# How this model's inputs are prepared. attrcli guessed what the file tells: check every line.\n[input]\n"
_IMAGE = """\
kind = "image"
{size}
resize = "{resize}"                 # exact | shorter-side (then centre crop) | none
channels = "{channels}"                    # RGB | BGR | L
range = [0.0, 1.0]                  # what pixel values 0..255 map to before mean and std
mean = {mean}
std = {std}
layout = "{layout}"
dtype = "{dtype}"
"""
_ARRAY = """\
kind = "array"
{size}
# mean = [0.0]                      # subtracted from the values, one for all or one per channel
# std = [1.0]                       # then divided by
dtype = "{dtype}"
"""
_TABLE = """\
kind = "table"
# columns = ["a", "b"]              # the {count} columns of the CSV, in order; default: all but id and label
# mean = [0.0]                      # subtracted from the values, one for all or one per column
# std = [1.0]                       # then divided by
dtype = "{dtype}"
"""
_SEQUENCE = """\
kind = "sequence"
alphabet = "ACGT"                   # the letters in the order of the channels; DNA was guessed
{size}
layout = "{layout}"                      # NCL (letters, positions) | NLC
unknown = "uniform"                 # other letters, such as N: uniform (1/4 each) | zero | refuse
lowercase = "accept"                # as capitals | refuse
lengths = "equal"                   # refuse other lengths | fit: crop or pad around the middle
dtype = "{dtype}"
"""
_OUTPUT = """
[output]
activation = "{activation}"                 # none | softmax | sigmoid: what the file already applies
# labels = "labels.txt"             # one name per line
"""


def write_sidecar(path: Path, shape: Shape | None = None, *, force: bool = False, trusted: bool = False) -> Path:
    """Write `<stem>.toml` beside a model, filled with what the file tells. Raises UsageError if it is there already."""
    from attrcli import model as models

    target = path.with_suffix(".toml")
    if target.exists() and not force:
        raise UsageError(f"{target} is there already; --force writes over it")
    model = models.load(path, trusted=trusted)
    embedded = parse_embedded(model.source.metadata.get("attrcli.toml"), str(path))
    if embedded is not None:
        text = to_toml(from_mapping(embedded, f"{path} (embedded)", None))
    else:
        text = _guessed(model, shape)
    try:
        target.write_text(text, encoding="utf-8")
    except OSError as error:
        raise UsageError(f"cannot write {target}: {error.strerror}") from error
    return target


def _guessed(model: "Model", shape: Shape | None) -> str:
    """The text of a sidecar, from the shape that the file or the user gives."""
    spec = _explained(model)
    sizes: tuple[int | None, ...] | None = tuple(shape) if shape else spec.shape[1:] if spec.shape else None
    dtype = "float32" if spec.dtype.is_floating_point else str(spec.dtype).removeprefix("torch.")
    last = sizes is not None and len(sizes) == 3 and sizes[0] not in (1, 3) and sizes[2] in (1, 3)
    image = sizes is None or (len(sizes) == 3 and (last or sizes[0] in (None, 1, 3)))
    first = (sizes[2], *sizes[:2]) if last and sizes is not None else sizes
    letters = _letters_axis(sizes) if spec.dtype.is_floating_point else None
    if letters == 1 and sizes is not None:
        first, last = (sizes[1], sizes[0]), True
    activation = _activation(model, first, "NHWC" if last else "NCHW")
    if letters is not None and sizes is not None:
        length = sizes[1 - letters]
        body = _SEQUENCE.format(
            size=f"size = [{length}]" if length else "# size = [200]                      # letters of every sequence",
            layout="NCL" if letters == 0 else "NLC",
            dtype=dtype,
        )
    elif not image and sizes is not None and len(sizes) == 1:
        body = _TABLE.format(count=sizes[0] or "", dtype=dtype)
    elif not image and sizes is not None:
        known = None not in sizes
        body = _ARRAY.format(size=f"size = {list(sizes)}" if known else "# size = [3, 224, 224]", dtype=dtype)
    else:
        channels, size = (first[0] or 3, list(first[1:])) if first else (3, [None])
        known = None not in size
        body = _IMAGE.format(
            size=f"size = {size}" if known else "# size = [224, 224]               # height, width",
            resize="exact" if known else "none",
            channels="L" if channels == 1 else "RGB",
            mean=[0.0] * (1 if channels == 1 else 3),
            std=[1.0] * (1 if channels == 1 else 3),
            layout="NHWC" if last else "NCHW",
            dtype=dtype,
        )
    return _HEADER + body + _OUTPUT.format(activation=activation)


def _letters_axis(sizes: tuple[int | None, ...] | None) -> int | None:
    """Which of the two axes of a sample has four channels, as one-hot DNA has; None where that is not so."""
    if sizes is None or len(sizes) != 2 or 4 not in sizes:
        return None
    return sizes.index(4)


def _activation(model: "Model", shape: tuple[int | None, ...] | None, layout: str) -> str:
    """What the graph applies last, where it can be built."""
    if shape is None or None in shape or len(model.source.inputs) > 1:
        return "none"
    known = tuple(size for size in shape if size is not None)
    _require_room(known)
    try:
        model.bind(layout=layout)
        head = model.engine(known).head
    except AttrcliError:
        return "none"
    return head if head in ("softmax", "sigmoid") else "none"
