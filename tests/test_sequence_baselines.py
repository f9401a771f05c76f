"""Baselines of sequences: dinucleotide shuffles, letter frequencies, zeros."""

import time
from collections import Counter
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from attrcli import letters
from attrcli.baselines import SHUFFLES, resolve, shuffle
from attrcli.errors import UsageError

DNA = "ACGT"
TEXT = "ACGTTGCAAGCTTAGGCATCGATTACGGATCTTAGCATCAGG"


def columns(text, unknown="uniform"):
    return letters.one_hot(np.frombuffer(text.encode(), "S1"), DNA, unknown, "accept")


def made(spec=None, text=TEXT, sample_id="a", seed=0, alphabet=DNA):
    def nothing(path):
        raise AssertionError("no file should be read")

    return resolve(spec, "sequence", load=nothing, alphabet=alphabet)(columns(text), sample_id, seed)


def pairs(text):
    return Counter(pairwise(text))


@given(st.text("ACGTN", min_size=1, max_size=60), st.integers(0, 99))
def test_a_shuffle_keeps_ends_and_pairs(text, seed):
    result = shuffle(columns(text), np.random.default_rng(seed))
    told = letters.text_of(result, DNA)
    assert (told[0], told[-1]) == (text[0], text[-1])
    assert pairs(told) == pairs(text)
    assert {tuple(column) for column in result.T} <= {tuple(column) for column in columns(text).T}  # still one-hot


def test_padding_stays_where_it_is():
    padded = letters.resized(columns(TEXT), 60)
    result = shuffle(padded, np.random.default_rng(0))
    np.testing.assert_array_equal(result.any(axis=0), padded.any(axis=0))
    inside = letters.inside(padded)
    assert pairs(letters.text_of(result[:, inside], DNA)) == pairs(TEXT)
    assert not shuffle(np.zeros((4, 3), np.float32), np.random.default_rng(0)).any()


def test_shuffles_differ_and_depend_on_id_and_seed_alone():
    first = made()
    assert len(first) == SHUFFLES == 20
    assert len({letters.text_of(each, DNA) for each in first}) > 10
    np.testing.assert_array_equal(first, made())
    np.testing.assert_array_equal(first[:3], made("shuffle:3"))  # drawn one after another
    assert not np.array_equal(first, made(sample_id="b"))
    assert not np.array_equal(first, made(seed=1))


def test_a_shuffle_reaches_every_place_but_the_ends():
    moved = np.mean([(each != columns(TEXT)).any(axis=0) for each in made("shuffle:200")], axis=0)
    assert moved[0] == moved[-1] == 0
    assert (moved[1:-2] > 0.1).all()  # TEXT ends in GG, and the last step from a letter stays the last


def test_many_shuffles_are_cheap():
    generator = np.random.default_rng(0)
    raw = columns("".join(generator.choice(list(DNA), 200)))
    start = time.process_time()
    for _ in range(1000):
        shuffle(raw, generator)
    assert time.process_time() - start < 2  # measured: 0.13


def test_the_background_is_that_of_the_letters():
    [found] = made("background", "ACN")
    np.testing.assert_allclose(found, np.repeat([[0.3], [0.2], [0.2], [0.3]], 3, axis=1), rtol=1e-6)
    [other] = resolve("background", "sequence", load=None, alphabet="TCGA")(columns("AC"), "a", 0)
    np.testing.assert_allclose(other[:, 0], [0.3, 0.2, 0.2, 0.3], rtol=1e-6)
    [other] = resolve("background", "sequence", load=None, alphabet="ACGU")(columns("AC"), "a", 0)
    np.testing.assert_allclose(other[:, 0], [0.25] * 4)
    padded = letters.resized(columns("AC"), 6)
    [around] = resolve("background", "sequence", load=None, alphabet=DNA)(padded, "a", 0)
    np.testing.assert_array_equal(around.any(axis=0), padded.any(axis=0))


def test_zero():
    [found] = made("zero")
    assert found.shape == (4, len(TEXT))
    assert not found.any()


@pytest.mark.parametrize("spec", ["shuffle:0", "shuffle:", "shuffle:x", "shuffle:1001", "shuffle:-1"])
def test_a_count_of_shuffles_that_is_none(spec):
    with pytest.raises(UsageError, match=rf"--baseline {spec}: accepted: shuffle:K, with K from 1 to 1000"):
        made(spec)


def test_other_kinds_have_no_shuffle():
    with pytest.raises(UsageError, match="neither a file nor a baseline for kind image"):
        resolve("shuffle", "image", load=None)
    with pytest.raises(UsageError, match=r"did you mean 'shuffle'.*accepted: background, shuffle, shuffle:K, zero"):
        made("shufle")
