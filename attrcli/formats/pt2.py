"""`.pt2` archives of torch.export: checked and rewritten before they are loaded, then fed to the builder.

`torch.export.load` can be made to run code from the file: through pickled sample inputs and constants, through
`use_pickle` payloads, through expressions that sympy evaluates, and through op targets that name any attribute of
torch. So the archive is read here first, everything outside a list is refused, the sample inputs (never needed) are
emptied, and only the rewritten archive is loaded.
"""

import ast
import io
import json
import operator
import re
import zipfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import fx

from attrcli.errors import AttrcliError, ModelError, UnsupportedOp
from attrcli.formats.spec import Sample, TensorSpec
from attrcli.graph.build import Builder, Value, is_tensor

aten = torch.ops.aten

_EXPRESSIONS = frozenset(
    ("Symbol", "Integer", "Add", "Mul", "Pow", "Max", "Min", "Mod", "FloorDiv", "CleanDiv", "PythonMod", "CeilToInt",
     "FloorToInt", "TruncToInt", "ToFloat", "IntTrueDiv", "Eq", "Ne", "Lt", "Le", "Gt", "Ge", "And", "Or", "Not",
     "Rational", "Float", "oo", "int_oo", "true", "false")
)  # fmt: skip
_SYMBOL = re.compile(r"[suf]\d+")
_TARGET = re.compile(r"torch\.ops\.(aten|prims|higher_order)\.\w+(\.\w+)?|_operator\.\w+|math\.\w+|torch\.sym_\w+")
_CODE_PREFIXES = ("torch", "_operator", "math", "builtins", "operator", "#")
_PAYLOAD = re.compile(r"(weight|tensor)_\d+")
_TENSORS = re.compile(r"data/(weights|constants)/(weight|tensor)_\d+")
_PLAIN = frozenset(
    ("archive_format", "archive_version", "byteorder", ".data/version", ".data/serialization_id", "version")
)
_LARGEST = 64 << 30


class Pt2:
    """A checked and loaded exported program. Raises ModelError for an archive that holds anything unexpected."""

    format = "pt2"

    def __init__(self, path: Path) -> None:
        self.metadata: Mapping[str, str]
        safe, self.metadata = _rewritten(path)
        try:
            self.program = torch.export.load(safe)
        except Exception as error:
            raise ModelError(f"{path}: torch.export.load failed: {type(error).__name__}: {str(error)[:200]}") from error
        signature = self.program.graph_signature
        by_name = {node.name: node for node in self.program.graph.nodes}
        self.inputs = tuple(_spec(by_name[name]) for name in signature.user_inputs if isinstance(name, str))
        outputs = [name for name in signature.user_outputs if isinstance(name, str)]
        self._output_names = ["output"] if len(outputs) == 1 else [f"output_{i}" for i in range(len(outputs))]
        self.outputs: tuple[TensorSpec, ...] | None = tuple(
            _spec(by_name[name], as_name) for name, as_name in zip(outputs, self._output_names, strict=True)
        )

    def build(self, samples: Mapping[str, Sample], dtype: torch.dtype, batches: Sequence[int]) -> fx.GraphModule:
        """Feed the exported graph to the builder. Raises UnsupportedOp, ModelError."""
        return _Feed(self.program, samples, Builder(dtype), batches).run(self._output_names)

    def operations(self) -> dict[str, int]:
        """Count the operations of the exported graph, by name."""
        counts: dict[str, int] = {}
        for node in self.program.graph.nodes:
            if node.op == "call_function":
                name = str(getattr(node.target, "_schema", node.target)).split("(")[0].replace("::", ".")
                counts[name] = counts.get(name, 0) + 1
        return counts

    def parameter_count(self) -> int:
        """Number of elements of all parameters."""
        return sum(parameter.numel() for parameter in self.program.parameters())


def _spec(node: fx.Node, name: str | None = None) -> TensorSpec:
    value = node.meta.get("val")
    if not isinstance(value, torch.Tensor):
        return TensorSpec(name or node.name, (), torch.float32)
    shape = tuple(size if isinstance(size, int) else None for size in value.shape)
    return TensorSpec(name or node.name, shape, value.dtype)


def _rewritten(path: Path) -> tuple[io.BytesIO, dict[str, str]]:
    """Return the archive without its sample inputs, and its extra files, after checking every entry."""
    out = io.BytesIO()
    extra: dict[str, str] = {}
    with zipfile.ZipFile(path) as archive, zipfile.ZipFile(out, "w", zipfile.ZIP_STORED) as copy:
        entries = archive.infolist()
        names = [entry.filename for entry in entries]
        if len(set(names)) != len(names):
            raise ModelError(f"{path}: refused: the archive holds two entries of one name")
        if any(entry.compress_type for entry in entries) or sum(e.file_size for e in entries) > _LARGEST:
            raise ModelError(f"{path}: refused: torch writes its archives uncompressed, this one is not")
        root = names[0].split("/")[0]
        for name in names:
            inner = name.removeprefix(f"{root}/")
            data = archive.read(name)
            if inner.endswith(".json"):
                _check_json(path, inner, json.loads(data))
            elif inner.startswith("data/sample_inputs/"):
                data = b""
            elif inner.startswith("extra/"):
                extra[inner.removeprefix("extra/")] = data.decode("utf-8", "replace")
            elif inner not in _PLAIN and not _TENSORS.fullmatch(inner):
                raise ModelError(
                    f"{path}: refused: unexpected entry {inner!r}; files of torch older than 2.8 hold pickles here: "
                    "save the model again with a newer torch.export.save"
                )
            copy.writestr(name, data)
    out.seek(0)
    return out, extra


def _check_json(path: Path, name: str, tree: Any) -> None:
    def refuse(what: str) -> None:
        raise ModelError(f"{path}: refused: {name} holds {what}; an honest exported program does not")

    def visit(value: Any) -> None:
        if isinstance(value, dict):
            for key, item in value.items():
                if key == "expr_str" and not (isinstance(item, str) and _expression_is_plain(item)):
                    refuse(f"the expression {str(item)[:60]!r}")
                if key == "use_pickle" and item:
                    refuse("a pickled payload")
                if key == "path_name" and not _PAYLOAD.fullmatch(str(item)):
                    refuse(f"the payload {str(item)[:60]!r}")
                if key == "target" and str(item).startswith(_CODE_PREFIXES) and not _TARGET.fullmatch(str(item)):
                    refuse(f"the call target {str(item)[:80]!r}")
                visit(item)
        elif isinstance(value, list):
            for item in value:
                visit(item)

    visit(tree)


def _expression_is_plain(text: str) -> bool:
    """Whether a size expression holds only numbers, symbols and the listed functions."""
    try:
        tree = ast.parse(text, mode="eval")
    except (SyntaxError, ValueError, RecursionError):
        return False
    allowed = (ast.Expression, ast.Call, ast.Name, ast.Load, ast.Constant, ast.BinOp, ast.UnaryOp, ast.Compare,
               ast.operator, ast.unaryop, ast.cmpop, ast.keyword)  # fmt: skip
    for node in ast.walk(tree):
        if not isinstance(node, allowed):
            return False
        if isinstance(node, ast.Call) and not (isinstance(node.func, ast.Name) and node.func.id in _EXPRESSIONS):
            return False
        if isinstance(node, ast.Name) and node.id not in _EXPRESSIONS and not _SYMBOL.fullmatch(node.id):
            return False
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and not _SYMBOL.fullmatch(node.value):
            return False
    return True


class _Feed:
    """One pass over an exported graph, node by node into the builder."""

    def __init__(self, program: Any, samples: Mapping[str, Sample], builder: Builder, batches: Sequence[int]) -> None:
        self.program, self.samples, self.b, self.batches = program, samples, builder, batches
        self.env: dict[fx.Node, Any] = {}

    def run(self, output_names: Sequence[str]) -> fx.GraphModule:
        """Return the finished graph."""
        for node in self.program.graph.nodes:
            self.b.where = _place(node)
            try:
                if node.op == "placeholder":
                    self.env[node] = self.placeholder(node)
                elif node.op == "get_attr":
                    self.b.refuse("a nested graph")
                elif node.op == "call_function":
                    self.env[node] = self.operation(node)
                else:
                    results = list(fx.map_arg(node.args[0], lambda item: self.env[item]))  # type: ignore[arg-type]
            except AttrcliError:
                raise
            except Exception as error:
                raise ModelError(f"{node.target} ({self.b.where}): {str(error)[:300]}") from error
        signature = self.program.graph_signature
        user = results[len(signature.output_specs) - len(signature.user_outputs) :]
        if not user or not all(is_tensor(value) for value in user):
            raise ModelError("the exported program returns something that is not a tensor")
        return self.b.finish(dict(zip(output_names, user, strict=True)))

    def placeholder(self, node: fx.Node) -> Value:
        signature = self.program.graph_signature
        stored = {**signature.inputs_to_parameters, **signature.inputs_to_buffers}
        if name := stored.get(node.name):
            held = self.program.state_dict if name in self.program.state_dict else self.program.constants
            return self.b.tensor(held[name], name, parameter=node.name in signature.inputs_to_parameters)
        if name := signature.inputs_to_lifted_tensor_constants.get(node.name):
            return self.b.tensor(self.program.constants[name], name)
        if node.name not in self.samples:
            self.b.refuse(f"input '{node.name}' is not a tensor")
        sample = self.samples[node.name]
        return self.b.placeholder(node.name, [(batch, *sample.shape) for batch in self.batches], sample.dtype)

    def operation(self, node: fx.Node) -> Any:
        target: Any = node.target
        args = fx.map_arg(node.args, lambda item: self.env[item])
        kwargs = dict(fx.map_arg(node.kwargs, lambda item: self.env[item]))
        args = tuple(list(arg) if isinstance(arg, (list, tuple)) else arg for arg in args)
        if _is_assertion(target):
            return None
        if target is operator.getitem:
            return args[0][args[1]]
        if target is aten.sym_size.int:
            return self.b.size(args[0], args[1])
        if isinstance(target, torch._ops.OpOverload):
            if target.namespace != "aten":
                raise UnsupportedOp(f"{target} ({self.b.where})")
            return self.b.call(target, *args, **kwargs)
        return self.b.number(_PYTHON.get(target, target), *args)


_PYTHON: dict[Any, Callable[..., Any]] = {
    torch.sym_max: max,
    torch.sym_min: min,
    torch.sym_float: lambda number: number,
}


def _is_assertion(target: Any) -> bool:
    return "_assert" in str(target) or "sym_constrain" in str(target) or target is torch._check


def _place(node: fx.Node) -> str:
    """The source line that an exported node came from, or its name."""
    frames = [line.strip() for line in (node.meta.get("stack_trace") or "").splitlines() if line.strip()]
    if len(frames) < 2:
        return f"node '{node.name}'"
    file = re.search(r'File "([^"]+)", line (\d+)', frames[-2])
    where = f"{file.group(1).rsplit('/', 1)[-1]}:{file.group(2)}: " if file else ""
    return where + frames[-1][:120]
