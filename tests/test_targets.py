"""`--target`: what is written, what it selects in each row, and what is refused by name."""

import re

import pytest
import torch

from attrcli.errors import AttrcliWarning, UsageError
from attrcli.score import select
from attrcli.targets import Wanted, classes_of, parse, resolve

LABELS = ["cat", "dog", "t-shirt", "shirt", "t"]
Z = torch.tensor([[0.1, 0.7, 0.2, 0.0, -1.0], [2.0, 0.0, 1.0, 0.5, 3.0]])
NONE = torch.tensor([1, 0])


def resolved(text, logits=Z, head="none", labels=NONE, names=LABELS, score="logit"):
    return resolve(parse(text, names), score, logits, head, labels)


# --- written


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("predicted", Wanted("predicted", "predicted")),
        ("label", Wanted("label", "label")),
        ("3", Wanted("3", "index", 3)),
        ("dog", Wanted("dog", "index", 1)),
        ("t-shirt", Wanted("t-shirt", "index", 2)),
        ("dog-cat", Wanted("dog-cat", "index", 1, 0)),
        ("t-shirt-dog", Wanted("t-shirt-dog", "index", 2, 1)),
        ("dog-t-shirt", Wanted("dog-t-shirt", "index", 1, 2)),
        ("3-cat", Wanted("3-cat", "index", 3, 0)),
        ("1-0", Wanted("1-0", "index", 1, 0)),
        ("dog@sum", Wanted("dog@sum", "sum", 1)),
        ("2@mask", Wanted("2@mask", "mask", 2)),
        ("1, 4,5", Wanted("1, 4,5", "position", 1, position=(4, 5))),
    ],
)
def test_every_form_is_read(text, expected):
    assert parse(text, LABELS) == expected


@pytest.mark.parametrize(
    ("text", "labels", "message"),
    [
        ("dgo", LABELS, "'dgo' is no label; did you mean 'dog'.; labels: cat, dog"),
        ("dgo", None, "'dgo' is no label; no labels are known; accepted: predicted, label, an index"),
        ("-1", LABELS, "'-1' is no label"),
        ("cat-cow", LABELS, "'cat-cow' is no label"),
        ("1@max", LABELS, "after @ comes sum or mask"),
        ("1,x", LABELS, "a position is written i,j,k with whole numbers"),
        ("a-b-c", ["a", "b-c", "a-b", "c"], "this says 'a' less 'b-c' or 'a-b' less 'c'; use the indices"),
        ("crane", ["crane", "dog", "crane"], "the label 'crane' stands for the classes 0, 2; use an index"),
        ("dog-crane", ["crane", "dog", "crane"], "the label 'crane' stands for the classes 0, 2"),
        ("", LABELS, "'' is no label"),
    ],
)
def test_what_cannot_be_read_is_refused(text, labels, message):
    with pytest.raises(UsageError, match=f"--target {text}: {message}") as caught:
        parse(text, labels)
    assert caught.value.exit_code == 2


@pytest.mark.parametrize("text", ["+1", "01", "1e3", "1.0", "0x1", "1_0", "１", "٣", "²", "9" * 30, "-", "1-", "1–0"])
def test_only_plain_whole_numbers_are_indices(text):
    for written in (text, f"{text}-1", f"1-{text}", f"{text}@sum"):
        with pytest.raises(UsageError, match=f"--target {re.escape(written)}: "):
            parse(written, LABELS)
    with pytest.raises(UsageError, match="a position is written i,j,k"):
        parse(f"0,{text}", LABELS)


@pytest.mark.parametrize("text", ["0-0", "cat-cat", "cat-0", "t-t"])
def test_a_class_less_itself_is_refused(text):
    with pytest.raises(UsageError, match=f"--target {text}: a class less itself is always zero"):
        parse(text, LABELS)


def test_a_label_that_is_a_number_is_the_label():
    assert parse("7", ["3", "7"]).index == 1


# --- resolved


def test_rows_get_their_own_class():
    assert resolved("predicted").index.tolist() == [1, 4]
    assert resolved("label").index.tolist() == [1, 0]
    assert resolved("t").index.tolist() == [4, 4]
    contrast = resolved("t-shirt-dog")
    assert (contrast.index.tolist(), contrast.minus.tolist()) == ([2, 2], [1, 1])


def test_one_sigmoid_output_has_two_classes():
    z = torch.tensor([[1.5], [-0.5]])
    flipped = resolved("predicted", z, "sigmoid", names=None)
    assert flipped.sign.tolist() == [1, -1]
    assert classes_of(flipped).tolist() == [1, 0]
    assert select(z, flipped, "sigmoid").tolist() == [1.5, 0.5]
    assert classes_of(resolved("0", z, "sigmoid", names=None)).tolist() == [0, 0]
    assert classes_of(resolved("label", z, "sigmoid", names=None)).tolist() == [1, 0]
    with pytest.raises(UsageError, match=r"2 is out of range: the output has 2 classes, 0 to 1"):
        resolved("2", z, "sigmoid", names=None)
    with pytest.raises(UsageError, match="one sigmoid output has no contrast"):
        resolved("1-0", z, "sigmoid", names=None)


def test_one_output_without_a_sigmoid_has_one_class():
    for z in (torch.tensor([[1.5], [-0.5]]), torch.tensor([1.5, -0.5])):
        assert resolved("predicted", z).index.tolist() == [0, 0]
        assert resolved("predicted", z).sign is None
        with pytest.raises(UsageError, match="1 is out of range: the output has 1 classes, 0 to 0"):
            resolved("1", z)


@pytest.mark.parametrize("text", ["5", "0-5", "5-0", "label"])
def test_a_class_out_of_range_is_refused(text):
    with pytest.raises(UsageError, match=f"--target {text}: 5 is out of range: the output has 5 classes, 0 to 4"):
        resolved(text, labels=torch.tensor([0, 5]))


# --- outputs of higher rank

MAP = torch.arange(24.0).reshape(2, 3, 2, 2)


def test_positions_sums_and_masks():
    at = resolved("1,0,1", MAP)
    assert select(MAP, at, "none").tolist() == MAP[:, 1, 0, 1].tolist()
    total = resolved("dog@sum", MAP)
    assert select(MAP, total, "none").tolist() == MAP[:, 1].sum((1, 2)).tolist()
    z = MAP.clone()
    z[0, 1, 0, 0] = z[1, 1, 1, 1] = z[1, 1, 1, 0] = 100
    where = resolved("dog@mask", z)
    assert select(z, where, "none").tolist() == [100, 200]
    with pytest.warns(AttrcliWarning, match="cat@mask: in 2 of 2 inputs class 0 is the likeliest at no position"):
        assert select(z, resolved("cat@mask", z), "none").tolist() == [0, 0]


def test_a_map_of_one_element_is_a_class_score():
    assert resolved("predicted", Z[..., None, None]).index.tolist() == [1, 4]


@pytest.mark.parametrize("text", ["predicted", "label", "1", "dog", "dog-cat"])
def test_a_class_of_a_map_is_refused_with_what_fits(text):
    message = f"--target {text}: the output is 3x2x2 per sample, .*choose C@sum, C@mask or a position i,j,k"
    with pytest.raises(UsageError, match=message):
        resolved(text, MAP)


@pytest.mark.parametrize("text", ["1@sum", "1@mask", "1,0"])
def test_a_position_of_a_class_score_is_refused_with_what_fits(text):
    with pytest.raises(UsageError, match=f"--target {text}: the output is 5 per sample; choose predicted, label"):
        resolved(text)


@pytest.mark.parametrize("text", ["1,0", "1,0,2", "1,0,0,0"])
def test_a_position_outside_the_map_is_refused(text):
    with pytest.raises(UsageError, match="not a position of an output of 3x2x2"):
        resolved(text, MAP)
    with pytest.raises(UsageError, match="out of range: the output has 3 classes"):
        resolved("3,0,0", MAP)
