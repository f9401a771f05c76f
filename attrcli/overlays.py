"""render: run files to pictures, one for each row, or several run files side by side in one."""

import os
import warnings
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

from attrcli import data, preprocess, render
from attrcli.errors import AttrcliWarning, InputError, UsageError
from attrcli.preprocess import Preprocess
from attrcli.render import Style
from attrcli.store import RunFile, Status

Array = npt.NDArray[Any]
Progress = Callable[[str, int, int], None]
_MONTAGE_ROWS = 12


@dataclass(frozen=True)
class Source:
    """Where the inputs of a run file lie, and how the model saw them."""

    root: Path
    preprocess: Preprocess
    records: dict[str, data.Record]

    @classmethod
    def of(cls, run: RunFile, root: Path | None = None) -> "Source":
        """The inputs as the run file recorded them, or below another root."""
        p = preprocess.from_mapping(run.attributes["preprocess"], str(run.path), None)
        return cls(root or Path(run.attributes["inputs_root"]), p, {})

    def read(self, name: str) -> data.Raw:
        """Read one input again. Raises InputError when it is gone."""
        p = self.preprocess
        return data.read(self._record(name), p.kind, channels=p.channels, columns=p.columns)

    def _record(self, name: str) -> data.Record:
        path = self.root / name
        if path.is_file():
            return data.Record(name, path)
        if name not in self.records:
            file = self.root / name.rpartition("#")[0]
            if not file.is_file():
                raise InputError(f"{name!r}: no such file below {self.root}")
            p = self.preprocess
            rank = {"table": 1}.get(p.kind, len(p.size) if p.size else None)
            found = data.collect([os.fspath(file)], p.kind, columns=p.columns, sample_rank=rank)
            prefix = name.rpartition("#")[0].rpartition("/")[0]
            for record in found.records:
                self.records[f"{prefix}/{record.id}" if prefix else record.id] = record
        if name not in self.records:
            raise InputError(f"{name!r}: no such record")
        return self.records[name]


def draw(
    run_path: Path,
    folder: Path,
    style: Style,
    *,
    root: Path | None = None,
    force: bool = False,
    progress: Progress = lambda stage, done, total: None,
) -> tuple[int, list[str]]:
    """Write one PNG for each good row of a run file; return how many, and the ids that could not be drawn.

    Raises UsageError for a folder or file that cannot be written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(f"cannot make the folder {folder}: {error.strerror}") from error
    with RunFile(run_path) as run:
        source = Source.of(run, root)
        rows = [int(row) for row in np.flatnonzero(run.status == Status.OK)]
        scale = None
        if style.scale == "run":
            scale = render.run_scale((_map(run, row) for row in rows), style.percentile)
        failed: list[str] = []
        with ThreadPoolExecutor(max(1, os.cpu_count() or 1)) as pool:

            def one(row: int, loaded: "_Row") -> None:
                picture, metadata = _picture(source, loaded, style, scale)
                path = folder / f"{data.escape(loaded.id)}.png"
                render.save_png(picture, path, metadata, overwrite=force)

            window: list[tuple[str, Any]] = []
            for done, row in enumerate(rows):
                loaded = _load(run, row)
                window.append((loaded.id, pool.submit(one, row, loaded)))
                if len(window) > 8:
                    _settle(*window.pop(0), failed)
                progress("overlays", done + 1, len(rows))
            for item in window:
                _settle(*item, failed)
    return len(rows) - len(failed), failed


def _settle(name: str, future: Any, failed: list[str]) -> None:
    try:
        future.result()
    except InputError as error:
        failed.append(name)
        warnings.warn(f"no picture of {error}", AttrcliWarning, stacklevel=2)


@dataclass(frozen=True)
class _Row:
    """One row of a run file, read into memory."""

    id: str
    values: Array
    facts: dict[str, str]


def _load(run: RunFile, row: int) -> _Row:
    labels = run.attributes["preprocess"]["output"].get("labels")
    target = int(run["target"][row])
    name = labels[target] if labels and target < len(labels) else str(target)
    facts = {
        "method": str(run.attributes["method"]),
        "target": str(name),
        "score": f"{run.attributes['score']} {float(run['score'][row]):.4g}",
    }
    values = run["attribution"][row]
    gap = float(run["completeness_delta"][row])
    if np.isfinite(gap):
        total = float(np.abs(values).sum(dtype=np.float64))
        facts["gap"] = f"{gap:.2g}" + (f" ({abs(gap) / total:.1g} of the sum)" if total else "")
    return _Row(run.ids[row], values, facts)


def _map(run: RunFile, row: int) -> Array:
    values = run["attribution"][row]
    return render.reduce_channels(values) if values.ndim == 3 else values.reshape(1, -1)


def _picture(source: Source, row: _Row, style: Style, scale: float | None) -> tuple[Image.Image, dict[str, str]]:
    p = source.preprocess
    caption = _caption(row)
    if row.values.ndim != 3 or p.kind != "image":
        names = list(p.columns or ())
        flat = row.values.reshape(-1)
        names = names if len(names) == flat.size else [f"[{i}]" for i in range(flat.size)]
        values = source.read(row.id).values.reshape(-1)
        raw = [float(v) for v in values] if values.size == flat.size else None
        return render.bar_chart(names, flat, raw, caption, style=style), row.facts
    stored = source.read(row.id)
    image = stored.values if stored.values.dtype == np.uint8 else np.rint(stored.values).astype(np.uint8)
    if p.channels == "BGR":
        image = image[..., ::-1]
    values = render.reduce_channels(row.values)
    used = render.robust_scale(values, style.percentile) if scale is None else scale
    box = p.seen_box(image.shape[1], image.shape[0])
    if style.panel:
        picture = render.panel(image, values, box, used, style, caption)
    else:
        picture = render.overlay(image, values, box, used, style)
    return picture, {**row.facts, "id": row.id, **render.describe(values, used, style)}


def _caption(row: _Row) -> list[str]:
    lines = [row.id, f"{row.facts['method']}: {row.facts['target']}, {row.facts['score']}"]
    return [*lines, f"completeness gap {row.facts['gap']}"] if "gap" in row.facts else lines


def grid(
    run_paths: Sequence[Path],
    out: Path,
    style: Style,
    *,
    root: Path | None = None,
    limit: int | None = None,
    force: bool,
) -> int:
    """Write several run files side by side as one picture: rows are inputs, columns are files. Return the rows.

    Raises UsageError when the files share no input that both explained.
    """
    runs = [RunFile(path) for path in run_paths]
    try:
        names = _shared(runs)[: limit or _MONTAGE_ROWS]
        source = Source.of(runs[0], root)
        scales: list[float | None] = [None] * len(runs)
        if style.scale == "run":
            scales = [render.run_scale((_map(run, run.ids.index(n)) for n in names), style.percentile) for run in runs]
        rows = [[*_cells(source, runs, scales, name, style)] for name in names]
        columns = ["input", *(str(run.attributes["method"]) for run in runs)]
        picture = render.montage(rows, [_row_label(runs[0], name) for name in names], columns, key=(style, None))
        render.save_png(picture, out, {"methods": ", ".join(columns[1:])}, overwrite=force)
        return len(names)
    finally:
        for run in runs:
            run.close()


def _shared(runs: Sequence[RunFile]) -> list[str]:
    """Ids of inputs that are ok in at least one file and listed in the first."""
    good = [{run.ids[i] for i in np.flatnonzero(run.status == Status.OK)} for run in runs]
    names = [name for name in runs[0].ids if any(name in ids for ids in good)]
    if not names:
        raise UsageError("no input was explained in these run files: there is nothing to draw")
    return names


def _cells(
    source: Source, runs: Sequence[RunFile], scales: Sequence[float | None], name: str, style: Style
) -> Iterator[Image.Image | str]:
    stored = source.read(name).values
    if source.preprocess.kind != "image" or stored.ndim != 3:
        raise UsageError("a grid shows images; tables get one chart per row: render --out DIR")
    image = stored if stored.dtype == np.uint8 else np.rint(stored).astype(np.uint8)
    yield render.thumbnail(image)
    for run, scale in zip(runs, scales, strict=True):
        row = run.ids.index(name) if name in run.ids else -1
        if row < 0 or run.status[row] != Status.OK:
            yield "not in this file" if row < 0 else str(run["message"].asstr()[row]) or "not explained"
            continue
        values = _map(run, row)
        used = render.robust_scale(values, style.percentile) if scale is None else scale
        yield render.cell(image, values, source.preprocess.seen_box(image.shape[1], image.shape[0]), used, style)


def _row_label(run: RunFile, name: str) -> list[str]:
    row = _load(run, run.ids.index(name))
    return [name, row.facts["target"]]


def model_images(
    run_path: Path, root: Path | None = None
) -> tuple[Callable[[Sequence[str]], Array], Sequence[str] | None]:
    """A function from ids to the pixels that the model saw, uint8 (n, H, W, C), RGB; and the labels, if known."""
    with RunFile(run_path) as run:
        source = Source.of(run, root)
    p = source.preprocess

    def images(ids: Sequence[str]) -> Array:
        raws = [p.fit(source.read(name).values) for name in ids]
        pixels = np.rint(np.stack(raws)).astype(np.uint8)
        return pixels[..., ::-1] if p.channels == "BGR" else pixels

    return images, p.labels
