"""What the tests of the ONNX importer share: one-node models, and ONNX Runtime as the reference."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import torch
from onnx import TensorProto, helper, numpy_helper
from torch import fx

from attrcli.formats.onnx import Onnx
from attrcli.formats.spec import Sample
from attrcli.graph.build import FREE

BATCHES = (1, 3, 5)
DOMAINS = {"com.microsoft": 1, "ai.onnx.ml": 3}
rng = np.random.default_rng(0)


def normal(*shape: int) -> np.ndarray:
    return rng.standard_normal(shape).astype(np.float32)


def positive(*shape: int) -> np.ndarray:
    return rng.uniform(0.5, 2.0, shape).astype(np.float32)


def ints(*values: int) -> np.ndarray:
    return np.array(values, dtype=np.int64)


def model(
    nodes: Sequence[onnx.NodeProto],
    inputs: dict[str, tuple[Any, ...]],
    outputs: Sequence[str] = ("y",),
    constants: dict[str, np.ndarray] | None = None,
    opset: int = 18,
    kind: int = TensorProto.FLOAT,
) -> onnx.ModelProto:
    stored = [numpy_helper.from_array(array, name) for name, array in (constants or {}).items()]
    graph = helper.make_graph(
        list(nodes),
        "test",
        [helper.make_tensor_value_info(name, kind, shape) for name, shape in inputs.items()],
        [onnx.ValueInfoProto(name=name) for name in outputs],
        stored,
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=10)


def saved(proto: onnx.ModelProto, folder: Path) -> Onnx:
    path = folder / "model.onnx"
    path.write_bytes(proto.SerializeToString())
    return Onnx(path)


def built(source: Onnx, dtype: torch.dtype = torch.float32, **shapes: tuple[int, ...]) -> fx.GraphModule:
    """The graph; a dimension that is free in the file needs its sample's shape."""
    samples = {
        spec.name: Sample(shapes.get(spec.name) or tuple(size or 0 for size in spec.shape[1:]), spec.dtype)
        for spec in source.inputs
    }
    frozen = {spec.shape[0] for spec in source.inputs if spec.shape and spec.shape[0]}
    return source.build(samples, dtype, (max(frozen),) * 2 if frozen else FREE)


def reference(data: bytes, feeds: dict[str, torch.Tensor]) -> list[np.ndarray]:
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(data, options, providers=["CPUExecutionProvider"])
    return session.run(None, {name: value.numpy() for name, value in feeds.items()})


def assert_same(graph: fx.GraphModule, data: bytes, feeds: dict[str, torch.Tensor], tolerance: float = 1e-5) -> None:
    with torch.no_grad():
        results = graph(*feeds.values())
    for result, wanted in zip(results, reference(data, feeds), strict=True):
        assert tuple(result.shape) == wanted.shape
        scale = max(1.0, float(np.abs(wanted[np.isfinite(wanted)]).max(initial=0)) if wanted.dtype.kind == "f" else 1.0)
        np.testing.assert_allclose(result.numpy(), wanted, rtol=0, atol=tolerance * scale)


@dataclass(frozen=True)
class Case:
    """One node: inputs with a free batch, then constants ('' leaves an input out)."""

    op: str
    shapes: Sequence[tuple[int, ...]]
    attributes: dict[str, Any] = field(default_factory=dict)
    constants: Sequence[np.ndarray | None] = ()
    opset: int = 18
    outputs: int = 1
    kind: str = "normal"
    domain: str = ""

    def proto(self) -> onnx.ModelProto:
        names = [f"x{i}" for i in range(len(self.shapes))]
        held = {f"c{i}": array for i, array in enumerate(self.constants) if array is not None}
        extra = [f"c{i}" if array is not None else "" for i, array in enumerate(self.constants)]
        outputs = [f"y{i}" for i in range(self.outputs)]
        node = helper.make_node(self.op, [*names, *extra], outputs, name="node", domain=self.domain, **self.attributes)
        kind = {"bool": TensorProto.BOOL, "index": TensorProto.INT64}.get(self.kind, TensorProto.FLOAT)
        shapes = {name: ("N", *shape) for name, shape in zip(names, self.shapes, strict=True)}
        proto = model([node], shapes, outputs, held, self.opset, kind)
        if self.domain:
            proto.opset_import.append(helper.make_opsetid(self.domain, DOMAINS[self.domain]))
        return proto

    def feeds(self, batch: int) -> dict[str, torch.Tensor]:
        generator = torch.Generator().manual_seed(batch)
        feeds = {}
        for i, shape in enumerate(self.shapes):
            values = torch.randn((batch, *shape), generator=generator)
            if self.kind == "positive":
                values = values.abs() + 0.5
            elif self.kind == "unit":
                values = values.tanh()
            elif self.kind == "above one":
                values = values.abs() + 1.5
            elif self.kind == "bool":
                values = values > 0
            elif self.kind == "index":
                values = torch.randint(0, 4, (batch, *shape), generator=generator)
            feeds[f"x{i}"] = values
        return feeds

    def __str__(self) -> str:
        details = ",".join(f"{key}={value}" for key, value in self.attributes.items())
        return f"{self.op}-{self.opset}({details}){'x'.join(map(str, self.shapes[0]))}".replace(" ", "")


def node(op: str, inputs: str, outputs: str, **attributes: Any) -> onnx.NodeProto:
    return helper.make_node(op, inputs.split(), outputs.split(), name=f"{op}_{outputs.split()[0]}", **attributes)
