"""ONNX Runtime beside the graph: forward passes of an ONNX file, compared with the graph on the first real input."""

import warnings
from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch

from attrcli.errors import AttrcliWarning, ModelError, UnsupportedOp
from attrcli.graph import ties
from attrcli.score import Head, undo_head
from attrcli.session import Session

if TYPE_CHECKING:
    from attrcli.model import Model

AGREEMENT = 1e-3
"""Difference between ONNX Runtime and the imported graph, of the largest logit (0.01 at least), that is an error; in a
graph that rounds, beyond what ties do."""

HALF_AGREEMENT = 1e-2
"""The same for a file in float16, whose step is 1e-3: ONNX Runtime rounds to it after each op, the graph does not."""

_AS_QUANTISED = (
    "it is run as it says, with its QuantizeLinear nodes one by one; by default ONNX Runtime fuses them into integer "
    "kernels, some of which approximate (softmax), so that its own outputs may differ by some 1 %"
)


class Runtime:
    """The logits of a model in ONNX Runtime, where it can give them; the session is opened at the first batch."""

    def __init__(self, model: "Model") -> None:
        self.model = model
        self._session: Session | None = None
        self._undone: Head | None = None
        self._agreed = False

    def gives(self, inputs: torch.Tensor, held: Mapping[str, torch.Tensor]) -> bool:
        """Whether it gives the logits: of an ONNX file in float32 in which they are a tensor of the file."""
        model = self.model
        if model.format != "onnx" or model.dtype != torch.float32 or model.lowered or held:
            return False
        try:
            made = model.engine(tuple(inputs.shape[1:]))
        except UnsupportedOp:
            return True
        return made.head == "none" or made.output_tensor is not None

    def logits(self, inputs: torch.Tensor) -> torch.Tensor:
        """Run on rows (N, ...): (N, K, ...) before a final softmax or sigmoid.

        Raises ModelError where it and the imported graph disagree.
        """
        model = self.model
        if self._session is None:
            self._session = self._opened(tuple(inputs.shape[1:]))
        given = model.arguments(inputs)
        arguments = {spec.name: given[spec.name].detach().cpu().to(spec.dtype).numpy() for spec in model.source.inputs}
        result = torch.from_numpy(self._session.run(arguments)).to(model.device, model.dtype)
        if self._undone:
            result = undo_head(result, self._undone)
        if not self._agreed:
            self._compare(inputs, result)
        return result

    def _opened(self, shape: tuple[int, ...]) -> Session:
        model, source = self.model, self.model.source
        declared = source.inputs[0].shape
        try:
            made = model.engine(shape)
            tensor, batch = made.output_tensor, made.batch
        except UnsupportedOp:
            tensor, batch, self._undone = None, declared[0] if declared else None, model.declared
        if "QuantizeLinear" in source.operations():
            warnings.warn(f"{model.path}: {_AS_QUANTISED}", AttrcliWarning, stacklevel=2)
        data = source.exposed([tensor or model.output or source.outputs[0].name])  # type: ignore[attr-defined, index]
        return Session(model.path, data, model.device, batch)

    def _compare(self, inputs: torch.Tensor, result: torch.Tensor) -> None:
        """Refuse to go on when ONNX Runtime and the imported graph disagree on real input."""
        self._agreed, model = True, self.model
        try:
            made = model.engine(tuple(inputs.shape[1:]))
        except UnsupportedOp as error:
            warnings.warn(f"{error}; forward-only methods still run, in ONNX Runtime", AttrcliWarning, stacklevel=2)
            return
        given = model.arguments(inputs).values()
        own = made(*given)
        if not bool(torch.isfinite(own).all() & torch.isfinite(result).all()):
            return  # the caller reports it, naming the node
        largest = result.abs().max().clamp_min(1e-2)
        difference = float((own - result).abs().max() / largest)
        if difference <= AGREEMENT:
            return
        by_ties = ties.spread(made.run, lambda moved: made(*given, run=moved), own) / float(largest)
        half = model.source.half  # type: ignore[attr-defined]
        accepted = (HALF_AGREEMENT if half else AGREEMENT) + by_ties
        what = (
            f"{model.path}: ONNX Runtime and the imported graph differ by {difference:.2g} of the largest output on "
            "real input"
        )
        if difference > accepted:
            raise ModelError(
                f"{what} (accepted: {accepted:.2g}); this is a defect of the importer, please report the model"
            )
        ties_do = f"values midway between two steps round either way, by which outputs can move by {by_ties:.2g}"
        why = "ONNX Runtime rounds each result to float16, the graph computes in float32" if half else ties_do
        warnings.warn(f"{what}: {why}", AttrcliWarning, stacklevel=2)
