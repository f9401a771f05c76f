"""Tables: rows, columns, ids and labels of CSV files, and rows that are wrong."""

import os

import numpy as np
import pytest
from input_files import ids

from attrcli.data import collect, first_header, read
from attrcli.errors import InputError, NoInputsError, UsageError

TABLE = 'age,id,sex,label,bmi\n50,p1,1,ill,20.5\n\n61,"p,2",2,well,31\n'


def test_csv_rows(tmp_path):
    path = tmp_path / "t.csv"
    path.write_text("\ufeff" + TABLE, encoding="utf-8")
    found = collect([str(path)], "table", columns=["bmi", "age"])
    assert ids(found) == ["t.csv#p,2", "t.csv#p1"]
    assert [record.label for record in found.records] == ["well", "ill"]
    second, first = (read(record, "table", columns=["bmi", "age"]) for record in found.records)
    np.testing.assert_array_equal(first.values, [20.5, 50])
    np.testing.assert_array_equal(second.values, [31, 61])
    assert first.values.dtype == np.float64
    assert first.sha256 != second.sha256
    np.testing.assert_array_equal(
        read(found.records[1], "table").values, [50, 1, 20.5]
    )  # no columns named: all but id, label


def test_csv_hash_is_that_of_the_row(tmp_path):
    path = tmp_path / "t.csv"

    def hashes(text):
        path.write_text(text)
        return [read(record, "table").sha256 for record in collect([str(path)], "table").records]

    before = hashes("a,b\n1,2\n3,4\n")
    assert hashes("a,b\n1,2\n3,5\n9,9\n")[0] == before[0]
    assert hashes("a,b\n1,2\n3,5\n")[1] != before[1]
    assert hashes("b,a\n1,2\n3,4\n")[0] != before[0]


def test_csv_without_ids_counts_rows_and_takes_the_folder_as_label(tmp_path):
    (tmp_path / "in/sick").mkdir(parents=True)
    rows = "".join(f'{i},"two\nlines"\n' for i in range(11))
    (tmp_path / "in/sick/t.csv").write_text("a,b\n" + rows)
    found = collect([str(tmp_path / "in")], "table", columns=["a"])
    assert ids(found) == [f"sick/t.csv#{i}" for i in range(11)]
    assert {record.label for record in found.records} == {"sick"}
    assert [read(record, "table", columns=["a"]).values[0] for record in found.records] == list(range(11))


def test_an_id_column_that_is_a_feature_is_no_id(tmp_path):
    (tmp_path / "t.csv").write_text("id,label\n7,1\n")
    (record,) = collect([str(tmp_path / "t.csv")], "table", columns=["id"]).records
    assert record.id == "t.csv#0"
    assert read(record, "table", columns=["id"]).values == [7]


def test_csv_without_the_columns(tmp_path):
    path = tmp_path / "t.csv"
    path.write_text(TABLE)
    with pytest.raises(UsageError, match=r"t\.csv': has no column 'weight'; its columns: age, id, sex, label, bmi"):
        collect([str(path)], "table", columns=["age", "weight"])
    path.write_text("a,a\n1,2\n")
    with pytest.raises(UsageError, match=r"has 2 columns 'a'"):
        collect([str(path)], "table")
    path.write_text("a,b\n")
    with pytest.raises(NoInputsError, match=r"t\.csv' holds no records"):
        collect([str(path)], "table")


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ("1,", "column 'b' holds '', which is not a number"),
        ("1,x\xff", "column 'b' holds"),
        ("1,nan", "holds 1 values that are NaN"),
        ("1", "the row has 1 cells, the header 2"),
    ],
)
def test_a_bad_row_is_one_failed_record(tmp_path, row, message):
    (tmp_path / "t.csv").write_bytes(f"a,b\n1,2\n{row}\n3,4\n".encode("latin-1"))
    good, bad, last = collect([str(tmp_path / "t.csv")], "table").records
    with pytest.raises(InputError, match=rf"^'t\.csv#1': {message}"):
        read(bad, "table")
    np.testing.assert_array_equal(read(good, "table").values, [1, 2])
    np.testing.assert_array_equal(read(last, "table").values, [3, 4])


@pytest.mark.parametrize("text", ["", "\n", 'a,b\n1,"' + "x" * 200_000])
def test_an_empty_or_damaged_file_is_one_failed_record(tmp_path, text):
    (tmp_path / "bad.csv").write_text(text)
    (tmp_path / "good.csv").write_text("a,b\n1,2\n")
    found = collect([str(tmp_path)], "table")
    assert ids(found) == ["bad.csv", "good.csv#0"]
    assert first_header(found.records) == (str(tmp_path / "good.csv"), ("a", "b"))
    with pytest.raises(InputError, match=r"^'bad\.csv': (no header row; the first line must|line \d+ is not CSV)"):
        read(found.records[0], "table")
    assert read(found.records[1], "table").values.tolist() == [1, 2]


def test_a_header_of_numbers_is_a_row_whose_header_is_missing(tmp_path):
    path = tmp_path / "t.csv"
    path.write_text("5.1,-3,1e3\n4.9,3,1.4\n")
    with pytest.raises(
        UsageError, match=r"t\.csv': its first line is numbers \(5\.1, -3, 1e3\).*columns = \["
    ) as caught:
        collect([str(path)], "table")
    assert caught.value.exit_code == 2
    assert ids(collect([str(path)], "table", columns=["-3", "5.1", "1e3"])) == ["t.csv#0"]
    path.write_text("id,0,1\nx,2,3\n")  # names that happen to be numbers
    assert ids(collect([str(path)], "table")) == ["t.csv#x"]


def test_a_table_that_shrinks_meanwhile(tmp_path):
    (tmp_path / "t.csv").write_text("a\n1\n2\n")
    records = collect([str(tmp_path / "t.csv")], "table").records
    (tmp_path / "t.csv").write_text("a\n1\n")
    with pytest.raises(InputError, match="the row is gone"):
        read(records[1], "table")
    os.remove(tmp_path / "t.csv")
    with pytest.raises(InputError, match="no such file"):
        read(records[0], "table")


def test_arrays_as_tables(tmp_path):
    np.save(tmp_path / "x.npy", [[1, 2], [3, 4]])
    found = collect([str(tmp_path)], "table", columns=["a", "b"])
    assert ids(found) == ["x.npy#0", "x.npy#1"]
    np.testing.assert_array_equal(read(found.records[1], "table").values, [3, 4])
