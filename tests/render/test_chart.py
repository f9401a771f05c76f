import numpy as np
import pytest

from attrcli.errors import InputError, NonFiniteError
from attrcli.render import Style, _text, bar_chart, chart

RED, BLUE, GREY = (255, 50, 50), (50, 50, 255), (110, 110, 116)


def bars(picture, colour):
    """Rows, first and last column of the pixels of a colour."""
    rows, columns = np.nonzero((np.asarray(picture) == colour).all(-1))
    return sorted({int(r) for r in rows}), int(columns.min()), int(columns.max())


def test_bars_point_to_either_side_of_zero_in_proportion():
    picture = bar_chart(["a", "b"], np.array([1.0, -0.5]), None, ["x"])
    _, left, right = bars(picture, RED)
    rows, start, stop = bars(picture, BLUE)
    assert right - left + 1 == 200
    assert stop - start + 1 == 100
    assert left - stop == 2  # the zero line lies between
    assert min(rows) > min(bars(picture, RED)[0])  # larger magnitude above


def test_only_the_top_features_are_drawn_and_the_rest_summed():
    values = np.arange(1.0, 31.0)
    picture = bar_chart([f"f{i}" for i in range(30)], values, None, [], top=5)
    assert picture.height == 2 * 16 + 6 * 24
    rows, left, right = bars(picture, RED)
    assert len(rows) == 5 * 15
    assert right - left + 1 == 200  # the longest of a feature, though the others add up to 325
    grey_rows, start, stop = bars(picture, GREY)
    assert (start, stop) == (left, left + 199)
    strip = np.asarray(picture)[sorted(grey_rows)[7], left : left + 200]
    assert (strip == 255).all(1).sum() > 3  # broken
    short = bar_chart([f"f{i}" for i in range(6)], np.array([8.0, 8, 8, 8, 8, 4]), None, [], top=5)
    assert bars(short, GREY)[2] - bars(short, GREY)[1] + 1 == 100


def test_no_digit_of_a_number_is_cut():
    widest = -1.234e-300
    assert _text.widest([f"{widest:+.4g}"], 12) <= chart._NUMBER - 6


def test_raw_values_stand_beside_the_names():
    values = np.array([1.0, 2.0])
    plain, raw, text = (bar_chart(["a", "b"], values, r, []) for r in (None, [0.25, float("nan")], ["low", "high"]))
    assert plain.width < raw.width
    assert text.size != plain.size


def test_zeros_are_labelled():
    zero = bar_chart(["a"], np.zeros(1), None, ["caption"])
    assert zero.height == bar_chart(["a"], np.ones(1), None, ["caption", "line"]).height
    assert not (np.asarray(zero) == RED).all(-1).any()


def test_values_that_are_not_finite_are_refused():
    with pytest.raises(NonFiniteError, match="1 of 2"):
        bar_chart(["a", "b"], np.array([1.0, np.nan]), None, [])


@pytest.mark.parametrize(
    ("names", "values", "raw"),
    [
        (["a"], np.ones(2), None),
        ([], np.ones(0), None),
        (["a"], np.ones(1), [1.0, 2.0]),
        (["a"], np.ones((1, 1)), None),
    ],
)
def test_lengths_must_agree(names, values, raw):
    with pytest.raises(InputError):
        bar_chart(names, values, raw, [])


def test_names_from_outside_do_not_break_the_chart():
    names = ["$x^{2", "a\nb", "\x1b[0m", "W" * 5000, "\udcff"]
    picture = bar_chart(names, np.linspace(-1, 1, 5), None, ["c\n" * 1000])
    assert picture.width < 1000
    assert (np.asarray(picture)[:, -8:] == 255).all()


def test_colours_follow_the_style():
    picture = bar_chart(["a"], np.ones(1), None, [], style=Style(colormap="bwr_r"))
    assert len(bars(picture, BLUE)[0]) == 15
