"""What a file is, told by its content; a file that is no model we read is named, with how to save it properly."""

import io
import pickletools
import zipfile
from pathlib import Path

from attrcli.errors import ModelError

_RESAVE = (
    "Save the model itself, in a process that has its source: torch.jit.trace(model.eval(), example).save('model.pt'), "
    "torch.onnx.export(model, (example,), 'model.onnx', dynamo=True), or "
    "torch.export.save(torch.export.export(model, (example,)), 'model.pt2')"
)
_CONVERT = "convert it to ONNX with tf2onnx: python -m tf2onnx.convert"
_SCAN = 1 << 20


def identify(path: Path) -> str:
    """Return 'torchscript', 'pt2' or 'onnx'. Raises ModelError saying what else the file is and what to do."""
    if path.is_dir():
        if (path / "saved_model.pb").exists():
            raise ModelError(
                f"{path}: a TensorFlow SavedModel is not supported; {_CONVERT} --saved-model DIR --output F"
            )
        raise ModelError(f"{path}: is a directory, not a model file")
    if path.exists() and not path.is_file():
        raise ModelError(f"{path}: a pipe or a device, not a model file")
    try:
        with path.open("rb") as file:
            head = file.read(_SCAN)
    except OSError as error:
        raise ModelError(f"{path}: cannot be read: {error.strerror}") from error
    if not head:
        raise ModelError(f"{path}: the file is empty")
    if head.startswith(b"PK\x03\x04"):
        return _identify_zip(path)
    if foreign := _foreign(head, path):
        raise ModelError(f"{path}: {foreign}")
    if head[0] in b"\x08\x0a\x12\x1a\x22\x2a\x32\x3a\x42":
        return "onnx"
    raise ModelError(f"{path}: not a TorchScript, ONNX or .pt2 file (its content is none that attrcli knows)")


def _foreign(head: bytes, path: Path) -> str | None:
    """What a file is that is neither a zip archive nor ONNX."""
    if head.startswith(b"\x89HDF\r\n\x1a\n"):
        return f"an HDF5 file (Keras?) is not supported; {_CONVERT} --keras FILE --output F"
    if head[4:8] == b"TFL3":
        return "a TensorFlow Lite model is not supported; convert it to ONNX with tf2onnx --tflite"
    if head.startswith(b"GGUF"):
        return "a GGUF file holds weights only, no graph. " + _RESAVE
    if head.startswith(b"version https://git-lfs"):
        return "a Git LFS pointer, not the model: run 'git lfs pull'"
    if head[8:9] == b"{" and int.from_bytes(head[:8], "little") < 1 << 28:
        return "a safetensors file holds weights only, no graph. " + _RESAVE
    if head[0] == 0x80 and head[1:2] in (b"\x02", b"\x03", b"\x04", b"\x05"):
        return f"a pickle ({_pickled(head)}); attrcli never unpickles a file. " + _RESAVE
    if head[:1] == b"\n" and path.suffix == ".pb":
        return f"a TensorFlow graph is not supported; {_CONVERT} --graphdef FILE --output F"
    return None


def _identify_zip(path: Path) -> str:
    try:
        with zipfile.ZipFile(path) as archive:
            if not any(entry.header_offset == 0 for entry in archive.infolist()):  # the list of an archive inside it
                raise ModelError(f"{path}: a damaged or truncated archive (the list of its entries is not at its end)")
            names = archive.namelist()
            inner = {name.split("/", 1)[-1] for name in names}
            if any(name.startswith("code/") for name in inner) and "data.pkl" in inner:
                return "torchscript"
            if "archive_format" in inner or "serialized_exported_program.json" in names:
                if any(name.startswith("data/aotinductor/") for name in inner):
                    raise ModelError(f"{path}: an AOTInductor package holds compiled code, no graph. {_RESAVE}")
                return "pt2"
            if "model.weights.h5" in names:
                raise ModelError(f"{path}: a Keras model is not supported; {_CONVERT} --keras FILE --output F")
            pickle = next((name for name in names if name.endswith("data.pkl")), None)
            if pickle:
                with archive.open(pickle) as file:
                    what = _pickled(file.read(_SCAN))
                raise ModelError(f"{path}: a file of torch.save ({what}); attrcli never unpickles a file. {_RESAVE}")
    except ModelError:
        raise
    except Exception as error:  # zipfile raises some ten kinds for damaged files
        raise ModelError(f"{path}: a damaged or truncated archive ({error or type(error).__name__})") from error
    raise ModelError(f"{path}: a zip archive that is neither TorchScript nor .pt2")


def _pickled(data: bytes) -> str:
    """Say what a pickle holds, from its opcodes alone: nothing is unpickled."""
    names: list[str] = []
    strings: list[str] = []
    stream = io.BytesIO(data)
    try:
        while stream.tell() < len(data):  # the oldest files of torch.save are several pickles, one after the other
            for opcode, argument, _ in pickletools.genops(stream):
                if opcode.name == "GLOBAL":
                    names.append(str(argument).replace(" ", "."))
                elif opcode.name == "STACK_GLOBAL" and len(strings) > 1:
                    names.append(".".join(strings[-2:]))
                elif isinstance(argument, str):
                    strings.append(argument)
    except Exception:  # cut off by the scan's limit, or damaged: what came before still tells
        names = names or ["something unreadable"]
    plain = ("collections.", "torch._utils.", "torch.storage.", "torch.serialization.")
    classes = [name for name in names if not name.startswith(plain) and not name.endswith("Storage")]
    if classes:
        shown = "".join(c if c.isprintable() else "?" for c in classes[0])[:80]
        return f"a whole pickled module, class {shown}"
    return "a state dict: weights only, no graph" if names else "plain data"
