"""The batch of a graph: free where the file leaves it so and rows are independent, else frozen, samples in groups."""

import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import fx

from attrcli.errors import AttrcliWarning, ModelError, TooLarge, UnsupportedOp
from attrcli.formats.spec import Sample, Source, require_shape
from attrcli.graph import engine
from attrcli.graph.build import FREE
from attrcli.graph.coupling import coupled
from attrcli.graph.engine import Engine

_COUPLED = "what it returns for one sample depends on the others of the batch"


@dataclass(frozen=True)
class Wanted:
    """What a graph is built for: samples by input, of which one is explained, and one output, None for the only one.

    `alone` says whether samples must run one by one, where that is known and was told; None: it is found out.
    """

    path: Path
    source: Source
    samples: Mapping[str, Sample]
    explained: str
    output: str | None
    device: torch.device
    dtype: torch.dtype
    lowered: bool
    alone: bool | None = None


def build(wanted: Wanted) -> Engine:
    """Build the graph and make it ready; warns of a batch that is not free. Raises UnsupportedOp, ModelError."""
    declared = next(spec for spec in wanted.source.inputs if spec.name == wanted.explained).shape
    if wanted.explained in wanted.samples:
        require_shape(declared, wanted.samples[wanted.explained].shape)
    if declared is not None and declared[0] is not None:
        _say(wanted.path, f"its batch is frozen at {declared[0]}", declared[0], " (the file says so)")
        return _made(wanted, declared[0])
    if wanted.alone:
        return _made(wanted, 1)
    try:
        return _free(wanted)
    except TooLarge:  # with a frozen batch, too
        raise
    except (UnsupportedOp, ModelError) as error:
        first = error
    try:
        made = _made(wanted, 1)
    except (UnsupportedOp, ModelError):
        raise first from None
    if str(first) == _COUPLED:
        _say(wanted.path, _COUPLED, 1)
    else:
        _say(wanted.path, "its batch is frozen at 1", 1, f" ({first})")
    return made


def graph_of(wanted: Wanted, batch: int | None) -> fx.GraphModule:
    """The file's own graph, all its outputs in it, with a batch, or with a free one (None)."""
    batches = FREE if batch is None else (batch, batch)
    graph = wanted.source.build(wanted.samples, wanted.dtype, batches)
    graph.meta["batches"] = batches
    return graph


def _made(wanted: Wanted, batch: int | None) -> Engine:
    return engine.make(graph_of(wanted, batch), wanted.output, wanted.device, batch, lowered=wanted.lowered)


def _free(wanted: Wanted) -> Engine:
    """The graph with a free batch. Raises ModelError where it has none, or where its rows are not independent."""
    graph = graph_of(wanted, None)
    shapes = graph.meta["output_shapes"]
    chosen = [shapes[wanted.output]] if wanted.output in shapes else shapes.values()
    if any(tuple(shape[:1] for shape in pair) != tuple((batch,) for batch in FREE) for pair in chosen):
        raise ModelError("the output does not keep the batch in its first dimension")
    made = engine.make(graph, wanted.output, wanted.device, None, lowered=wanted.lowered)
    if wanted.alone is None:
        rows = [wanted.samples[name] for name in graph.meta["inputs"]]
        kinds = [wanted.dtype if row.dtype.is_floating_point else row.dtype for row in rows]
        if coupled(made, [(row.shape, kind) for row, kind in zip(rows, kinds, strict=True)], wanted.device):
            raise ModelError(_COUPLED)
    return made


def _say(path: Path, what: str, batch: int, reason: str = "") -> None:
    how = "samples run one by one" if batch == 1 else f"samples run {batch} by {batch}"
    warnings.warn(f"{path}: {what}; {how}{reason}", AttrcliWarning, stacklevel=2)
