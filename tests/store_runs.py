"""A small run, known in advance, for the tests; as a script, a writer to be killed: PATH ROWS PAUSE [SHIFT]."""

import hashlib
import sys
import time
from pathlib import Path

import h5py
import numpy as np

from attrcli.store import Layout, RunWriter, Status

LAYOUT = Layout((3, 8, 9), (5,), ("channel", "y", "x"))
ATTRIBUTES = {
    "method": "gradient",
    "options": {"steps": 50, "baseline": {"kind": "black"}},
    "preprocess": {"mean": [0.5, 0.25], "size": [8, 9]},
    "target": "predicted",
    "score": "logit",
    "baseline": None,
    "inputs_root": "/data/images",
    "model_sha256": "ab" * 32,
    "model_format": "onnx",
    "seed": 0,
    "batch_size": 4,
    "threads": 2,
    "device": "cpu",
    "precision": "float32",
    "versions": {"attrcli": "0.1.0", "numpy": "2"},
    "argv": ["attrcli", "explain"],
}


def names(count, shift=0):
    return [f"class é/{number:05d}.png" for number in range(shift, shift + count)]


def sha(name):
    return hashlib.sha256(name.encode()).hexdigest()


def batch(ids, layout=LAYOUT):
    """All columns of some rows; a function of the ids only."""
    columns = {"attribution": [], "prediction": [], "label": [], "target": [], "sample_sha256": [sha(i) for i in ids]}
    columns |= {name: [] for name in ("score", "baseline_score", "completeness_delta", "remainder")}
    for name in ids:
        rng = np.random.default_rng(int(sha(name)[:8], 16))
        columns["attribution"].append(rng.standard_normal(layout.attribution))
        columns["prediction"].append(rng.standard_normal(layout.outputs))
        columns["label"].append(rng.integers(5))
        columns["target"].append(rng.integers(5))
        for scalar in ("score", "baseline_score", "completeness_delta", "remainder"):
            columns[scalar].append(rng.standard_normal())
    return {name: np.array(values) for name, values in columns.items()}


def fill(writer, size=4, limit=None, each=lambda: None):
    """Write the batches that are not done yet, at most `limit`; return the number of rows written."""
    written = 0
    for start in range(0, len(writer.ids), size):
        rows = slice(start, min(start + size, len(writer.ids)))
        ids = writer.ids[rows]
        good = writer.status[rows] == Status.OK
        if good.all() and all(writer.sha256(start + i) == sha(name) for i, name in enumerate(ids)):
            continue
        writer.write(rows, batch(ids, writer.layout))
        written += len(ids)
        each()
        limit = None if limit is None else limit - 1
        if limit == 0:
            break
    return written


def make(path, ids, attributes=ATTRIBUTES, layout=LAYOUT):
    """A finished run file."""
    with RunWriter.open(path, ids, layout, attributes) as writer:
        fill(writer)
        writer.finish()
    return Path(path)


def open_run(path, ids=None, *, force=False, layout=LAYOUT, **changed):
    return RunWriter.open(path, ids or names(10), layout, ATTRIBUTES | changed, force=force)


def begin(path, ids=None, batches=1, **options):
    """A run that stopped after some batches of four."""
    with open_run(path, ids, **options) as writer:
        fill(writer, limit=batches)


def finish(path, ids=None, **options):
    with open_run(path, ids, **options) as writer:
        written = fill(writer)
        writer.finish()
    return written


def assert_same(left, right, ignore=("argv",)):
    """Same datasets, types, storage, and attributes."""
    with h5py.File(left) as a, h5py.File(right) as b:
        assert set(a) == set(b)
        for name in a:
            assert a[name].dtype == b[name].dtype
            assert a[name].chunks == b[name].chunks
            np.testing.assert_array_equal(a[name][...], b[name][...])
        assert set(a.attrs) == set(b.attrs)
        for key in set(a.attrs) - set(ignore):
            assert a.attrs[key] == b.attrs[key], key


def part_of(path):
    return path.with_name(path.name + ".part")


def leftovers(path):
    return sorted(item.name for item in path.parent.iterdir() if item != path)


def main(path, rows, pause, shift=0):
    def each():
        print("batch", flush=True)
        time.sleep(float(pause))

    with RunWriter.open(path, names(int(rows), int(shift)), LAYOUT, ATTRIBUTES) as writer:
        print("open", flush=True)
        fill(writer, each=each)
        writer.finish()


if __name__ == "__main__":
    main(*sys.argv[1:])
