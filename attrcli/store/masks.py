"""The file of masks: which neurons stay for each input, bit by bit, and what that does to the prediction.

`/masks/LAYER` (n, bytes) holds the bits of each input, packed in the order of the layer's elements (C, H, W); its
attribute `shape` says how many there are. All else is a dataset of n rows; `jaccard` compares each two inputs.
"""

import contextlib
import json
import math
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Self

import h5py
import numpy as np
import numpy.typing as npt

from ..errors import UsageError
from .disk import LIBVER, disk_errors, replacing
from .layout import Array, decode, encode, plain

MASK_SCHEMA = "attrcli-masks/1"
_BLOCK = 4096  # bytes of a row that are compared at once


def is_mask_file(path: Path) -> bool:
    """Whether a file is a file of masks, told by content."""
    with contextlib.suppress(OSError, RuntimeError), h5py.File(path, "r", locking=False) as file:
        return bool(file.attrs.get("schema") == MASK_SCHEMA)
    return False


class MaskWriter:
    """A file of masks being written; it takes its name when all is there."""

    def __init__(self, file: h5py.File, count: int, layers: Mapping[str, tuple[int, ...]]) -> None:
        self._file, self._count = file, count
        for name, shape in layers.items():
            size = (math.prod(shape) + 7) // 8
            held = file.create_dataset(
                f"masks/{name}", (count, size), "u1", chunks=(1, size), compression="gzip", compression_opts=1
            )
            held.attrs["shape"] = json.dumps(shape)

    def put_masks(self, row: int, masks: Mapping[str, Array]) -> None:
        """The masks of one input by layer."""
        for name, mask in masks.items():
            self._file[f"masks/{name}"][row] = np.packbits(mask.reshape(-1))

    def put(self, name: str, values: npt.ArrayLike) -> None:
        """A dataset; text as str."""
        array = np.asarray(values)
        if array.dtype.kind == "U":
            texts = [str(text).encode("utf-8", "surrogateescape") for text in array]
            kind = h5py.string_dtype("utf-8", max(1, *map(len, texts)))
            self._file.create_dataset(name, data=np.array(texts, kind))
        else:
            self._file.create_dataset(name, data=array)

    def intersections(self, rows: Array) -> npt.NDArray[np.float64]:
        """How many neurons each two of some inputs (m,) both keep, (m, m)."""
        total = np.zeros((len(rows), len(rows)))
        for held in self._file["masks"].values():
            for start in range(0, held.shape[1], _BLOCK):
                bits = np.unpackbits(held[:, start : start + _BLOCK][rows], axis=1).astype(np.float32)
                total += bits @ bits.T
        return total


@contextlib.contextmanager
def writing_masks(
    path: Path, count: int, layers: Mapping[str, tuple[int, ...]], attributes: Mapping[str, Any]
) -> Iterator[MaskWriter]:
    """Write a file of masks under another name, synced and renamed at the end; after an error nothing is left of it.

    Raises: UsageError when the disk refuses.
    """
    with (
        disk_errors(path),
        replacing(path) as temporary,
        h5py.File(temporary, "w", libver=LIBVER, locking=False) as file,
    ):
        for key, value in {**plain(attributes), "schema": MASK_SCHEMA}.items():
            file.attrs[key] = encode(value)
        yield MaskWriter(file, count, layers)


class MaskFile:
    """A file of masks, open for reading. Close it, or use `with`.

    Raises: UsageError for a file that is missing, damaged or none of masks.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        if not is_mask_file(self.path):
            raise UsageError(f"{path}: no file of masks, as attrcli prune writes them")
        self._file = h5py.File(self.path, "r", locking=False)
        self.attributes: dict[str, Any] = {key: decode(value) for key, value in self._file.attrs.items()}
        self.layers: dict[str, tuple[int, ...]] = {
            name: tuple(json.loads(self._file[f"masks/{name}"].attrs["shape"])) for name in self.attributes["layers"]
        }
        self.ids = [raw.decode("utf-8", "surrogateescape") for raw in self._file["sample_id"][...]]

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def __getitem__(self, name: str) -> Array:
        """A dataset in memory, as stored."""
        values: Array = self._file[name][...]
        return values

    def masks(self, row: int) -> dict[str, npt.NDArray[np.bool_]]:
        """What one input keeps, by layer."""
        found = {}
        for name, shape in self.layers.items():
            bits = np.unpackbits(self._file[f"masks/{name}"][row], count=math.prod(shape))
            found[name] = bits.astype(bool).reshape(shape)
        return found
