"""A canonical graph as a `.pt2` archive of torch.export, with a free batch where the graph has one."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import fx
from torch.fx.node import map_aggregate

from attrcli.errors import ModelError
from attrcli.formats.spec import Sample


def save(module: fx.GraphModule, path: Path, metadata: Mapping[str, str], samples: Mapping[str, Sample]) -> None:
    """Export a graph for inputs of these sample shapes. Raises ModelError where torch.export refuses it."""
    first, second = next(node.meta["shapes"] for node in module.graph.nodes if node.op == "placeholder")
    free = first != second
    rows = 3 if free else first[0]
    dtype = {4: torch.float32, 8: torch.float64}[module.meta["itemsize"]]
    kinds = [samples[name].dtype for name in module.meta["inputs"]]
    shapes = [(rows, *samples[name].shape) for name in module.meta["inputs"]]
    arguments = tuple(
        torch.ones(shape, dtype=dtype if kind.is_floating_point else kind)
        for shape, kind in zip(shapes, kinds, strict=True)
    )
    batch = torch.export.Dim("batch", min=1)
    dynamic = tuple({0: batch} for _ in arguments) if free else None
    try:
        program = torch.export.export(_returning(module), arguments, dynamic_shapes=dynamic, strict=False)
    except Exception as error:  # torch.export raises its own kinds, of several modules
        raise ModelError(f"{path}: torch.export refuses the graph: {str(error)[:300]}") from error
    torch.export.save(program, str(path), extra_files=dict(metadata))


def _returning(module: fx.GraphModule) -> fx.GraphModule:
    """The graph over the same tensors, returning what its program did: a tensor, or containers of them."""
    graph = fx.Graph()
    outputs: Any = graph.graph_copy(module.graph, {})
    values, told = dict(zip(module.meta["outputs"], outputs, strict=True)), module.meta.get("returned")
    names: list[Any] = []
    map_aggregate(told, names.append)
    if values.keys() == set(names) - {None}:
        graph.output(map_aggregate(told, values.get))
    else:
        graph.output(outputs[0] if len(outputs) == 1 else outputs)
    return fx.GraphModule(module, graph)
