"""Names of output files, and hashes of files that a run depends on."""

import os

import pytest
from hypothesis import given
from hypothesis import strategies as st

from attrcli.data import escape, sha256_of
from attrcli.errors import UsageError


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
