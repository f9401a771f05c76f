"""What options name besides the inputs: the baseline, labels, values of other inputs; and where results go."""

import os
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from attrcli import baselines, data
from attrcli.config import Config
from attrcli.errors import AttrcliWarning, InputError, NoInputsError, UsageError
from attrcli.formats.spec import TensorSpec
from attrcli.preprocess import Preprocess

Array = npt.NDArray[Any]


def baseline(config: Config, preprocess: Preprocess, needs: frozenset[str]) -> baselines.Baseline | None:
    """The baseline that the options ask for; None, and no option, where what the method `needs` is none.

    Raises UsageError naming option and file.
    """
    if needs.isdisjoint({"baseline", "baselines"}):
        for option, value in (("--baseline", config.baseline), ("--background", config.background)):
            if value is not None:
                raise UsageError(f"{config.method} uses no baseline; leave out {option} {value}")
        return None
    background = Path(config.background) if config.background else None

    def load(path: Path) -> Iterator[baselines.Stored]:
        option = "--background" if path == background else "--baseline"
        return _read(path, preprocess, f"{option} {path}")

    p = preprocess
    return baselines.resolve(
        config.baseline, p.kind, load=load, background=background, alphabet=p.alphabet, several="baselines" in needs
    )


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
    tensor = torch.from_numpy(found[0][1])
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


def _read(path: Path, preprocess: Preprocess, option: str) -> Iterator[baselines.Stored]:
    """Id and raw values of the inputs that an option names; whatever is wrong with one is a UsageError."""
    p = preprocess
    try:
        found = data.collect([os.fspath(path)], p.kind, columns=p.columns, sample_rank=p.sample_rank)
        for record in found.records:
            yield record.id, _fitted(record, p)
    except (InputError, NoInputsError, UsageError) as error:
        raise UsageError(f"{option}: {error}") from error


def _fitted(record: data.Record, p: Preprocess) -> Array:
    values = data.read(record, p.kind, channels=p.channels, columns=p.columns).values
    try:
        return p.fit(values)
    except InputError as error:
        raise InputError(f"{record.id!r}: {error}") from error


def labels(config: Config, collection: data.Collection, names: Sequence[str] | None) -> npt.NDArray[np.uint16]:
    """The class of each input, from `--labels` or class folders; UNKNOWN_LABEL where there is none.

    Warns of class folders that no label matches. Raises UsageError where `--target label` finds none.
    """
    if config.labels is not None:
        return data.labels_csv(Path(config.labels), collection, names)
    found = data.class_labels(collection, names)
    none = bool((found == data.UNKNOWN_LABEL).all())
    folders = sorted({record.label for record in collection.records if record.label})
    if names and len(folders) > 1 and none:
        warnings.warn(
            f"no class folder ({', '.join(folders[:5])}) matches a label ({', '.join(names[:5])}, ...): "
            "inputs count as unlabelled",
            AttrcliWarning,
            stacklevel=2,
        )
    if config.target == "label" and none:
        raise UsageError("--target label: no input has a label; use class folders named as the labels, or --labels CSV")
    return found


def require_apart(config: Config, kind: str, records: Sequence[data.Record]) -> None:
    """Raise UsageError where what is written would take the place of an input, or become one of the next run."""
    out = os.path.abspath(config.out)
    if out == os.path.abspath(config.model) or out in {os.fspath(record.path) for record in records}:
        raise UsageError(f"--out {config.out} is the model or an input; choose another name")
    made = {"--out": out} if out.lower().endswith(data.SUFFIXES[kind]) else {}
    made |= {"--overlays": os.path.abspath(config.overlays)} if config.overlays else {}
    folders = [os.path.abspath(name) for name in config.inputs if os.path.isdir(name)]
    for option, path in made.items():
        if inside := [folder for folder in folders if f"{path}{os.sep}".startswith(f"{folder}{os.sep}")]:
            raise UsageError(
                f"{option} {path} lies in the folder of inputs {inside[0]}: the next run would take what is "
                "written there for inputs; choose a place beside it"
            )
