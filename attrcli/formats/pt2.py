"""`.pt2` archives of torch.export, read as data and fed to the builder.

`torch.export.load` can be made to run code from the file: by pickled sample inputs, weights and constants, expressions
that sympy evaluates, names of inputs that become source code, modules that the description of the inputs imports, and
op targets that name any attribute of torch. So none of it is used: the JSON of the program is read here, the weights
are bytes, and a target is an ATen op or one of the functions of numbers below. Nothing is unpickled or evaluated.
"""

import json
import math
import operator
import re
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import fx

from attrcli.errors import AttrcliError, ModelError, UnsupportedOp
from attrcli.formats.spec import Sample, TensorSpec
from attrcli.graph import ops
from attrcli.graph.build import Builder, Value, is_tensor

aten = torch.ops.aten

_MAJOR = 8
"""Version of the JSON schema that is read; minor versions only add to it."""

_ENTRY = re.compile(
    r"archive_format|archive_version|byteorder|version|\.data/\w+|extra/.+|models/[^/]+\.json"
    r"|data/sample_inputs/[^/]+\.pt|data/(weights|constants)/([^/]+_config\.json|(weight|tensor)_\d+)"
)
_PAYLOAD = re.compile(r"(weight|tensor)_\d+")
_TARGET = re.compile(r"torch\.ops\.\w+\.\w+(\.\w+)?|_operator\.\w+|math\.\w+|torch\.(_?sym_\w+|_check\w*)")

_DTYPES = {
    1: torch.uint8, 2: torch.int8, 3: torch.int16, 4: torch.int32, 5: torch.int64, 6: torch.float16,
    7: torch.float32, 8: torch.float64, 9: torch.complex32, 10: torch.complex64, 11: torch.complex128,
    12: torch.bool, 13: torch.bfloat16, 28: torch.uint16, 34: torch.uint32, 35: torch.uint64,
}  # fmt: skip
"""The schema's ScalarType by its number."""

_STRIDED = 7
_MEMORY_FORMATS = {1: torch.contiguous_format, 2: torch.channels_last, 3: torch.channels_last_3d}


class Pt2:
    """An opened exported program. Raises ModelError for an archive that holds anything unexpected."""

    format = "pt2"

    def __init__(self, path: Path) -> None:
        try:
            self._read(path)
        except AttrcliError as error:
            raise type(error)(f"{path}: {error}") from error
        except Exception as error:
            what = f"{type(error).__name__}: {str(error)[:200]}"
            raise ModelError(f"{path}: a damaged .pt2 archive, or one of another version of torch ({what})") from error

    def _read(self, path: Path) -> None:
        with zipfile.ZipFile(path) as archive:
            entries = _entries(archive, path.stat().st_size)
            program = json.loads(archive.read(entries[_the_model(entries)]))
            _check_version(program, archive, entries)
            self._tensors = _stored_tensors(archive, entries)
            self.metadata: Mapping[str, str] = {
                name.removeprefix("extra/"): archive.read(entry).decode("utf-8", "replace")
                for name, entry in entries.items()
                if name.startswith("extra/")
            }
        module = program["graph_module"]
        self._graph, signature = module["graph"], module["signature"]
        for node in _nodes(self._graph):
            if not _TARGET.fullmatch(node["target"]):
                raise ModelError(f"refused: the call target {node['target'][:80]!r} is no operator")
        self._sources = [_source(spec) for spec in signature["input_specs"]]
        self._results = _results(signature["output_specs"])
        self.inputs = tuple(_spec(self._graph, name, name) for name, kind, _ in self._sources if kind == "user_input")
        self.outputs: tuple[TensorSpec, ...] | None = tuple(
            _spec(self._graph, name, shown) for shown, name in self._results.items()
        )
        missing = [held for _, kind, held in self._sources if kind in _STORED and held not in self._tensors]
        if missing or not self.inputs or not self._results:
            lacks = f"the stored tensor '{missing[0]}'" if missing else "tensor inputs or outputs"
            raise ModelError(f"the exported program lacks {lacks}")

    def build(self, samples: Mapping[str, Sample], dtype: torch.dtype, batches: Sequence[int]) -> fx.GraphModule:
        """Feed the exported graph to the builder. Raises UnsupportedOp, ModelError."""
        feed = _Feed(Builder(dtype))
        for name, kind, held in self._sources:
            if kind in _STORED:
                feed.env[name] = feed.b.tensor(self._tensors[held], held, parameter=kind == "parameter")
            elif kind == "user_input":
                sample = samples[name]
                shapes = [(batch, *sample.shape) for batch in batches]
                feed.env[name] = feed.b.placeholder(name, shapes, sample.dtype)
        return feed.run(self._graph, self._results)

    def operations(self) -> dict[str, int]:
        """Count the operations of the exported graph, by name."""
        counts: dict[str, int] = {}
        for node in _nodes(self._graph):
            name = node["target"].removeprefix("torch.ops.").removesuffix(".default")
            counts[name] = counts.get(name, 0) + 1
        return counts

    def parameter_count(self) -> int:
        """Number of elements of all parameters, tied ones once."""
        held = {id(self._tensors[name]): self._tensors[name] for _, kind, name in self._sources if kind == "parameter"}
        return sum(tensor.numel() for tensor in held.values())


# -- the archive -----------------------------------------------------------------------------------------------------


def _entries(archive: zipfile.ZipFile, size: int) -> dict[str, zipfile.ZipInfo]:
    """The archive's entries by their names below its one folder; every one is of a known kind."""
    entries: dict[str, zipfile.ZipInfo] = {}
    for entry in archive.infolist():
        inner = entry.filename.partition("/")[2]
        if inner in entries:
            raise ModelError(f"refused: the archive holds two entries {inner!r}")
        if not _ENTRY.fullmatch(inner):
            raise ModelError(
                f"refused: unexpected entry {entry.filename!r}; torch older than 2.8 stores pickles in its archives: "
                "save the model again with a newer torch.export.save"
            )
        if entry.compress_type != zipfile.ZIP_STORED or entry.file_size > size:
            raise ModelError(f"refused: torch writes its archives uncompressed, {inner!r} is not")
        entries[inner] = entry
    return entries


def _the_model(entries: Mapping[str, Any]) -> str:
    models = [name for name in entries if name.startswith("models/")]
    if len(models) != 1:
        raise ModelError(f"the archive holds {len(models)} models; a file for attrcli holds one")
    return models[0]


def _check_version(program: Any, archive: zipfile.ZipFile, entries: Mapping[str, zipfile.ZipInfo]) -> None:
    major = program["schema_version"]["major"]
    if major != _MAJOR:
        raise ModelError(
            f"written in version {major} of the format, by torch {program.get('torch_version', 'of another version')}; "
            f"attrcli reads version {_MAJOR}: save the model again with torch.export.save of a torch that writes it"
        )
    if "byteorder" in entries and archive.read(entries["byteorder"]) != b"little":
        raise ModelError("written on a big-endian machine; save the model again on a little-endian one")


def _stored_tensors(archive: zipfile.ZipFile, entries: Mapping[str, zipfile.ZipInfo]) -> dict[str, torch.Tensor]:
    """Every weight, buffer and constant under its name; tied ones are one object."""
    found: dict[str, torch.Tensor] = {}
    made: dict[str, torch.Tensor] = {}
    for folder in ("data/weights", "data/constants"):
        for config in (name for name in entries if name.startswith(folder) and name.endswith("_config.json")):
            for name, payload in json.loads(archive.read(entries[config]))["config"].items():
                file = payload["path_name"]
                if payload["use_pickle"] or not _PAYLOAD.fullmatch(file):
                    raise ModelError(
                        f"refused: {name!r} is a pickled object ({file[:60]!r}); attrcli unpickles nothing"
                    )
                key = json.dumps([folder, file, payload["tensor_meta"]], sort_keys=True)
                if key not in made:
                    made[key] = _tensor(name, archive, entries[f"{folder}/{file}"], payload["tensor_meta"])
                found[name] = made[key]
    return found


def _tensor(name: str, archive: zipfile.ZipFile, entry: zipfile.ZipInfo, meta: Mapping[str, Any]) -> torch.Tensor:
    sizes, strides = ([item["as_int"] for item in meta[key]] for key in ("sizes", "strides"))
    if meta["dtype"] not in _DTYPES or meta["layout"] != _STRIDED:
        raise ModelError(f"stored tensor '{name}' has a data type or layout that attrcli does not read")
    dtype = _DTYPES[meta["dtype"]]
    if 0 in sizes:
        return torch.empty(sizes, dtype=dtype)
    if any(size < 0 for size in sizes) or not entry.file_size:
        raise ModelError(f"stored tensor '{name}' of {sizes} has {entry.file_size} bytes")
    data = bytearray(archive.read(entry))
    return torch.frombuffer(data, dtype=dtype).as_strided(sizes, strides, meta["storage_offset"]["as_int"])


# -- the signature ---------------------------------------------------------------------------------------------------

_STORED = {"parameter": "parameter_name", "buffer": "buffer_name", "tensor_constant": "tensor_constant_name"}
"""Kinds of inputs of the exported graph that the archive stores, and the key of their names."""


def _source(spec: Mapping[str, Any]) -> tuple[str, str, str]:
    """What fills an input of the exported graph: its name, its kind, and the name of a stored tensor."""
    ((kind, fields),) = spec.items()
    if kind in _STORED:
        return fields["arg"]["name"], kind, fields[_STORED[kind]]
    if kind == "constant_input":
        return fields["name"], kind, ""
    if kind != "user_input" or "as_tensor" not in fields["arg"]:
        raise ModelError(f"the exported program has an input that is no tensor: {json.dumps(fields)[:80]}")
    return fields["arg"]["as_tensor"]["name"], kind, ""


def _results(specs: Sequence[Mapping[str, Any]]) -> dict[str, str]:
    """The outputs that are tensors: name for the user -> name in the graph."""
    arguments = [spec["user_output"]["arg"] for spec in specs if "user_output" in spec]
    names = [argument["as_tensor"]["name"] for argument in arguments if "as_tensor" in argument]
    return {"output": names[0]} if len(names) == 1 else {f"output_{index}": name for index, name in enumerate(names)}


def _spec(graph: Mapping[str, Any], name: str, shown: str) -> TensorSpec:
    meta = graph["tensor_values"][name]
    return TensorSpec(shown, tuple(size.get("as_int") for size in meta["sizes"]), _DTYPES[meta["dtype"]])


# -- the graph -------------------------------------------------------------------------------------------------------


def _nodes(graph: Mapping[str, Any]) -> Iterator[Any]:
    """Every node, those of nested graphs included."""
    for node in graph["nodes"]:
        yield node
        for given in node["inputs"]:
            if "as_graph" in given["arg"]:
                yield from _nodes(given["arg"]["as_graph"]["graph"])


def _needed(graph: Mapping[str, Any]) -> list[Any]:
    """The nodes that the outputs need or that write in place; assertions about sizes are left out."""
    wanted, nodes = _names(graph["outputs"]), []
    for node in reversed(graph["nodes"]):
        if wanted & _names(node["outputs"]) or _writes(node["target"]):
            nodes.append(node)
            wanted |= _names(node["inputs"])
    return nodes[::-1]


def _names(tree: Any) -> set[str]:
    """The names of all values that arguments mention."""
    if isinstance(tree, list):
        return {name for item in tree for name in _names(item)}
    if not isinstance(tree, dict):
        return set()
    named = {item for key, item in tree.items() if key in ("name", "as_name") and isinstance(item, str)}
    return named.union(*(_names(item) for key, item in tree.items() if key != "as_graph"))


def _writes(target: str) -> bool:
    op = _operator(target)
    return op is not None and bool(op._schema.is_mutable)


def _operator(target: str) -> Any:
    """The ATen overload of this name, None where there is none."""
    if not target.startswith("torch.ops.aten."):
        return None
    name, _, overload = target.removeprefix("torch.ops.aten.").partition(".")
    op = getattr(getattr(aten, name, None), overload or "default", None)
    return op if isinstance(op, torch._ops.OpOverload) else None


class _Feed:
    """One pass over an exported graph, node by node into the builder; `env` holds the values by name."""

    def __init__(self, builder: Builder) -> None:
        self.b = builder
        self.env: dict[str, Any] = {}

    def run(self, graph: Mapping[str, Any], results: Mapping[str, str]) -> fx.GraphModule:
        """Return the finished graph with these outputs: shown name -> name in the exported graph."""
        self.walk(graph)
        outputs = {shown: self.env[name] for shown, name in results.items()}
        return self.b.finish(outputs)

    def walk(self, graph: Mapping[str, Any]) -> None:
        """Evaluate the nodes in order."""
        for node in _needed(graph):
            outer, self.b.where = self.b.where, _place(node)
            try:
                self.bind(node["outputs"], self.operation(node))
            except AttrcliError:
                raise
            except Exception as error:
                raise ModelError(f"{node['target']} ({self.b.where}): {str(error)[:300]}") from error
            self.b.where = outer

    def bind(self, outputs: Sequence[Mapping[str, Any]], result: Any) -> None:
        """Enter the results of a node under the names that the file gives them."""
        names: list[str] = []
        for output in outputs:
            ((kind, value),) = output.items()
            if kind == "as_tensors":
                names += [item["name"] for item in value]
            elif kind != "as_none":
                names.append(value.get("name") or value["as_name"])
        single = len(names) == 1 and not isinstance(result, list)
        self.env.update(zip(names, [result] if single else result, strict=True))

    def operation(self, node: Mapping[str, Any]) -> Any:
        """Return what a node returns: a value, or a list of them."""
        target = node["target"]
        if target == "torch.ops.higher_order.wrap_with_set_grad_enabled":
            return self.region(node)
        given = {item["name"] or str(i): self.argument(item["arg"]) for i, item in enumerate(node["inputs"])}
        if target == "torch.ops.aten.sym_size.int":
            return self.b.size(*given.values())
        if function := _NUMBERS.get(target):
            return function(self.b, *given.values())
        op = _operator(target)
        if op is None:
            raise UnsupportedOp(f"op {target.removeprefix('torch.ops.')} ({self.b.where})")
        arguments = op._schema.arguments
        last = max((i for i, a in enumerate(arguments) if a.name in given and not a.kwarg_only), default=-1)
        positional = [given.get(a.name, a.default_value) for a in arguments[: last + 1]]
        keyword = {a.name: given[a.name] for a in arguments if a.kwarg_only and a.name in given}
        return self.b.call(op, *positional, **keyword)

    def region(self, node: Mapping[str, Any]) -> list[Any]:
        """A part of the model that ran with or without gradients: its nodes, detached where it had none."""
        enabled, nested, *values = (item["arg"] for item in node["inputs"])
        graph = nested["as_graph"]["graph"]
        self.bind(graph["inputs"], [self.argument(value) for value in values])
        self.walk(graph)
        results = [self.argument(output) for output in graph["outputs"]]
        if self.argument(enabled):
            return results
        return [self.b.call(aten.detach.default, value) if is_tensor(value) else value for value in results]

    def argument(self, argument: Mapping[str, Any]) -> Any:
        """An argument of a node as the builder takes it."""
        ((kind, value),) = argument.items()
        if kind in _ARGUMENTS:
            return _ARGUMENTS[kind](self.env, value)
        if kind == "as_graph":
            self.b.refuse("a nested graph: control flow that depends on the input's data")
        return self.b.refuse(f"an argument of kind {kind}")


def _named(env: Mapping[str, Any], value: Mapping[str, Any]) -> Any:
    """A size by its name, or as it is."""
    return env[value["as_name"]] if "as_name" in value else next(iter(value.values()))


def _optional(env: Mapping[str, Any], value: Mapping[str, Any]) -> Any:
    return env[value["as_tensor"]["name"]] if "as_tensor" in value else None


def _plain(env: Mapping[str, Any], value: Any) -> Any:
    return value


_ARGUMENTS: dict[str, Callable[[Mapping[str, Any], Any], Any]] = {
    "as_none": lambda env, value: None,
    "as_tensor": lambda env, value: env[value["name"]],
    "as_tensors": lambda env, value: [env[item["name"]] for item in value],
    "as_optional_tensor": _optional,
    "as_optional_tensors": lambda env, value: [_optional(env, item) for item in value],
    "as_sym_int": _named,
    "as_sym_float": _named,
    "as_sym_bool": _named,
    "as_sym_ints": lambda env, value: [_named(env, item) for item in value],
    "as_sym_floats": lambda env, value: [_named(env, item) for item in value],
    "as_sym_bools": lambda env, value: [_named(env, item) for item in value],
    "as_int": _plain,
    "as_ints": _plain,
    "as_bool": _plain,
    "as_bools": _plain,
    "as_string": _plain,
    "as_strings": _plain,
    "as_float": lambda env, value: float(value),
    "as_floats": lambda env, value: [float(item) for item in value],
    "as_scalar_type": lambda env, value: _DTYPES[value],
    "as_memory_format": lambda env, value: _MEMORY_FORMATS.get(value),
    "as_layout": lambda env, value: None,
    "as_device": lambda env, value: None,
}
"""Arguments by their kind in the schema; infinities and NaN are written as text."""


def _number(function: Callable[..., Any]) -> Callable[..., Any]:
    return lambda b, *args: b.number(function, *args)


def _sum(b: Builder, *args: Any) -> Any:
    total, *rest = args[0] if isinstance(args[0], list) else args
    for number in rest:
        total = b.number(operator.add, total, number)
    return total


def _truncated(b: Builder, number: Any) -> Any:
    """A whole number from a size, which is not negative."""
    return b.number(math.floor, number) if isinstance(number, Value) else math.trunc(number)


_NUMBERS: dict[str, Callable[..., Any]] = {
    **{f"{function.__module__}.{name}": _number(function) for function, name in ops.PYTHON.items()},
    **{f"_operator.{name}": _number(getattr(operator, name)) for name in ("eq", "ne", "lt", "le", "gt", "ge")},
    "_operator.getitem": lambda b, items, index: items[index],
    "math.trunc": _truncated,
    "torch.sym_int": _truncated,
    "torch.sym_float": lambda b, number: number,
    "torch.sym_max": _number(max),
    "torch.sym_min": _number(min),
    "torch.sym_sum": _sum,
    "torch._sym_sqrt": _number(math.sqrt),
}
"""Functions of numbers by their names in the file."""


def _place(node: Mapping[str, Any]) -> str:
    """Where a node comes from: its name, with the submodule and the source line as far as the file kept them."""
    name = node.get("name") or next(iter(_names(node["outputs"])), node["target"])
    metadata = node.get("metadata") or {}
    modules = [part.split(",")[1] for part in metadata.get("nn_module_stack", "").split(";") if part.count(",") > 1]
    frames = [line.strip() for line in metadata.get("stack_trace", "").splitlines() if line.strip()]
    where = f"node '{name}'" + (f" in '{modules[-1]}'" if modules and modules[-1] else "")
    return f"{where}: {frames[-1][:120]}" if frames else where
