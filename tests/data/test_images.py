"""Images: pixels of every mode and format, upright, and what each kind of bad file is told."""

import contextlib
import hashlib
import struct

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from input_files import F_SHAPE, encoded, only, png, save
from PIL import Image, PngImagePlugin

from attrcli.data import decode_image
from attrcli.errors import InputError


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


def noted(tmp_path, image, format, **options):
    path = tmp_path / f"x.{format.lower()}"
    path.write_bytes(encoded(image, format, **options))
    return only(path).notes


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P", "RGB"])
def test_dropped_transparency_is_noted(tmp_path, mode):
    image = Image.new(mode, (2, 1))
    options = {"P": {"transparency": 0}, "RGB": {"transparency": (0, 0, 0)}}.get(mode, {})
    [note] = (note for note in noted(tmp_path, image, "PNG", **options) if "grey" not in note)
    assert note.startswith("its transparency is dropped")
    opaque = Image.new(mode, (2, 1), {"RGBA": (1, 2, 3, 255), "LA": (9, 255), "P": 1, "RGB": (1, 2, 3)}[mode])
    assert all("grey" in note for note in noted(tmp_path, opaque, "PNG", **options))


@pytest.mark.parametrize("format", ["GIF", "TIFF", "PNG", "WEBP"])
def test_frames_that_are_not_read_are_noted(tmp_path, format):
    frames = [Image.new("RGB", (4, 4), colour) for colour in ("red", "blue")]
    assert noted(tmp_path, frames[0], format) == ()
    several = noted(tmp_path, frames[0], format, save_all=True, append_images=frames[1:])
    assert several == ("only the first of its frames is read",)


GREY = np.arange(0, 240, 10, np.uint8).reshape(6, 4)


@pytest.mark.parametrize(
    ("made", "channels", "told"),
    [
        (Image.fromarray(GREY), "RGB", "it is grey, and the model gets it as RGB"),
        (Image.fromarray(GREY), "BGR", "it is grey, and the model gets it as BGR"),
        (Image.fromarray(GREY.astype(np.uint16)), "RGB", "it is grey"),
        (Image.fromarray(GREY > 100), "RGB", "it is grey"),
        (Image.fromarray(F_SHAPE), "L", "it has colours, and the model gets their brightness alone"),
        (Image.fromarray(F_SHAPE).convert("P"), "L", "it has colours"),
        (Image.fromarray(GREY), "L", ""),
        (Image.fromarray(F_SHAPE), "RGB", ""),
        (Image.fromarray(F_SHAPE), "BGR", ""),
        (Image.fromarray(np.repeat(GREY[:, :, None], 3, 2)), "L", ""),  # nothing is lost
    ],
)
def test_a_conversion_between_grey_and_colours_is_noted(made, channels, told, tmp_path):
    made.save(tmp_path / "x.png")
    found = only(tmp_path / "x.png", channels=channels).notes
    if made.mode in ("L", "RGB"):
        np.save(tmp_path / "y.npy", np.asarray(made))
        assert only(tmp_path / "y.npy", channels=channels).notes == found
    assert len(found) == bool(told)
    assert all(note.startswith(told) for note in found)


def test_what_is_wrong_behind_the_first_frame_does_not_matter(tmp_path):
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "blue")]
    alone, whole = (encoded(frames[0], "GIF", save_all=True, append_images=more) for more in ([], frames[1:]))
    for length in range(len(alone), len(whole)):
        (tmp_path / "x.gif").write_bytes(whole[:length])
        np.testing.assert_array_equal(only(tmp_path / "x.gif").values[0, 0], [255, 0, 0])


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
