"""A canonical graph as a `.pt2` archive of torch.export, with a free batch where the graph has one."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import fx
from torch.utils import _pytree

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
    flat, containers = _returned(module)
    try:
        program = torch.export.export(flat, arguments, dynamic_shapes=dynamic, strict=False)
    except Exception as error:  # torch.export raises its own kinds, of several modules
        raise ModelError(f"{path}: torch.export refuses the graph: {str(error)[:300]}") from error
    signature: Any = program.module_call_graph[0].signature
    signature.out_spec = containers  # those of fx itself are no lists and dictionaries, and would stay in the file
    torch.export.save(program, str(path), extra_files=dict(metadata))


def _returned(module: fx.GraphModule) -> tuple[fx.GraphModule, Any]:
    """The graph over the same tensors with all that its program returned as one tuple, and the containers it was in.

    An output that was chosen is returned as it is.
    """
    names = module.meta["outputs"]
    told, containers = _pytree.tree_flatten(module.meta.get("returned"))
    if set(names) != set(told) - {None}:
        told, containers = _pytree.tree_flatten(names[0] if len(names) == 1 else names)
    graph = fx.Graph()
    outputs: Any = graph.graph_copy(module.graph, {})
    values = dict(zip(names, outputs, strict=True))
    graph.output(tuple(values.get(name) for name in told))
    return fx.GraphModule(module, graph), containers
