"""inspect: what is in a model file or in a run file. Plain functions that return facts; nothing is printed."""

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from attrcli.errors import AttrcliError, UsageError
from attrcli.store import RunFile, Status

_SIDECAR = """\
# How this model's inputs are prepared. attrcli guessed what the file tells; check every line against the training code.
[input]
kind = "{kind}"
{size}
resize = "{resize}"
channels = "{channels}"
range = [0.0, 1.0]                  # what pixel values 0..255 map to before mean and std
mean = {mean}
std = {std}
layout = "{layout}"
dtype = "float32"

[output]
activation = "{activation}"         # none | softmax | sigmoid: what the file already applies
# labels = "labels.txt"             # one name per line
"""


def is_run_file(path: Path) -> bool:
    """Whether a file is HDF5, as run files are, told by content."""
    if not path.is_file():
        return False
    with path.open("rb") as file:
        return file.read(8) == b"\x89HDF\r\n\x1a\n"


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
        keys = ("method", "options", "target", "score", "baseline", "model", "model_format", "model_sha256")
        keys += ("precision", "seed", "batch_size", "device", "versions")
        facts.update({key: run.attributes.get(key) for key in keys})
        facts["attribution"] = tuple(run.layout.attribution)
        facts.update(_gaps(run))
        failed = [(run.ids[i], run.messages[i]) for i in np.flatnonzero(run.status == Status.ERROR)[:10]]
        if failed:
            facts["errors"] = [f"{name}: {message}" for name, message in failed]
        return facts


def _gaps(run: RunFile) -> dict[str, Any]:
    """|gap| relative to the sum of |attribution|: median, 95 %, largest and where; nothing for other methods."""
    relative, delta = gaps(run), run.read("completeness_delta")
    if not np.isfinite(delta).any():
        return {}
    worst = int(np.nanargmax(relative))
    return {
        "gap_median": float(f"{np.nanmedian(relative):.2g}"),
        "gap_p95": float(f"{np.nanpercentile(relative, 95):.2g}"),
        "gap_max": float(f"{relative[worst]:.2g}"),
        "gap_max_id": run.ids[worst],
    }


def gaps(run: RunFile) -> np.ndarray[Any, np.dtype[np.float64]]:
    """|completeness gap| / sum of |attribution| of every row, float64 (n,); NaN where there is none."""
    found = np.full(len(run), np.nan)
    for rows in run.blocks():
        values = run.read("attribution", rows)
        total = np.abs(values).reshape(len(values), -1).sum(1, dtype=np.float64)
        gap = np.abs(run.read("completeness_delta", rows).astype(np.float64))
        found[rows] = np.divide(gap, total, out=np.where(gap == 0, 0.0, np.inf), where=total > 0)
        found[rows][~np.isfinite(gap)] = np.nan
    return found


def model_file(path: Path, shape: Sequence[int] | None = None) -> dict[str, Any]:
    """Format, inputs, outputs, parameters, operations, final activation, and which methods work and why not.

    `shape` of one sample is needed where neither the file nor the sidecar tells; without it operations are counted
    from the file. Raises ModelError for a file that cannot be opened.
    """
    from attrcli import model as models
    from attrcli import preprocess

    model = models.load(path)
    source = model.source
    embedded = preprocess.parse_embedded(source.metadata.get("attrcli.toml"), str(path))
    sidecar = preprocess.find(path, None, embedded)
    facts: dict[str, Any] = {
        "model": str(path),
        "format": model.format,
        "sha256": model.sha256,
        "inputs": models.describe(source.inputs),
        "parameters": source.parameter_count(),
        "preprocessing": "none: explain needs --preprocess, or a sidecar (--write-sidecar)"
        if sidecar is None
        else f"{sidecar.kind}, from {'the file itself' if embedded is not None else path.with_suffix('.toml').name}",
    }
    problem = None
    known = tuple(shape) if shape else _known_shape(source.inputs, sidecar)
    if known is None:
        problem = "the file does not say the size of its input: give --shape C,H,W, or a sidecar with size"
        facts["outputs"] = "unknown until the input's size is known"
    elif len(source.inputs) > 1:
        problem = "several inputs: which methods work depends on --input and --fix"
        facts["outputs"] = models.describe(source.outputs) if source.outputs else "unknown"
    else:
        try:
            _bind(model, sidecar)
            facts.update(_graph_facts(model, known))
        except AttrcliError as error:
            problem = str(error)
    facts["operations"] = dict(sorted(source.operations().items(), key=lambda item: -item[1]))
    if problem:
        facts["note"] = problem
    facts["methods"] = _methods(model.format, None if known is None or len(source.inputs) > 1 else problem)
    return facts


def _bind(model: Any, sidecar: Any) -> None:
    import torch

    if sidecar is not None:
        declared = None if sidecar.activation == "none" else sidecar.activation
        layout = sidecar.layout if sidecar.kind == "image" else "NCHW"
        model.bind(dtype=getattr(torch, sidecar.dtype), declared=declared, layout=layout)


def _known_shape(inputs: Any, sidecar: Any) -> tuple[int, ...] | None:
    """Shape of one sample, channels first, from the file or else the sidecar."""
    if sidecar is not None and sidecar.kind == "image" and sidecar.size is not None:
        return (3 if sidecar.channels != "L" else 1, *sidecar.size)
    if sidecar is not None and sidecar.sample_shape is not None:
        return tuple(sidecar.sample_shape)
    declared = inputs[0].shape
    if declared is not None and None not in declared[1:]:
        return tuple(declared[1:])
    return None


def _graph_facts(model: Any, shape: tuple[int, ...]) -> dict[str, Any]:
    from attrcli.graph import ops

    engine = model.engine(shape)
    kinds: Counter[str] = Counter()
    nodes = [node for node in engine.graph.graph.nodes if node.op == "call_function"]
    for node in nodes:
        kind = ops.classify(node.target)
        kinds[kind.value if kind else "?"] += 1
    return {
        "sample_shape": shape,
        "outputs": f"{engine.output} {'x'.join(map(str, engine.output_shape))}",
        "batch": "free" if engine.batch is None else f"frozen at {engine.batch}: samples run {engine.batch} at a time",
        "final_activation": engine.head,
        "graph_nodes": len(nodes),
        "op_classes": dict(kinds.most_common()),
        "nodes": [node.name for node in nodes],
        "activation_bytes": engine.activation_bytes,
    }


def _methods(kind: str, problem: str | None) -> dict[str, str]:
    """Which methods work on this model, and why not."""
    from attrcli import methods

    works = {}
    for name in methods.METHODS:
        needs = methods.description(name).needs
        if problem is None:
            works[name] = "works"
        elif kind == "onnx" and "gradient" not in needs:
            works[name] = "works, in ONNX Runtime"
        else:
            works[name] = f"no: {problem}"
    return works


def write_sidecar(path: Path, shape: Sequence[int] | None = None, *, force: bool = False) -> Path:
    """Write `<stem>.toml` beside a model, filled with what the file tells. Raises UsageError if it is there already."""
    from attrcli import model as models

    target = path.with_suffix(".toml")
    if target.exists() and not force:
        raise UsageError(f"{target} is there already; --force writes over it")
    model = models.load(path)
    declared = model.source.inputs[0].shape
    sample = tuple(shape) if shape else declared[1:] if declared is not None else None
    activation, layout, kind, size, channels = "none", "NCHW", "image", None, 3
    if sample is not None and len(sample) == 3:
        if sample[0] not in (1, 3) and sample[2] in (1, 3):
            layout, channels, size = "NHWC", sample[2], sample[:2]
        else:
            channels, size = sample[0] or 3, sample[1:]
    if sample is not None and None not in sample and len(model.source.inputs) == 1:
        try:
            first = (sample[2], *sample[:2]) if layout == "NHWC" else sample
            model.bind(layout=layout)
            head = model.engine(tuple(n for n in first if n is not None)).head
            activation = "softmax" if head == "softmax" else "sigmoid" if head == "sigmoid" else "none"
        except AttrcliError:
            pass
    known = size is not None and None not in size
    text = _SIDECAR.format(
        kind=kind,
        size=f"size = {list(size)}" if known and size else "# size = [224, 224]              # height, width",
        resize="exact" if known else "none",
        channels="L" if channels == 1 else "RGB",
        mean=[0.0] * (1 if channels == 1 else 3),
        std=[1.0] * (1 if channels == 1 else 3),
        layout=layout,
        activation=activation,
    )
    try:
        target.write_text(text, encoding="utf-8")
    except OSError as error:
        raise UsageError(f"cannot write {target}: {error.strerror}") from error
    return target
