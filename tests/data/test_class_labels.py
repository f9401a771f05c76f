"""Labels: folder names and label files to output indices."""

import numpy as np
import pytest
from input_files import save

from attrcli.data import UNKNOWN_LABEL, class_labels, collect, labels_csv
from attrcli.errors import AttrcliWarning, UsageError

NAMES = ["T-shirt/top", "Ankle boot", "Bag"]


def in_folders(tmp_path, *folders):
    for folder in folders:
        save(tmp_path / "in" / folder / "x.png")
    save(tmp_path / "in/loose.png")
    return collect([str(tmp_path / "in")], "image")


def test_folder_names_are_labels(tmp_path):
    found = in_folders(tmp_path, "T-shirt_top", "ankle boot", "Bag", "1", "7", "07", "hat")
    by_folder = dict(zip([record.label for record in found.records], class_labels(found, NAMES).tolist(), strict=True))
    assert by_folder == {
        "T-shirt_top": 0,
        "ankle boot": 1,
        "Bag": 2,
        "1": 1,
        "7": UNKNOWN_LABEL,
        "07": UNKNOWN_LABEL,
        "hat": UNKNOWN_LABEL,
        "": UNKNOWN_LABEL,
    }
    assert class_labels(found, NAMES).dtype == np.uint16


def test_indices_without_names_and_names_that_are_numbers(tmp_path):
    found = in_folders(tmp_path, "7", "0")
    assert class_labels(found, None).tolist() == [0, 7, UNKNOWN_LABEL]
    assert class_labels(found, ["5", "7", "0"]).tolist() == [2, 1, UNKNOWN_LABEL]


def test_a_name_of_two_outputs_is_no_label(tmp_path):
    found = in_folders(tmp_path, "crane")
    with pytest.warns(AttrcliWarning, match=r"'crane' fits the outputs \[0, 1\]; use an index"):
        assert class_labels(found, ["crane", "crane"]).tolist() == [UNKNOWN_LABEL] * 2


def test_a_class_folder_given_alone_is_the_label_of_its_files(tmp_path):
    for folder in ("T-shirt_top", "Bag", "1", "hat"):
        save(tmp_path / folder / "x.png")
    bag, shirt = (str(tmp_path / name) for name in ("Bag", "T-shirt_top"))

    def labels(*inputs):
        return class_labels(collect(inputs, "image"), NAMES).tolist()

    assert labels(bag) == labels(f"{bag}/x.png") == labels(f"{bag}/*.png") == [2]
    assert labels(shirt) == [0]
    assert labels(bag, shirt) == [2, 0]
    assert labels(str(tmp_path / "1")) == labels(str(tmp_path / "hat")) == [UNKNOWN_LABEL]


def test_an_empty_label_cell_is_no_label_whatever_the_folder(tmp_path):
    (tmp_path / "Bag").mkdir()
    (tmp_path / "Bag/t.csv").write_text("a,label\n1,\n2,Ankle boot\n")
    found = collect([str(tmp_path / "Bag")], "table")
    assert class_labels(found, NAMES).tolist() == [UNKNOWN_LABEL, 1]


def test_labels_from_a_file(tmp_path):
    found = in_folders(tmp_path, "a", "b")
    path = tmp_path / "labels.csv"
    path.write_text("id,label,note\na/x.png,bag,\nloose.png,1,\nelsewhere.png,0,\n")
    assert labels_csv(path, found, NAMES).tolist() == [2, UNKNOWN_LABEL, 1]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "id,label\na/x.png,hat\nb/x.png,3\n",
            r"labels\.csv: the labels \['3', 'hat'\] match nothing; accepted: the names T-shirt/top, ",
        ),
        (
            "name,label\na/x.png,Bag\n",
            r"labels\.csv: its columns are name, label; accepted: .*the columns 'id' and 'label'",
        ),
        ("", r"labels\.csv: no header row.*the columns 'id' and 'label'"),
        ('id,label\n"' + "x" * 200_000, r"labels\.csv: line \d+ is not CSV"),
        ("id,label\nx.png,Bag\n", r"'x\.png' is the name of several inputs"),
        ("id,label\ny.png,Bag\n", r"no id is that of an input; an input's id is like 'a/x\.png'"),
    ],
)
def test_label_files_that_do_not_fit(tmp_path, text, message):
    found = in_folders(tmp_path, "a", "b")
    path = tmp_path / "labels.csv"
    path.write_text(text)
    with pytest.raises(UsageError, match=f"--labels .*{message}"):
        labels_csv(path, found, NAMES)
    with pytest.raises(UsageError, match=r"--labels .*none\.csv: no such file"):
        labels_csv(tmp_path / "none.csv", found, NAMES)


def test_an_id_that_is_labelled_twice_is_refused(tmp_path):
    save(tmp_path / "a.png")
    table = tmp_path / "labels.csv"
    table.write_text("id,label\na.png,1\na.png,2\n")
    with pytest.raises(UsageError, match=r"'a\.png' is listed more than once"):
        labels_csv(table, collect([str(tmp_path / "a.png")], "image"), ["x", "y", "z"])
