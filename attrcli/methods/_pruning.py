"""Input-specific pruning: scores of neurons, masks for each input, and the gradient of the network that is left.

What `prune_grad`, `prune_int` and the verb `prune` share. A neuron is one element of the output of one call of a ReLU;
scores and masks are held layer by layer, `{node name: (N, ...)}`, each row for itself.
"""

import math
import warnings
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, fx

from attrcli.errors import AttrcliWarning, ModelError, NonFiniteError, UsageError
from attrcli.graph import neurons
from attrcli.graph.rules import Rule, Ruled, Step, Verdict, dependent, leads_with_batch
from attrcli.methods._method import Attribution
from attrcli.model import Model, Target
from attrcli.score import select

Layers = dict[str, Tensor]

SPARSITY = 0.9
"""Share of the neurons that is pruned where nothing else is asked for."""

BISECTIONS = 10
"""Halvings of the sparsity for an allowed change of the prediction: to a thousandth."""


def check(method: str, ops: str, sparsity: float | None, max_output_change: float | None) -> float | None:
    """The sparsity to use, None for an allowed change. Raises UsageError for values out of range, and for both."""
    neurons.parse(ops, method)
    if sparsity is not None and max_output_change is not None:
        raise UsageError(f"{method}: sparsity={sparsity} and max_output_change={max_output_change}: give one of them")
    if sparsity is not None and not 0 <= sparsity <= 1:
        raise UsageError(f"{method}: sparsity={sparsity} must lie between 0 and 1: the share of neurons pruned")
    if max_output_change is not None and not 0 <= max_output_change < math.inf:
        raise UsageError(f"{method}: max_output_change={max_output_change} must be finite and not negative")
    return sparsity if sparsity is not None or max_output_change is not None else SPARSITY


class Network:
    """A model with its neurons at hand, for inputs of one shape.

    `layers` are the names of the nodes, in order; none where the graph has no nonlinearity at all. Raises ModelError
    where it has others than those asked for, naming them.
    """

    def __init__(self, model: Model, inputs: Tensor, ops: str, method: str) -> None:
        self.model = model
        ready = model.engine(tuple(inputs.shape[1:]))
        self.varies = len(dependent(ready.run, model.input)) > 1
        self.nodes = neurons.chosen(ready.run, model.input, neurons.parse(ops, method))
        if not self.nodes:
            _refuse_others(model, ready.run, ops, method)
        self.layers = [node.name for node in self.nodes]
        self._leading = {node: leads_with_batch(node) for node in self.nodes}
        self._single = not all(self._leading.values())
        if self._single and (ready.batch or 1) > 1:
            mixing = next(node.name for node, leads in self._leading.items() if not leads)
            raise ModelError(
                f"{model.path}: node '{mixing}' mixes the batch, frozen at {ready.batch}, with another dimension: "
                f"{method} cannot tell one sample's neurons from another's"
            )
        self.ruled: Ruled = model.ruled(inputs, self._choose, method)
        self._count = 0
        self._masks: Mapping[str, Tensor] = {}
        self._scaled: tuple[str, float] | None = None
        self._recording = False
        self._values: dict[fx.Node, list[Tensor]] = {}
        self._starts: Counter[fx.Node] = Counter()

    def passes(self, count: int) -> list[Tensor]:
        """Rows of each pass: as the model has it, one by one where a layer mixes the batch with another dimension."""
        if self._single:
            return [torch.tensor([row], device=self.model.device) for row in range(count)]
        return list(self.model.passes(count))

    # -- one pass ------------------------------------------------------------------------------------------------

    def logits(
        self,
        inputs: Tensor,
        target: Target,
        masks: Mapping[str, Tensor] | None = None,
        *,
        record: bool = False,
        scaled: tuple[str, float] | None = None,
    ) -> Tensor:
        """Run one pass under masks, recording the neurons, or with one layer scaled and cut off from what made it."""
        self._masks, self._recording, self._scaled = masks or {}, record, scaled
        self._values, self._starts, self._count = {node: [] for node in self.nodes}, Counter(), len(inputs)
        logits = self.model.run(inputs, target, self.ruled)
        self.ruled.remainders.clear()
        self.model.on_pass(len(inputs))
        return logits

    def scored(self, inputs: Tensor, target: Target, logits: Tensor) -> Tensor:
        """The scores (N,) of logits."""
        return select(logits, target, self.model.head(inputs))

    def fail(self, inputs: Tensor, target: Target) -> None:
        """Raise NonFiniteError, naming the node where the network is the reason and not its masks."""
        self.model.gradient(inputs, target)
        raise NonFiniteError(f"{self.model.path}: the pruned network makes values that are not finite")

    def gradients(self, scores: Tensor) -> tuple[Layers, Layers]:
        """Values of the recorded neurons, and the gradients of the scores with respect to them: (N, ...) by layer."""
        places = [(node, value) for node, values in self._values.items() for value in values]
        found: Sequence[Tensor | None] = [None] * len(places)
        if scores.requires_grad and places:
            found = torch.autograd.grad(scores.sum(), [value for _, value in places], allow_unused=True)
        values: dict[str, list[Tensor]] = {}
        slopes: dict[str, list[Tensor]] = {}
        for (node, value), slope in zip(places, found, strict=True):
            values.setdefault(node.name, []).append(self._rows(node, value.detach()))
            slopes.setdefault(node.name, []).append(
                self._rows(node, torch.zeros_like(value) if slope is None else slope)
            )
        return self._joined(values), self._joined(slopes)

    def _joined(self, parts: Mapping[str, list[Tensor]]) -> Layers:
        return {name: (each[0] if len(each) == 1 else torch.cat(each))[: self._count] for name, each in parts.items()}

    def _rows(self, node: fx.Node, value: Tensor) -> Tensor:
        """A value with its samples first: one sample's value as a whole where the batch is inside it."""
        return value if self._leading[node] else value[None]

    def _choose(self, node: fx.Node, varying: Any) -> Rule | Verdict:
        return self._at if node in self._leading else Verdict.PLAIN

    def _at(self, step: Step) -> Any:
        """A layer in a pass: its value, masked, scaled or recorded."""
        node, value = step.node, step.run()
        if node.name in self._masks:
            mask = self._part(self._masks[node.name], node, len(step.explained))
            value = value * mask.reshape(value.shape).to(value.dtype)
        if self._scaled is not None:
            if self._scaled[0] != node.name:
                return value
            value = value.detach() * self._scaled[1]
        elif not self._recording:
            return value
        if not value.requires_grad and torch.is_grad_enabled():
            value.requires_grad_(True)
        self._values[node].append(value)
        return value

    def _part(self, mask: Tensor, node: fx.Node, rows: int) -> Tensor:
        """The rows of a mask that a call for `rows` inputs is about; a frozen batch is padded, as its inputs are."""
        start = self._starts[node]
        self._starts[node] += rows
        part = mask[start : start + rows]
        short = rows - len(part)
        return torch.cat([part, part[-1:].expand(short, *part.shape[1:])]) if short else part


def _refuse_others(model: Model, graph: fx.GraphModule, ops: str, method: str) -> None:
    if found := neurons.nonlinearities(graph, model.input):
        counts = Counter(found.values())
        listed = ", ".join(f"{name} ({count})" for name, count in counts.items())
        option = "--ops " if method == "prune" else "-o ops="
        raise ModelError(
            f"{model.path}: no {' or '.join(ops.split(','))} in the graph, whose outputs are the neurons that {method} "
            f"prunes; its nonlinearities: {listed}; choose among them, as with {option}{next(iter(counts))}"
        )


# -- scores --------------------------------------------------------------------------------------------------------


def gradient_scores(
    net: Network, inputs: Tensor, target: Target, masks: Mapping[str, Tensor] | None = None
) -> tuple[Layers, Tensor]:
    """|a * df/da| of each neuron: by how much, to first order, the score changes without it; and the logits."""
    with torch.enable_grad():
        logits = net.logits(inputs, target, masks, record=True)
        values, slopes = net.gradients(net.scored(inputs, target, logits))
    return {name: (_wide(values[name]) * _wide(slopes[name])).abs_() for name in net.layers}, logits.detach()


def integrated_scores(net: Network, inputs: Tensor, target: Target, steps: int) -> tuple[Layers, Tensor]:
    """|a * mean over alpha of df/da at alpha a|, one layer at a time, alpha by the midpoint rule; and the logits."""
    with torch.no_grad():
        logits = net.logits(inputs, target)
    return {name: signed.abs_() for name, signed in signed_integrated(net, inputs, target, steps).items()}, logits


def signed_integrated(net: Network, inputs: Tensor, target: Target, steps: int) -> Layers:
    """The same with its sign: adds up, layer by layer, to f less f with the layer set to zero."""
    result = {}
    for name in net.layers:
        total: Tensor | None = None
        for step in range(steps):
            alpha = (step + 0.5) / steps
            with torch.enable_grad():
                logits = net.logits(inputs, target, scaled=(name, alpha))
                values, slopes = net.gradients(net.scored(inputs, target, logits))
            product = _wide(values[name]) * _wide(slopes[name]) / (alpha * steps)
            total = product if total is None else total.add_(product)
        assert total is not None
        result[name] = total
    return result


def random_scores(net: Network, inputs: Tensor, target: Target) -> tuple[Layers, Tensor]:
    """A draw from [0, 1) for each neuron, seeded by sample; and the logits."""
    with torch.no_grad():
        logits = net.logits(inputs, target, record=True)
    drawn: Layers = {}
    values, _ = net.gradients(torch.zeros(()))
    seeds = [0] * len(inputs) if target.seed is None else target.seed.tolist()
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    for name, value in values.items():
        rows = [torch.rand(value.shape[1:], generator=generator) for generator in generators]
        drawn[name] = torch.stack(rows).to(value.device)
    return drawn, logits


def _wide(values: Tensor) -> Tensor:
    """At least float32: in fewer bits scores would tie."""
    return values.float() if values.dtype in (torch.bfloat16, torch.float16) else values


# -- masks ---------------------------------------------------------------------------------------------------------


def masks_at(scores: Mapping[str, Tensor], sparsity: Sequence[float]) -> Layers:
    """Which neurons of each row stay at its sparsity: those with a score above the row's percentile, never none.

    The percentile is NumPy's, at 100 x sparsity, over all layers together; the neuron with the highest score stays.
    """
    if not scores:
        return {}
    limits = [_threshold([layer[row] for layer in scores.values()], each) for row, each in enumerate(sparsity)]
    return {
        name: layer > torch.stack(limits).to(layer).reshape(-1, *[1] * (layer.dim() - 1))
        for name, layer in scores.items()
    }


def _threshold(layers: Sequence[Tensor], sparsity: float) -> Tensor:
    """The percentile of one row's scores; just below the highest where that would leave no neuron."""
    values = torch.cat([_flat(layer) for layer in layers])
    highest = values.max()
    if not bool(torch.isfinite(highest)):
        raise NonFiniteError("the scores of neurons are not finite: their gradients overflow")
    below = math.floor(sparsity * (len(values) - 1))
    found = values.kthvalue(below + 1).values
    return torch.nextafter(highest, torch.zeros_like(highest)) if highest > 0 and found == highest else found


def _flat(layer: Tensor) -> Tensor:
    """All elements in the order in which they lie in memory, which is free."""
    return layer.permute(sorted(range(layer.dim()), key=lambda dim: -layer.stride()[dim])).reshape(-1)


# -- what is left --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Pruned:
    """What pruning made of a batch of N.

    `masks` (N, ...) by layer, `values` the gradient of the score in the pruned network, `logits` before and after,
    `sparsity` the share pruned, `change` that of the prediction, both (N,) float64.
    """

    masks: Layers
    values: Tensor
    before: Tensor
    after: Tensor
    sparsity: Tensor
    change: Tensor


Score = Callable[[Network, Tensor, Target], tuple[Layers, Tensor]]
"""Scores of the neurons, and the logits of the whole network."""


def prune(
    net: Network, inputs: Tensor, target: Target, score: Score, sparsity: float | None, most: float | None
) -> Pruned:
    """Prune rows of one pass by their scores, to a sparsity or as far as the prediction changes by at most `most`."""
    scores, before = score(net, inputs, target)
    if not bool(torch.isfinite(net.scored(inputs, target, before)).all()):
        net.fail(inputs, target)
    if sparsity is not None:
        return finish(net, inputs, target, before, masks_at(scores, [sparsity] * len(inputs)))
    assert most is not None
    low, high = [0.0] * len(inputs), [1.0] * len(inputs)
    for _ in range(BISECTIONS):
        middle = [(a + b) / 2 for a, b in zip(low, high, strict=True)]
        with torch.no_grad():
            after = net.logits(inputs, target, masks_at(scores, middle))
        for row, changed in enumerate(change(net, inputs, target, before, after).tolist()):
            low[row], high[row] = (middle[row], high[row]) if changed <= most else (low[row], middle[row])
    return finish(net, inputs, target, before, masks_at(scores, low))


def prune_greedily(net: Network, inputs: Tensor, target: Target, sparsity: float | None, most: float | None) -> Pruned:
    """Raise the percentile a point at a time, with the scores of the network that is left each time.

    Stops at the sparsity, or for each row before the prediction changes by more than `most`.
    """
    with torch.no_grad():
        before = net.logits(inputs, target)
    limits = [point / 100 for point in range(1, 100) if sparsity is None or point / 100 < sparsity]
    limits += [1.0 if sparsity is None else sparsity]
    masks: Layers = {}
    going = torch.ones(len(inputs), dtype=torch.bool, device=inputs.device)
    for limit in limits:
        made = masks_at(gradient_scores(net, inputs, target, masks)[0], [limit] * len(inputs))
        if most is not None:
            with torch.no_grad():
                after = net.logits(inputs, target, made)
            going &= change(net, inputs, target, before, after) <= most
            made = {name: torch.where(_column(going, new), new, masks.get(name, True)) for name, new in made.items()}
        masks = made
        if not bool(going.any()):
            break
    return finish(net, inputs, target, before, masks)


def finish(net: Network, inputs: Tensor, target: Target, before: Tensor, masks: Layers) -> Pruned:
    """The gradient of the score in the network that masks leave. Raises NonFiniteError."""
    leaf = inputs.detach().requires_grad_(True)
    with torch.enable_grad():
        logits = net.logits(leaf, target, masks)
        scores = net.scored(leaf, target, logits)
        found = torch.autograd.grad(scores.sum(), leaf, allow_unused=True)[0] if scores.requires_grad else None
    values, after = torch.zeros_like(inputs) if found is None else found, logits.detach()
    if not bool(torch.isfinite(values.sum())):
        net.fail(inputs, target)
    kept = sum((mask.flatten(1).sum(1).double() for mask in masks.values()), torch.zeros(1, device=inputs.device))
    total = sum(mask[0].numel() for mask in masks.values())
    sparsity = 1 - kept / total if total else torch.zeros(len(inputs), dtype=torch.float64)
    return Pruned(masks, values, before, after, sparsity, change(net, inputs, target, before, after))


def _column(flags: Tensor, like: Tensor) -> Tensor:
    return flags.reshape(-1, *[1] * (like.dim() - 1))


def measure(net: Network, inputs: Tensor, logits: Tensor) -> str:
    """What a change of the prediction is measured on: softmax, sigmoid, or the output of one number without either."""
    head = net.model.head(inputs)
    if head == "sigmoid":
        return "sigmoid"
    return "softmax" if logits.dim() > 1 and logits.shape[1] > 1 else "output"


def probability(net: Network, inputs: Tensor, target: Target, logits: Tensor) -> Tensor:
    """What `measure` says of each row's target, (N,) float64: of the first class, where two are compared."""
    scale = "logit" if measure(net, inputs, logits) == "output" else "prob"
    return select(logits.double(), replace(target, score=scale, minus=None), net.model.head(inputs))  # type: ignore[arg-type]


def change(net: Network, inputs: Tensor, target: Target, before: Tensor, after: Tensor) -> Tensor:
    """|p' - p| / |p| of each row's target, (N,) float64."""
    p, pruned = (probability(net, inputs, target, logits) for logits in (before, after))
    return (pruned - p).abs() / p.abs().clamp_min(1e-12)


def explain(
    net: Network, inputs: Tensor, target: Target, score: Score, sparsity: float | None, most: float | None
) -> Attribution:
    """The map of a batch of any length, with each row's effective sparsity and change in its note.

    Warns where there is nothing to prune.
    """
    if not net.layers and net.varies:
        warnings.warn(
            f"{net.model.path}: the graph has no nonlinearity, so that nothing can be pruned: the map is the gradient",
            AttrcliWarning,
            stacklevel=3,
        )
    parts, notes = [], []
    for rows in net.passes(len(inputs)):
        chunk = inputs[rows]
        done = prune(net, chunk, target.take(rows), score, sparsity, most)
        parts.append(done.values)
        what = measure(net, chunk, done.before)
        for share, changed in zip(done.sparsity.tolist(), done.change.tolist(), strict=True):
            missed = " (more than allowed)" if most is not None and changed > most else ""
            notes.append(f"sparsity={share:.4f} change={changed:.3g} of {what}{missed}" if net.layers else "no neurons")
    return Attribution(torch.cat(parts), note=tuple(notes))
