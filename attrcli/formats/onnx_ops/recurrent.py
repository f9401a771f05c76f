"""LSTM, GRU and RNN, unrolled over the sequence into products, sums and activations."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from attrcli.formats.onnx_ops.base import Node, Op, Operand, Result, Stored, Table, aten, known, padded, tensor
from attrcli.graph.build import Builder, Value

_MOST_STEPS = 1 << 14

Activation = Callable[[Builder, Value], Any]


def _activation(name: str, alpha: float | None, beta: float | None) -> Activation:
    """An activation by ONNX's name for it, with its own defaults."""
    first, second = {
        "affine": (1.0, 0.0),
        "elu": (1.0, 0.0),
        "hardsigmoid": (0.2, 0.5),
        "leakyrelu": (0.01, 0.0),
        "scaledtanh": (1.0, 1.0),
        "thresholdedrelu": (1.0, 0.0),
    }.get(name, (0.0, 0.0))
    a, c = first if alpha is None else alpha, second if beta is None else beta

    def affine(b: Builder, x: Value) -> Any:
        return b.call(aten.add.Scalar, b.call(aten.mul.Scalar, x, a), c)

    def scaled_tanh(b: Builder, x: Value) -> Any:
        return b.call(aten.mul.Scalar, b.call(aten.tanh.default, b.call(aten.mul.Scalar, x, c)), a)

    table: dict[str, Activation] = {
        "affine": affine,
        "elu": lambda b, x: b.call(aten.elu.default, x, a),
        "hardsigmoid": lambda b, x: b.call(aten.clamp.default, affine(b, x), 0, 1),
        "leakyrelu": lambda b, x: b.call(aten.leaky_relu.default, x, a),
        "relu": lambda b, x: b.call(aten.relu.default, x),
        "scaledtanh": scaled_tanh,
        "sigmoid": lambda b, x: b.call(aten.sigmoid.default, x),
        "softplus": lambda b, x: b.call(aten.softplus.default, x),
        "softsign": lambda b, x: b.call(aten.div.Tensor, x, b.call(aten.add.Scalar, b.call(aten.abs.default, x), 1)),
        "tanh": lambda b, x: b.call(aten.tanh.default, x),
        "thresholdedrelu": lambda b, x: b.call(aten.threshold.default, x, a, 0),
    }
    if name not in table:
        raise ValueError(f"activation '{name}'")
    return table[name]


@dataclass(frozen=True)
class Cell:
    """One direction of a recurrent op: its weights, activations, and what bounds them."""

    recurrence: Value
    bias: Value | None
    peepholes: list[Value] | None
    activations: list[Activation]
    clip: float
    coupled: bool
    linear_before_reset: bool

    def activate(self, b: Builder, index: int, x: Value) -> Any:
        """An activation of the clipped sum."""
        if self.clip:
            x = b.call(aten.clamp.default, x, -self.clip, self.clip)
        return self.activations[index](b, x)


def _product(b: Builder, x: Value, y: Value) -> Any:
    return b.call(aten.mul.Tensor, x, y)


def _sum(b: Builder, x: Value, *others: Value | None) -> Any:
    for other in others:
        x = x if other is None else b.call(aten.add.Tensor, x, other)
    return x


def lstm_step(b: Builder, cell: Cell, x: Value, state: list[Value]) -> list[Value]:
    """One step of an LSTM; gates in the order i, o, f, c."""
    h, c = state
    gates = _sum(b, x, b.call(aten.linear.default, h, cell.recurrence))
    i, o, f, g = b.call(aten.split_with_sizes.default, gates, [gates.probes[0].shape[1] // 4] * 4, 1)
    if cell.peepholes:
        i, f = _sum(b, i, _product(b, c, cell.peepholes[0])), _sum(b, f, _product(b, c, cell.peepholes[2]))
    i = cell.activate(b, 0, i)
    f = b.call(aten.rsub.Scalar, i, 1) if cell.coupled else cell.activate(b, 0, f)
    c = _sum(b, _product(b, f, c), _product(b, i, cell.activate(b, 1, g)))
    if cell.peepholes:
        o = _sum(b, o, _product(b, c, cell.peepholes[1]))
    return [_product(b, cell.activate(b, 0, o), cell.activations[2](b, c)), c]


def gru_step(b: Builder, cell: Cell, x: Value, state: list[Value]) -> list[Value]:
    """One step of a GRU; gates in the order z, r, h."""
    h, size = state[0], state[0].probes[0].shape[1]
    parts = b.call(aten.split_with_sizes.default, x, [size] * 3, 1)
    weights = b.call(aten.split_with_sizes.default, cell.recurrence, [size] * 3, 0)
    shifts = [None] * 3 if cell.bias is None else b.call(aten.split_with_sizes.default, cell.bias, [size] * 3, 0)
    z, r = (
        cell.activate(b, 0, _sum(b, parts[k], b.call(aten.linear.default, h, weights[k], shifts[k]))) for k in (0, 1)
    )
    if cell.linear_before_reset:
        inner = _product(b, r, b.call(aten.linear.default, h, weights[2], shifts[2]))
    else:
        inner = b.call(aten.linear.default, _product(b, r, h), weights[2], shifts[2])
    new = cell.activate(b, 1, _sum(b, parts[2], inner))
    return [_sum(b, _product(b, b.call(aten.rsub.Scalar, z, 1), new), _product(b, z, h))]


def rnn_step(b: Builder, cell: Cell, x: Value, state: list[Value]) -> list[Value]:
    """One step of a plain recurrent layer."""
    return [cell.activate(b, 0, _sum(b, x, b.call(aten.linear.default, state[0], cell.recurrence)))]


@dataclass(frozen=True)
class Kind:
    """A recurrent op: gates, states, default activations, the function of one step."""

    gates: int
    states: int
    activations: tuple[str, ...]
    step: Callable[[Builder, Cell, Value, list[Value]], list[Value]]


KINDS = {
    "GRU": Kind(3, 1, ("Sigmoid", "Tanh"), gru_step),
    "LSTM": Kind(4, 2, ("Sigmoid", "Tanh", "Tanh"), lstm_step),
    "RNN": Kind(1, 1, ("Tanh",), rnn_step),
}


def recurrent(b: Builder, n: Node, *operands: Operand) -> Result:
    """LSTM, GRU, RNN: outputs of every step, then the last states; batch first when `layout` is 1."""
    kind = KINDS[n.op]
    data, inner, outer, bias, lengths, *rest = padded(operands, 8)
    states, peepholes = rest[: kind.states], rest[kind.states] if n.op == "LSTM" else None
    x, weights, recurrence = tensor(b, data), tensor(b, inner), tensor(b, outer)
    batch_first, size = bool(n.get("layout", 0)), recurrence.probes[0].shape[2]
    if batch_first:
        x = b.call(aten.transpose.int, x, 0, 1)
    steps = b.size(x, 0)
    if not isinstance(steps, int):
        b.refuse(f"{n.op} over a sequence whose length is the batch size: its data is laid out (length, batch, ...)")
    if not 0 < steps <= _MOST_STEPS:
        b.refuse(f"{n.op} over {steps} steps")
    limits = _lengths(b, lengths, steps)
    outputs, last = [], []
    for d, backwards in enumerate(_directions(b, n)):
        cell = _cell(b, n, kind, d, recurrence, bias, peepholes)
        own = [_initial(b, state, d, x, size, batch_first) for state in states]
        projected = _projected(b, kind, x, weights, bias, d)
        ys, own = _unrolled(b, kind, cell, projected, own, range(steps)[:: -1 if backwards else 1], limits)
        outputs.append(b.call(aten.stack.default, ys, 0))
        last.append(own)
    y = b.call(aten.stack.default, outputs, 1)
    y = b.call(aten.permute.default, y, [2, 0, 1, 3]) if batch_first else y
    return [y, *(b.call(aten.stack.default, list(items), int(batch_first)) for items in zip(*last, strict=True))]


def _directions(b: Builder, n: Node) -> list[bool]:
    direction = n.get("direction", "forward")
    if direction not in ("forward", "reverse", "bidirectional"):
        b.refuse(f"{n.op} with direction '{direction}'")
    return {"forward": [False], "reverse": [True], "bidirectional": [False, True]}[direction]


def _part(b: Builder, item: Value, direction: int) -> Any:
    return b.call(aten.select.int, item, 0, direction)


def _cell(
    b: Builder, n: Node, kind: Kind, direction: int, recurrence: Value, bias: Operand, peepholes: Operand
) -> Cell:
    count = len(kind.activations)
    names = n.get("activations") or list(kind.activations) * 2
    own = [_text(name) for name in names[direction * count : (direction + 1) * count]]
    # Parameters are listed for those activations only that have any, in order over all directions.
    skipped = sum(_text(name) in _HAS_ALPHA for name in names[: direction * count])
    skipped_beta = sum(_text(name) in _HAS_BETA for name in names[: direction * count])
    alphas, betas = list(n.get("activation_alpha", []))[skipped:], list(n.get("activation_beta", []))[skipped_beta:]
    activations = []
    for name in own:
        alpha = alphas.pop(0) if name in _HAS_ALPHA and alphas else None
        beta = betas.pop(0) if name in _HAS_BETA and betas else None
        activations.append(_activation(name, alpha, beta))
    shift = None
    if bias is not None and n.op == "GRU":  # an LSTM's and a plain layer's is in the projection of the inputs
        size = recurrence.probes[0].shape[2]
        shift = b.call(aten.slice.Tensor, _part(b, tensor(b, bias), direction), 0, kind.gates * size, (1 << 63) - 1, 1)
    holes = None
    if peepholes is not None:
        size = recurrence.probes[0].shape[2]
        holes = b.call(aten.split_with_sizes.default, _part(b, tensor(b, peepholes), direction), [size] * 3, 0)
    return Cell(
        _part(b, recurrence, direction),
        shift,
        holes,
        activations,
        n.get("clip", 0.0),
        bool(n.get("input_forget", 0)),
        bool(n.get("linear_before_reset", 0)),
    )


_HAS_ALPHA = {"affine", "elu", "hardsigmoid", "leakyrelu", "scaledtanh", "thresholdedrelu"}
_HAS_BETA = {"affine", "hardsigmoid", "scaledtanh"}


def _text(name: Any) -> str:
    return (name.decode() if isinstance(name, bytes) else str(name)).lower()


def _projected(b: Builder, kind: Kind, x: Value, weights: Value, bias: Operand, direction: int) -> list[Value]:
    """The inputs' part of the gates at each step: (N, gates x H)."""
    shift = None
    if bias is not None:
        halves = _part(b, tensor(b, bias), direction)
        size = halves.probes[0].shape[0] // 2
        inner, outer = b.call(aten.split_with_sizes.default, halves, [size, size], 0)
        shift = inner if kind.step is gru_step else _sum(b, inner, outer)
    whole = b.call(aten.linear.default, x, _part(b, weights, direction), shift)
    return [b.call(aten.select.int, whole, 0, step) for step in range(x.probes[0].shape[0])]


def _initial(b: Builder, state: Operand, direction: int, x: Value, size: int, batch_first: bool) -> Any:
    if state is None:
        return b.call(aten.full.default, [b.size(x, 1), size], 0.0, dtype=b.dtype)
    return b.call(aten.select.int, tensor(b, state), 1 if batch_first else 0, direction)


def _lengths(b: Builder, lengths: Operand, steps: int) -> Value | None:
    """The lengths of the sequences, as a column; None where all are as long as the data."""
    if lengths is None:
        return None
    if isinstance(lengths, Stored) and all(item == steps for item in known(b, lengths).list()):  # type: ignore[union-attr]
        return None
    return b.call(aten.unsqueeze.default, tensor(b, lengths), 1)  # type: ignore[no-any-return]


def _unrolled(
    b: Builder,
    kind: Kind,
    cell: Cell,
    projected: Sequence[Value],
    state: list[Value],
    order: range,
    limits: Value | None,
) -> tuple[list[Value], list[Value]]:
    """The output of every step and the last state; beyond a sequence's end the output is 0 and the state stays."""
    outputs: dict[int, Value] = {}
    for step in order:
        new = kind.step(b, cell, projected[step], state)
        output = new[0]
        if limits is not None:
            inside = b.call(aten.gt.Scalar, limits, step)
            output = b.call(aten.where.self, inside, output, b.call(aten.zeros_like.default, output))
            new = [b.call(aten.where.self, inside, ours, held) for ours, held in zip(new, state, strict=True)]
        outputs[step], state = output, new
    return [outputs[step] for step in sorted(outputs)], state


RECURRENT: Table = {name: {1: Op(recurrent, raw=True)} for name in KINDS}
