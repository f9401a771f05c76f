"""Backward passes that let only what is positive through an activation: guided backpropagation and deconvnet."""

from collections import Counter
from collections.abc import Callable, Collection
from typing import Any, Literal

import torch
from torch import fx

from attrcli.errors import UnsupportedOp
from attrcli.graph import ops
from attrcli.graph.rectified import ACTIVATIONS, Activation, activation, rectifier
from attrcli.graph.rules import PLAIN, REFUSE, Choice, Rule, Ruled, Step, Verdict, own
from attrcli.methods._method import Attribution
from attrcli.model import Model, Target

Tensor = torch.Tensor
aten = torch.ops.aten
Acts = Literal["relu", "all"]
Passed = Callable[[Tensor, Tensor], Tensor]
"""What goes on to the input of an activation, given its derivative there and the gradient that arrives."""

_CURVED = (ops.OpClass.SMOOTH, ops.OpClass.KINKED, ops.OpClass.NORMALISATION, ops.OpClass.RECURRENT)


def ruled(model: Model, inputs: Tensor, method: str, acts: Acts, passed: Passed) -> Ruled:
    """The graph with activations under a rule, for `Model.gradient`.

    Raises UnsupportedOp where there is none, naming what there is instead, and, with `acts` all, for an activation
    that is written out in several nodes.
    """
    advice = "save the model with that activation as one operation, or choose -o acts=relu"
    made = model.ruled(inputs, _choice(acts, passed), method, advice)
    if made.rules:
        return made
    found = _activations(made)
    there = f"its nonlinearities: {_counted(found)}" if found else "it has no nonlinearity"
    way_out = "; -o acts=all takes the activations among them" if acts == "relu" and _taken(made) else ""
    raise UnsupportedOp(
        f"{model.path}: no {'ReLU' if acts == 'relu' else 'activation'} lies between the input and the output, and "
        f"without one {method} is the plain gradient; {there}{way_out}; the method gradient says what it is"
    )


def attribute(model: Model, inputs: Tensor, target: Target, made: Ruled) -> Attribution:
    """What the rules bring back to the input; the note counts the activations that keep their gradient."""
    rows = model.passes(len(inputs))
    values = torch.cat([model.gradient(inputs[part], target.take(part), ruled=made)[0] for part in rows])
    left = _activations(made)
    note = f"{len(made.rules)} activations guided; by their gradient: {_counted(left)}" if left else ""
    return Attribution(values, note=(note,) * len(inputs) if note else None)


def _choice(acts: Acts, passed: Passed) -> Choice:
    find = rectifier if acts == "relu" else activation

    def choose(node: fx.Node, varying: Collection[fx.Node]) -> Rule | Verdict:
        found = find(node, varying)
        if found is not None:
            return _rule(found, passed)
        return REFUSE if acts == "all" and _gates_itself(node, varying) else PLAIN

    return choose


def _rule(found: Activation, passed: Passed) -> Rule:
    def rule(step: Step) -> Any:
        x = step.args[found.place]
        if not x.requires_grad:  # it depends on the input by comparisons alone
            return step.run()
        held = x.detach()
        return own(
            step.run().detach(), [x], lambda gradient: (passed(found.slope(held), gradient).sum_to_size(held.shape),)
        )

    return rule


def _gates_itself(node: fx.Node, varying: Collection[fx.Node]) -> bool:
    """Whether a product has two factors computed from one tensor, element by element: x sigmoid(x), GELU."""
    if node.target is not aten.mul.Tensor or not all(arg in varying for arg in node.args):
        return False
    first, second = (_unary_chain(arg, varying) for arg in node.args)
    return not first.isdisjoint(second)


def _unary_chain(node: Any, varying: Collection[fx.Node]) -> set[fx.Node]:
    """A node with those before it from which it is computed element by element, with constants."""
    chain = {node}
    while ops.classify(node.target) in (ops.OpClass.SMOOTH, ops.OpClass.KINKED, ops.OpClass.AFFINE) or (
        node.target in (aten.mul.Tensor, aten.div.Tensor)
    ):
        before = [arg for arg in node.args if isinstance(arg, fx.Node) and arg in varying]
        if len(before) != 1:
            break
        (node,) = before
        chain.add(node)
    return chain


def _activations(made: Ruled) -> list[fx.Node]:
    """The nonlinearities on the way that no rule was given to."""
    return [
        node
        for node in made.nodes
        if node in made.varying and node not in made.rules and ops.classify(node.target) in _CURVED
    ]


def _taken(made: Ruled) -> bool:
    return any(node.target in ACTIVATIONS for node in _activations(made))


def _counted(nodes: Collection[fx.Node]) -> str:
    """How many of each, with the name of the first."""
    kinds = Counter(str(node.target).removeprefix("aten.").split(".")[0] for node in nodes)
    return ", ".join(f"{count} {kind}" for kind, count in kinds.most_common())
