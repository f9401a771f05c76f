"""Masked models: written in the format that the model came from, without what is empty, and read again to be sure."""

import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy.typing as npt
import torch
from torch import fx

from attrcli import formats
from attrcli import model as models
from attrcli.errors import ModelError
from attrcli.graph import passes
from attrcli.graph.check import attribute
from attrcli.graph.shrink import shrink
from attrcli.plan import Plan
from attrcli.score import apply_head

__all__ = ["Exporter"]

Array = npt.NDArray[Any]

AGREEMENT = 1e-4
"""Difference of a written model's output from the masked network's, of the largest output, that is an error."""


class Exporter:
    """Writes masked models into a folder; `shapes` are those of one input's neurons by layer.

    `written` are the files. Of the model as it was and of the first file: `bytes`, `seconds` of a forward pass of 16
    rows, `parameters`. Raises ModelError for a layer that holds the batch inside.
    """

    def __init__(self, plan: Plan, shapes: Mapping[str, tuple[int, ...]], folder: Path) -> None:
        self.plan, self.folder = plan, folder
        self.written: list[Path] = []
        self.bytes, self.seconds, self.parameters = (0, 0), (0.0, 0.0), (0, 0)
        self.graph, self.samples = plan.model.imported(plan.shape)
        self.resizable = formats.resizable(plan.model.source)
        found = {node.name: node for node in self.graph.graph.nodes if "shapes" in node.meta}
        for name, shape in shapes.items():
            there = found[name].meta["shapes"][0] if name in found else ()
            if tuple(there[1:]) != shape:
                raise ModelError(
                    f"{plan.path}: node '{name}' mixes the batch with another dimension, so that a mask of one "
                    "input cannot be written into the file; leave out --export"
                )
        folder.mkdir()

    def write(
        self, name: str, masks: Mapping[str, Array], inputs: torch.Tensor, logits: torch.Tensor | None = None
    ) -> None:
        """Mask the model, leave out what is empty, and write it; `inputs` is one input, `logits` what it must give.

        Raises ModelError for what the format cannot say, and where the file read again gives another output.
        """
        model, path = self.plan.model, self.folder / name
        held = {layer: torch.from_numpy(mask)[None].to(model.device) for layer, mask in masks.items() if not mask.all()}
        masked = passes.mask(self.graph, held)
        small = shrink(masked, self.resizable)
        formats.save(model.source, passes.place(small, torch.device("cpu"), channels_last=False), self.samples, path)
        again = self._opened(path)
        self._require_same(again, masked, inputs, logits)
        if not self.written:
            self.bytes = (self.plan.path.stat().st_size, path.stat().st_size)
            self.seconds = self._seconds(again, inputs)
            self.parameters = _numbers(self.graph), _numbers(small)
        self.written.append(path)

    def _opened(self, path: Path) -> models.Model:
        config, model = self.plan.config, self.plan.model
        again = models.load(path, device=config.device, precision=config.precision, trusted=config.trust_model)
        again.bind(
            input=config.input,
            output=config.output,
            fixed=model.fixed,
            dtype=model.input_dtype,
            declared=model.declared,
            layout="NHWC" if model.channels_last_input else "NCHW",
        )
        again.rows = model.rows
        return again

    def _require_same(
        self, again: models.Model, masked: fx.GraphModule, inputs: torch.Tensor, logits: torch.Tensor | None
    ) -> None:
        index = masked.meta["outputs"].index(self.plan.model.output or masked.meta["outputs"][0])
        with torch.no_grad():
            written = again(inputs)
            if logits is None:
                batch = masked.meta["batches"][0] if masked.meta["batches"][0] == masked.meta["batches"][1] else 1
                given = self.plan.model.arguments(inputs.expand(batch, *inputs.shape[1:]))
                expected = masked(*given.values())[index][:1].reshape(written.shape)
            else:
                expected = apply_head(logits, self.plan.model.head(inputs))
        gap = float((written - expected).abs().max() / expected.abs().max().clamp_min(1e-2))
        if not gap <= AGREEMENT:
            raise ModelError(
                f"{self.plan.path}: the masked model, read again, differs by {gap:.2g} of the largest output "
                f"(accepted: {AGREEMENT:g}); this is a defect of the export, please report the model"
            )

    def _seconds(self, again: models.Model, inputs: torch.Tensor) -> tuple[float, float]:
        """Shortest of a few forward passes of 16 rows, of the model and of the written one, in turns."""
        rows = inputs.expand(16, *inputs.shape[1:]).contiguous()
        best = [float("inf"), float("inf")]
        for _ in range(7):
            for which, model in enumerate((self.plan.model, again)):
                start = time.perf_counter()
                model.logits(rows)
                best[which] = min(best[which], time.perf_counter() - start)
        return best[0], best[1]


def _numbers(graph: fx.GraphModule) -> int:
    """Elements of the stored tensors that a graph reads, masks apart."""
    masks = {str(node.args[1].target) for node in graph.graph.nodes if "mask" in node.meta}
    names = {str(node.target) for node in graph.graph.nodes if node.op == "get_attr"} - masks
    return sum(int(attribute(graph, name).numel()) for name in names)
