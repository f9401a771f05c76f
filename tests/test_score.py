"""The scalar that is explained: closed forms of every score."""

import pytest
import torch
from nets import assert_close

from attrcli.errors import UsageError
from attrcli.score import SCORES, Target, apply_head, select, undo_head

Z = torch.tensor([[1.0, -2.0, 0.5], [0.0, 3.0, 3.5]], dtype=torch.float64)
INDEX = torch.tensor([0, 1])
P = Z.exp() / Z.exp().sum(1, keepdim=True)
S = 1 / (1 + (-Z).exp())


def test_a_score_that_is_none_is_refused():
    with pytest.raises(UsageError, match="unknown score 'nonsense'; accepted: logit, centred, prob, logprob, margin"):
        Target(INDEX, "nonsense")


@pytest.mark.parametrize(
    ("score", "head", "expected"),
    [
        ("logit", "none", [Z[0, 0], Z[1, 1]]),
        ("logit", "softmax", [Z[0, 0], Z[1, 1]]),
        ("centred", "softmax", [Z[0, 0] - Z[0].mean(), Z[1, 1] - Z[1].mean()]),
        ("prob", "softmax", [P[0, 0], P[1, 1]]),
        ("prob", "none", [P[0, 0], P[1, 1]]),
        ("prob", "sigmoid", [S[0, 0], S[1, 1]]),
        ("logprob", "log_softmax", [P[0, 0].log(), P[1, 1].log()]),
        ("logprob", "sigmoid", [S[0, 0].log(), S[1, 1].log()]),
        ("margin", "softmax", [Z[0, 0] - Z[0, 2], Z[1, 1] - Z[1, 2]]),
    ],
)
def test_closed_forms(score, head, expected):
    assert_close(select(Z, Target(INDEX, score), head), torch.stack(expected), 1e-14)


@pytest.mark.parametrize("score", SCORES)
@pytest.mark.parametrize("head", ["none", "sigmoid"])
def test_a_contrast_is_the_difference_of_two_scores(score, head):
    first, second = torch.tensor([0, 1]), torch.tensor([2, 0])
    contrast = select(Z, Target(first, score, minus=second), head)
    apart = [select(Z, Target(index, score), head) for index in (first, second)]
    assert_close(contrast, apart[0] - apart[1], 1e-14)


@pytest.mark.parametrize("shape", [(2,), (2, 1)])
@pytest.mark.parametrize("head", ["none", "sigmoid"])
def test_one_unit_is_a_sigmoid_with_two_sides(shape, head):
    z = torch.tensor([1.5, -0.5], dtype=torch.float64)
    sides = Target(torch.tensor([0, 0]), sign=torch.tensor([1.0, -1.0]))
    expected = {"logit": z * sides.sign, "prob": 1 / (1 + (-z * sides.sign).exp())}
    expected["logprob"] = expected["prob"].log()
    for score, value in expected.items():
        chosen = Target(sides.index, score, sign=sides.sign)
        assert_close(select(z.reshape(shape), chosen, head), value, 1e-14)
    for score in ("margin", "centred"):
        with pytest.raises(UsageError, match=f"{score} needs at least two classes"):
            select(z.reshape(shape), Target(sides.index, score), head)


def test_centred_scores_sum_to_zero_and_know_no_common_constant():
    every = [select(Z, Target(torch.full((2,), k), "centred"), "none") for k in range(3)]
    assert_close(torch.stack(every).sum(0), torch.zeros(2).double(), 1e-12)
    moved = [select(Z + 7, Target(torch.full((2,), k), "centred"), "none") for k in range(3)]
    assert_close(torch.stack(moved), torch.stack(every), 1e-12)


def test_positions_are_weighed_and_else_summed():
    z = torch.randn(2, 3, 4, 5, dtype=torch.float64)
    index = torch.tensor([2, 0])
    picked = torch.stack([z[0, 2], z[1, 0]])
    assert_close(select(z, Target(index), "none"), picked.sum((1, 2)), 1e-14)
    weight = torch.rand(2, 20, dtype=torch.float64)
    weighed = (picked.flatten(1) * weight).sum(1)
    assert_close(select(z, Target(index, weight=weight), "none"), weighed, 1e-14)
    probabilities = z.softmax(1)
    expected = torch.stack([probabilities[0, 2], probabilities[1, 0]]).sum((1, 2))
    assert_close(select(z, Target(index, "prob"), "softmax"), expected, 1e-14)


def test_rows_do_not_mix_and_gradients_reach_their_row_only():
    z = Z.clone().requires_grad_()
    gradient = torch.autograd.grad(select(z, Target(INDEX), "none").sum(), z)[0]
    assert gradient.tolist() == [[1, 0, 0], [0, 1, 0]]


def test_take_picks_rows_of_everything_and_may_repeat():
    target = Target(
        torch.tensor([0, 1, 2]), "margin", torch.tensor([3, 4, 5]), torch.rand(3, 2), torch.tensor([1.0, -1, 1]),
        torch.tensor([7, 8, 9]), {"mask": torch.tensor([10, 11, 12])},
    )  # fmt: skip
    taken = target.take(torch.tensor([2, 0, 2]))
    assert taken.score == "margin"
    assert taken.index.tolist() == [2, 0, 2]
    assert taken.minus.tolist() == [5, 3, 5]
    assert torch.equal(taken.weight, target.weight[[2, 0, 2]])
    assert taken.sign.tolist() == [1, 1, 1]
    assert taken.seed.tolist() == [9, 7, 9]
    assert taken.held["mask"].tolist() == [12, 10, 12]
    assert Target(torch.tensor([1])).take(torch.tensor([0, 0])).minus is None


@pytest.mark.parametrize("head", ["none", "softmax", "log_softmax", "sigmoid"])
def test_a_head_is_applied_and_undone(head):
    outputs = apply_head(Z, head)
    expected = {"none": Z, "softmax": P, "log_softmax": P.log(), "sigmoid": S}[head]
    assert_close(outputs, expected, 1e-14)
    again = undo_head(outputs, head)
    assert_close(apply_head(again, head), outputs, 1e-14)
    saturated = undo_head(torch.tensor([[0.0, 1.0]]), head)
    assert bool(torch.isfinite(saturated).all())
