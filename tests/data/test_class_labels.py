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
            r"labels \['3', 'hat'\] match nothing; accepted: the names T-shirt/top, ",
        ),
        ("name,label\na/x.png,Bag\n", r"the columns 'id' and 'label'"),
        ("id,label\nx.png,Bag\n", r"'x\.png' is the name of several inputs"),
        ("id,label\ny.png,Bag\n", r"no id is that of an input; an input's id is like 'a/x\.png'"),
    ],
)
def test_label_files_that_do_not_fit(tmp_path, text, message):
    found = in_folders(tmp_path, "a", "b")
    path = tmp_path / "labels.csv"
    path.write_text(text)
    with pytest.raises(UsageError, match=message):
        labels_csv(path, found, NAMES)
    with pytest.raises(UsageError, match=r"none\.csv': accepted for labels"):
        labels_csv(tmp_path / "none.csv", found, NAMES)
