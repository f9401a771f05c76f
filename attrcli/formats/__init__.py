"""A file <-> a canonical graph: one module per format, told apart by content, never by suffix."""

from pathlib import Path

from attrcli.formats.detect import identify
from attrcli.formats.spec import Source


def load(path: Path) -> Source:
    """Open and check a model file. Raises ModelError: what the file is, and how to save it properly."""
    kind = identify(path)
    if kind == "torchscript":
        from attrcli.formats.torchscript import TorchScript

        return TorchScript(path)
    if kind == "pt2":
        from attrcli.formats.pt2 import Pt2

        return Pt2(path)
    from attrcli.formats.onnx import Onnx

    return Onnx(path)
