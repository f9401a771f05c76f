"""The walk over an ONNX graph: nodes become ATen calls by the op table, shapes stay numbers."""

from collections import ChainMap
from collections.abc import MutableMapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import onnx
import torch
from onnx import defs
from torch import fx

from attrcli.errors import AttrcliError, ModelError, UnsupportedOp
from attrcli.formats.onnx_ops.base import SMALL, Known, Node, Op, Operand, Stored, known, tensor
from attrcli.formats.onnx_ops.control import CONTROL
from attrcli.formats.onnx_ops.functions import Function, standard_function
from attrcli.formats.onnx_ops.numbers import ON_NUMBERS
from attrcli.formats.onnx_ops.protos import all_nodes, attributes_of, domain_of, one_line, stored_tensor
from attrcli.formats.onnx_ops.tables import BESIDE_STANDARD, REFUSED, TABLES
from attrcli.graph.bounded import LARGEST, BoundedBuilder
from attrcli.graph.build import Value

MOST_NUMBERS = 1 << 11
"""Most numbers of one tensor that are followed beside the graph."""

MOST_LEVELS = 60
"""Most functions and subgraphs inside one another."""


@dataclass
class File:
    """What every walk over one file shares: its functions, and what it has cost so far."""

    functions: dict[tuple[str, str], Function] = field(default_factory=dict)
    stored: int = 0
    elements: int = 0

    @property
    def most_elements(self) -> int:
        """Most elements that may be made from constants, which dequantised weights are."""
        return LARGEST + 16 * self.stored


@dataclass
class Walk:
    """One walk over a graph: an environment from ONNX tensor names to operands.

    The walk over a subgraph or a function's body is a `child`: `attributes` are the function's, `place` says where the
    body stands in the file.
    """

    b: BoundedBuilder
    opsets: dict[str, int]
    env: MutableMapping[str, Operand]
    file: File
    attributes: dict[str, Any] = field(default_factory=dict)
    place: str = ""
    level: int = 0

    def placeholder(self, name: str, shapes: Sequence[Sequence[int]], dtype: torch.dtype) -> None:
        """Add an input of the model."""
        value = self.b.placeholder(name, shapes, dtype)
        value.node.meta["tensor"] = name
        self.env[name] = value

    def output(self, name: str) -> Value:
        """The tensor of this name, as an output."""
        if name not in self.env:
            raise ModelError(f"no node makes the output '{one_line(name)}'")
        return tensor(self.b, self.env[name])

    def run(self, nodes: Sequence[onnx.NodeProto], outputs: Sequence[str]) -> list[Operand]:
        """Evaluate the nodes that these outputs need, in the order of the file; return the outputs."""
        for proto in _needed(nodes, outputs):
            name = proto.name or next((output for output in proto.output if output), "")
            self.b.where = self.place + one_line(f"node '{name}' ({proto.op_type})")
            self.b.step()
            try:
                results = self.step(proto, Node(proto.op_type, attributes_of(proto, self.attributes), proto.output))
            except AttrcliError:
                raise
            except (Exception, RecursionError) as error:
                raise ModelError(f"{self.b.where}: {_first_line(error)}") from error
            for output, result in zip(proto.output, results, strict=False):
                if output:
                    self.env[output] = self.folded(output, result)
        self.b.where = self.place
        missing = next((name for name in outputs if name not in self.env), None)
        if missing is not None:
            raise ModelError(f"{self.place}no node makes the output '{one_line(missing)}'")
        return [self.env[name] for name in outputs]

    def folded(self, name: str, result: Operand) -> Operand:
        """A result under its name; one computed from constants alone is a constant from here on.

        What is computed from parameters stays in the graph, so that it still shows which parameter it uses.
        """
        if not isinstance(result, Value) or result.node.op != "call_function":
            return result
        if not self.level:
            result.node.meta.setdefault("tensor", name)
        first, second = result.probes
        if result.data or first.is_meta:
            return result
        self.file.elements += first.numel()
        if self.file.elements > self.file.most_elements:
            raise ModelError(f"{self.b.where}: more than {self.file.most_elements} elements made from constants")
        if not torch.equal(first, second) or _uses_parameters(self.b.root, result.node):
            return result
        return Stored(first, name)

    def step(self, proto: onnx.NodeProto, node: Node) -> list[Operand]:
        """The outputs of one node: by a function of the file, a subgraph, numbers, the op table, or ONNX's own body."""
        missing = next((name for name in proto.input if name and name not in self.env), None)
        if missing is not None:
            raise ModelError(
                f"{self.b.where} reads '{one_line(missing)}', which nothing before it makes in a supported type"
            )
        operands = [self.env[name] if name else None for name in proto.input]
        domain = domain_of(proto.domain)
        if function := self.file.functions.get((domain, proto.op_type)):
            return self.call(function, node, operands)
        if not domain and (control := CONTROL.get(proto.op_type)):
            return control(self, node, operands)
        result = self.on_numbers(node, operands) if not domain else None
        if result is None:
            op, result = self.find(proto), NotImplemented
            if op is not None:
                result = op.function(self.b, node, *(self.convert(op, i, item) for i, item in enumerate(operands)))
        if result is NotImplemented:
            function = standard_function(proto, node.attributes, self.opsets, operands)
            return self.call(function, node, operands) if function else self.unsupported(proto)
        return result if isinstance(result, list) else [result]

    # -- bodies ------------------------------------------------------------------------------------------------------

    def child(self, what: str, env: MutableMapping[str, Operand], **changes: Any) -> "Walk":
        """A walk over a body inside this one."""
        if self.level >= MOST_LEVELS:
            raise ModelError(f"{self.b.where}: functions and subgraphs more than {MOST_LEVELS} deep")
        self.b.step()
        given = {"opsets": self.opsets, "attributes": self.attributes, **changes}
        return Walk(self.b, env=env, file=self.file, place=f"{what}: ", level=self.level + 1, **given)

    def subgraph(self, graph: onnx.GraphProto, inputs: Sequence[Operand]) -> list[Operand]:
        """Evaluate a graph inside a node: it also sees the names around it."""
        env: ChainMap[str, Operand] = ChainMap({}, *(self.env.maps if isinstance(self.env, ChainMap) else [self.env]))
        for entry in graph.initializer:
            held = stored_tensor(entry)
            env[entry.name] = Stored(held, entry.name, held.is_floating_point() and held.dim() > 0)
        names = [value.name for value in graph.input]
        if len(names) != len(inputs):
            raise ModelError(f"{self.b.where}: its subgraph takes {len(names)} inputs, not {len(inputs)}")
        env.update(zip(names, inputs, strict=True))
        where = self.b.where
        results = self.child(where, env).run(graph.node, [value.name for value in graph.output])
        self.b.where = where
        return results

    def call(self, function: Function, node: Node, operands: Sequence[Operand]) -> list[Operand]:
        """Evaluate a function's body."""
        names = function.proto.input
        if len(operands) > len(names):
            raise ModelError(f"{self.b.where}: function {one_line(function.proto.name)} takes {len(names)} inputs")
        padded = [*operands, *[None] * (len(names) - len(operands))]
        where, attributes = self.b.where, {**function.defaults, **node.attributes}
        child = self.child(where, dict(zip(names, padded, strict=True)), opsets=function.opsets, attributes=attributes)
        wanted = [name for i, name in enumerate(function.proto.output) if node.wants(i)]
        results = dict(zip(wanted, child.run(function.proto.node, wanted), strict=True))
        self.b.where = where
        return [results.get(name) for name in function.proto.output]

    # -- the op table ------------------------------------------------------------------------------------------------

    def on_numbers(self, node: Node, operands: Sequence[Operand]) -> Any:
        """The outputs as numbers when all inputs are; None where this is an operation on tensors."""
        if node.op not in ON_NUMBERS or not operands or not all(_small(operand) for operand in operands):
            return None
        if any(isinstance(x, Stored) and x.tensor.is_floating_point() for x in operands) and not any(
            isinstance(x, Known) for x in operands
        ):
            return None
        result = ON_NUMBERS[node.op](self.b, node, *(known(self.b, operand) for operand in operands))
        return [self.bounded(item) for item in result] if isinstance(result, list) else self.bounded(result)

    def bounded(self, result: Any) -> Any:
        """Numbers that fit their type; many constants become a tensor again."""
        if result is None:
            return None
        numbers = result.list()
        if any(type(number) is int and abs(number) >= 1 << 63 for number in numbers):
            self.b.refuse("a size beyond 63 bits")
        if len(numbers) <= MOST_NUMBERS:
            return result
        if any(isinstance(number, Value) for number in numbers):
            self.b.refuse(f"{len(numbers)} sizes in one tensor")
        return Stored(torch.tensor(result.array.tolist(), dtype=result.dtype), "numbers")

    def find(self, proto: onnx.NodeProto) -> Op | None:
        """The row of the op table for this node in its operator set's version; None without one."""
        domain = domain_of(proto.domain)
        version = self.opsets.get(domain)
        rows = TABLES.get(domain, {}).get(proto.op_type, {})
        since = version or 1
        if not domain and version is not None:
            try:
                since = defs.get_schema(proto.op_type, version, "").since_version
            except defs.SchemaError:
                rows = BESIDE_STANDARD.get(proto.op_type, {})
        fitting = [row for row in rows if row <= since]
        if not fitting or version is None:
            return None
        row = rows[max(fitting)]
        return row if isinstance(row, Op) else Op(row)

    def unsupported(self, proto: onnx.NodeProto) -> list[Operand]:
        """Raise UnsupportedOp: node, op, domain, opset, and why where the table says so."""
        domain, where = domain_of(proto.domain), self.b.where.removesuffix(f" ({proto.op_type})")
        version = self.opsets.get(domain)
        opset = f"opset {version}" if version is not None else "an operator set that the file does not import"
        reasons = REFUSED.get(domain, {})
        reason = reasons.get(proto.op_type) or reasons.get("") or "has no importer"
        op = one_line(f"op {proto.op_type} (domain {domain or 'ai.onnx'}, {opset})")
        raise UnsupportedOp(f"{where}: {op} {reason}")

    def convert(self, op: Op, position: int, operand: Operand) -> Any:
        """An input as the op function wants it."""
        if op.raw or operand is None:
            return operand
        return known(self.b, operand) if position in op.reads else tensor(self.b, operand)


def _needed(nodes: Sequence[onnx.NodeProto], outputs: Sequence[str]) -> list[onnx.NodeProto]:
    """The nodes that these outputs need; what a subgraph reads from outside counts as an input of its node."""
    wanted, needed = set(outputs), []
    for node in reversed(nodes):
        if wanted.intersection(node.output):
            needed.append(node)
            wanted.update(node.input)
            for attribute in node.attribute:
                for inner in (attribute.g, *attribute.graphs):
                    wanted.update(name for item in all_nodes(inner) for name in item.input)
                    wanted.update(output.name for output in inner.output)
    return needed[::-1]


def _uses_parameters(root: torch.nn.Module, node: fx.Node) -> bool:
    """Whether a node that depends on no input depends on a parameter."""
    parameters = dict(root.named_parameters())
    pending, seen = [node], {node}
    while pending:
        item = pending.pop()
        if item.op == "get_attr" and item.target in parameters:
            return True
        pending.extend(other for other in item.all_input_nodes if other not in seen)
        seen.update(item.all_input_nodes)
    return False


def _small(operand: Operand) -> bool:
    return (
        operand is None
        or isinstance(operand, Known)
        or (isinstance(operand, Stored) and operand.tensor.numel() <= SMALL)
    )


def _first_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return one_line(lines[0][:300]) if lines else type(error).__name__
