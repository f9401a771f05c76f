"""inspect --complete: the walk finds nothing where all is right, and names the node whose rule is wrong."""

import json

import pytest
import torch
from cli_runs import CNN, MLP, TEST, attrcli

from attrcli.graph.rules import own
from attrcli.methods import _contributions
from attrcli.methods._deeplift_rules import RULES

IMAGE = sorted((TEST / "Bag").glob("*.png"))[0]
aten = torch.ops.aten


def walked(*arguments):
    done = attrcli("inspect", *arguments, "--json")
    assert done.code == 0, done.err
    return json.loads(done.out)


@pytest.mark.parametrize("model", [CNN, MLP], ids=["cnn", "mlp"])
def test_where_all_is_right_it_says_so(model):
    told = walked(model, "--complete", IMAGE, "--baseline", "grey", "--target", "3")
    assert told["complete"] is True
    assert "first" not in told
    assert told["largest"] < 1e-12
    assert abs(told["sum"] + told["remainder"] - told["delta"]) < 1e-9 * abs(told["delta"])
    assert abs(told["delta"]) > 1e-3


def test_it_names_the_node_with_a_wrong_rule_and_its_share(monkeypatch):
    right = walked(CNN, "--complete", IMAGE)

    def wrong(node, depends):
        def rule(step):
            if node.name != "max_pool2d_1":
                return RIGHT(node, depends)(step)
            value = step.run(*(a.detach() if isinstance(a, torch.Tensor) else a for a in step.args))
            return own(value, [step.args[0]], lambda g: (torch.ones_like(step.args[0]) * 1e-3,))

        return rule

    pools = aten.max_pool2d.default
    RIGHT = RULES[pools]
    monkeypatch.setitem(RULES, pools, wrong)
    told = walked(CNN, "--complete", IMAGE)
    assert told["complete"] is False
    assert told["first"] == "max_pool2d_1"
    assert "max_pool2d" in told["first_op"]
    assert told["worst"][0].startswith("max_pool2d_1 ")
    assert told["first_share"] == pytest.approx(1)
    assert told["gap"] == pytest.approx(told["first_gap"])
    assert told["delta"] == right["delta"]


def test_a_wrong_rule_for_relu_is_found_at_the_relu_nearest_to_the_output(monkeypatch):
    def gradient(pair):
        value = pair.x.detach()
        return own(value.relu(), [pair.x], lambda g: (g * (value > 0),))

    monkeypatch.setattr(_contributions, "relu", gradient)
    told = walked(MLP, "--complete", IMAGE, "--baseline", "white")
    assert told["complete"] is False
    assert "relu" in told["first_op"]
    assert abs(told["gap"]) > 1e-6


def test_text_is_a_table():
    text = attrcli("inspect", CNN, "--complete", IMAGE).out
    assert "complete:  True" in text
    assert "largest:" in text
