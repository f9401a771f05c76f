"""FASTA files: ids, lines and line ends, gzip, and what is told of a file or record that is none."""

import gzip
import hashlib

import numpy as np
import pytest

from attrcli.data import collect, escape, guess_kind, letter_count, read
from attrcli.data.fasta import letters_of, members
from attrcli.errors import InputError, NoInputsError, UsageError


def fasta(path, text):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    return path


def records(*paths):
    return collect([str(path) for path in paths], "sequence").records


def letters(record):
    return read(record, "sequence").values.tobytes().decode()


TWO = ">one first of two\nACGT\nacg\n\n>two\nNNTT\n"


@pytest.mark.parametrize("end", ["\n", "\r\n"])
@pytest.mark.parametrize("packed", [False, True])
def test_records_of_several_lines(tmp_path, end, packed):
    text = TWO.replace("\n", end).encode()
    path = fasta(tmp_path / ("s.fa.gz" if packed else "s.fa"), gzip.compress(text) if packed else text)
    one, two = records(path)
    assert (one.id, two.id) == (f"{path.name}#one", f"{path.name}#two")
    assert (letters(one), letters(two)) == ("ACGTacg", "NNTT")
    assert (letter_count(one), letter_count(two)) == (7, 4)
    assert escape(one.id) == f"{path.name}=one"


def test_what_precedes_and_what_is_missing_at_the_end(tmp_path):
    path = fasta(tmp_path / "s.fa", b"\xef\xbb\xbf\n\n>a\nAC\nGT")
    assert [letters(record) for record in records(path)] == ["ACGT"]


def test_a_greater_sign_within_a_header_begins_no_record(tmp_path):
    [record] = records(fasta(tmp_path / "s.fa", ">a >b\nAC\n"))
    assert (record.id, letters(record)) == ("s.fa#a", "AC")


def test_a_header_without_id_is_named_by_its_place(tmp_path):
    assert [record.id for record in records(fasta(tmp_path / "s.fa", ">a\nA\n>\nC\n"))] == ["s.fa#a", "s.fa#1"]


def test_the_hash_is_of_the_letters_alone(tmp_path):
    wrapped, plain = records(fasta(tmp_path / "a.fa", ">x\nAC\nGT\n")), records(fasta(tmp_path / "b.fa", ">y\nACGT"))
    assert read(wrapped[0], "sequence").sha256 == read(plain[0], "sequence").sha256
    assert read(plain[0], "sequence").sha256 == hashlib.sha256(b"ACGT").hexdigest()


def test_a_directory_gives_fasta_and_array_files(tmp_path):
    for name in ("a.fa", "b.fasta", "c.FNA", "d.faa", "notes.txt"):
        fasta(tmp_path / name, ">r\nAC\n")
    fasta(tmp_path / "e.fa.gz", gzip.compress(b">r\nAC\n"))
    np.save(tmp_path / "x.npy", np.eye(4))
    found = [record.id for record in records(tmp_path)]
    assert found == ["a.fa#r", "b.fasta#r", "c.FNA#r", "d.faa#r", "e.fa.gz#r", "x.npy"]
    with pytest.raises(NoInputsError, match=r"looked for sequence files \(\.fa \.fasta"):
        collect([str(fasta(tmp_path / "none/notes.txt", "x").parent)], "sequence")


@pytest.mark.parametrize("name", ["s.fa", "s.FASTA", "s.fna.gz"])
def test_the_kind_is_guessed_from_the_suffix(tmp_path, name):
    assert guess_kind([str(tmp_path / name)]) == "sequence"


def test_fasta_beside_arrays_is_no_kind(tmp_path):
    with pytest.raises(UsageError, match=r"arrays, such as 'x\.npy', and sequences, such as 's\.fa'"):
        guess_kind(["x.npy", "s.fa"])


def test_two_records_of_one_id_are_an_error(tmp_path):
    with pytest.raises(UsageError, match=r"two inputs have the id 's\.fa#a': both in"):
        records(fasta(tmp_path / "s.fa", ">a 1\nAC\n>a 2\nGT\n"))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "the file is empty"),
        (b"ACGT\n", "holds no FASTA record: the first line must be a header"),
        (b"  \n\n", "holds no FASTA record"),
        (gzip.compress(b">a\n" + b"ACGT" * 1000, mtime=0)[:-20], "the gzip file is cut short"),
        (b"\x1f\x8b\x08garbage", "gzip|cut short|compress"),
    ],
)
def test_a_file_that_cannot_be_listed_is_one_failed_record(tmp_path, content, message):
    [record] = records(fasta(tmp_path / "s.fa", content))
    assert record.id == "s.fa"
    assert letter_count(record) == 0
    with pytest.raises(InputError, match=rf"'s\.fa': .*({message})"):
        read(record, "sequence")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "the record holds no letters"),
        ("AC\n1T\n", "holds '1' at position 2; accepted: letters, \\* and -"),
        ("ACé\n", "holds 'Ã' at position 2"),
    ],
)
def test_a_record_that_cannot_be_read_leaves_the_others(tmp_path, text, message):
    bad, good = records(fasta(tmp_path / "s.fa", f">bad\n{text}>good\nAC-*\n"))
    with pytest.raises(InputError, match=rf"'s\.fa#bad': {message}"):
        read(bad, "sequence")
    assert letters(good) == "AC-*"


def test_a_record_that_is_gone_is_told(tmp_path):
    path = fasta(tmp_path / "s.fa", TWO)
    _, two = records(path)
    fasta(path, ">one\nA\n")
    with pytest.raises(InputError, match="the record is gone; the file changed"):
        read(two, "sequence")


@pytest.mark.parametrize(
    "content",
    [b"\xef\xbb\xbf>a\nAC\n>b\nGT\n", b" >a\nAC\n>b\nGT\n", b">a\rAC\r>b\rGT", b">a\r\nAC\r\n>b\r\nGT\r\n"],
    ids=["byte order mark", "space", "old line ends", "Windows"],
)
def test_no_record_is_lost_to_what_stands_around_it(tmp_path, content):
    path = tmp_path / "x.fasta"
    path.write_bytes(content)
    found = [(name, letters_of(str(path), place).tobytes()) for name, place in members(str(path))]
    assert found == [("a", b"AC"), ("b", b"GT")]
