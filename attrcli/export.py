"""Run files in the formats of other tools."""

import json
import os
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np
import numpy.typing as npt

from .errors import InputError, UsageError
from .store import UNLABELLED, Columns, RunFile, Status, disk_errors, replacing, require_folder, write_datasets

Array = npt.NDArray[Any]
Images = Callable[[Sequence[str]], Array]


@dataclass(frozen=True)
class _Request:
    """One export: what to write, where, and under which names."""

    run: RunFile
    folder: Path
    name: str
    images: Images | None
    labels: Sequence[str] | None
    force: bool
    sequences: Images | None


def export(
    run_path: str | os.PathLike[str],
    to: str,
    out_dir: str | os.PathLike[str],
    *,
    images: Images | None = None,
    sequences: Images | None = None,
    labels: Sequence[str] | None = None,
    name: str | None = None,
    force: bool = False,
) -> list[Path]:
    """Write a run file in the format `to`, one of `FORMATS`, into `out_dir`, and return the files made.

    `images` returns the uint8 pixels (N, H, W, C) of some ids at the model's input size, `sequences` their one-hot
    columns (N, A, L); `labels` names the outputs;
    `name` begins the file names, by default the run file's stem. Raises: UsageError, also for a file that is there
    already unless `force`; InputError for an image that cannot be read.
    """
    if to not in FORMATS:
        raise UsageError(f"--to {to}: not a format; choose one of {', '.join(FORMATS)}")
    folder = Path(out_dir)
    with RunFile(run_path) as run:
        stem = Path(run.path.name.removesuffix(".part")).stem
        request = _Request(run, folder, name or stem, images, labels, force, sequences)
        with disk_errors(folder):
            return FORMATS[to](request)


def _claim(request: _Request, names: Sequence[str]) -> list[Path]:
    """The paths of `names`, in a folder that now exists."""
    paths = [request.folder / name for name in names]
    there = [path.name for path in paths if path.exists()]
    if there and not request.force:
        raise UsageError(f"{request.folder} already holds {', '.join(there)}; choose another folder, or use --force")
    request.folder.mkdir(parents=True, exist_ok=True)
    require_folder(request.folder)
    return paths


# npz ----------------------------------------------------------------------------------------------------------------


def _npz(request: _Request) -> list[Path]:
    """One named array for each dataset, all rows, and the attributes as a JSON text named `attributes`."""
    [path] = _claim(request, [f"{request.name}.npz"])
    run = request.run
    with replacing(path) as temporary, zipfile.ZipFile(temporary, "w") as archive:
        for name, (shape, dtype) in run.columns.items():
            with archive.open(f"{name}.npy", "w", force_zip64=True) as file:
                if name == "attribution":
                    _write_npy(file, shape, dtype, (run.read(name, rows) for rows in run.blocks()))
                else:
                    np.lib.format.write_array(file, run.read(name), allow_pickle=False)
        with archive.open("attributes.npy", "w") as file:
            np.lib.format.write_array(file, np.array(json.dumps(run.attributes)), allow_pickle=False)
    return [path]


def _write_npy(file: IO[bytes], shape: tuple[int, ...], dtype: np.dtype[Any], parts: Iterator[Array]) -> None:
    """Write an .npy file from successive rows, so that a large array need not fit in memory."""
    header = {"shape": shape, "fortran_order": False, "descr": np.lib.format.dtype_to_descr(dtype)}
    np.lib.format.write_array_header_2_0(file, header)
    for part in parts:
        file.write(np.ascontiguousarray(part).data)


# ViRelAy ------------------------------------------------------------------------------------------------------------


def _virelay(request: _Request) -> list[Path]:
    """A ViRelAy project: images, attributions, label map and project file, for the rows that are ok.

    Layout as ViRelAy 0.6 and 1.0 read it (`virelay/model.py`). No `/index`: both files hold the same rows in the same
    order. ViRelAy sums over channels and cannot show grey images, so one channel becomes three with a third each.
    """
    run = request.run
    method, count = str(run.attributes["method"]), int((run.status == Status.OK).sum())
    height, width = _image_size(run)
    if request.images is None:
        raise UsageError("--to virelay needs the images that were explained")
    if not count:
        raise UsageError(f"{run.path}: no row is ok, there is nothing to export")
    names = [f"{request.name}.input.h5", f"{request.name}-{method}.attribution.h5", "label-map.json", "project.yaml"]
    inputs, attributions, label_map, project = _claim(request, names)
    both: Columns = {"label": ((count,), np.dtype("u2")), "sample_id": ((count,), run["sample_id"].dtype)}
    pixels: Columns = {"data": ((count, 3, height, width), np.dtype("u1")), **both}
    maps: Columns = {
        "attribution": ((count, 3, height, width), np.dtype("f4")),
        "prediction": ((count, run["prediction"].shape[1]), np.dtype("f4")),
        **both,
    }
    text = {label_map: _label_map(request), project: _project(request, names, (height, width))}
    with ExitStack() as stack:
        places = {path: stack.enter_context(replacing(path)) for path in (project, label_map, attributions, inputs)}
        write_datasets(places[inputs], pixels, _image_parts(run, request.images, (height, width)))
        write_datasets(places[attributions], maps, _attribution_parts(run))
        for path, content in text.items():
            places[path].write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    return [inputs, attributions, label_map, project]


def _image_size(run: RunFile) -> tuple[int, int]:
    shape, dims = run.layout.attribution, run.layout.dims
    if dims != ("channel", "y", "x") or shape[0] not in (1, 3) or min(shape[1:]) < 3:
        given = ", ".join(f"{name} {size}" for name, size in zip(dims, shape, strict=True))
        raise UsageError(
            f"{run.path}: the rows are ({given}); ViRelAy shows images only: (channel 1 or 3, y, x), 3x3 or larger. "
            "Use --to npz"
        )
    return shape[1], shape[2]


def _ok_blocks(run: RunFile) -> Iterator[tuple[slice, Array]]:
    """Blocks of rows with the mask of those that are ok, where there are any."""
    for rows in run.blocks():
        ok = run.status[rows] == Status.OK
        if ok.any():
            yield rows, ok


def _image_parts(run: RunFile, images: Images, size: tuple[int, int]) -> Iterator[Mapping[str, Array]]:
    for rows, ok in _ok_blocks(run):
        ids = [run.ids[row] for row in np.flatnonzero(ok) + rows.start]
        try:
            pixels = images(ids)
        except OSError as error:
            raise InputError(f"an image that was explained cannot be read any more: {error}") from error
        if pixels.dtype != np.uint8 or pixels.shape not in [(len(ids), *size, channels) for channels in (1, 3)]:
            raise ValueError(f"images are {pixels.dtype} {pixels.shape}, need uint8 {(len(ids), *size, 'C')}")
        data = np.broadcast_to(pixels.transpose(0, 3, 1, 2), (len(ids), 3, *size))
        yield {"data": data, **{name: run[name][rows][ok] for name in ("label", "sample_id")}}


def _attribution_parts(run: RunFile) -> Iterator[Mapping[str, Array]]:
    for rows, ok in _ok_blocks(run):
        maps = run["attribution"][rows][ok]
        if maps.shape[1] == 1:
            maps = np.repeat(maps / 3, 3, axis=1)
        yield {"attribution": maps, **{name: run[name][rows][ok] for name in ("prediction", "label", "sample_id")}}


def _label_map(request: _Request) -> list[dict[str, Any]]:
    """A row for each output and each label that occurs; ViRelAy looks up both, and wants `word_net_id` in each."""
    run, labels = request.run, list(request.labels or ())
    found = run["label"][...][run.status == Status.OK].tolist()
    indices = sorted({*range(max(len(labels), run["prediction"].shape[1])), *found})
    names = {**{index: f"class {index}" for index in indices}, UNLABELLED: "unlabelled", **dict(enumerate(labels))}
    return [{"index": index, "word_net_id": f"{index:08d}", "name": names[index]} for index in indices]


def _project(request: _Request, files: Sequence[str], size: tuple[int, int]) -> dict[str, Any]:
    """The project file; JSON is YAML."""
    attributes = request.run.attributes
    method, target = attributes["method"], attributes.get("target")
    strategies = {"label": "true_label", "predicted": "predicted_label"}
    return {
        "project": {
            "name": f"{request.name}-{method}",
            "model": str(attributes.get("model") or attributes.get("model_sha256", "unknown")),
            "label_map": files[2],
            "dataset": {
                "name": request.name,
                "type": "hdf5",
                "path": files[0],
                "input_width": size[1],
                "input_height": size[0],
                "up_sampling_method": "none",
                "down_sampling_method": "none",
                "label_index_regex": None,
                "label_word_net_id_regex": None,
            },
            "attributions": {
                "attribution_method": method,
                "attribution_strategy": strategies.get(str(target), f"target {target}"),
                "sources": [files[1]],
            },
        }
    }


# TF-MoDISco ---------------------------------------------------------------------------------------------------------


def _modisco(request: _Request) -> list[Path]:
    """One-hot sequences and hypothetical contributions of the rows that are ok, (N, 4, L) in the order ACGT; their ids.

    As `modisco motifs -s NAME.ohe.npz -a NAME.shap.npz` of tfmodisco-lite reads them; it multiplies the two itself.
    """
    run = request.run
    alphabet = _dna(run)
    if request.sequences is None:
        raise UsageError("--to modisco needs the sequences that were explained")
    ok = np.flatnonzero(run.status == Status.OK)
    if not ok.size:
        raise UsageError(f"{run.path}: no row is ok, there is nothing to export")
    paths = _claim(request, [f"{request.name}.{part}" for part in ("ohe.npz", "shap.npz", "ids.txt")])
    ids, order = [run.ids[row] for row in ok], [alphabet.index(letter) for letter in "ACGT"]
    hypothetical = np.concatenate([run["hypothetical"][rows][good] for rows, good in _ok_blocks(run)])
    contents = (request.sequences(ids)[:, order].astype(np.float32), hypothetical[:, order].astype(np.float32))
    with ExitStack() as stack:
        places = [stack.enter_context(replacing(path)) for path in paths]
        for place, content in zip(places, contents, strict=False):
            with place.open("wb") as file:
                np.savez_compressed(file, content)
        places[2].write_text("".join(f"{name}\n" for name in ids), encoding="utf-8", errors="surrogateescape")
    return paths


def _dna(run: RunFile) -> str:
    """The alphabet of a run of DNA with hypothetical contributions. Raises UsageError for any other run."""
    told = run.attributes["preprocess"].get("input", {})
    if "hypothetical" not in run.layout.extras:
        raise UsageError(
            f"{run.path}: holds no /hypothetical, which TF-MoDISco reads; explain sequences (kind = 'sequence' in the "
            "sidecar) by a method that gives multipliers, such as deeplift"
        )
    if sorted(told["alphabet"]) != list("ACGT"):
        raise UsageError(f"{run.path}: the alphabet is {told['alphabet']}; TF-MoDISco reads A, C, G and T only")
    return str(told["alphabet"])


FORMATS: dict[str, Callable[[_Request], list[Path]]] = {"npz": _npz, "virelay": _virelay, "modisco": _modisco}
