"""One architecture in one format: saved, imported, and compared with what the file and the module compute."""

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from nets import load_script, quiet, ready
from torch import Tensor, fx, nn
from torch.utils import _pytree

from attrcli import formats
from attrcli.errors import ModelError
from attrcli.formats.spec import Sample
from attrcli.graph import passes
from attrcli.graph.build import FREE
from zoo import ZOO, Arch

aten = torch.ops.aten

Run = Callable[..., Any]
"""Tensors in, tensors in nested containers out."""

FIXED = 3
"""The batch of the files whose batch is fixed."""

ROUNDED = {("swin", "traced"), ("swin", "traced_frozen")}
"""Cells whose file computes a factor from a size, which a trace does in single precision; the graph does not."""


# -- saving ----------------------------------------------------------------------------------------------------------


def _traced(module: nn.Module, given: tuple[Tensor, ...], path: Path) -> Run:
    torch.jit.trace(module, given, check_trace=False, strict=False).save(path)
    return load_script(path)


def _traced_frozen(module: nn.Module, given: tuple[Tensor, ...], path: Path) -> Run:
    """As a deployment script writes it: no gradients, hence torch's fast paths, and no parameters in the file."""
    with torch.no_grad():
        traced = torch.jit.trace(module, given, check_trace=False, strict=False)
    torch.jit.freeze(traced).save(path)
    return load_script(path)


def _scripted(module: nn.Module, given: tuple[Tensor, ...], path: Path) -> Run:
    torch.jit.script(module).save(path)
    return load_script(path)


def _scripted_frozen(module: nn.Module, given: tuple[Tensor, ...], path: Path) -> Run:
    torch.jit.freeze(torch.jit.script(module)).save(path)
    return load_script(path)


def _program(module: nn.Module, given: tuple[Tensor, ...], *, free: bool) -> torch.export.ExportedProgram:
    batch = {0: torch.export.Dim("batch", min=1, max=4096)}
    return torch.export.export(module, given, dynamic_shapes=tuple(batch for _ in given) if free else None)


def _exported(module: nn.Module, given: tuple[Tensor, ...], path: Path) -> Run:
    torch.export.save(_program(module, given, free=True), path)
    return torch.export.load(path).module()


def _exported_fixed(module: nn.Module, given: tuple[Tensor, ...], path: Path) -> Run:
    torch.export.save(_program(module, given, free=False), path)
    return torch.export.load(path).module()


def _decomposed(module: nn.Module, given: tuple[Tensor, ...], path: Path) -> Run:
    torch.export.save(_program(module, given, free=True).run_decompositions(), path)
    return torch.export.load(path).module()


def _onnx(module: nn.Module, given: tuple[Tensor, ...], path: Path) -> Run:
    batch = {0: torch.export.Dim("batch", min=1, max=4096)}
    shapes = tuple(batch for _ in given)
    torch.onnx.export(module, given, str(path), dynamo=True, dynamic_shapes=shapes, verbose=False)
    return module


def _onnx_legacy(module: nn.Module, given: tuple[Tensor, ...], path: Path) -> Run:
    names = [f"input_{index}" for index in range(len(given))]
    axes = {name: {0: "batch"} for name in names}
    torch.onnx.export(
        module, given, str(path), dynamo=False, opset_version=18, input_names=names, dynamic_axes=axes, verbose=False
    )
    return module


FORMATS: dict[str, tuple[str, Callable[[nn.Module, tuple[Tensor, ...], Path], Run]]] = {
    "traced": ("pt", _traced),
    "traced_frozen": ("pt", _traced_frozen),
    "scripted": ("pt", _scripted),
    "scripted_frozen": ("pt", _scripted_frozen),
    "pt2": ("pt2", _exported),
    "pt2_fixed": ("pt2", _exported_fixed),
    "pt2_decomposed": ("pt2", _decomposed),
    "onnx": ("onnx", _onnx),
    "onnx_legacy": ("onnx", _onnx_legacy),
}
"""Suffix, and a function that saves a module and returns what runs the file: the module itself for ONNX, whose own
exporters are not exact in float64."""


# -- comparing -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Outcome:
    """What became of a cell: 'ok', 'refused', 'wrong' or 'not saved'; the largest relative errors; the reason."""

    verdict: str
    outputs: float = 0.0
    gradients: float = 0.0
    message: str = ""


def tolerance(how: str, dtype: torch.dtype) -> float:
    """The largest relative error of a cell that is ok; exporters to ONNX round constants to single precision."""
    return 1e-5 if dtype == torch.float32 else 1e-6 if how.startswith("onnx") else 1e-10


def cell(name: str, how: str, folder: Path, dtype: torch.dtype = torch.float64) -> Outcome:
    """Save an architecture, import the file, compare at batch 1, 3 and 5 (a fixed batch: at that)."""
    arch, (suffix, save) = ZOO[name], FORMATS[how]
    torch.manual_seed(0)
    module, path = ready(arch.make(), dtype=dtype), folder / f"{name}.{suffix}"
    fixed = how == "pt2_fixed"
    try:
        with quiet():
            run = save(module, inputs(arch, FIXED, dtype), path)
    except Exception as error:
        return Outcome("not saved", message=f"{type(error).__name__}: {str(error).strip().splitlines()[0][:200]}")
    try:
        graph = built(arch, path, dtype, (FIXED, FIXED) if fixed else FREE)
    except ModelError as error:
        return Outcome("refused", message=str(error).removeprefix(f"{path}: "))
    run = module if (name, how) in ROUNDED else run
    errors = [differences(arch, module, graph, run, batch, dtype) for batch in ((FIXED,) if fixed else (1, 3, 5))]
    outputs, gradients = (max(pair[side] for pair in errors) for side in (0, 1))
    return Outcome("ok" if max(outputs, gradients) <= tolerance(how, dtype) else "wrong", outputs, gradients)


def inputs(arch: Arch, batch: int, dtype: torch.dtype, seed: int = 1) -> tuple[Tensor, ...]:
    """A batch of random inputs."""
    generator = torch.Generator().manual_seed(seed + batch)
    return tuple(
        torch.randint(given.words, (batch, *given.shape), generator=generator)
        if given.words
        else torch.randn(batch, *given.shape, generator=generator, dtype=dtype)
        for given in arch.inputs.values()
    )


def built(arch: Arch, path: Path, dtype: torch.dtype, batches: Sequence[int]) -> fx.GraphModule:
    """The graph of a file."""
    source = formats.load(path)
    samples: Mapping[str, Sample] = {
        spec.name: Sample(given.shape, torch.int64 if given.words else dtype)
        for spec, given in zip(source.inputs, arch.inputs.values(), strict=True)
    }
    return source.build(samples, dtype, batches)


def differences(
    arch: Arch, module: nn.Module, graph: fx.GraphModule, run: Run, batch: int, dtype: torch.dtype
) -> tuple[float, float]:
    """The largest relative errors of the outputs, against the file's, and of the gradients, against the module's."""
    given = inputs(arch, batch, dtype)
    with quiet():
        mine, theirs = graph(*given), flat(run(*(x.clone() for x in given)))
    weights = [torch.randn(y.shape, dtype=y.dtype, generator=torch.Generator().manual_seed(7)) for y in mine]
    return _largest(mine, theirs), _largest(*gradients(graph, module, given, weights))


def flat(result: Any) -> list[Tensor]:
    """The tensors of nested containers, in order."""
    return [leaf for leaf in _pytree.tree_leaves(result) if isinstance(leaf, Tensor)]


def _largest(mine: Sequence[Tensor], theirs: Sequence[Tensor]) -> float:
    assert [x.shape for x in mine] == [y.shape for y in theirs]
    assert not theirs or any(bool(y.any()) for y in theirs)  # zeros would prove nothing
    pairs = [(x.detach(), y.detach()) for x, y in zip(mine, theirs, strict=True) if y.numel()]
    return max((float((x - y).abs().max() / y.abs().max().clamp(min=1e-6)) for x, y in pairs), default=0.0)


def _weighted(results: Sequence[Tensor], weights: Sequence[Tensor]) -> Tensor:
    return torch.stack([(y * w).sum() for y, w in zip(results, weights, strict=True)]).sum()


def gradients(
    graph: fx.GraphModule, module: nn.Module, given: Sequence[Tensor], weights: Sequence[Tensor]
) -> tuple[list[Tensor], list[Tensor]]:
    """The gradients of graph and module, with respect to the inputs and to what is looked up in embeddings.

    The graph is cut at each lookup, as --at does.
    """
    names = [node.name for node in graph.graph.nodes if node.target is aten.embedding.default]
    looked_up = [passes.until(graph, name)(*given)[0].detach().requires_grad_() for name in names]
    for name in names:
        graph = passes.cut(graph, name)
    leaves = _leaves(given)
    mine = _gradients(_weighted(graph(*reversed(looked_up), *leaves), weights), [*leaves, *looked_up])
    found: list[Tensor] = []
    module = exact(module)
    for part in module.modules():
        if isinstance(part, nn.Embedding):
            part.register_forward_hook(lambda part, args, output: found.append(output))
    leaves = _leaves(given)
    total = _weighted(flat(module(*leaves)), weights)
    same = [next(y for y in found if y.shape == x.shape and torch.allclose(x, y, atol=1e-6)) for x in looked_up]
    return mine, _gradients(total, [*leaves, *same])


def _leaves(given: Sequence[Tensor]) -> list[Tensor]:
    return [x.clone().requires_grad_(x.is_floating_point()) for x in given]


def _gradients(total: Tensor, leaves: Sequence[Tensor]) -> list[Tensor]:
    leaves = [leaf for leaf in leaves if leaf.requires_grad]
    return list(torch.autograd.grad(total, leaves)) if leaves else []


class _Hardsigmoid(nn.Module):
    """With its own gradient: torch's holds 1/6 in single precision."""

    def forward(self, x: Tensor) -> Tensor:
        return (x / 6 + 0.5).clamp(0, 1)


def exact(module: nn.Module) -> nn.Module:
    """A copy without the layers whose derivative torch does not know in double precision."""
    module = copy.deepcopy(module)
    for part in list(module.modules()):
        for name, child in part.named_children():
            if isinstance(child, nn.Hardsigmoid):
                setattr(part, name, _Hardsigmoid())
    return module
