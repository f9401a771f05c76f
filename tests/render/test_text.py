import pytest

from attrcli.render import _text


@pytest.mark.parametrize(
    ("given", "shown"),
    [
        ("a\nb\tc\r\u2028d", "a b c  d"),
        ("\x1b[31mred\x00", "\ufffd[31mred\ufffd"),
        ("evil\u202egnp.exe", "evil\ufffdgnp.exe"),
        ("\udcff\ue000", "\ufffd\ufffd"),
        ("Müller 靴 −1.5 · ½", "Müller 靴 −1.5 · ½"),
    ],
)
def test_text_from_outside_is_one_harmless_line(given, shown):
    assert _text.clean(given) == shown


def test_text_that_fits_is_left_alone():
    assert _text.fitted("boot/0001.png", _text.font(12), 300) == "boot/0001.png"


@pytest.mark.parametrize("width", [0, 5, 40, 120, 500])
@pytest.mark.parametrize("text", ["images/" + "x" * 90 + "/0001.png", "W" * 100_000, "i" * 501])
def test_long_text_is_cut_in_the_middle_to_the_width(text, width):
    face = _text.font(12)
    cut = _text.fitted(text, face, width)
    assert cut.count("…") >= 1
    assert face.getlength(cut) <= max(width, face.getlength("…"))
    head, tail = cut.split("…")[0], cut.split("…")[-1]
    assert text.startswith(head)
    assert text.endswith(tail)
    if width >= 120:
        assert min(len(head), len(tail)) > 3


def test_text_is_wrapped_at_blanks_and_stays_within_its_lines():
    lines = _text.wrapped("no rule for op Erf at node Erf_12 of the graph", 100, 12, 3)
    assert len(lines) == 3
    assert all(_text.font(12).getlength(line) <= 100 for line in lines)
    assert lines[0].startswith("no rule")
    assert _text.wrapped("", 100, 12, 3) == []
