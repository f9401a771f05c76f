"""Inputs: which records a collection holds, what their numbers are, and what each kind of bad file is told."""

import contextlib
import hashlib
import io
import os
import struct
import zlib

import h5py
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image, PngImagePlugin

from attrcli.data import (
    UNKNOWN_LABEL,
    class_labels,
    collect,
    decode_image,
    escape,
    guess_kind,
    labels_csv,
    read,
    sha256_of,
)
from attrcli.errors import AttrcliWarning, InputError, NoInputsError, UsageError

F_SHAPE = np.zeros((6, 4, 3), np.uint8)  # no symmetry: every orientation shows
F_SHAPE[0, :, 0] = 250
F_SHAPE[3, :2, 1] = 200
F_SHAPE[1:, 0, 2] = 150


def save(path, pixels=F_SHAPE, **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path, **options)
    return path


def encoded(image, format, **options):
    buffer = io.BytesIO()
    image.save(buffer, format, **options)
    return buffer.getvalue()


def ids(collection):
    return [record.id for record in collection.records]


def only(path, kind="image", **options):
    """Read the one record of a file."""
    (record,) = collect([str(path)], kind, **{k: v for k, v in options.items() if k != "channels"}).records
    return read(record, kind, **{k: v for k, v in options.items() if k != "sample_rank"})


def png(width, height, depth, colour, rows=b""):
    """A PNG made by hand: header, one data chunk, end."""

    def chunk(name, body):
        return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))

    header = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)
    parts = [chunk(b"IHDR", header), chunk(b"IDAT", zlib.compress(rows)), chunk(b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


@pytest.fixture
def tree(tmp_path):
    for name in ("shoe/b.png", "shoe/a.JPG", "bag/c.png", "top.png"):
        save(tmp_path / "in" / name, format="PNG")
    (tmp_path / "in/bag/notes.txt").write_text("not an image")
    save(tmp_path / "in/bag/.hidden.png")
    save(tmp_path / "in/.cache/d.png")
    return tmp_path / "in"


# --- listing


def test_a_directory_is_walked_sorted_and_filtered(tree):
    found = collect([str(tree)], "image")
    assert ids(found) == ["bag/c.png", "shoe/a.JPG", "shoe/b.png", "top.png"]
    assert [record.label for record in found.records] == ["bag", "shoe", "shoe", ""]
    assert found.root == tree
    assert found.records[0].path == tree / "bag/c.png"


def test_order_of_arguments_does_not_matter(tree):
    names = [str(tree / "shoe"), str(tree / "bag/c.png"), str(tree / "top.png")]
    assert collect(names, "image") == collect(names[::-1], "image") == collect([str(tree)], "image")


def test_relative_arguments_and_globs(tree, monkeypatch):
    monkeypatch.chdir(tree.parent)
    whole = collect(["in"], "image")
    assert collect(["in/*/*.[pJ]*", "in/top.png"], "image") == whole
    assert collect(["in/../in"], "image") == whole
    globbed = collect(["in/*/*.png"], "image")
    assert ids(globbed) == ["bag/c.png", "shoe/b.png"]
    assert [record.label for record in globbed.records] == ["bag", "shoe"]
    assert ids(collect(["in/**/*.png"], "image")) == ["bag/c.png", "shoe/b.png", "top.png"]
    assert ids(collect(["in/*o*"], "image")) == ["shoe/a.JPG", "shoe/b.png", "top.png"]  # a matched folder is walked


def test_names_with_glob_characters_are_names_if_they_exist(tmp_path, monkeypatch):
    folder = tmp_path / "odd [1]"
    save(folder / "a[1].png")
    save(folder / "a1.png")
    monkeypatch.chdir(folder)
    assert ids(collect(["a[1].png"], "image")) == ["a[1].png"]
    assert ids(collect(["a[1]*"], "image")) == ["a1.png"]


@pytest.mark.parametrize("separator", ["\n", "\r\n", "\0"])
def test_lists_from_file_and_stdin(tree, separator):
    text = separator.join([str(tree / "shoe"), str(tree / "bag/c.png"), ""])
    (tree / "list.txt").write_text(text, newline="")
    listed = collect([f"@{tree}/list.txt"], "image")
    assert ids(listed) == ["bag/c.png", "shoe/a.JPG", "shoe/b.png"]
    assert collect(["-"], "image", stdin=io.StringIO(text)) == listed
    assert collect(["-"], "image", stdin=io.TextIOWrapper(io.BytesIO(text.encode()))) == listed


def test_a_missing_name_in_a_list_is_one_failed_record(tree):
    found = collect(["-"], "image", stdin=io.StringIO(f"{tree}/top.png\n{tree}/gone.png\n"))
    assert ids(found) == ["gone.png", "top.png"]
    with pytest.raises(InputError, match=r"'gone\.png': no such file"):
        read(found.records[0], "image")


def test_explicit_files_are_tried_whatever_their_suffix(tree):
    os.rename(tree / "top.png", tree / "top.dat")
    np.testing.assert_array_equal(only(tree / "top.dat").values, F_SHAPE)
    with pytest.raises(InputError, match=r"notes\.txt': not an image that can be read; accepted: PNG, JPEG"):
        only(tree / "bag/notes.txt")


def test_nothing_found(tree, tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(NoInputsError, match=r"empty': looked for image files \(\.png .*\); it holds no files at all"):
        collect([str(tmp_path / "empty")], "image")
    with pytest.raises(
        NoInputsError, match=r"looked for array files .*it holds 7 other files, such as '\.hidden\.png'"
    ):
        collect([str(tree)], "array")
    with pytest.raises(NoInputsError, match=r"no input matched '.*\*\.gif'"):
        collect([f"{tree}/*.gif"], "image")
    with pytest.raises(NoInputsError, match=r"no such file or directory: '.*tpo\.png'"):
        collect([str(tree / "top.png"), str(tree / "tpo.png")], "image")
    with pytest.raises(NoInputsError, match="no input matched '-'"):
        collect(["-"], "image", stdin=io.StringIO("\n"))
    with pytest.raises(NoInputsError, match="no input was given"):
        collect([], "image")
    with pytest.raises(UsageError, match=r"the list 'none\.txt' cannot be read: No such file"):
        collect(["@none.txt"], "image")


def test_one_file_given_twice(tree):
    with pytest.raises(UsageError, match=r"id 'top\.png': '.*top\.png' is given twice, by '.*in' and by '.*top\.png'"):
        collect([str(tree), str(tree / "top.png")], "image")


def test_two_inputs_with_one_id(tmp_path):
    np.save(tmp_path / "x.npy", np.zeros((2, 3)))
    np.save(tmp_path / "x.npy#0", np.zeros(3))
    os.rename(tmp_path / "x.npy#0.npy", tmp_path / "x.npy#0")
    with pytest.raises(UsageError, match=r"id 'x\.npy#0': '.*/x\.npy' and '.*/x\.npy#0'; ids must be unique"):
        collect([str(tmp_path / "x.npy"), str(tmp_path / "x.npy#0")], "array", sample_rank=1)
    (tmp_path / "t.csv").write_text("id,a\nk,1\nk,2\n")
    with pytest.raises(UsageError, match=r"id 't\.csv#k': both in '.*t\.csv'"):
        collect([str(tmp_path / "t.csv")], "table")


def test_links_are_followed_but_not_in_circles(tree, tmp_path):
    (tree / "shoe/loop").symlink_to(tree)
    (tmp_path / "other").mkdir()
    save(tmp_path / "other/z.png")
    (tree / "linked").symlink_to(tmp_path / "other")
    assert ids(collect([str(tree)], "image")) == [
        "bag/c.png",
        "linked/z.png",
        "shoe/a.JPG",
        "shoe/b.png",
        "top.png",
    ]


def test_names_that_are_not_text(tmp_path):
    raw_name = os.fsencode(tmp_path) + b"/\xff\n.png"
    with open(raw_name, "wb") as file:
        file.write(encoded(Image.fromarray(F_SHAPE), "PNG"))
    (record,) = collect([str(tmp_path)], "image").records
    assert record.id == "\\udcff\n.png"
    assert record.id.encode()
    np.testing.assert_array_equal(read(record, "image").values, F_SHAPE)
    assert escape(record.id) == "%5Cudcff%0A.png"


def test_special_files_are_refused_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(InputError, match="not a regular file"):
        only(tmp_path / "pipe")


def test_listing_does_not_read_the_data(tmp_path, monkeypatch):
    save(tmp_path / "a.png")
    np.savez(tmp_path / "b.npz", z=BATCH)
    monkeypatch.setattr(np, "load", None)
    monkeypatch.setattr(Image, "open", None)
    assert len(collect([str(tmp_path / "a.png"), str(tmp_path / "b.npz")], "image").records) == 2


@pytest.mark.parametrize(
    ("names", "kind"),
    [
        (["a.png"], "image"),
        (["a.npy"], "array"),
        (["dir/*.npz"], "array"),
        (["A.HDF5"], "array"),
        (["t.csv"], "table"),
        (["a.npy", "t.csv"], "array"),
        (["notes.txt", "t.csv"], "table"),
        (["notes.txt"], "image"),
        (["-"], "image"),
    ],
)
def test_the_kind_is_guessed_from_the_first_suffix_that_says_one(names, kind):
    assert guess_kind(names) == kind


def test_the_kind_of_a_folder_and_of_a_list(tmp_path):
    (tmp_path / "deep/er").mkdir(parents=True)
    np.save(tmp_path / "deep/er/x.npy", np.zeros(2))
    save(tmp_path / "deep/.thumbnail.png")
    assert guess_kind([str(tmp_path)]) == "array"
    (tmp_path / "list.txt").write_text(f"{tmp_path}/deep/er/x.npy\n")
    assert guess_kind([f"@{tmp_path}/list.txt"]) == "array"
    (tmp_path / "t.csv").write_text("a\n1\n")
    assert guess_kind([str(tmp_path)]) == "table"
    save(tmp_path / "deep/er/picture.png")  # beside pictures, a table holds their labels
    assert guess_kind([str(tmp_path)]) == "image"
    with pytest.raises(UsageError, match=r"the list 'none\.txt' cannot be read"):
        guess_kind(["@none.txt"])


# --- images


def test_bytes_are_hashed_and_the_size_is_width_height(tree):
    raw = only(tree / "top.png")
    assert raw.sha256 == hashlib.sha256((tree / "top.png").read_bytes()).hexdigest()
    assert raw.size == (4, 6)
    assert raw.values.dtype == np.uint8
    np.testing.assert_array_equal(raw.values, F_SHAPE)


def test_channel_orders(tree):
    np.testing.assert_array_equal(only(tree / "top.png", channels="BGR").values, F_SHAPE[:, :, ::-1])
    grey = only(tree / "top.png", channels="L").values
    assert grey.shape == (6, 4, 1)
    np.testing.assert_allclose(grey[:, :, 0], F_SHAPE @ [0.299, 0.587, 0.114], atol=1)


# how the pixels must lie for the tag's rotation to give F_SHAPE (Exif 2.3, tag 0x0112: where row 0 and column 0 are)
STORED = {
    1: F_SHAPE,
    2: F_SHAPE[:, ::-1],  # row 0 is the top, column 0 the right side
    3: F_SHAPE[::-1, ::-1],
    4: F_SHAPE[::-1],
    5: F_SHAPE.transpose(1, 0, 2),  # row 0 is the left side, column 0 the top
    6: F_SHAPE.transpose(1, 0, 2)[::-1],  # row 0 is the right side, column 0 the top
    7: F_SHAPE.transpose(1, 0, 2)[::-1, ::-1],
    8: F_SHAPE.transpose(1, 0, 2)[:, ::-1],  # row 0 is the left side, column 0 the bottom
}


@pytest.mark.parametrize("orientation", STORED)
@pytest.mark.parametrize("format", ["PNG", "TIFF", "WEBP", "JPEG"])
def test_exif_orientation(orientation, format):
    exif = Image.Exif()
    exif[0x0112] = orientation
    options = {"WEBP": {"lossless": True}, "JPEG": {"quality": 100, "subsampling": 0}}.get(format, {})
    scale = 8  # so that JPEG's blocks keep the shape
    stored = np.ascontiguousarray(STORED[orientation].repeat(scale, 0).repeat(scale, 1))
    found = decode_image(encoded(Image.fromarray(stored), format, exif=exif, **options), "RGB")
    expected = F_SHAPE.repeat(scale, 0).repeat(scale, 1)
    np.testing.assert_allclose(found.astype(float), expected, atol=30 if format == "JPEG" else 0)


@pytest.mark.filterwarnings("ignore:Corrupt EXIF data")  # as data/images.py does outside of pytest
def test_damaged_exif_is_no_reason_to_refuse():
    jpeg = encoded(Image.fromarray(F_SHAPE), "JPEG", exif=b"Exif\0\0II*\0\xff\xff\xff\x7f")
    assert decode_image(jpeg, "RGB").shape == (6, 4, 3)


@pytest.mark.parametrize("channels", ["RGB", "L", "BGR"])
def test_sixteen_bit_grey_png_keeps_its_precision(channels):
    values = np.array([[0, 1, 257], [32768, 65534, 65535]])
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in values)
    found = decode_image(png(3, 2, 16, 0, rows), channels)
    assert found.dtype == np.float32
    assert found.shape == (2, 3, 1 if channels == "L" else 3)
    np.testing.assert_allclose(found[:, :, 0], values / 257, rtol=1e-6)


def test_sixteen_bit_colour_png():
    values = np.array([[[0, 32768, 65535], [257, 2570, 25700]]])
    found = decode_image(png(2, 1, 16, 2, b"\0" + values.astype(">u2").tobytes()), "RGB")
    np.testing.assert_allclose(found.astype(float), values / 257, atol=1)


@pytest.mark.parametrize(("order", "white_is_zero"), [("<", False), ("<", True), (">", False)])
def test_sixteen_bit_grey_tiff(order, white_is_zero):
    values = np.array([[0, 257, 65535]])
    body = (65535 - values if white_is_zero else values).astype(order + "u2").tobytes()
    tags = [(256, 3), (257, 1), (258, 16), (259, 1), (262, 0 if white_is_zero else 1), (273, 8), (277, 1), (279, 6)]
    entries = b"".join(struct.pack(order + "HHIHH", tag, 3, 1, value, 0) for tag, value in tags)
    tiff = (b"II*\0" if order == "<" else b"MM\0*") + struct.pack(order + "I", 14) + body
    tiff += struct.pack(order + "H", len(tags)) + entries + bytes(4)
    np.testing.assert_allclose(decode_image(tiff, "L")[:, :, 0], values / 257)


def test_float_and_32_bit_tiff_are_refused(tmp_path):
    for name, dtype in (("f", np.float32), ("i", np.int32)):
        path = save(tmp_path / f"{name}.tiff", np.ones((2, 2), dtype))
        with pytest.raises(InputError, match=r"whose range is not known; save 8 or 16 unsigned bits"):
            only(path)


@pytest.mark.parametrize("transparency", [None, 1, b"\x00\x80\xff"])
def test_palette_png_gives_its_colours_and_drops_alpha(transparency):
    image = Image.new("P", (3, 1))
    image.putpalette([255, 0, 0, 0, 200, 0, 10, 20, 30])
    image.putdata([0, 1, 2])
    stored = encoded(image, "PNG", **({} if transparency is None else {"transparency": transparency}))
    assert decode_image(stored, "RGB").tolist() == [[[255, 0, 0], [0, 200, 0], [10, 20, 30]]]
    assert decode_image(stored, "L")[0, :, 0].tolist() == [76, 117, 18]


def test_alpha_is_dropped_without_blending():
    image = Image.new("RGBA", (1, 1), (10, 20, 30, 0))
    assert decode_image(encoded(image, "PNG"), "RGB").tolist() == [[[10, 20, 30]]]
    assert decode_image(encoded(Image.new("LA", (1, 1), (99, 7)), "PNG"), "RGB").tolist() == [[[99, 99, 99]]]
    keyed = encoded(Image.new("RGB", (1, 1), (1, 2, 3)), "PNG", transparency=(1, 2, 3))
    assert decode_image(keyed, "L").tolist() == [[[2]]]


@pytest.mark.parametrize("format", ["PNG", "TIFF", "BMP"])
def test_one_bit(format):
    image = Image.fromarray(np.array([[True, False]]))
    assert decode_image(encoded(image, format), "RGB").tolist() == [[[255] * 3, [0] * 3]]


@pytest.mark.parametrize("format", ["JPEG", "TIFF"])
@pytest.mark.parametrize(
    ("ink", "colour"),
    [((0, 0, 0, 0), (255, 255, 255)), ((0, 255, 255, 0), (255, 0, 0)), ((255, 0, 0, 128), (0, 127, 127))],
)
def test_cmyk(format, ink, colour):
    stored = encoded(Image.new("CMYK", (8, 8), ink), format)
    assert (b"Adobe" in stored) == (format == "JPEG")  # the marker that says: stored inverted
    np.testing.assert_allclose(decode_image(stored, "RGB")[4, 4].astype(int), colour, atol=2)


def test_animated_gif_is_its_first_frame():
    frames = [Image.new("RGB", (4, 4), colour) for colour in ("red", "blue")]
    gif = encoded(frames[0], "GIF", save_all=True, append_images=frames[1:])
    assert decode_image(gif, "RGB")[0, 0].tolist() == [255, 0, 0]


def test_decompression_bomb(tmp_path):
    (tmp_path / "bomb.png").write_bytes(png(60_000, 60_000, 8, 2))
    with pytest.raises(InputError, match=r"bomb\.png': Image size \(3600000000 pixels\) exceeds limit of \d+ pixels"):
        only(tmp_path / "bomb.png")


@pytest.mark.parametrize("format", ["PNG", "JPEG", "BMP", "GIF", "TIFF", "WEBP"])
def test_truncated_and_empty_files(tmp_path, format):
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    whole = encoded(Image.fromarray(noise), format)
    for length in (0, 5, 40, len(whole) // 2):
        path = tmp_path / f"{length}.{format.lower()}"
        path.write_bytes(whole[:length])
        with pytest.raises(InputError, match=rf"^'{path.name}': "):
            only(path)


@given(st.integers(0, 2**32), st.sampled_from(["PNG", "JPEG", "BMP", "GIF", "TIFF", "WEBP"]))
def test_damaged_files_fail_as_inputs_or_decode(tmp_path_factory, seed, format):
    rng = np.random.default_rng(seed)
    stored = bytearray(encoded(Image.fromarray(F_SHAPE), format))
    for place in rng.integers(0, len(stored), 3):
        stored[place] = rng.integers(0, 256)
    path = tmp_path_factory.getbasetemp() / "damaged.png"
    path.write_bytes(stored)
    with contextlib.suppress(InputError):  # and no other error
        assert only(path).values.ndim == 3


def test_formats_outside_the_list_are_not_tried(tmp_path):
    (tmp_path / "x.png").write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n")
    with pytest.raises(InputError, match="not an image that can be read"):
        only(tmp_path / "x.png")


def test_text_in_a_png_that_swells_is_refused_or_ignored(tmp_path):
    text = PngImagePlugin.PngInfo()
    text.add_text("a", "b" * 80_000_000, zip=True)
    save(tmp_path / "x.png", pnginfo=text)
    with pytest.raises(InputError, match=r"^'x\.png': "):
        only(tmp_path / "x.png")


# --- arrays


BATCH = np.arange(24, dtype=np.float32).reshape(2, 3, 4)


def array_file(path):
    if path.suffix == ".npy":
        np.save(path, BATCH)
    elif path.suffix == ".npz":
        np.savez_compressed(path, z=BATCH, one=BATCH[0])
    else:
        with h5py.File(path, "w") as file:
            file.create_dataset("z", data=BATCH, chunks=(1, 3, 4), compression="gzip")
            file["one"] = BATCH[0]
            file.create_group("group")["ignored"] = BATCH
    return path


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


# --- tables


TABLE = 'age,id,sex,label,bmi\n50,p1,1,ill,20.5\n\n61,"p,2",2,well,31\n'


def test_csv_rows(tmp_path):
    path = tmp_path / "t.csv"
    path.write_text("\ufeff" + TABLE, encoding="utf-8")
    found = collect([str(path)], "table", columns=["bmi", "age"])
    assert ids(found) == ["t.csv#p,2", "t.csv#p1"]
    assert [record.label for record in found.records] == ["well", "ill"]
    second, first = (read(record, "table", columns=["bmi", "age"]) for record in found.records)
    np.testing.assert_array_equal(first.values, [20.5, 50])
    np.testing.assert_array_equal(second.values, [31, 61])
    assert first.values.dtype == np.float64
    assert first.sha256 != second.sha256
    np.testing.assert_array_equal(
        read(found.records[1], "table").values, [50, 1, 20.5]
    )  # no columns named: all but id, label


def test_csv_hash_is_that_of_the_row(tmp_path):
    path = tmp_path / "t.csv"

    def hashes(text):
        path.write_text(text)
        return [read(record, "table").sha256 for record in collect([str(path)], "table").records]

    before = hashes("a,b\n1,2\n3,4\n")
    assert hashes("a,b\n1,2\n3,5\n9,9\n")[0] == before[0]
    assert hashes("a,b\n1,2\n3,5\n")[1] != before[1]
    assert hashes("b,a\n1,2\n3,4\n")[0] != before[0]


def test_csv_without_ids_counts_rows_and_takes_the_folder_as_label(tmp_path):
    (tmp_path / "in/sick").mkdir(parents=True)
    rows = "".join(f'{i},"two\nlines"\n' for i in range(11))
    (tmp_path / "in/sick/t.csv").write_text("a,b\n" + rows)
    found = collect([str(tmp_path / "in")], "table", columns=["a"])
    assert ids(found) == [f"sick/t.csv#{i}" for i in range(11)]
    assert {record.label for record in found.records} == {"sick"}
    assert [read(record, "table", columns=["a"]).values[0] for record in found.records] == list(range(11))


def test_an_id_column_that_is_a_feature_is_no_id(tmp_path):
    (tmp_path / "t.csv").write_text("id,label\n7,1\n")
    (record,) = collect([str(tmp_path / "t.csv")], "table", columns=["id"]).records
    assert record.id == "t.csv#0"
    assert read(record, "table", columns=["id"]).values == [7]


def test_csv_without_the_columns(tmp_path):
    path = tmp_path / "t.csv"
    path.write_text(TABLE)
    with pytest.raises(UsageError, match=r"t\.csv': has no column 'weight'; its columns: age, id, sex, label, bmi"):
        collect([str(path)], "table", columns=["age", "weight"])
    path.write_text("a,a\n1,2\n")
    with pytest.raises(UsageError, match=r"has 2 columns 'a'"):
        collect([str(path)], "table")
    path.write_text("")
    with pytest.raises(UsageError, match="no header row"):
        collect([str(path)], "table")
    path.write_text("a,b\n")
    with pytest.raises(NoInputsError, match=r"t\.csv' holds no records"):
        collect([str(path)], "table")


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ("1,", "column 'b' holds '', which is not a number"),
        ("1,x\xff", "column 'b' holds"),
        ("1,nan", "holds 1 values that are NaN"),
        ("1", "the row has 1 cells, the header 2"),
    ],
)
def test_a_bad_row_is_one_failed_record(tmp_path, row, message):
    (tmp_path / "t.csv").write_bytes(f"a,b\n1,2\n{row}\n3,4\n".encode("latin-1"))
    good, bad, last = collect([str(tmp_path / "t.csv")], "table").records
    with pytest.raises(InputError, match=rf"^'t\.csv#1': {message}"):
        read(bad, "table")
    np.testing.assert_array_equal(read(good, "table").values, [1, 2])
    np.testing.assert_array_equal(read(last, "table").values, [3, 4])


def test_a_table_that_shrinks_meanwhile(tmp_path):
    (tmp_path / "t.csv").write_text("a\n1\n2\n")
    records = collect([str(tmp_path / "t.csv")], "table").records
    (tmp_path / "t.csv").write_text("a\n1\n")
    with pytest.raises(InputError, match="the row is gone"):
        read(records[1], "table")
    os.remove(tmp_path / "t.csv")
    with pytest.raises(InputError, match="no such file"):
        read(records[0], "table")


def test_arrays_as_tables(tmp_path):
    np.save(tmp_path / "x.npy", [[1, 2], [3, 4]])
    found = collect([str(tmp_path)], "table", columns=["a", "b"])
    assert ids(found) == ["x.npy#0", "x.npy#1"]
    np.testing.assert_array_equal(read(found.records[1], "table").values, [3, 4])


# --- labels


NAMES = ["T-shirt/top", "Ankle boot", "Bag"]


def in_folders(tmp_path, *folders):
    for folder in folders:
        save(tmp_path / "in" / folder / "x.png")
    save(tmp_path / "in/loose.png")
    return collect([str(tmp_path / "in")], "image")


def test_folder_names_are_labels(tmp_path):
    found = in_folders(tmp_path, "T-shirt_top", "ankle boot", "Bag", "1", "7", "07", "hat")
    by_folder = dict(zip([record.label for record in found.records], class_labels(found, NAMES).tolist(), strict=True))
    assert by_folder == {
        "T-shirt_top": 0,
        "ankle boot": 1,
        "Bag": 2,
        "1": 1,
        "7": UNKNOWN_LABEL,
        "07": UNKNOWN_LABEL,
        "hat": UNKNOWN_LABEL,
        "": UNKNOWN_LABEL,
    }
    assert class_labels(found, NAMES).dtype == np.uint16


def test_indices_without_names_and_names_that_are_numbers(tmp_path):
    found = in_folders(tmp_path, "7", "0")
    assert class_labels(found, None).tolist() == [0, 7, UNKNOWN_LABEL]
    assert class_labels(found, ["5", "7", "0"]).tolist() == [2, 1, UNKNOWN_LABEL]


def test_a_name_of_two_outputs_is_no_label(tmp_path):
    found = in_folders(tmp_path, "crane")
    with pytest.warns(AttrcliWarning, match=r"'crane' fits the outputs \[0, 1\]; use an index"):
        assert class_labels(found, ["crane", "crane"]).tolist() == [UNKNOWN_LABEL] * 2


def test_labels_from_a_file(tmp_path):
    found = in_folders(tmp_path, "a", "b")
    path = tmp_path / "labels.csv"
    path.write_text("id,label,note\na/x.png,bag,\nloose.png,1,\nelsewhere.png,0,\n")
    assert labels_csv(path, found, NAMES).tolist() == [2, UNKNOWN_LABEL, 1]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "id,label\na/x.png,hat\nb/x.png,3\n",
            r"labels \['3', 'hat'\] match nothing; accepted: the names T-shirt/top, ",
        ),
        ("name,label\na/x.png,Bag\n", r"the columns 'id' and 'label'"),
        ("id,label\nx.png,Bag\n", r"'x\.png' is the name of several inputs"),
        ("id,label\ny.png,Bag\n", r"no id is that of an input; an input's id is like 'a/x\.png'"),
    ],
)
def test_label_files_that_do_not_fit(tmp_path, text, message):
    found = in_folders(tmp_path, "a", "b")
    path = tmp_path / "labels.csv"
    path.write_text(text)
    with pytest.raises(UsageError, match=message):
        labels_csv(path, found, NAMES)
    with pytest.raises(UsageError, match=r"none\.csv': accepted for labels"):
        labels_csv(tmp_path / "none.csv", found, NAMES)


# --- hashes of other files


def test_the_hash_of_a_file_is_that_of_its_bytes(tmp_path):
    (tmp_path / "x").write_bytes(b"abc")
    # FIPS 180-4, the example of one block
    assert sha256_of(tmp_path / "x") == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    with pytest.raises(UsageError, match=r"none' cannot be read: No such file"):
        sha256_of(tmp_path / "none")


def test_the_hash_of_a_folder_covers_names_and_contents(tmp_path):
    (tmp_path / "a/b").mkdir(parents=True)
    (tmp_path / "a/b/x").write_bytes(b"1")
    (tmp_path / "a/y").write_bytes(b"2")
    found = [sha256_of(tmp_path / "a")]
    os.rename(tmp_path / "a", tmp_path / "c")
    assert sha256_of(tmp_path / "c") == found[0]
    os.rename(tmp_path / "c/y", tmp_path / "c/z")
    found.append(sha256_of(tmp_path / "c"))
    (tmp_path / "c/z").write_bytes(b"3")
    found.append(sha256_of(tmp_path / "c"))
    os.remove(tmp_path / "c/z")
    found.append(sha256_of(tmp_path / "c"))
    assert len(set(found)) == 4


# --- names of output files


def test_escaped_ids_stay_readable():
    assert escape("shoe/b_1.png") == "shoe+b_1.png"
    assert escape("x.npz#key[3]") == "x.npz=key%5B3%5D"
    assert escape("../-a") == "%2E.+-a"
    assert escape("-rf") == "%2Drf"


@given(st.lists(st.text(alphabet="aA/#%+=~._- é\n\x00\udcff", max_size=8), unique=True))
def test_escape_is_injective_and_safe(names):
    escaped = [escape(name) for name in names]
    assert len(set(escaped)) == len(names)
    for name in escaped:
        assert name.isascii()
        assert name.isprintable()
        assert not set(name) & set('/\\:*?"<>| ')
        assert name not in ("", ".", "..")


def test_long_ids_are_cut_and_stay_different():
    first, second = (escape("é" * 200 + end) for end in "ab")
    assert first != second
    assert len(first) <= 200
    assert first == escape("é" * 200 + "a")
