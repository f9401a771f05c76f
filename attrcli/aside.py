"""What options name besides the inputs: the baseline's file, the background, and the values of other inputs."""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy.typing as npt
import torch

from attrcli import baselines, data
from attrcli.config import Config
from attrcli.errors import InputError, NoInputsError, UsageError
from attrcli.formats.spec import TensorSpec
from attrcli.preprocess import Preprocess

Array = npt.NDArray[Any]


def baseline(config: Config, preprocess: Preprocess) -> baselines.Baseline:
    """The baseline that the options ask for. Raises UsageError naming option and file."""
    background = Path(config.background) if config.background else None

    def load(path: Path) -> Iterator[Array]:
        option = "--background" if path == background else "--baseline"
        return _read(path, preprocess, f"{option} {path}")

    return baselines.resolve(config.baseline, preprocess.kind, load=load, background=background)


def fixed(name: str, value: str, spec: TensorSpec | None, dtype: torch.dtype) -> torch.Tensor:
    """One sample of an input that is not explained, from `--fix NAME=FILE|zero`, in the type that the file declares.

    Where the file declares a shape, a leading batch axis of 1 is left out; `dtype` is that of floating values.
    Raises UsageError naming option and file.
    """
    option = f"--fix {name}={value}"
    declared = spec.shape[1:] if spec is not None and spec.shape is not None else None
    kind = spec.dtype if spec is not None and declared is not None else None
    if kind is not None and kind.is_floating_point:
        kind = dtype
    if value == "zero":
        if declared is None or None in declared:
            raise UsageError(f"{option}: the file does not say the shape of '{name}'; give an array file")
        return torch.zeros([size for size in declared if size is not None], dtype=kind)
    found = [*_read(Path(value), Preprocess("array"), option)]
    if len(found) != 1:
        raise UsageError(f"{option}: holds {len(found)} arrays; accepted: one, of one sample")
    tensor = torch.from_numpy(found[0])
    if declared is not None:
        tensor = _one_sample(tensor, declared, option)
    given = dtype if tensor.is_floating_point() else tensor.dtype
    cast = tensor.to(kind or given)
    if not cast.is_floating_point() and not torch.equal(cast.to(tensor.dtype), tensor):
        raise UsageError(f"{option}: holds values that are not whole numbers of {cast.dtype}, which '{name}' takes")
    return cast


def _one_sample(tensor: torch.Tensor, declared: tuple[int | None, ...], option: str) -> torch.Tensor:
    for shape in (tensor.shape, tensor.shape[1:]) if tensor.shape[:1] == (1,) else (tensor.shape,):
        if len(shape) == len(declared) and all(d in (None, s) for d, s in zip(declared, shape, strict=True)):
            return tensor.reshape(shape)
    sizes = "x".join("N" if size is None else str(size) for size in declared) or "one number"
    raise UsageError(
        f"{option}: the array is {'x'.join(map(str, tensor.shape)) or 'one number'}; accepted: one sample, {sizes}, "
        f"or a batch of one, 1x{sizes}"
    )


def _read(path: Path, preprocess: Preprocess, option: str) -> Iterator[Array]:
    """The raw inputs of a file that an option names; whatever is wrong with it is a UsageError."""
    p = preprocess
    try:
        rank = len(p.size) if p.size is not None else None
        found = data.collect([os.fspath(path)], p.kind, columns=p.columns, sample_rank=rank)
        for record in found.records:
            yield p.fit(data.read(record, p.kind, channels=p.channels, columns=p.columns).values)
    except (InputError, NoInputsError, UsageError) as error:
        raise UsageError(f"{option}: {error}") from error
