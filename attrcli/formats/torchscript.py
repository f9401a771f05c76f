"""TorchScript archives: checked, loaded, and walked node by node into a canonical graph (torchscript_walk.py)."""

import io
import re
import warnings
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import wraps
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ParamSpec, TypeVar

import torch
from torch import fx
from torch.jit import _state

from attrcli.errors import AttrcliError, AttrcliWarning, ModelError, UnsupportedOp
from attrcli.formats.spec import ADVICE, Sample, TensorSpec
from attrcli.formats.torchscript_enums import enumerations
from attrcli.formats.torchscript_pickle import check_tensors
from attrcli.formats.torchscript_walk import Argument, Walk, all_nodes, last_line
from attrcli.graph.bounded import BoundedBuilder

_ENTRY = re.compile(r"\w+\.pkl|\w+/\d+|version|byteorder|\.data/\w+|extra/.+|code/.+\.(py|debug_pkl)")
"""What `torch.jit.save` writes. Older kinds of archives keep their code elsewhere, where nobody would look at it."""

_FORBIDDEN = {
    r"__setstate__": "__setstate__, which runs while the file is loaded",
    r"\btorch\.save\(": "torch.save, which writes files",
    r"\btorch\.load\(": "torch.load, which unpickles files",
    r"\bfrom_file\(": "from_file, which reads files",
    r"\bops\.(?!(?:aten|prim|prims)\b)\w+\.": "an operator of a library outside torch",
    r"\btorch\.classes\b": "a class written in C++",
}
"""What TorchScript code may not hold: `torch.jit.load` runs `__setstate__`, and `aten::save` writes any path."""

_UNSUPPORTED = {
    r"\btorch\.classes\.quantized\b|\bops\.quantized\.": (
        "quantised operations (ops.quantized) are not supported; save the model before it is quantised, or export it "
        "to ONNX"
    ),
    r"\bops\.prim\.\w*(?:MKLDNN|mkldnn)|\bops\.mkldnn\.|\btorch\.to_mkldnn\(": (
        "operations of mkldnn, by torch.jit.optimize_for_inference, are not supported, and torch stores their weights "
        "nowhere; save the model before it is optimised"
    ),
    r"\btorch\.classes\.xnnpack\b|\bops\.prepacked\.": (
        "packed operations, by torch.utils.mobile_optimizer, are not supported; save the model before it is optimised"
    ),
}
"""What honest files hold that have been made ready for something else; looked for first."""

_LARGEST_TEXT = 64 << 20

P = ParamSpec("P")
R = TypeVar("R")


def _quiet(function: Callable[P, R]) -> Callable[P, R]:
    """torch.jit warns of its deprecation on every call: said once in the README, not on every run."""

    @wraps(function)
    def run(*args: P.args, **kwargs: P.kwargs) -> R:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", category=DeprecationWarning)
            warnings.filterwarnings("ignore", category=FutureWarning)
            return function(*args, **kwargs)

    return run


@contextmanager
def _standing_in(classes: Mapping[str, SimpleNamespace]) -> Iterator[None]:
    """While this lasts, torch finds these classes under their names, and those of this process afterwards."""
    known: dict[str, Any] = _state._name_to_pyclass
    before = {name: known[name] for name in classes if name in known}
    known.update(classes)
    try:
        yield
    finally:
        for name in classes:
            del known[name]
        known.update(before)


class TorchScript:
    """A checked and loaded TorchScript file.

    It holds no input shapes: `inputs` have names only, and a graph is built per sample shape.
    Raises ModelError when the archive holds code that could act while it is loaded.
    """

    format = "torchscript"

    def __init__(self, path: Path, *, trusted: bool = False) -> None:
        try:
            self._open(path, trusted)
        except AttrcliError as error:
            raise type(error)(f"{path}: {error}") from error
        except Exception as error:
            what = f"{type(error).__name__}: {last_line(error)}"
            raise ModelError(f"{path}: a damaged TorchScript archive ({what})") from error

    @_quiet
    def _open(self, path: Path, trusted: bool) -> None:
        self.metadata: Mapping[str, str]
        archive, self.metadata, self._enums = _checked(path, trusted)
        self.module: Any = torch.jit.load(archive, map_location="cpu")  # type: ignore[no-untyped-call]
        self.in_training = _in_training(self.module)
        self.module.eval()
        if not hasattr(self.module, "forward"):
            raise ModelError("the TorchScript module has no forward method")
        if self.module._c._get_forward_hooks() or self.module._c._get_forward_pre_hooks():
            raise ModelError("the TorchScript module has forward hooks, which are no part of its graph")
        with _standing_in(self._enums):
            self.arguments = _arguments(self.module)
        self.inputs = tuple(TensorSpec(item.name, None, torch.float32) for item in self.arguments if item.is_input)
        self.outputs: tuple[TensorSpec, ...] | None = None
        if not self.inputs:
            raise ModelError("forward takes no tensor")

    @_quiet
    def build(self, samples: Mapping[str, Sample], dtype: torch.dtype, batches: Sequence[int]) -> fx.GraphModule:
        """Walk `forward` for inputs of these sample shapes. Raises UnsupportedOp, ModelError."""
        with _standing_in(self._enums):
            graph = Walk(self.module, BoundedBuilder(dtype, ADVICE)).run(self.arguments, samples, batches)
        if self.in_training:
            warnings.warn(
                f"the TorchScript file was saved in training mode ({self.in_training[0]}); it is explained as in "
                "inference, without dropout, by batch norm's running statistics: save the model after model.eval()",
                AttrcliWarning,
                stacklevel=2,
            )
        return graph

    @_quiet
    def operations(self) -> dict[str, int]:
        """Count the operations of `forward`, by name, without building a graph."""
        counts: dict[str, int] = {}
        for node in all_nodes(self.module.inlined_graph):
            counts[node.kind()] = counts.get(node.kind(), 0) + 1
        return counts

    @_quiet
    def parameter_count(self) -> int:
        """Number of elements of all parameters; 0 for a frozen file."""
        return sum(parameter.numel() for parameter in self.module.parameters())


def _arguments(module: Any) -> list[Argument]:
    """The arguments of `forward`, without `self`. Raises ModelError for one that is no tensor and has no default."""
    arguments = []
    for argument in module._c._get_method("forward").schema.arguments[1:]:
        kind = str(argument.type)
        default = argument.default_value if argument.has_default_value() else None
        is_input = kind == "Tensor" or (kind == "Optional[Tensor]" and not argument.has_default_value())
        if not is_input and not argument.has_default_value():
            raise ModelError(f"forward takes '{argument.name}', a {kind}; attrcli gives a model tensors only")
        arguments.append(Argument(argument.name, is_input, default))
    return arguments


def _checked(path: Path, trusted: bool) -> tuple[io.BytesIO, dict[str, str], dict[str, SimpleNamespace]]:
    """The archive, written anew from the entries that were checked; its extra files, as a sidecar; its enumerations.

    The copy is what is loaded: another reader of the original could find other entries in it than were checked.
    """
    out = io.BytesIO()
    extra: dict[str, str] = {}
    enums: dict[str, SimpleNamespace] = {}
    size = path.stat().st_size
    with zipfile.ZipFile(path) as archive, zipfile.ZipFile(out, "w", zipfile.ZIP_STORED) as copy:
        names = archive.namelist()
        if len(set(names)) != len(names):
            raise ModelError("refused: the archive holds two entries of one name")
        sizes = {entry.filename.partition("/")[2]: entry.file_size for entry in archive.infolist()}
        for entry in archive.infolist():
            inner = entry.filename.partition("/")[2]
            if not _ENTRY.fullmatch(inner):
                raise ModelError(f"refused: unexpected entry {entry.filename!r} in a TorchScript archive")
            if entry.file_size > (size if entry.compress_type == zipfile.ZIP_STORED else _LARGEST_TEXT):
                raise ModelError(f"refused: the entry {inner!r} is {entry.file_size} bytes in a file of {size}")
            data = archive.read(entry)
            if inner.endswith(".debug_pkl") or inner.startswith("traced_inputs"):
                continue  # lines of the author's source, on which torch crashes when damaged; the shapes of an example
            if inner.endswith(".pkl"):
                check_tensors(inner, data, sizes)
            if inner.endswith((".py", ".pkl")):
                _check_code(inner, data, trusted)
            if inner.endswith(".py"):
                enums |= enumerations(inner, data.decode("utf-8", "replace"))
            elif inner.startswith("extra/") and len(data) < 1 << 20:
                extra[inner.removeprefix("extra/")] = data.decode("utf-8", "replace")
            copy.writestr(entry.filename, data)
    out.seek(0)
    return out, extra, enums


def _check_code(name: str, data: bytes, trusted: bool) -> None:
    """Refuse what may not be in a source file, or a class that a pickle names, however it is laid out in lines."""
    text = data.decode("utf-8", "replace")
    code = re.sub(r"[\s\\]*([.(])[\s\\]*", r"\1", text) if name.endswith(".py") else text.replace("\n", ".")
    for pattern, what in _UNSUPPORTED.items():
        if re.search(pattern, code):
            raise UnsupportedOp(f"{what} ({name})")
    for pattern, what in _FORBIDDEN.items():
        if re.search(pattern, code) and not trusted:
            raise ModelError(
                f"refused: its code ({name}) uses {what}; an honest model file hardly needs it. If you trust whoever "
                "made it, --trust-model loads it all the same"
            )


def _in_training(module: Any) -> list[str]:
    """The submodules that are saved as in training, and do something else then: dropout and batch norm."""
    return [
        name
        for name, part in module.named_modules()
        if getattr(part, "training", False) and ("Dropout" in part.original_name or "BatchNorm" in part.original_name)
    ]
