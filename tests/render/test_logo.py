"""Logos, by chosen pixels: what is above and below zero, colours, heights, outlines, cropping."""

import numpy as np
import pytest
from PIL import Image

from attrcli import logos
from attrcli.errors import InputError, NonFiniteError
from attrcli.preprocess import Preprocess
from attrcli.render import Track, cell_positions, logo, logo_cell, shown
from attrcli.render.logo import colour_of, glyph

DNA = "ACGT"


def heights(*columns):
    return np.array(columns, np.float32).T


def cell(*columns, scale=1.0, within=None):
    """A cell as an array, upper and lower half, each (40, width, 3)."""
    track = Track("", heights(*columns), DNA)
    picture = np.asarray(logo_cell(track, scale, within or slice(0, len(columns)))).astype(int)
    return picture[:40], picture[41:]


def inked(part):
    """Where a part of a picture is not white."""
    return (part != 255).any(axis=2)


def test_positive_above_and_negative_below():
    upper, lower = cell([1, 0, 0, 0], [0, -1, 0, 0])
    half = upper.shape[1] // 2
    assert inked(upper[:, :half]).mean() > 0.3
    assert not inked(upper[:, half:]).any()
    assert inked(lower[:, half:]).mean() > 0.3
    assert not inked(lower[:, :half]).any()


@pytest.mark.parametrize(("row", "letter"), list(enumerate(DNA)))
def test_the_usual_colours(row, letter):
    upper, _ = cell(np.eye(4)[row])
    colours, counts = np.unique(upper[inked(upper)], axis=0, return_counts=True)
    assert tuple(colours[counts.argmax()]) == colour_of(letter, DNA)
    usual = {"A": (0, 150, 0), "C": (30, 80, 220), "G": (245, 165, 0), "T": (214, 39, 40)}
    assert colour_of(letter, DNA) == usual[letter]


def test_proteins_have_colours_of_their_own():
    protein = "ACDEFGHIKLMNPQRSTVWYX"
    assert colour_of("D", protein) == colour_of("E", protein) != colour_of("K", protein)
    assert len({colour_of(letter, protein) for letter in protein}) == 5


@pytest.mark.parametrize("height", [1.0, 0.5, 0.25])
def test_the_height_is_the_contribution(height):
    upper, _ = cell([0, 0, 0, height], scale=1.0)
    tall = inked(upper).any(axis=1).sum()
    assert abs(tall - 40 * height) <= 1
    upper, _ = cell([0, 0, 0, height], scale=2.0)
    assert abs(inked(upper).any(axis=1).sum() - 20 * height) <= 1


def test_what_is_beyond_the_scale_is_cut():
    upper, lower = cell([0, 0, 0, 5])
    assert inked(upper).any(axis=1).sum() == 40
    assert not inked(lower).any()


def test_a_stack_has_the_smallest_at_the_axis():
    upper, _ = cell([0.25, 0, 0, 0.5])
    red = (upper[..., 0] > 180) & (upper[..., 1] < 100)
    green = (upper[..., 1] > 100) & (upper[..., 0] < 100)
    assert np.flatnonzero(red.any(axis=1)).max() < np.flatnonzero(green.any(axis=1)).min()
    assert abs(green.any(axis=1).sum() - 10) <= 1
    assert abs(red.any(axis=1).sum() - 20) <= 1


def test_letters_are_outlines_with_their_holes():
    a, t = (np.asarray(glyph(letter, (60, 80))) for letter in "AT")
    assert a[:5, :10].max() == 0  # beside the top of an A
    assert a[30, 30] == 0  # its hole, between the two legs above the bar
    assert a[2, 30] > 200
    assert t[2, 5] > 200
    assert t[40, 5] == 0
    assert t[40, 30] > 200
    assert glyph("G", (1, 1)).size == (1, 1)


def test_an_i_is_a_stroke_and_no_block():
    """As wide beside an H as in the typeface, in the middle; as high as all letters."""
    i = np.asarray(glyph("I", (60, 80))) > 127
    columns = np.flatnonzero(i.any(axis=0))
    assert len(columns) == pytest.approx(60 * 18.8 / 65.3, abs=1)
    assert abs(columns[0] + columns[-1] - 59) <= 1
    assert i[:, columns].all()
    for letter in "ACDEFGHKLMNPQRSTVWYX":
        others = np.asarray(glyph(letter, (60, 80))) > 127
        assert others.any(axis=0)[1:-1].all()
        assert others.mean() < 0.8


def test_the_stretch_of_the_largest_contributions_is_shown():
    values = np.zeros(1000)
    values[[700, 900]] = 5, -3
    assert shown(values) == slice(501, 901)
    assert shown(values[:400]) == slice(0, 400)
    assert cell_positions(values).stop - cell_positions(values).start == 64
    assert 700 in range(*cell_positions(values).indices(1000))


def test_a_long_sequence_wraps_and_says_what_is_left_out():
    track = Track("", np.eye(4, dtype=np.float32)[:, [0, 1, 2, 3] * 250], DNA)
    sizes = [logo([track], ["id"], within=slice(0, count)).size for count in (100, 101, 400, 1000)]
    assert sizes[0][0] == sizes[1][0] == sizes[3][0]
    assert sizes[0][1] < sizes[1][1] < sizes[2][1] < sizes[3][1]
    whole = Track("", track.heights[:, :400], DNA)
    assert logo([track], ["id"], within=slice(0, 400)).height == logo([whole], ["id"]).height + 19  # one line more


def test_a_panel_has_a_row_for_each_track():
    track = Track("contribution", heights([1, 0, 0, 0]), DNA)
    assert logo([track, track], ["id"]).height > logo([track], ["id"]).height + 100


def test_all_zero_is_said():
    nothing, something = (Track("", heights([value, 0, 0, 0]), DNA) for value in (0, 1))
    assert logo([nothing], ["id"]).height == logo([something], ["id"]).height + 19


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_what_is_not_finite_is_not_drawn(bad):
    with pytest.raises(NonFiniteError, match="1 of 4 attributions are NaN or infinite"):
        logo([Track("", heights([0, bad, 0, 0]), DNA)], [])


def test_each_letter_needs_a_row():
    with pytest.raises(InputError, match=r"heights of shape \(4, 1\) for the letters ACG"):
        logo_cell(Track("", heights([1, 0, 0, 0]), "ACG"), 1.0, slice(0, 1))


def test_a_track_sums_over_the_letters_and_stands_at_the_observed_one():
    p = Preprocess("sequence", alphabet="ACGT", layout="NCL")
    values = np.arange(12, dtype=np.float32).reshape(4, 3)
    made = logos.track(p, np.frombuffer(b"CNT", "S1"), values)
    assert made.alphabet == "ACGTN"
    expected = np.zeros((5, 3))
    expected[[1, 4, 3], [0, 1, 2]] = values.sum(0)
    np.testing.assert_array_equal(made.heights, expected)
    picture = logos.picture(p, np.frombuffer(b"CNT", "S1"), values, values, ["id"], None)
    assert isinstance(picture, Image.Image)
    assert picture.width == 420
