"""render: run files to pictures, one for each row, or several run files side by side in one."""

import os
import warnings
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

from attrcli import data, logos, render
from attrcli.errors import AttrcliWarning, InputError, UsageError
from attrcli.preprocess import Preprocess
from attrcli.render import Style
from attrcli.source import Source
from attrcli.store import RunFile, Status, require_folder, require_place

Array = npt.NDArray[Any]
Progress = Callable[[str, int, int], None]
_MONTAGE_ROWS = 12
_SEQUENCE = ("letter", "position")  # dimensions of a row that is drawn as a logo
_PICTURES = (*data.SUFFIXES["image"], ".pdf", ".svg", ".eps")


def style(**options: Any) -> Style:
    """How pictures look: `panel`, `scale` (image or run), `colormap`, `alpha`, `percentile`. Raises UsageError."""
    return Style(**options)


# -- one picture for each row --------------------------------------------------------------------------------------


def file_names(ids: Iterable[str]) -> dict[str, str]:
    """The picture of each id: the escaped id and .png, once; twice where two ids would else share a picture."""
    known = frozenset(ids)
    names = {}
    for name in known:
        escaped = data.escape(name)
        once = escaped.endswith(".png") and name.removesuffix(".png") not in known
        names[name] = escaped if once else f"{escaped}.png"
    return names


def prepare(folder: Path, ids: Iterable[str], method: str, *, force: bool = False) -> dict[str, Path]:
    """Make the folder; return the path of each id's picture.

    Raises UsageError for a folder that cannot be made or has the name of a picture, and for files in the way: without
    `force` only pictures that attrcli drew of the same id and method are written over.
    """
    if folder.suffix.lower() in _PICTURES and not folder.is_dir():
        raise UsageError(
            f"{folder}: pictures are PNG, one for each input: give a folder for them (render also makes a grid, with "
            "--out FILE.png)"
        )
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        reason = "there is a file of that name" if isinstance(error, FileExistsError) else error.strerror
        raise UsageError(f"cannot make the folder {folder}: {reason}; choose another") from error
    require_folder(folder)
    paths = {name: folder / file for name, file in file_names(ids).items()}
    there = {entry.name for entry in os.scandir(folder)}
    foreign = [] if force else [n for n, path in paths.items() if path.name in there and not _drawn(path, n, method)]
    if foreign:
        raise UsageError(
            f"{paths[min(foreign)]} is there already and is no picture that attrcli drew of this input with {method} "
            f"({len(foreign)} such files); choose another folder, or --force to write over them"
        )
    return paths


def _drawn(path: Path, name: str, method: str) -> bool:
    """Whether a file is our picture of this id and method, as its PNG text says."""
    try:
        with Image.open(path, formats=("PNG",)) as picture:
            told = picture.info
            return all(told.get(key) == text for key, text in _signature(name, method).items())
    except (OSError, ValueError, SyntaxError):
        return False


def _signature(name: str, method: str) -> dict[str, str]:
    plain = name.replace("\0", "\ufffd").encode("utf-8", "backslashreplace").decode()
    return {"Software": "attrcli", "id": plain, "method": method}


def _require_apart(folder: Path, ids: Iterable[str], source: Source) -> None:
    """Raise UsageError where pictures would lie among the inputs, for which the next run would take them."""
    originals = (source.root / name.rpartition("#")[0] if "#" in name else source.root / name for name in ids)
    if os.path.realpath(folder) in {os.path.realpath(path.parent) for path in originals}:
        raise UsageError(f"{folder} holds inputs, and the next run would take pictures there for more; choose another")


def _require_free(out: Path, runs: Sequence[RunFile], source: Source, force: bool) -> None:
    """Raise UsageError where a picture would take the place of what it is made from, or of anything unless `force`."""
    if out.exists() and not force:
        raise UsageError(f"{out} is there already; choose another name, or --force to write over it")
    require_place(out)
    inputs = {os.path.realpath(source.root / name) for run in runs for name in run.ids}
    if os.path.realpath(out) in inputs | {os.path.realpath(run.path) for run in runs}:
        raise UsageError(f"{out} is a run file or an input; choose another name")


def draw(
    run_path: Path,
    folder: Path,
    style: Style,
    *,
    root: Path | None = None,
    limit: int | None = None,
    force: bool = False,
    progress: Progress = lambda stage, done, total: None,
) -> tuple[int, list[str]]:
    """Write one PNG for each good row of a run file, at most `limit`; return how many, and the ids that failed.

    An input that is gone or changed since is a warning. Raises UsageError as `prepare`.
    """
    with RunFile(run_path) as run:
        source = Source.of(run, root)
        _require_apart(folder, run.ids, source)
        paths = prepare(folder, run.ids, str(run.attributes["method"]), force=force)
        rows = [int(row) for row in np.flatnonzero(run.status == Status.OK)]
        maps = (_map(run, row) for row in rows)
        scale = render.run_scale(maps, _percentile(run, style)) if style.scale == "run" else None
        rows = rows[:limit]
        failed: list[str] = []

        def settle(name: str, future: Future[None]) -> None:
            try:
                future.result()
            except InputError as error:
                failed.append(name)
                warnings.warn(f"no picture of {error}", AttrcliWarning, stacklevel=2)

        with ThreadPoolExecutor(max(1, os.cpu_count() or 1)) as pool:
            window: deque[tuple[str, Future[None]]] = deque()
            for done, number in enumerate(rows):
                row = _load(run, number)
                window.append((row.id, pool.submit(_save, source, row, paths[row.id], style, scale)))
                if len(window) > 8:
                    settle(*window.popleft())
                progress("overlays", done + 1, len(rows))
            for item in window:
                settle(*item)
    return len(rows) - len(failed), failed


@dataclass(frozen=True)
class _Row:
    """One row of a run file, read into memory."""

    id: str
    sha256: str
    values: Array
    facts: dict[str, str]
    sequence: bool
    hypothetical: Array | None


def _load(run: RunFile, row: int) -> _Row:
    facts = {
        "method": str(run.attributes["method"]),
        "target": _target(run, row),
        "score": f"{run.attributes['score']} {float(run['score'][row]):.4g}",
    }
    values = run["attribution"][row]
    gap = float(run["completeness_delta"][row])
    if np.isfinite(gap):
        total = float(np.abs(values).sum(dtype=np.float64))
        facts["gap"] = f"{gap:.2g}" + (f" ({abs(gap) / total:.1g} of the sum)" if total else "")
    hypothetical = run["hypothetical"][row] if "hypothetical" in run.layout.extras else None
    sequence = run.layout.dims == _SEQUENCE
    return _Row(run.ids[row], run["sample_sha256"][row].decode(), values, facts, sequence, hypothetical)


def _target(run: RunFile, row: int) -> str:
    """What a row explains: the name of its class, or the target as it was asked for where that says more."""
    asked = str(run.attributes["target"])
    labels, target = run.attributes["preprocess"]["output"].get("labels") or (), int(run["target"][row])
    if asked in ("predicted", "label") or asked.isdecimal():
        return str(labels[target]) if target < len(labels) else f"class {target}"
    return asked


def _map(run: RunFile, row: int) -> Array:
    values = run["attribution"][row]
    if run.layout.dims == _SEQUENCE:
        return logos.contributions(values)[None]
    return render.reduce_channels(values) if values.ndim == 3 else values.reshape(1, -1)


def _percentile(run: RunFile, style: Style) -> float:
    """Of |attribution|, the end of the scale: of letters all, since beyond it they would be cut."""
    return 100.0 if run.layout.dims == _SEQUENCE else style.percentile


def _picture(source: Source, row: _Row, style: Style, scale: float | None) -> tuple[Image.Image, dict[str, str]]:
    p = source.preprocess
    facts = {**row.facts, **_signature(row.id, row.facts["method"])}
    stored = source.read(row.id, row.sha256).values
    if row.sequence:
        below = row.hypothetical if style.panel else None
        return logos.picture(p, stored, row.values, below, _caption(row), scale), facts
    if row.values.ndim != 3 or p.kind != "image":
        names, flat = list(p.columns or ()), row.values.reshape(-1)
        if len(names) != flat.size:
            names = [f"[{', '.join(map(str, place))}]" for place in np.ndindex(row.values.shape)]
        raw = [float(v) for v in stored.reshape(-1)] if stored.size == flat.size else None
        return render.bar_chart(names, flat, raw, _caption(row), style=style), facts
    image = _pixels(stored, p)
    values = render.reduce_channels(row.values)
    used = render.robust_scale(values, style.percentile) if scale is None else scale
    box = p.seen_box(image.shape[1], image.shape[0])
    if style.panel:
        picture = render.panel(image, values, box, used, style, _caption(row))
    else:
        picture = render.overlay(image, values, box, used, style)
    return picture, {**facts, **render.describe(values, used, style)}


def _save(source: Source, row: _Row, path: Path, style: Style, scale: float | None) -> None:
    picture, metadata = _picture(source, row, style, scale)
    render.save_png(picture, path, metadata, overwrite=True)


def _pixels(stored: Array, p: Preprocess) -> Array:
    """An image as stored to uint8, RGB or grey."""
    image = stored if stored.dtype == np.uint8 else np.rint(stored).astype(np.uint8)
    return image[..., ::-1] if p.channels == "BGR" else image


def _caption(row: _Row) -> list[str]:
    lines = [row.id, f"{row.facts['method']}: {row.facts['target']}, {row.facts['score']}"]
    return [*lines, f"completeness gap {row.facts['gap']}"] if "gap" in row.facts else lines


# -- one picture for several run files -----------------------------------------------------------------------------


def grid(
    run_paths: Sequence[Path],
    out: Path,
    style: Style,
    *,
    root: Path | None = None,
    limit: int | None = None,
    force: bool,
) -> tuple[int, list[str]]:
    """Write run files side by side as one picture: rows are inputs, columns are files; return the number of rows.

    Also returns the ids whose input is gone or changed; their cells say so. Raises UsageError when nothing was
    explained, and for a picture that is there already unless `force`.
    """
    runs = [RunFile(path) for path in run_paths]
    try:
        names = _explained(runs)[: limit or _MONTAGE_ROWS]
        source = Source.of(runs[0], root)
        _require_free(out, runs, source, force)
        places = [{name: row for row, name in enumerate(run.ids)} for run in runs]
        scales: list[float | None] = [None] * len(runs)
        if style.scale == "run":
            maps = [
                [_map(run, place[n]) for n in names if n in place and run.status[place[n]] == Status.OK]
                for run, place in zip(runs, places, strict=True)
            ]
            ends = zip(maps, runs, strict=True)
            scales = [render.run_scale(each, _percentile(run, style)) if each else None for each, run in ends]
        rows, failed = [], []
        for name in names:
            found = [place.get(name) for place in places]
            try:
                rows.append(_cells(source, runs, found, scales, name, style))
            except InputError as error:
                failed.append(name)
                warnings.warn(f"no picture of {error}", AttrcliWarning, stacklevel=2)
                rows.append([str(error)] * (1 + len(runs)))
        columns = ["input", *_titles(runs)]
        labels = [_row_label(runs, name, [place.get(name) for place in places]) for name in names]
        picture = render.montage(rows, labels, columns, key=_key(runs[0], style))
        render.save_png(picture, out, {"Software": "attrcli", "methods": ", ".join(columns[1:])}, overwrite=force)
        return len(names), failed
    finally:
        for run in runs:
            run.close()


def _key(run: RunFile, style: Style) -> tuple[Style, float | None] | None:
    """The colour bar of a grid; letters have colours of their own."""
    return None if run.layout.dims == _SEQUENCE else (style, None)


def _titles(runs: Sequence[RunFile]) -> list[str]:
    """The method of each file, with the node it explains at; with the file's name where that leaves two alike."""
    titles = [
        str(run.attributes["method"]) + (f" at {run.attributes['at']}" if run.attributes.get("at") else "")
        for run in runs
    ]
    return [
        f"{title} ({run.path.stem})" if titles.count(title) > 1 else title
        for title, run in zip(titles, runs, strict=True)
    ]


def _explained(runs: Sequence[RunFile]) -> list[str]:
    """Ids of inputs that are ok in at least one file and listed in the first. Raises UsageError for no images."""
    for run in runs:
        if run.layout.dims not in (("channel", "y", "x"), _SEQUENCE) or run.layout.dims != runs[0].layout.dims:
            raise UsageError(
                f"{run.path}: a grid shows images, or sequences; others get a chart per row: render RUN --out FOLDER"
            )
    good = set().union(*({run.ids[i] for i in np.flatnonzero(run.status == Status.OK)} for run in runs))
    names = [name for name in runs[0].ids if name in good]
    if not names:
        raise UsageError("no input was explained in these run files: there is nothing to draw")
    return names


def _cells(
    source: Source,
    runs: Sequence[RunFile],
    rows: Sequence[int | None],
    scales: Sequence[float | None],
    name: str,
    style: Style,
) -> list[Image.Image | str | None]:
    """The input, then its picture in each run file, or why there is none. Raises InputError for a lost input."""
    hashes = [
        run["sample_sha256"][row].decode() if row is not None and run.status[row] == Status.OK else None
        for run, row in zip(runs, rows, strict=True)
    ]
    known = next(each for each in hashes if each is not None)
    p, stored = source.preprocess, source.read(name, known).values
    first = next(run["attribution"][row] for run, row, sha in zip(runs, rows, hashes, strict=True) if sha == known)
    cells: list[Image.Image | str | None]
    if sequence := runs[0].layout.dims == _SEQUENCE:
        cells = [logos.written(p, stored, first)]
    else:
        image = _pixels(stored, p)
        box = p.seen_box(image.shape[1], image.shape[0])
        cells = [render.thumbnail(image)]
    for run, row, sha256, scale in zip(runs, rows, hashes, scales, strict=True):
        if row is None or sha256 is None:
            cells.append("not in this file" if row is None else run.messages[row] or "not explained")
            continue
        if sha256 != known:
            cells.append("another version of this input")
            continue
        values = _map(run, row)
        used = render.robust_scale(values, _percentile(run, style)) if scale is None else scale
        if sequence:
            cells.append(logos.cell(p, stored, run["attribution"][row], used, first))
        else:
            cells.append(render.cell(image, values, box, used, style))
    return cells


def _row_label(runs: Sequence[RunFile], name: str, rows: Sequence[int | None]) -> list[str]:
    """The id, and the target of the first file that explained it."""
    for run, row in zip(runs, rows, strict=True):
        if row is not None and run.status[row] == Status.OK:
            return [name, _load(run, row).facts["target"]]
    return [name]


def model_images(
    run_path: Path, root: Path | None = None
) -> tuple[Callable[[Sequence[str]], Array], Sequence[str] | None]:
    """A function from ids to the pixels that the model saw, uint8 (n, H, W, C), RGB; and the labels, if known."""
    with RunFile(run_path) as run:
        source = Source.of(run, root)
        hashes = dict(zip(run.ids, run.read("sample_sha256").tolist(), strict=True))
    p = source.preprocess

    def images(ids: Sequence[str]) -> Array:
        raws = [p.fit(source.read(name, hashes[name]).values) for name in ids]
        return _pixels(np.stack(raws), p)

    return images, p.labels


def model_sequences(run_path: Path, root: Path | None = None) -> Callable[[Sequence[str]], Array]:
    """A function from ids to the one-hot sequences that the model saw, float32 (n, A, L)."""
    with RunFile(run_path) as run:
        source = Source.of(run, root)
        hashes = dict(zip(run.ids, run.read("sample_sha256").tolist(), strict=True))
    return lambda ids: np.stack([source.preprocess.fit(source.read(name, hashes[name]).values) for name in ids])
