"""`.pt2` archives of torch.export, read as data and fed to the builder.

`torch.export.load` can be made to run code from the file: by pickled sample inputs, weights and constants, expressions
that sympy evaluates, names of inputs that become source code, modules that the description of the inputs imports, and
op targets that name any attribute of torch. So none of it is used: the JSON of the program is read here, the weights
are bytes, and a target is an ATen op or one of the functions of numbers below. Nothing is unpickled or evaluated.
"""

import json
import re
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import fx
from torch.utils import _pytree

from attrcli.errors import AttrcliError, ModelError, UnsupportedOp
from attrcli.formats.pt2_walk import DTYPES, Feed, all_nodes, one_line
from attrcli.formats.spec import ADVICE, Sample, TensorSpec, named
from attrcli.graph.bounded import BoundedBuilder

_MAJOR = 8
"""Version of the JSON schema that is read; minor versions only add to it."""

_ENTRY = re.compile(
    r"archive_format|archive_version|byteorder|version|\.data/\w+|extra/.+|models/[^/]+\.json"
    r"|data/sample_inputs/[^/]+\.pt|data/(weights|constants)/([^/]+_config\.json|(weight|tensor)_\d+)"
)
_PAYLOAD = re.compile(r"(weight|tensor)_\d+")
_TARGET = re.compile(r"torch\.ops\.\w+\.\w+(\.\w+)?|_operator\.\w+|math\.\w+|torch\.(_?sym_\w+|_check\w*)")

_STRIDED = 7


class Pt2:
    """An opened exported program. Raises ModelError for an archive that holds anything unexpected."""

    format = "pt2"

    def __init__(self, path: Path) -> None:
        try:
            self._read(path)
        except AttrcliError as error:
            raise type(error)(f"{path}: {one_line(error, 1500)}") from error
        except Exception as error:
            what = f"{type(error).__name__}: {one_line(error)}"
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
        for node in all_nodes(self._graph):
            if node["target"].startswith("torch._functorch."):
                raise UnsupportedOp(
                    f"{node['target'][:80]}, of torch.vmap and other transforms of torch.func, is not supported; save "
                    "the program as plain operators: torch.export.save(program.run_decompositions({}), 'model.pt2')"
                )
            if not _TARGET.fullmatch(node["target"]):
                raise ModelError(f"refused: the call target {node['target'][:80]!r} is no operator")
        self._sources = [_source(spec) for spec in signature["input_specs"]]
        self._returned = _returned(signature["output_specs"], module)
        self._results = {shown: name for shown, name in named("output", self._returned).items() if name is not None}
        self._written = [
            s["buffer_mutation"]["buffer_name"] for s in signature["output_specs"] if "buffer_mutation" in s
        ]
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
        try:
            return self._fed(Feed(BoundedBuilder(dtype, ADVICE)), samples, batches)
        except AttrcliError as error:
            raise type(error)(one_line(error, 1500)) from error
        except Exception as error:
            what = f"{type(error).__name__}: {one_line(error)}"
            raise ModelError(f"the exported program does not hold together ({what})") from error

    def _fed(self, feed: Feed, samples: Mapping[str, Sample], batches: Sequence[int]) -> fx.GraphModule:
        for name, kind, held in self._sources:
            if kind in _STORED:
                value = feed.b.tensor(self._tensors[held], held, parameter=kind == "parameter", state=True)
                feed.env[name] = value
                if held in self._written:
                    feed.b.changes(value)
            elif kind == "user_input":
                sample = samples[name]
                shapes = [(batch, *sample.shape) for batch in batches]
                feed.env[name] = feed.b.placeholder(name, shapes, sample.dtype)
        graph = feed.run(self._graph, self._results)
        shown = {name: shown for shown, name in self._results.items()}
        graph.meta["returned"] = _pytree.tree_map(shown.get, self._returned)
        return graph

    def operations(self) -> dict[str, int]:
        """Count the operations of the exported graph, by name."""
        counts: dict[str, int] = {}
        for node in all_nodes(self._graph):
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
            raise ModelError(f"refused: unexpected entry {entry.filename!r}{_advice(entry.filename)}")
        if entry.compress_type != zipfile.ZIP_STORED or entry.file_size > size:
            raise ModelError(f"refused: torch writes its archives uncompressed, {inner!r} is not")
        entries[inner] = entry
    return entries


def _advice(name: str) -> str:
    """What an unexpected entry tells of the archive."""
    if name.startswith("/") or ".." in name.split("/"):
        return ", which would lie outside the archive's folder; torch.export.save writes no such name"
    return "; torch older than 2.8 stores pickles in its archives: save the model again with a newer torch.export.save"


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
    if meta["dtype"] not in DTYPES or meta["layout"] != _STRIDED:
        raise ModelError(f"stored tensor '{name}' has a data type or layout that attrcli does not read")
    dtype = DTYPES[meta["dtype"]]
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


def _returned(specs: Sequence[Mapping[str, Any]], module: Mapping[str, Any]) -> Any:
    """What the model returned, in dictionaries, lists and tuples as far as the file tells.

    A tensor is its name in the graph, anything else None.
    """
    arguments = [spec["user_output"]["arg"] for spec in specs if "user_output" in spec]
    leaves = [argument["as_tensor"]["name"] if "as_tensor" in argument else None for argument in arguments]
    rest = iter(leaves)

    def filled(spec: Mapping[str, Any]) -> Any:
        if spec["type"] is None:
            return next(rest)
        children = [filled(child) for child in spec["children_spec"]]
        if spec["type"] in ("builtins.dict", "collections.OrderedDict"):
            return dict(zip(json.loads(spec["context"]), children, strict=True))
        return children if spec["type"] == "builtins.list" else tuple(children)

    try:
        _, spec = json.loads(module["module_call_graph"][0]["signature"]["out_spec"])
        result = filled(spec)
        if not list(rest):
            return result
    except (ValueError, TypeError, KeyError, IndexError, StopIteration):
        pass
    return leaves[0] if len(leaves) == 1 else tuple(leaves)


def _spec(graph: Mapping[str, Any], name: str, shown: str) -> TensorSpec:
    meta = graph["tensor_values"][name]
    return TensorSpec(shown, tuple(size.get("as_int") for size in meta["sizes"]), DTYPES[meta["dtype"]])
