"""Array files (.npy, .npz, HDF5): what a file is, the arrays it holds, and the values of one of them."""

import os
import zipfile
from functools import lru_cache
from typing import Any

import h5py
import numpy as np
import numpy.typing as npt

SUFFIXES = {
    "image": (".png", ".jpg", ".jpeg", ".bmp", ".gif", ".tif", ".tiff", ".webp"),
    "array": (".npy", ".npz", ".h5", ".hdf5"),
    "table": (".csv", ".npy", ".npz", ".h5", ".hdf5"),
}
FASTA = (".fa", ".fasta", ".fna", ".faa")
SUFFIXES["sequence"] = (*FASTA, *(f"{suffix}.gz" for suffix in FASTA), *SUFFIXES["array"])
_MAGIC = {b"\x93NUM": "npy", b"PK\x03\x04": "npz", b"\x89HDF": "h5"}


def container_of(path: str, kind: str) -> str:
    """What kind of file this is, by content except for image suffixes; what is no array file is of the kind's own."""
    suffix = os.path.splitext(path)[1].lower()
    if kind == "image" and suffix in SUFFIXES["image"]:
        return "image"
    known = None
    if os.path.isfile(path) and os.access(path, os.R_OK):
        with open(path, "rb") as file:
            known = _MAGIC.get(file.read(4))
    by_suffix = {".npy": "npy", ".npz": "npz", ".h5": "h5", ".hdf5": "h5"}
    return known or by_suffix.get(suffix, {"table": "csv", "sequence": "fasta"}.get(kind, "image"))


def members(path: str, container: str) -> list[tuple[str | None, tuple[int, ...]]]:
    """Key and shape of each array in a file, read from the headers alone."""
    if container == "npy":
        return [(None, np.lib.format.open_memmap(path, mode="r").shape)]
    if container == "npz":
        with zipfile.ZipFile(path) as archive:
            names = [name for name in archive.namelist() if name.endswith(".npy")]
            found = [(name.removesuffix(".npy"), _npy_shape(archive, name)) for name in names]
    else:
        with h5py.File(path, "r") as file:
            found = [(key, _dataset(file, key).shape) for key in file if not _is_group(file, key)]
    if not found:
        raise ValueError("holds no array at its root")
    return list(found)


def _npy_shape(archive: zipfile.ZipFile, name: str) -> tuple[int, ...]:
    with archive.open(name) as member:
        version = np.lib.format.read_magic(member)
        header = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        return header(member)[0]


def _is_group(file: h5py.File, key: str) -> bool:
    return isinstance(file.get(key, getlink=True), h5py.HardLink) and file.get(key, getclass=True) is h5py.Group


def _dataset(file: h5py.File, key: str) -> h5py.Dataset:
    """A dataset whose data lies in this file: an untrusted file must not point at others."""
    if not isinstance(file.get(key, getlink=True), h5py.HardLink):
        raise ValueError(f"{key!r} is a link; copy the data into this file")
    dataset = file[key]
    if dataset.shape is None or dataset.external or dataset.is_virtual:
        raise ValueError(f"dataset {key!r} holds no data in this file; copy the data into it")
    return dataset


def stamp_of(path: str) -> tuple[int, int]:
    """What tells one version of a file from the next: time of change and size."""
    status = os.stat(path)
    return status.st_mtime_ns, status.st_size


def values_of(path: str, container: str, key: str | None, row: int | None) -> npt.NDArray[Any]:
    """One array of a file, or one row of it."""
    if container == "npy":
        stored: Any = np.lib.format.open_memmap(path, mode="r")
        return np.array(stored if row is None else stored[row])
    if key is None:
        members(path, container)
        raise ValueError("the file changed during the run")
    if container == "npz":
        stored = _npz_member(path, stamp_of(path), key)
        return np.array(stored if row is None else stored[row])
    return _h5_values(path, key, row)


@lru_cache(maxsize=1)
def _npz_member(path: str, stamp: tuple[int, int], key: str) -> npt.NDArray[Any]:
    """One array of an archive, which cannot be read by rows; kept for the rows that follow."""
    with np.load(path, allow_pickle=False) as archive:
        values: npt.NDArray[Any] = archive[key]
        return values


def _h5_values(path: str, key: str, row: int | None) -> npt.NDArray[Any]:
    """A dataset or one row of it, read with the rows that share its chunks."""
    with h5py.File(path, "r") as file:
        dataset = _dataset(file, key)
        rows = dataset.chunks[0] if dataset.chunks else 1
        if row is None or rows == 1 or rows * dataset.nbytes > len(dataset) * 2**26:  # 64 MiB of rows
            return np.asarray(dataset[() if row is None else row])
    first = row - row % rows
    return np.array(_h5_block(path, stamp_of(path), key, first, first + rows)[row - first])


@lru_cache(maxsize=1)
def _h5_block(path: str, stamp: tuple[int, int], key: str, first: int, last: int) -> npt.NDArray[Any]:
    with h5py.File(path, "r") as file:
        return np.asarray(_dataset(file, key)[first:last])
