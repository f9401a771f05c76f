"""A file <-> a canonical graph: one module per format, told apart by content, never by suffix."""

from collections.abc import Callable, Mapping
from pathlib import Path

from torch import fx

from attrcli.formats.detect import identify
from attrcli.formats.spec import Sample, Source


def load(path: Path, *, trusted: bool = False) -> Source:
    """Open and check a model file. Raises ModelError: what the file is, and how to save it properly.

    `trusted` lets a TorchScript file run code of its own while it is loaded, and use libraries outside torch.
    """
    kind = identify(path)
    if kind == "torchscript":
        from attrcli.formats.torchscript import TorchScript

        return TorchScript(path, trusted=trusted)
    if kind == "pt2":
        from attrcli.formats.pt2 import Pt2

        return Pt2(path)
    from attrcli.formats.onnx import Onnx

    return Onnx(path)


def resizable(source: Source) -> Callable[[fx.Node], bool]:
    """What tells of a node of a graph built from `source` whether `save` can write its value in another size."""
    if source.format != "onnx":
        return lambda node: True
    from attrcli.formats import onnx_write

    return onnx_write.resizable(source)


def save(source: Source, graph: fx.GraphModule, samples: Mapping[str, Sample], path: Path) -> None:
    """Write a graph that was built from `source` for these samples, and changed by passes, in its format.

    TorchScript and `.pt2` are written anew, in the graph's precision; of an ONNX file only what was changed is.
    Raises ModelError for what the format cannot say.
    """
    if source.format == "torchscript":
        from attrcli.formats import torchscript_write

        torchscript_write.save(graph, path, source.metadata)
    elif source.format == "pt2":
        from attrcli.formats import pt2_write

        pt2_write.save(graph, path, source.metadata, samples)
    else:
        from attrcli.formats import onnx_write

        onnx_write.save(source, graph, path)
