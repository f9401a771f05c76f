import os

import numpy as np
import pytest
from PIL import Image

from attrcli.errors import InputError, NonFiniteError, UsageError
from attrcli.render import (
    DIVERGING,
    ZERO_NOTE,
    Style,
    describe,
    heatmap,
    overlay,
    reduce_channels,
    robust_scale,
    run_scale,
    save_png,
    shrink,
)

STYLE = Style()
NAMES = [name + suffix for name in DIVERGING for suffix in ("", "_r")]


def grey(height, width, value=128):
    return np.full((height, width, 1), value, np.uint8)


def drawn(image, values, box=None, scale=1.0, style=STYLE):
    box = box or (0, 0, image.shape[1], image.shape[0])
    return np.asarray(overlay(image, values, box, scale, style)).astype(int)


def redness(pixels):
    return pixels[..., 0].astype(int) - pixels[..., 2]


# style


def test_a_colour_map_that_is_not_diverging_is_refused_with_the_accepted_ones():
    with pytest.raises(UsageError, match=r"viridis.*bwr.*RdBu"):
        Style(colormap="viridis")


@pytest.mark.parametrize("options", [{"alpha": 0}, {"alpha": 1.1}, {"percentile": 0}, {"percentile": 101}])
def test_style_values_out_of_range_are_refused(options):
    with pytest.raises(UsageError):
        Style(**options)


def test_an_unknown_scale_is_refused():
    with pytest.raises(UsageError, match="'image' or 'run'"):
        Style(scale="batch")


# channels and scale


def test_channels_are_summed_with_their_sign():
    attribution = np.array([[[1.0, 2.0]], [[-1.0, 3.0]], [[0.5, -4.0]]], np.float32)
    np.testing.assert_array_equal(reduce_channels(attribution), [[0.5, 1.0]])
    assert reduce_channels(attribution).dtype == np.float32


def test_half_precision_is_summed_in_single():
    attribution = np.full((3, 1, 1), 40000.0, np.float16)
    assert reduce_channels(attribution)[0, 0] == 120000


def test_an_attribution_without_a_channel_axis_is_refused():
    with pytest.raises(InputError, match=r"\(4, 4\)"):
        reduce_channels(np.zeros((4, 4)))


def test_scale_is_the_percentile_of_the_magnitude():
    values = np.linspace(-1, 0, 101).reshape(1, -1)
    assert robust_scale(values, 99) == pytest.approx(0.99)
    assert robust_scale(values, 100) == 1


def test_scale_of_a_sparse_map_is_its_largest_magnitude():
    values = np.zeros((50, 50))
    values[3, 3] = -2
    assert robust_scale(values, 99) == 2
    assert run_scale([values], 99) == 2


def test_scale_of_zeros_is_zero():
    assert robust_scale(np.zeros((3, 3)), 99) == 0
    assert run_scale([np.zeros((3, 3))], 99) == 0
    assert run_scale([], 99) == 0


@pytest.mark.parametrize("exponent", [-30, -3, 0, 20])
def test_run_scale_is_the_scale_of_all_maps_together_in_any_order(exponent):
    maps = list(np.random.default_rng(0).standard_normal((7, 40, 40)).astype(np.float32) * 10.0**exponent)
    exact = robust_scale(np.stack(maps), 99)
    assert exact * 0.999 <= run_scale(maps, 99) <= exact * 1.005
    assert run_scale(maps, 99) == run_scale(maps[::-1], 99)
    assert run_scale(maps, 100) == pytest.approx(robust_scale(np.stack(maps), 100), rel=1e-6)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_a_map_that_is_not_finite_is_never_a_picture(bad):
    values = np.ones((4, 4), np.float32)
    values[1, 1] = bad
    for draw in (
        lambda: robust_scale(values, 99),
        lambda: run_scale([values], 99),
        lambda: heatmap(values, 1.0, STYLE),
        lambda: drawn(grey(4, 4), values),
    ):
        with pytest.raises(NonFiniteError, match="1 of 16"):
            draw()


@pytest.mark.parametrize("scale", [0.0, -1.0, float("nan")])
def test_a_scale_that_cannot_show_the_map_is_refused(scale):
    with pytest.raises(ValueError, match="cannot show"):
        heatmap(np.ones((2, 2)), scale, STYLE)


# heatmap


@pytest.mark.parametrize("name", NAMES)
def test_zero_has_the_neutral_colour_exactly(name):
    from matplotlib import colormaps

    centre = np.rint(np.array(colormaps[name].resampled(255)(127)[:3]) * 255)
    values = np.array([[0.0, -0.0]], np.float32)
    np.testing.assert_array_equal(heatmap(values, 1.0, Style(colormap=name))[0], [centre, centre])


def test_default_neutral_is_white_and_the_ends_red_and_blue():
    colours = heatmap(np.array([[-1.0, 0.0, 1.0]]), 1.0, STYLE)[0]
    np.testing.assert_array_equal(colours, [[0, 0, 255], [255, 255, 255], [255, 0, 0]])


def test_opposite_values_have_mirrored_colours():
    values = np.linspace(0, 1.5, 40, dtype=np.float32)[None]
    positive, negative = heatmap(values, 1.0, STYLE), heatmap(-values, 1.0, STYLE)
    np.testing.assert_array_equal(positive, negative[..., ::-1])


@pytest.mark.parametrize("name", NAMES)
def test_a_reversed_colour_map_swaps_the_signs(name):
    values = np.linspace(-1, 1, 21)[None]
    other = name.removesuffix("_r") if name.endswith("_r") else name + "_r"
    left, right = (heatmap(v, 1.0, Style(colormap=n)) for v, n in ((values, name), (-values, other)))
    np.testing.assert_allclose(left.astype(int), right, atol=1)


def test_colours_saturate_at_the_scale():
    values = np.random.default_rng(0).standard_normal((100, 100))
    colours = heatmap(values, robust_scale(values, 90), STYLE)
    saturated = (colours == [255, 0, 0]).all(-1) | (colours == [0, 0, 255]).all(-1)
    assert 0.1 <= saturated.mean() < 0.11


@pytest.mark.parametrize("scale", [5e-324, 1e-45, 1e-30, 1e30, 1e300])
def test_extreme_scales_neither_warn_nor_flip(scale):
    colours = heatmap(np.array([[-scale, 0.0, scale, 1e300]]), scale, STYLE)[0]
    np.testing.assert_array_equal(redness(colours), [-255, 0, 255, 255])


# overlay


@pytest.mark.parametrize(("height", "width"), [(28, 28), (1, 1), (1, 37), (53, 1), (480, 640)])
@pytest.mark.parametrize("channels", [1, 3])
def test_overlay_has_the_resolution_of_the_image(height, width, channels):
    image = np.full((height, width, channels), 90, np.uint8)
    picture = overlay(image, np.ones((14, 14), np.float32), (0, 0, width, height), 1.0, STYLE)
    assert picture.size == (width, height)
    assert picture.mode == "RGB"


def test_full_photos_are_drawn_at_full_resolution():
    values = np.random.default_rng(0).standard_normal((224, 224)).astype(np.float32)
    image = np.zeros((3000, 4000, 3), np.uint8)
    assert overlay(image, values, (437.5, 187.5, 3562.5, 2812.5), 1.0, STYLE).size == (4000, 3000)


def test_each_pixel_of_a_map_lies_on_its_pixel_of_the_image():
    values = np.zeros((6, 5), np.float32)
    values[1, 3], values[4, 0] = 1, -1
    pixels = redness(drawn(grey(6, 5), values))
    expected = np.zeros((6, 5))
    expected[1, 3], expected[4, 0] = 1, -1
    np.testing.assert_array_equal(np.sign(pixels), expected)


def test_near_zero_shows_the_picture_in_grey():
    image = np.random.default_rng(0).integers(0, 256, (20, 20, 3), dtype=np.uint8)
    values = np.full((20, 20), 1e-6, np.float32)
    pixels = drawn(image, values)
    assert (pixels[..., 0] == pixels[..., 1]).all()
    assert (pixels[..., 1] == pixels[..., 2]).all()
    luminance = np.asarray(Image.fromarray(image).convert("L")).astype(float)
    assert np.corrcoef(pixels[..., 0].ravel(), luminance.ravel())[0, 1] > 0.999


def test_colour_grows_with_the_magnitude_and_saturates():
    pixels = redness(drawn(grey(1, 5), np.array([[0, 0.25, 0.5, 1, 2]], np.float32)))[0]
    assert pixels[0] == 0 < pixels[1] < pixels[2] < pixels[3] == pixels[4]


@pytest.mark.parametrize("shade", [0, 60, 128, 255])
@pytest.mark.parametrize("alpha", [0.3, 0.6, 1.0])
def test_sign_shows_on_black_and_on_white(shade, alpha):
    values = np.array([[-1, -0.3, 0.3, 1]], np.float32)
    pixels = redness(drawn(grey(1, 4, shade), values, style=Style(alpha=alpha)))[0]
    assert (np.sign(pixels) == [-1, -1, 1, 1]).all()
    assert (abs(pixels) > 12).all()


def test_full_alpha_covers_the_picture():
    np.testing.assert_array_equal(drawn(grey(1, 1), np.ones((1, 1)), style=Style(alpha=1.0))[0, 0], [255, 0, 0])


def test_outside_the_box_the_picture_is_dimmed_and_without_colour():
    pixels = drawn(grey(40, 60, 200), np.ones((8, 8), np.float32), box=(10, 0, 50, 40))
    assert (pixels[:, :10] == 80).all()
    assert (pixels[:, 50:] == 80).all()
    assert (redness(pixels[:, 10:50]) > 100).all()


def test_a_pixel_belongs_to_the_box_when_its_centre_does():
    pixels = redness(drawn(grey(10, 10), np.ones((2, 2), np.float32), box=(1.75, 2.5, 8.4, 7.51)))
    rows, columns = np.nonzero(pixels)
    assert (columns.min(), columns.max(), rows.min(), rows.max()) == (2, 7, 2, 7)


def test_a_box_beyond_the_image_shows_the_part_of_the_map_on_it():
    values = np.concatenate([np.ones((4, 2)), -np.ones((4, 2))], axis=1).astype(np.float32)
    pixels = redness(drawn(grey(10, 10), values, box=(-10, 0, 10, 10)))
    assert (pixels[:, 3:] < 0).all()  # the positive half lies in the padding to the left


@pytest.mark.parametrize("box", [(10, 0, 20, 10), (0, 0, 0, 10), (5, 5, 4, 6), (float("nan"), 0, 10, 10)])
def test_a_box_that_misses_the_image_is_refused(box):
    with pytest.raises(InputError, match="10x10"):
        drawn(grey(10, 10), np.ones((2, 2)), box=box)


def test_a_box_within_one_pixel_still_shows():
    assert redness(drawn(grey(3, 3), np.ones((8, 8)), box=(1.4, 1.4, 1.6, 1.6)))[1, 1] > 0


def test_enlarging_interpolates_values_and_keeps_their_range_and_sign():
    pixels = redness(drawn(grey(10, 200), np.array([[-1, 1]], np.float32)))[5]
    assert (np.diff(pixels) >= 0).all()
    assert abs(pixels[99:101]).max() <= 3  # through zero in the middle, where colours would have mixed to purple
    assert (pixels[:99] < 0).all()
    assert (pixels[101:] > 0).all()


def test_an_outlier_does_not_bleed_into_its_neighbours():
    values = np.full((1, 9), 0.0, np.float32)
    values[0, 4] = 1e30
    pixels = redness(drawn(grey(10, 90), values))[5]
    assert (pixels[:34] == 0).all()
    assert (pixels[56:] == 0).all()


def test_zeros_are_stamped_with_words_or_crossed_out():
    image = grey(200, 300)
    stamped = drawn(image, np.zeros((7, 7)), scale=0.0)
    plain = drawn(image, np.full((7, 7), 1e-9), scale=1.0)
    changed = (stamped != plain).any(-1)
    assert changed[100].all()
    assert not changed[:40].any()
    small = drawn(grey(28, 28), np.zeros((28, 28)), scale=0.0)
    np.testing.assert_array_equal(small[0, 0], [255, 200, 0])
    np.testing.assert_array_equal(small[27, 0], [255, 200, 0])
    assert (small[0, 10] == small[0, 10, 0]).all()
    assert drawn(grey(1, 1), np.zeros((1, 1)), scale=0.0).shape == (1, 1, 3)


@pytest.mark.parametrize(
    "image", [np.zeros((4, 4), np.uint8), np.zeros((4, 4, 4), np.uint8), np.zeros((4, 4, 3)), np.zeros((0, 4, 3), "u1")]
)
def test_what_is_no_picture_is_refused_with_its_shape(image):
    with pytest.raises(InputError, match=r"\(height, width, 1 or 3\)"):
        overlay(image, np.ones((4, 4)), (0, 0, 4, 4), 1.0, STYLE)


@pytest.mark.parametrize("shape", [(3, 4, 4), (16,), (0, 4)])
def test_what_is_no_map_is_refused_with_its_shape(shape):
    with pytest.raises(InputError, match=str(shape[0])):
        heatmap(np.ones(shape), 1.0, STYLE)


def test_inputs_are_left_alone():
    image, values = grey(9, 9), np.full((9, 9), 3.0, np.float32)
    drawn(image, values)
    assert (image == 128).all()
    assert (values == 3).all()


# shrink


def test_shrink_scales_the_box_with_the_picture():
    image, box = shrink(np.zeros((300, 400, 3), np.uint8), (50.0, 0.0, 350.0, 300.0), 100)
    assert image.shape == (75, 100, 3)
    assert box == (12.5, 0.0, 87.5, 75.0)


def test_shrink_leaves_small_pictures_and_keeps_one_pixel_of_thin_ones():
    image = grey(28, 28)
    assert shrink(image, (0, 0, 28, 28), 100)[0] is image
    assert shrink(np.zeros((1, 4000, 1), np.uint8), (0, 0, 4000, 1), 100)[0].shape == (1, 100, 1)


# files


def test_metadata_survives_the_file(tmp_path):
    values = np.array([[0.5, -2.0]], np.float32)
    facts = describe(values, 1.0, STYLE) | {"target": "Schnürsenkel 靴", "id": "a\nb\0\udcff"}
    save_png(Image.new("RGB", (3, 2)), tmp_path / "x.png", facts)
    with Image.open(tmp_path / "x.png") as picture:
        text = picture.text
        assert picture.size == (3, 2)
    assert float(text["scale"]) == 1.0
    assert float(text["saturated"]) == 0.5
    assert (text["percentile"], text["colormap"], text["scaling"]) == ("99.0", "bwr", "image")
    assert text["target"] == "Schnürsenkel 靴"
    assert text["id"] == "a\nb\ufffd\\udcff"
    assert "note" not in text


def test_zeros_are_noted_in_the_metadata():
    assert describe(np.zeros((2, 2)), 0.0, STYLE)["note"] == ZERO_NOTE


def test_an_existing_file_is_kept_unless_asked(tmp_path):
    path = tmp_path / "x.png"
    save_png(Image.new("RGB", (1, 1)), path, {})
    with pytest.raises(UsageError, match=r"x\.png exists"):
        save_png(Image.new("RGB", (2, 2)), path, {})
    save_png(Image.new("RGB", (2, 2)), path, {}, overwrite=True)
    with Image.open(path) as picture:
        assert picture.size == (2, 2)


def test_a_failed_write_leaves_nothing_new(tmp_path, monkeypatch):
    path = tmp_path / "x.png"
    save_png(Image.new("RGB", (1, 1)), path, {})
    before = path.read_bytes()

    def full(source, target):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(UsageError, match="No space left"):
        save_png(Image.new("RGB", (2, 2)), path, {}, overwrite=True)
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


def test_a_missing_folder_is_a_usage_error(tmp_path):
    with pytest.raises(UsageError, match="cannot be written"):
        save_png(Image.new("RGB", (1, 1)), tmp_path / "no" / "x.png", {})


def test_the_file_is_as_readable_as_any_other(tmp_path):
    save_png(Image.new("RGB", (1, 1)), tmp_path / "x.png", {})
    (tmp_path / "plain").touch()
    assert (tmp_path / "x.png").stat().st_mode == (tmp_path / "plain").stat().st_mode
