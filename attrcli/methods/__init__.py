"""The methods: what an attribution is, one file each. The registry is this dict; nothing is imported before use.

model = attrcli.model.load("net.onnx")
method = attrcli.methods.load("integrated_gradients", {"steps": "auto"})
values = method.attribute(model, inputs, Target(index), baseline).values  # (N, ...), like inputs and baseline
"""

import importlib
from collections.abc import Mapping
from typing import Any

from attrcli.methods._describe import Description, convert, describe, unknown, unknown_option

__all__ = ["METHODS", "Description", "description", "load", "unknown", "unknown_option"]

METHODS: dict[str, tuple[str, str]] = {
    "attention_rollout": (
        "attrcli.methods.attention_rollout:AttentionRollout",
        "Attention maps multiplied over the layers: which patches flow into the output",
    ),
    "deconvnet": (
        "attrcli.methods.deconvnet:Deconvnet",
        "Gradient whose ReLUs pass what is positive in it",
    ),
    "deeplift": ("attrcli.methods.deeplift:DeepLift", "Differences from the baseline, propagated by multipliers"),
    "excitation_backprop": (
        "attrcli.methods.excitation_backprop:ExcitationBackprop",
        "Probability handed down to what excites the score",
    ),
    "expected_gradients": (
        "attrcli.methods.expected_gradients:ExpectedGradients",
        "Gradients between a set of baselines and the input, averaged",
    ),
    "grad_cam": ("attrcli.methods.grad_cam:GradCam", "Channels of a late node, weighed by their mean gradient"),
    "grad_cam_pp": (
        "attrcli.methods.grad_cam_pp:GradCamPlusPlus",
        "Grad-CAM, places weighed apart",
    ),
    "gradient": ("attrcli.methods.gradient:Gradient", "Signed gradient of the score with respect to the input"),
    "guided_backprop": (
        "attrcli.methods.guided_backprop:GuidedBackprop",
        "Gradient of which ReLUs pass the positive part",
    ),
    "guided_grad_cam": ("attrcli.methods.guided_grad_cam:GuidedGradCam", "Guided backpropagation times Grad-CAM"),
    "input_x_gradient": ("attrcli.methods.input_x_gradient:InputXGradient", "Input times gradient"),
    "integrated_gradients": (
        "attrcli.methods.integrated_gradients:IntegratedGradients",
        "Gradient integrated on the straight line from the baseline to the input",
    ),
    "layer_cam": (
        "attrcli.methods.layer_cam:LayerCam",
        "Channels of a node, weighed place by place",
    ),
    "lrp": ("attrcli.methods.lrp:Lrp", "Relevance, handed back layer by layer so that it sums to the score"),
    "occlusion": ("attrcli.methods.occlusion:Occlusion", "Fall of the score when a patch is replaced by the baseline"),
    "prune_grad": (
        "attrcli.methods.prune_grad:PruneGrad",
        "Gradient of the network left when the neurons that matter least for the input are cut (|a df/da|)",
    ),
    "prune_int": (
        "attrcli.methods.prune_int:PruneInt",
        "As prune_grad, with neurons scored by gradients integrated over each layer",
    ),
    "saliency": ("attrcli.methods.saliency:Saliency", "Absolute gradient of the score"),
    "smoothgrad": ("attrcli.methods.smoothgrad:SmoothGrad", "Gradient averaged over noisy copies of the input"),
}


def description(name: str) -> Description:
    """Paper, cost, needs, axioms and options of a method, without importing it. Raises UsageError for a typo."""
    return describe(METHODS, name)


def load(name: str, options: Mapping[str, Any] | None = None) -> Any:
    """Make a method from its name and options; strings are converted to the options' types.

    Raises UsageError, with a suggestion, for an unknown method or option and for a value that does not fit.
    """
    path, _ = METHODS[describe(METHODS, name).name]
    module, _, cls = path.partition(":")
    kind = getattr(importlib.import_module(module), cls)
    return kind(**convert(kind, name, description(name), options or {}))
