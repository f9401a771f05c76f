"""Listing: which records the arguments give, their ids and order, and what is told when nothing fits."""

import io
import os

import numpy as np
import pytest
from input_files import BATCH, F_SHAPE, encoded, ids, only, save
from PIL import Image

from attrcli.data import collect, escape, guess_kind, read
from attrcli.errors import InputError, NoInputsError, UsageError


def test_a_directory_is_walked_sorted_and_filtered(tree):
    found = collect([str(tree)], "image")
    assert ids(found) == ["bag/c.png", "shoe/a.JPG", "shoe/b.png", "top.png"]
    assert [record.label for record in found.records] == ["bag", "shoe", "shoe", ""]
    assert found.root == tree
    assert found.records[0].path == tree / "bag/c.png"


def test_order_of_arguments_does_not_matter(tree):
    names = [str(tree / "shoe"), str(tree / "bag/c.png"), str(tree / "top.png")]
    assert collect(names, "image") == collect(names[::-1], "image") == collect([str(tree)], "image")


def test_relative_arguments_and_globs(tree, monkeypatch):
    monkeypatch.chdir(tree.parent)
    whole = collect(["in"], "image")
    assert collect(["in/*/*.[pJ]*", "in/top.png"], "image") == whole
    assert collect(["in/../in"], "image") == whole
    globbed = collect(["in/*/*.png"], "image")
    assert ids(globbed) == ["bag/c.png", "shoe/b.png"]
    assert [record.label for record in globbed.records] == ["bag", "shoe"]
    assert ids(collect(["in/**/*.png"], "image")) == ["bag/c.png", "shoe/b.png", "top.png"]
    assert ids(collect(["in/*o*"], "image")) == ["shoe/a.JPG", "shoe/b.png", "top.png"]  # a matched folder is walked


def test_names_with_glob_characters_are_names_if_they_exist(tmp_path, monkeypatch):
    folder = tmp_path / "odd [1]"
    save(folder / "a[1].png")
    save(folder / "a1.png")
    monkeypatch.chdir(folder)
    assert ids(collect(["a[1].png"], "image")) == ["a[1].png"]
    assert ids(collect(["a[1]*"], "image")) == ["a1.png"]


@pytest.mark.parametrize("mark", ["", "\ufeff"])
@pytest.mark.parametrize("separator", ["\n", "\r\n", "\0"])
def test_lists_from_file_and_stdin(tree, separator, mark):
    text = mark + separator.join([str(tree / "shoe"), str(tree / "bag/c.png"), ""])
    (tree / "list.txt").write_text(text, encoding="utf-8", newline="")
    listed = collect([f"@{tree}/list.txt"], "image")
    assert ids(listed) == ["bag/c.png", "shoe/a.JPG", "shoe/b.png"]
    assert collect(["-"], "image", stdin=io.StringIO(text)) == listed
    assert collect(["-"], "image", stdin=io.TextIOWrapper(io.BytesIO(text.encode()))) == listed


def test_a_missing_name_in_a_list_is_one_failed_record(tree):
    found = collect(["-"], "image", stdin=io.StringIO(f"{tree}/top.png\n{tree}/gone.png\n"))
    assert ids(found) == ["gone.png", "top.png"]
    with pytest.raises(InputError, match=r"'gone\.png': no such file"):
        read(found.records[0], "image")


def test_explicit_files_are_tried_whatever_their_suffix(tree):
    os.rename(tree / "top.png", tree / "top.dat")
    np.testing.assert_array_equal(only(tree / "top.dat").values, F_SHAPE)
    with pytest.raises(InputError, match=r"notes\.txt': not an image that can be read; accepted: PNG, JPEG"):
        only(tree / "bag/notes.txt")


def test_nothing_found(tree, tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(NoInputsError, match=r"empty': looked for image files \(\.png .*\); it holds no files at all"):
        collect([str(tmp_path / "empty")], "image")
    with pytest.raises(
        NoInputsError, match=r"looked for array files .*it holds 7 other files, such as '\.hidden\.png'"
    ):
        collect([str(tree)], "array")
    with pytest.raises(NoInputsError, match=r"no input matched '.*\*\.gif'"):
        collect([f"{tree}/*.gif"], "image")
    with pytest.raises(NoInputsError, match=r"no such file or directory: '.*tpo\.png'"):
        collect([str(tree / "top.png"), str(tree / "tpo.png")], "image")
    with pytest.raises(NoInputsError, match="no input matched '-'"):
        collect(["-"], "image", stdin=io.StringIO("\n"))
    with pytest.raises(NoInputsError, match="no input was given"):
        collect([], "image")
    with pytest.raises(UsageError, match=r"the list 'none\.txt' cannot be read: No such file"):
        collect(["@none.txt"], "image")


def test_one_file_given_twice(tree):
    with pytest.raises(UsageError, match=r"id 'top\.png': '.*top\.png' is given twice, by '.*in' and by '.*top\.png'"):
        collect([str(tree), str(tree / "top.png")], "image")


def test_two_inputs_with_one_id(tmp_path):
    np.save(tmp_path / "x.npy", np.zeros((2, 3)))
    np.save(tmp_path / "x.npy#0", np.zeros(3))
    os.rename(tmp_path / "x.npy#0.npy", tmp_path / "x.npy#0")
    with pytest.raises(UsageError, match=r"id 'x\.npy#0': '.*/x\.npy' and '.*/x\.npy#0'; ids must be unique"):
        collect([str(tmp_path / "x.npy"), str(tmp_path / "x.npy#0")], "array", sample_rank=1)
    (tmp_path / "t.csv").write_text("id,a\nk,1\nk,2\n")
    with pytest.raises(UsageError, match=r"id 't\.csv#k': both in '.*t\.csv'"):
        collect([str(tmp_path / "t.csv")], "table")


def test_links_are_followed_but_not_in_circles(tree, tmp_path):
    (tree / "shoe/loop").symlink_to(tree)
    (tmp_path / "other").mkdir()
    save(tmp_path / "other/z.png")
    (tree / "linked").symlink_to(tmp_path / "other")
    assert ids(collect([str(tree)], "image")) == [
        "bag/c.png",
        "linked/z.png",
        "shoe/a.JPG",
        "shoe/b.png",
        "top.png",
    ]


def test_names_that_are_not_text(tmp_path):
    raw_name = os.fsencode(tmp_path) + b"/\xff\n.png"
    with open(raw_name, "wb") as file:
        file.write(encoded(Image.fromarray(F_SHAPE), "PNG"))
    (record,) = collect([str(tmp_path)], "image").records
    assert record.id == "\\udcff\n.png"
    assert record.id.encode()
    np.testing.assert_array_equal(read(record, "image").values, F_SHAPE)
    assert escape(record.id) == "%5Cudcff%0A.png"


def test_special_files_are_refused_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(InputError, match="not a regular file"):
        only(tmp_path / "pipe")


def test_listing_does_not_read_the_data(tmp_path, monkeypatch):
    save(tmp_path / "a.png")
    np.savez(tmp_path / "b.npz", z=BATCH)
    monkeypatch.setattr(np, "load", None)
    monkeypatch.setattr(Image, "open", None)
    assert len(collect([str(tmp_path / "a.png"), str(tmp_path / "b.npz")], "image").records) == 2


@pytest.mark.parametrize(
    ("names", "kind"),
    [
        (["a.png"], "image"),
        (["a.npy"], "array"),
        (["dir/*.npz"], "array"),
        (["A.HDF5"], "array"),
        (["t.csv"], "table"),
        (["a.npy", "p.png"], "image"),
        (["notes.txt", "t.csv"], "table"),
        (["notes.txt"], "image"),
        (["-"], "image"),
    ],
)
def test_the_kind_is_guessed_from_the_suffixes(names, kind):
    assert guess_kind(names) == kind


def test_the_kind_of_a_folder_and_of_a_list(tmp_path):
    (tmp_path / "deep/er").mkdir(parents=True)
    np.save(tmp_path / "deep/er/x.npy", np.zeros(2))
    save(tmp_path / "deep/.thumbnail.png")
    assert guess_kind([str(tmp_path)]) == "array"
    (tmp_path / "list.txt").write_text(f"{tmp_path}/deep/er/x.npy\n")
    assert guess_kind([f"@{tmp_path}/list.txt"]) == "array"
    assert guess_kind([f"{tmp_path}/deep/er/*"]) == "array"
    (tmp_path / "tables").mkdir()
    (tmp_path / "tables/t.csv").write_text("a\n1\n")
    assert guess_kind([f"{tmp_path}/tables"]) == "table"
    for mixed in ([str(tmp_path)], ["x.npy", "t.csv"], ["t.csv", "x.npy"]):
        with pytest.raises(UsageError, match=r"arrays, such as 'x\.npy', and tables, such as 't\.csv': .*of one kind"):
            guess_kind(mixed)
    save(tmp_path / "deep/er/picture.png")  # beside pictures, a table holds their labels
    assert guess_kind([str(tmp_path)]) == "image"
    with pytest.raises(UsageError, match=r"the list 'none\.txt' cannot be read"):
        guess_kind(["@none.txt"])
