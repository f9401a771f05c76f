"""Sequences as columns: letters and back, lengths, strands; and the keys of a sidecar that say how."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from attrcli import letters
from attrcli.errors import AttrcliWarning, InputError, UsageError
from attrcli.sidecar import from_mapping, to_toml

DNA = "ACGT"


def stored(text):
    return np.frombuffer(text.encode(), "S1")


def columns(text, alphabet=DNA, unknown="uniform", lowercase="accept"):
    return letters.one_hot(stored(text), alphabet, unknown, lowercase)


def sequence(**keys):
    return from_mapping({"input": {"kind": "sequence", "alphabet": DNA, **keys}}, "x.toml", None)


# --- letters


def test_each_letter_has_the_row_of_its_place_in_the_alphabet():
    np.testing.assert_array_equal(columns("TGCA"), np.eye(4)[::-1])
    np.testing.assert_array_equal(columns("TGCA", "TGCA"), np.eye(4))
    assert columns("ACGT").dtype == np.float32


@given(st.text("ACGTN", min_size=1), st.sampled_from(["ACGT", "TCGA"]))
def test_columns_go_back_to_letters(text, alphabet):
    assert letters.text_of(columns(text, alphabet), alphabet) == text


@pytest.mark.parametrize(("unknown", "value"), [("uniform", 0.25), ("zero", 0)])
def test_letters_outside_the_alphabet(unknown, value):
    np.testing.assert_array_equal(columns("ANC", unknown=unknown)[:, 1], np.full(4, value, np.float32))


def test_a_letter_outside_the_alphabet_refused():
    with pytest.raises(
        InputError, match=r"the letter 'x' at position 2 is not in the alphabet ACGT.*'uniform', 'zero'"
    ):
        columns("ACxN", unknown="refuse")


def test_lower_case_accepted_as_capitals_or_refused():
    np.testing.assert_array_equal(columns("acGT"), columns("ACGT"))
    with pytest.raises(InputError, match="the letter 'c' at position 1 is lower case"):
        columns("AcG", lowercase="refuse")


def test_what_is_written_for_no_letter_is_none_of_the_alphabet():
    assert letters.text_of(np.full((4, 1), 0.25), DNA) == "N"
    protein = "ACDEFGHIKLMNPQRSTVWY"
    assert letters.text_of(np.full((20, 1), 0.05), protein) == "X"


@pytest.mark.parametrize(
    ("length", "text"), [(7, "0ACGT00"), (6, "0ACGT0"), (4, "ACGT"), (3, "ACG"), (2, "CG"), (1, "C")]
)
def test_crop_and_padding_lie_around_the_middle(length, text):
    made = letters.resized(columns("ACGT"), length)
    expected = columns(text.replace("0", "N"), unknown="zero")
    np.testing.assert_array_equal(made, expected)


def test_the_complement_of_any_order_of_letters():
    for alphabet in ("ACGT", "TGAC"):
        turned = columns("AACGT", alphabet)[letters.complement(alphabet)][:, ::-1]
        assert letters.text_of(turned, alphabet) == "ACGTT"
    for alphabet in ("ACGU", "UGAC"):
        turned = columns("AACGU", alphabet)[letters.complement(alphabet)][:, ::-1]
        assert letters.text_of(turned, alphabet) == "ACGUU"
    for alphabet in ("ACGTU", "ACGN", "ACG", "ACDEFGHIKLMNPQRSTVWY"):
        with pytest.raises(
            UsageError, match=f"the alphabet {alphabet} has no complement; accepted: A, C, G and T, or U"
        ):
            letters.complement(alphabet)


@pytest.mark.parametrize("column", [[1, 1, 0, 0], [2, -1, 0, 0], [0.5, 0, 0, 0]])
def test_numbers_that_are_no_letters_are_refused(column):
    with pytest.raises(InputError, match=r"position 1 holds .*; accepted: one-hot, or frequencies"):
        letters.checked(np.array([[1, 0, 0, 0], column]).T)
    np.testing.assert_array_equal(letters.checked(columns("AN")), columns("AN"))


# --- preprocessing


@pytest.mark.parametrize("keys", [{}, {"layout": "NLC"}, {"flat": True}, {"layout": "NLC", "flat": True}])
def test_every_layout_there_and_back(keys):
    p, raw = sequence(size=[5], **keys), columns("ACGTN")
    np.testing.assert_array_equal(p.fit(stored("ACGTN")), raw)
    x = p.normalize(raw)
    assert x.shape == p.sample_shape
    assert x.flags["C_CONTIGUOUS"]
    wanted = raw.T if p.layout == "NLC" else raw
    np.testing.assert_array_equal(x, wanted.reshape(-1) if p.flat else wanted)
    np.testing.assert_array_equal(p.denormalize(x), raw)
    np.testing.assert_array_equal(p.fit(x), raw)  # an array file holds what the model takes
    assert p.channels_first(p.sample_shape) == (4, 5)
    assert p.sample_rank == x.ndim
    assert from_mapping(p.as_dict(), "x.toml", None) == p
    assert 'kind = "sequence"' in to_toml(p)


def test_an_array_of_another_shape_names_both():
    with pytest.raises(InputError, match=r"the shape is \(5, 4\); .* expects \(4, 5\)"):
        sequence().fit(np.zeros((5, 4)))
    with pytest.raises(InputError, match=r"the shape is \(4, 0\)"):
        sequence().fit(np.zeros((4, 0)))


def test_another_length_is_refused_or_fitted():
    with pytest.raises(InputError, match="the sequence has 4 letters, the model's preprocessing expects 6; --length 6"):
        sequence(size=[6]).fit(stored("ACGT"))
    np.testing.assert_array_equal(
        sequence(size=[6], lengths="fit").fit(stored("ACGT")), columns("NACGTN", unknown="zero")
    )


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"alphabet": "AACG"}, r"alphabet = 'AACG' is not possible; accepted: different capital letters"),
        ({"alphabet": "acgt"}, "alphabet = 'acgt' is not possible"),
        ({"alphabet": "A"}, "alphabet = 'A' is not possible"),
        ({"size": [4, 5]}, r"size = \[4, 5\]: a sequence's size is \[length\]"),
        ({"layout": "NCHW"}, "layout = 'NCHW' is not possible for kind = 'sequence'; accepted: NCL, NLC"),
        ({"unknown": "drop"}, "unknown = 'drop' is not possible; accepted: uniform, refuse, zero"),
        ({"lowercase": "no"}, "accepted: accept, refuse"),
        ({"lengths": "any"}, "accepted: equal, fit"),
        ({"flat": 1}, "flat = 1 is not possible; accepted: true or false"),
        ({"mean": [0.0]}, "'mean' is unknown for kind = 'sequence'"),
    ],
)
def test_wrong_keys_are_named(keys, message):
    with pytest.raises(UsageError, match=rf"x\.toml: \[input\] .*{message}|{message}"):
        sequence(**keys)


def test_the_alphabet_must_be_said():
    with pytest.raises(UsageError, match=r"x\.toml: \[input\] alphabet is missing"):
        from_mapping({"input": {"kind": "sequence"}}, "x.toml", None)
    with pytest.raises(UsageError, match="layout = 'NCL' is not possible for kind = 'image'; accepted: NCHW, NHWC"):
        from_mapping({"input": {"kind": "image", "layout": "NCL"}}, "x.toml", None)


def test_many_letters_of_another_alphabet_are_warned_of():
    rna = np.frombuffer(b"ACGUUACGUU", "S1")
    with pytest.warns(AttrcliWarning, match=r"4 of 10 letters are not in the alphabet ACGT, 'U' for one"):
        letters.one_hot(rna, "ACGT", "uniform", "accept")
    letters.one_hot(np.frombuffer(b"ACGTNNNN", "S1"), "ACGT", "uniform", "accept")
