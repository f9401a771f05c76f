"""The rule engine: one forward pass in which ruled nodes run under a backward of their own, and one backward pass.

A method supplies `rule(node)`, which is asked once per node that depends on the explained input. PLAIN leaves the node
to autograd; with every rule PLAIN the result is the gradient, bit for bit. REFUSE is an UnsupportedOp that names the
node and the method. A `Rule` computes the node's value and says how what comes back is passed on (`own`).
"""

import math
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Any

import torch
from torch import fx

from attrcli.errors import UnsupportedOp
from attrcli.graph import ops
from attrcli.graph.check import attribute


class Verdict(Enum):
    """What a method says of a node that it has no rule for."""

    PLAIN = "autograd"
    REFUSE = "refused"


PLAIN, REFUSE = Verdict.PLAIN, Verdict.REFUSE


class Remainder:
    """What rules knowingly leave unattributed: a sum (N,), float64, filled by the backward pass.

    `marks` are what they have to say of nodes besides: a number for each row, NaN where they say nothing.
    """

    def __init__(self, rows: int, device: torch.device) -> None:
        self.rows, self.total = rows, torch.zeros(rows, dtype=torch.float64, device=device)
        self.marks: dict[str, torch.Tensor] = {}
        self._at, self._whole = slice(None), rows

    def add(self, node: fx.Node, contributions: torch.Tensor) -> None:
        """Add contributions to a node's value, shaped like it. Raises UnsupportedOp where rows are not its first."""
        if self.rows > 1 and not leads_with_batch(node):
            raise UnsupportedOp(f"node '{node.name}' mixes the batch with another dimension: its remainder has no rows")
        self.total += self.by_row(contributions)

    def by_row(self, values: torch.Tensor) -> torch.Tensor:
        """The sum (N,), float64, of each row's values."""
        whole = values.reshape(self.rows, -1) if values.shape[:1] != (self.rows,) else values
        return torch.stack([row.double().sum() for row in whole])  # row by row it stays in the cache

    def mark(self, node: fx.Node, numbers: torch.Tensor) -> None:
        """Mark a node with a number for each row, or one for all; what was marked stays where the new one is NaN."""
        held = self.marks.setdefault(node.name, torch.full((self._whole,), math.nan, dtype=torch.float64))[self._at]
        held.copy_(torch.where(numbers.isnan().cpu(), held, numbers.cpu()))

    def row(self, i: int) -> "Remainder":
        """That of one row alone, which adds to this one."""
        part = Remainder(1, self.total.device)
        part.total, part.marks, part._at, part._whole = self.total[i : i + 1], self.marks, slice(i, i + 1), self.rows
        return part


@dataclass
class Step:
    """One call of a node: its arguments, and what they and its value are at the baseline, where that runs beside it.

    `explained` is the explained input, for what has nothing else in front of it that autograd knows.
    `beside` is a place for what one rule has to tell the rules of the nodes that follow.
    """

    node: fx.Node
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    reference_args: tuple[Any, ...]
    reference: Any
    explained: torch.Tensor
    remainder: Remainder
    beside: dict[fx.Node, Any]
    varying: Collection[fx.Node]

    def depends(self, place: int) -> bool:
        """Whether an argument depends on the explained input, be it by comparisons alone."""
        node = self.node.args[place]
        return isinstance(node, fx.Node) and node in self.varying

    def argument(self, name: str, default: Any) -> Any:
        """An argument of the op by its name in the schema."""
        names = [each.name for each in self.node.target._schema.arguments]  # type: ignore[union-attr]
        place = names.index(name)
        value = self.args[place] if place < len(self.args) else self.kwargs.get(name)
        return default if value is None else value

    def run(self, *args: Any) -> Any:
        """Call the node's op, on its own arguments or on others in their place."""
        target: Any = self.node.target
        return target(*(args or self.args), **self.kwargs)


Rule = Callable[[Step], Any]
Choice = Callable[[fx.Node, Collection[fx.Node]], Rule | Verdict]
"""The rule of a node, given all nodes that depend on the explained input."""


class Ruled:
    """A graph with its rules resolved: `(inputs) -> outputs` as the graph itself, with another backward pass.

    `name` is the explained input; `method` is named in errors, with `advice`. With `at`, a node is explained in its
    place: the backward pass ends there, and only what follows needs rules. Raises UnsupportedOp for a node that is
    refused.
    """

    def __init__(
        self, module: fx.GraphModule, name: str, choose: Choice, method: str, advice: str = "", at: str | None = None
    ) -> None:
        self.module, self.nodes, self.at = module, list(module.graph.nodes), at
        self.varying = dependent(module, name, at)
        self.leaves: list[torch.Tensor] = []
        self.rules: dict[fx.Node, Rule] = {}
        self.remainders: list[Remainder] = []
        for node in self.nodes:
            if node not in self.varying or node.op != "call_function" or node.name == at:
                continue
            verdict = choose(node, self.varying)
            if verdict is REFUSE:
                raise UnsupportedOp(f"{place_of(node)}: {method} has no rule for it{f'; {advice}' if advice else ''}")
            if not isinstance(verdict, Verdict):
                self.rules[node] = verdict
        self._explained = next(node for node in self.nodes if node in self.varying)
        self._last: dict[fx.Node, list[fx.Node]] = {}
        seen: set[fx.Node] = {self._explained}
        for node in reversed(self.nodes):
            ending = [item for item in node.all_input_nodes if item not in seen]
            seen.update(ending)
            self._last[node] = ending

    def __call__(self, *inputs: torch.Tensor) -> Any:
        """Run on all inputs of the graph; with references, these follow in the same order.

        References of one row stand for all rows.
        """
        count = len(self.module.meta["inputs"])
        given, references = iter(inputs[:count]), iter(inputs[count:])
        paired = len(inputs) > count
        self.remainders.append(Remainder(len(inputs[0]), inputs[0].device))
        env: dict[fx.Node, Any] = {}
        reference: dict[fx.Node, Any] = {}
        beside: dict[fx.Node, Any] = {}
        for node in self.nodes:
            if node.op == "placeholder":
                env[node], reference[node] = next(given), next(references, None)
            elif node.op == "get_attr":
                env[node] = reference[node] = attribute(self.module, str(node.target))
            elif node.op == "output":
                return fx.map_arg(node.args[0], env.__getitem__)
            else:
                self._call(node, env, reference, beside, paired)
            if node.name == self.at:
                env[node] = env[node].detach().requires_grad_(True)
                self.leaves.append(env[node])
            for ended in self._last[node]:
                env.pop(ended, None), reference.pop(ended, None)
        return None

    def marks(self, count: int) -> list[dict[str, float]]:
        """What rules marked since the remainder was last asked: node and number, for each of the first rows."""
        rows: list[dict[str, float]] = []
        for part in self.remainders:
            for i in range(part.rows):
                rows.append({name: float(each[i]) for name, each in part.marks.items() if not each[i].isnan()})
        return rows[:count]

    def remainder(self, count: int) -> torch.Tensor:
        """What the rules left unattributed since this was last asked, for the first `count` rows."""
        total = torch.cat([part.total for part in self.remainders])[:count]
        self.remainders.clear()
        return total

    def _call(self, node: fx.Node, env: dict[Any, Any], reference: dict[Any, Any], beside: Any, paired: bool) -> None:
        target: Any = node.target
        args, kwargs = fx.map_arg((node.args, node.kwargs), env.__getitem__)
        if node not in self.varying and not any(item in self.varying for item in node.all_input_nodes):
            env[node] = target(*args, **kwargs)
            if paired:
                reference[node] = self._at_baseline(node, reference) if _sized(node) else env[node]
            return
        if paired:
            reference[node] = self._at_baseline(node, reference)
        if node in self.rules:
            there = fx.map_arg(node.args, reference.__getitem__) if paired else ()
            about = (there, reference.get(node), env[self._explained], self.remainders[-1], beside, self.varying)
            env[node] = self.rules[node](Step(node, args, kwargs, *about))
        else:
            env[node] = target(*args, **kwargs)

    def _at_baseline(self, node: fx.Node, reference: dict[Any, Any]) -> Any:
        args, kwargs = fx.map_arg((node.args, node.kwargs), reference.__getitem__)
        target: Any = node.target
        with torch.no_grad():
            return target(*args, **kwargs)


def _sized(node: fx.Node) -> bool:
    """Whether a node that depends on no value of the input still depends on the number of rows."""
    shapes = node.meta.get("shapes")
    return node.op != "get_attr" and (shapes is None or shapes[0] != shapes[1])


def dependent(module: fx.GraphModule, name: str, at: str | None = None) -> set[fx.Node]:
    """The nodes whose values depend on those of an input, or of the node `at`; a size alone does not count."""
    names = iter(module.meta["inputs"])
    found: set[fx.Node] = set()
    for node in module.graph.nodes:
        if node.op == "placeholder":
            if next(names) == name and at is None:
                found.add(node)
        elif node.op == "call_function":
            values = node.target is not ops.SIZE and node.target not in ops.LIKE
            reads = values and not found.isdisjoint(node.all_input_nodes)
            if reads or node.name == at:
                found.add(node)
    return found


def leads_with_batch(node: fx.Node) -> bool:
    """Whether the batch is the first dimension of a node's value, and no part of another."""
    first, second = node.meta.get("shapes", ((), ()))
    return bool(first) and first[1:] == second[1:] and (first[0], second[0]) == tuple(batches_of(node))


def batches_of(node: fx.Node) -> tuple[int, int]:
    """The two batch sizes that the shapes in the graph of a node stand for."""
    inputs = (item for item in node.graph.nodes if item.op == "placeholder")
    shapes = next(item.meta["shapes"] for item in inputs if "shapes" in item.meta)  # one that was cut out has none
    return shapes[0][0], shapes[1][0]


def merges_batch(module: fx.GraphModule, among: set[fx.Node]) -> bool:
    """Whether some of these nodes have no batch of their own in front, so that one row does not broadcast to many."""
    return any(node.op == "call_function" and "shapes" in node.meta and not leads_with_batch(node) for node in among)


def place_of(node: fx.Node) -> str:
    """A node's name, op and place in the file, for a message."""
    origin = node.meta.get("origin")
    return f"node '{node.name}' is op {node.target}{f' ({origin})' if origin else ''}"


class _Own(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, backward: Any, values: Any, *inputs: torch.Tensor) -> Any:
        ctx.own = backward
        return values

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> Any:
        return None, None, *ctx.own(*gradients)


def own(values: Any, inputs: Sequence[torch.Tensor], backward: Callable[..., Sequence[torch.Tensor | None]]) -> Any:
    """Values (a tensor, or a tuple of them) that depend on `inputs` by this backward and by nothing else.

    `backward` takes a gradient for each value and returns one for each input.
    """
    return _Own.apply(backward, values, *inputs)  # type: ignore[no-untyped-call]
