"""Array files: batches and samples, hashes, and files that are damaged or point elsewhere."""

import h5py
import numpy as np
import pytest
from input_files import BATCH, F_SHAPE, array_file, ids, only

from attrcli.data import collect, read
from attrcli.errors import InputError


@pytest.mark.parametrize(
    ("name", "expected"),
    [("x.npy", ["x.npy#0", "x.npy#1"])]
    + [(name, [f"{name}#one", f"{name}#z[0]", f"{name}#z[1]"]) for name in ("x.npz", "x.h5")],
)
def test_the_sample_rank_tells_a_batch_from_a_sample(tmp_path, name, expected):
    path = array_file(tmp_path / name)
    found = collect([str(path)], "array", sample_rank=2)
    assert ids(found) == expected
    raws = [read(record, "array") for record in found.records]
    for raw, values in zip(raws[-2:], BATCH, strict=True):
        np.testing.assert_array_equal(raw.values, values)
        assert raw.size is None
    assert raws[-1].sha256 != raws[-2].sha256
    assert [record.row for record in found.records][-2:] == [0, 1]
    whole = collect([str(path)], "array", sample_rank=3)
    np.testing.assert_array_equal(read(whole.records[-1], "array").values, BATCH)


def test_a_hash_covers_values_shape_and_dtype_and_no_more(tmp_path):
    hashes = set()
    for values in (BATCH, BATCH + 1, BATCH.reshape(2, 12), BATCH.astype(np.float64)):
        np.save(tmp_path / "x.npy", values)
        hashes.add(only(tmp_path / "x.npy", "array").sha256)
    assert len(hashes) == 4
    np.save(tmp_path / "swapped.npy", BATCH.astype(">f4"))
    raw = only(tmp_path / "swapped.npy", "array")
    assert raw.sha256 in hashes
    assert raw.values.dtype == np.float32
    assert raw.values.dtype.isnative


def test_rows_that_share_chunks(tmp_path):
    values = np.random.default_rng(0).normal(size=(50, 4))
    with h5py.File(tmp_path / "x.h5", "w") as file:
        file.create_dataset("z", data=values, chunks=(8, 2), compression="gzip")
    records = collect([str(tmp_path)], "array", sample_rank=1).records
    np.testing.assert_array_equal([read(record, "array").values for record in records], values)
    np.testing.assert_array_equal(read(records[17], "array").values, values[17])


def test_rows_come_in_file_order(tmp_path):
    np.save(tmp_path / "x.npy", np.zeros((12, 2)))
    assert ids(collect([str(tmp_path)], "array", sample_rank=1)) == [f"x.npy#{i}" for i in range(12)]


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (np.array([{}], dtype=object), "x.npy': .*[Oo]bject"),
        (np.array(["a"]), "holds <U1; accepted: real numbers"),
        (np.array([1j]), "holds complex128"),
        (np.array([1, np.nan, np.inf]), "holds 2 values that are NaN or infinite"),
    ],
)
def test_arrays_that_are_no_numbers(tmp_path, values, message):
    np.save(tmp_path / "x.npy", values, allow_pickle=True)
    with pytest.raises(InputError, match=message):
        only(tmp_path / "x.npy", "array")


@pytest.mark.parametrize("suffix", ["npy", "npz", "h5"])
def test_damaged_array_files_are_one_failed_record(tmp_path, suffix):
    path = array_file(tmp_path / f"x.{suffix}")
    whole = path.read_bytes()
    for content in (b"", b"\x80\x04.", whole[:100], whole[: len(whole) - 60]):
        path.write_bytes(content)
        with pytest.raises(InputError, match=rf"^'x\.{suffix}': "):
            only(path, "array")


def test_an_image_is_no_array_file(tree):
    with pytest.raises(InputError, match=r"top\.png': is not an array file; accepted: \.npy \.npz \.h5"):
        only(tree / "top.png", "array")


def test_h5_data_in_other_files_is_refused(tmp_path):
    array_file(tmp_path / "secret.h5")
    with h5py.File(tmp_path / "link.h5", "w") as file:
        file["z"] = h5py.ExternalLink("secret.h5", "z")
    with h5py.File(tmp_path / "external.h5", "w") as file:
        file.create_dataset("z", (4,), "u1", external=[(str(tmp_path / "secret.h5"), 0, 4)])
    with h5py.File(tmp_path / "empty.h5", "w") as file:
        file.create_group("a")["z"] = BATCH
    for name, message in (("link", "'z' is a link"), ("external", "holds no data in this"), ("empty", "no array at")):
        with pytest.raises(InputError, match=message):
            only(tmp_path / f"{name}.h5", "array")


def test_arrays_as_pixels(tmp_path):
    np.save(tmp_path / "a.npy", F_SHAPE)
    np.save(tmp_path / "b.npy", F_SHAPE[:, :, 0])
    np.save(tmp_path / "c.npy", np.stack([F_SHAPE, F_SHAPE // 2]))
    found = collect([str(tmp_path / f"{name}.npy") for name in "abc"], "image")
    assert ids(found) == ["a.npy", "b.npy", "c.npy#0", "c.npy#1"]
    raws = [read(record, "image") for record in found.records]
    np.testing.assert_array_equal(raws[0].values, F_SHAPE)
    np.testing.assert_array_equal(raws[1].values, F_SHAPE[:, :, :1].repeat(3, axis=2))
    np.testing.assert_array_equal(raws[3].values, F_SHAPE // 2)
    assert raws[0].size == (4, 6)
    assert read(found.records[0], "image", channels="L").values.shape == (6, 4, 1)


@pytest.mark.parametrize("values", [BATCH, np.zeros((3, 8, 8), np.uint8), np.zeros((2, 0), np.uint8)])
def test_arrays_that_are_no_pixels(tmp_path, values):
    np.save(tmp_path / "x.npy", values)
    with pytest.raises(InputError, match=r"of shape \(\d.*accepted as pixels: uint8 of shape \(H, W\).*kind = 'array'"):
        only(tmp_path / "x.npy")
