import numpy as np
import pytest
from PIL import Image

from attrcli.errors import InputError, NonFiniteError, UsageError
from attrcli.render import Style, cell, montage, panel, thumbnail

STYLE = Style()
RED, BLUE = (255, 0, 0), (0, 0, 255)


def colours(picture):
    return {tuple(int(v) for v in pixel) for pixel in np.asarray(picture).reshape(-1, 3)}


def gradient(height, width):
    return np.linspace(-1, 1, height * width, dtype=np.float32).reshape(height, width)


def box(image):
    return (0.0, 0.0, float(image.shape[1]), float(image.shape[0]))


# panel


@pytest.mark.parametrize(
    ("shape", "width"),
    [((28, 28, 1), 3 * 224), ((224, 224, 3), 3 * 224), ((3000, 4000, 3), 3 * 400), ((1, 1, 1), 600), ((1, 50, 3), 600)],
)
def test_panel_shows_every_size_legibly(shape, width):
    image = np.full(shape, 100, np.uint8)
    picture = panel(image, gradient(7, 7), box(image), 1.0, STYLE, ["title", "line"])
    assert picture.mode == "RGB"
    assert width < picture.width < width + 200
    assert 100 < picture.height < 520


def test_panel_pixels_stay_square_and_exact():
    image = np.zeros((28, 28, 1), np.uint8)
    image[5, 9] = 255
    picture = np.asarray(panel(image, np.ones((28, 28), np.float32), box(image), 1.0, STYLE))
    left, top = 16, 16 + 19
    tile = picture[top : top + 224, left : left + 224]
    expected = np.kron(image[:, :, 0], np.ones((8, 8), np.uint8))
    np.testing.assert_array_equal(tile, np.repeat(expected[..., None], 3, 2))


def test_panel_leaves_the_input_in_colour():
    image = np.full((224, 224, 3), (10, 200, 30), np.uint8)
    assert (10, 200, 30) in colours(panel(image, gradient(224, 224), box(image), 1.0, STYLE))


def test_panel_numbers_of_the_colour_bar_follow_the_scale():
    image = np.zeros((28, 28, 1), np.uint8)
    one, two = (np.asarray(panel(image, gradient(28, 28) * s, box(image), s, STYLE)) for s in (1.0, 2.5))
    differing = np.nonzero((one != two).any((0, 2)))[0]
    assert differing.min() > one.shape[1] - 100  # the pictures are equal, only the numbers differ


def test_panel_of_zeros_is_labelled_and_has_no_colour():
    image = np.full((28, 28, 1), 90, np.uint8)
    picture = panel(image, np.zeros((28, 28), np.float32), box(image), 0.0, STYLE, ["t"])
    pixels = np.asarray(picture)
    left, top, step = 16, 16 + 19 + 12 + 19, 224 + 12
    for number in (1, 2):
        tile = pixels[top : top + 224, left + number * step : left + number * step + 224]
        assert (tile == (255, 200, 0)).all(-1).any()
        assert not ((tile == RED) | (tile == BLUE)).all(-1).any()


def test_panel_refuses_what_overlay_refuses():
    image = np.zeros((4, 4, 3), np.uint8)
    with pytest.raises(NonFiniteError):
        panel(image, np.full((4, 4), np.nan), box(image), 1.0, STYLE)
    with pytest.raises(InputError):
        panel(image[..., :2], np.ones((4, 4)), box(image), 1.0, STYLE)


def test_captions_from_outside_do_not_change_the_layout():
    image = np.zeros((28, 28, 1), np.uint8)
    plain = panel(image, gradient(28, 28), box(image), 1.0, STYLE, ["a", "b"])
    for text in ("x\n" * 50, "\x1b]0;title\x07", "\udc80\u202e", "W" * 10_000, "", "$x_2^{"):
        picture = panel(image, gradient(28, 28), box(image), 1.0, STYLE, [text, text])
        assert picture.size == plain.size
        border = np.asarray(picture)[:, -8:]
        assert (border == 255).all()


# grid


def test_montage_places_each_cell_in_its_row_and_column():
    cells = [[Image.new("RGB", (200, 180), (10 * r, 20 * c, 99)) for c in range(3)] for r in range(2)]
    picture = np.asarray(montage(cells, ["one", "two"], ["a", "b", "c"]))
    tops = set()
    for r in range(2):
        for c in range(3):
            rows, columns = np.nonzero((picture == (10 * r, 20 * c, 99)).all(-1))
            assert (np.ptp(rows) + 1, np.ptp(columns) + 1, rows.size) == (180, 200, 180 * 200)
            tops.add((int(rows.min()), r, int(columns.min()), c))
    assert len({top for top, *_ in tops}) == 2
    assert len({left for *_, left, _ in tops}) == 3
    assert [c for *_, c in sorted(tops, key=lambda t: t[2:])][::2] == [0, 1, 2]


def test_montage_enlarges_small_cells_and_reduces_large_ones():
    small = montage([[Image.new("RGB", (28, 28), RED)]], ["r"], ["c"])
    large = montage([[Image.new("RGB", (4000, 3000), RED)]], ["r"], ["c"])
    assert (np.asarray(small) == RED).all(-1).sum() == 168 * 168
    assert (np.asarray(large) == RED).all(-1).sum() == 320 * 240


def test_a_missing_cell_is_a_frame_with_the_reason():
    full = Image.new("RGB", (160, 160), RED)
    none, short, other = (
        np.asarray(montage([[full, gap]], ["r"], ["a", "b"])) for gap in (None, "no rule for Erf", "out of memory")
    )
    assert none.shape == short.shape == other.shape
    assert (none != short).any()
    assert (short != other).any()
    assert (none == RED).all(-1).sum() == 160 * 160


def test_a_row_or_column_of_missing_cells_keeps_its_place():
    assert montage([[None, "x" * 5000], [None, "y"]], ["r", ""], ["a", "b"]).size[0] > 300


def test_row_labels_may_have_lines_and_any_length():
    cells = [[Image.new("RGB", (160, 160))], [Image.new("RGB", (160, 160))]]
    picture = montage(cells, [["id", "boot 0.98"], "x/" * 5000], ["gradient"], title="t\n" * 500)
    assert picture.width < 500


def test_montage_key_shows_the_common_scale_or_says_that_there_is_none():
    cells = [[Image.new("RGB", (300, 160))]]
    plain = montage(cells, ["r"], ["c"])
    shared, own = (np.asarray(montage(cells, ["r"], ["c"], key=(STYLE, scale))) for scale in (0.25, None))
    assert shared.shape == own.shape
    assert shared.shape[0] > plain.height
    assert {RED, BLUE} <= colours(shared)
    assert (shared != own).any()


@pytest.mark.parametrize(
    ("rows", "labels", "columns"), [([[None]], [], ["a"]), ([[None]], ["r"], ["a", "b"]), ([[]], ["r"], [])]
)
def test_a_ragged_grid_is_refused(rows, labels, columns):
    with pytest.raises(UsageError):
        montage(rows, labels, columns)


def test_a_grid_without_rows_is_just_its_head():
    assert montage([], [], ["a", "b"], title="nothing").height < 100


def test_a_grid_too_large_for_one_picture_is_refused():
    with pytest.raises(UsageError, match="fewer inputs"):
        montage([[None] * 100] * 100, [""] * 100, [""] * 100)


def test_cell_of_a_huge_photo_is_small_and_a_zero_map_legible():
    image = np.zeros((3000, 4000, 3), np.uint8)
    assert cell(image, gradient(7, 7), box(image), 1.0, STYLE).size == (320, 240)
    tiny = np.zeros((28, 28, 1), np.uint8)
    picture = cell(tiny, np.zeros((28, 28), np.float32), box(tiny), 0.0, STYLE)
    assert picture.size == thumbnail(tiny).size == (168, 168)
    assert (20, 20, 20) in colours(picture)  # the band behind the words
