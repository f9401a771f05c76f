"""Whether an output can be explained, told by running the model on a few inputs: scores, or what is none."""

import warnings

import torch

from attrcli.errors import AttrcliWarning, InputError, ModelError
from attrcli.methods._method import Method, Ruling
from attrcli.model import Model

_FEWEST = 8
"""So many different numbers between 0 and 1 are no accident; a single one may be."""


def examine(model: Model, inputs: torch.Tensor, labels: int) -> None:
    """Look at the output for some inputs (N, ...); `labels` is how many classes have names, 0 for unknown.

    Warns of probabilities that no known activation made, and of labels that are not one per class. Raises ModelError
    for whole numbers, such as the class that an argmax chose: no step of theirs tells what a prediction rests on.
    """
    declared = {spec.name: spec.dtype for spec in model.source.outputs or ()}
    name = model.output or next(iter(declared), "")
    try:
        values = model.logits(inputs)
    except InputError:  # an input that the model cannot take, as its row will say
        return
    what = f"{model.path}: the output{f' {name!r}' if name else ''}"
    _require_fractions(model, values.dtype)
    head = model.head(inputs)
    if head == "none" and (seen := _probabilities(values)):
        warnings.warn(
            f"{what} looks like probabilities ({seen}), but ends in no softmax or sigmoid that could be stepped over: "
            "they are explained as they are, and where they are close to 0 or 1, gradients vanish; better save the "
            "model without its last activation",
            AttrcliWarning,
            stacklevel=2,
        )
    classes = values.shape[1] if values.dim() > 1 else 1
    if labels and labels not in ((1, 2) if classes == 1 else (classes,)):
        warnings.warn(
            f"{labels} labels for an output of {classes} classes: the names are probably not those of this model",
            AttrcliWarning,
            stacklevel=2,
        )


def _require_fractions(model: Model, computed: torch.dtype) -> None:
    """Raise ModelError for an output of whole numbers."""
    declared = {spec.name: spec.dtype for spec in model.source.outputs or ()}
    name = model.output or next(iter(declared), "")
    dtype = declared.get(name, computed)
    what = f"{model.path}: the output{f' {name!r}' if name else ''}"
    if not dtype.is_floating_point:
        others = [other for other, kind in declared.items() if kind.is_floating_point]
        way_out = (
            f"choose another with --output ({', '.join(others)})" if others else "save the model without that step"
        )
        raise ModelError(
            f"{what} is whole numbers ({str(dtype).removeprefix('torch.')}), such as the class that an argmax chose, "
            f"and no scores that could be explained; {way_out}"
        )


def require(model: Model, method: Method, inputs: torch.Tensor) -> None:
    """Raise ModelError where a method cannot explain this model, for inputs (N, ...) of its shape.

    The output is whole numbers, no gradient leads to the input, an op has no rule in the method, or no node a grid.
    """
    _require_fractions(model, model.logits(inputs[:1]).dtype)
    if "gradient" in method.needs:
        require_gradient(model, inputs[:1])
    if isinstance(method, Ruling):
        method.ruled(model, inputs[:1])


def require_gradient(model: Model, inputs: torch.Tensor) -> None:
    """Raise ModelError where no gradient leads from the output back to one input (1, ...): all would be zero."""
    leaf = inputs.detach().requires_grad_(True)
    with torch.enable_grad():
        values = model.engine(tuple(leaf.shape[1:]))(*model.arguments(leaf).values())
    if not values.requires_grad:
        raise ModelError(
            f"{model.path}: no gradient leads from the output back to the input: a step between them, such as an "
            "argmax, a comparison or a cast to whole numbers, has none; a method such as occlusion needs none"
        )


def _probabilities(values: torch.Tensor) -> str:
    """What about some outputs (N, K, ...) looks like probabilities; '' for nothing."""
    if not bool(((values >= 0) & (values <= 1)).all()) or not bool(values.any()):
        return ""
    if values.dim() > 1 and values.shape[1] > 1 and bool(((values.sum(1) - 1).abs() < 1e-3).all()):
        return "they add up to 1"
    different = torch.unique(values).numel()
    return "all lie between 0 and 1" if different >= _FEWEST else ""
