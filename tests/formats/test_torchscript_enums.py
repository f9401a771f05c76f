"""Enumerations of scripted models whose Python classes are not in this process."""

from enum import Enum
from pathlib import Path

import pytest
import torch
from nets import assert_close, build, load_script, save_scripted
from torch import Tensor, nn
from torch.jit import _state

from attrcli.errors import UnsupportedOp
from attrcli.formats.torchscript_enums import enumerations


class Layout(Enum):
    NCL = "channels"
    NLC = "length"


class Scale(Enum):
    SMALL = -0.5
    LARGE = 3e2


class Step(Enum):
    ONE = 1
    BACK = -2


class Chooses(nn.Module):
    """Constants, attributes, lists, defaults; compared by ==, !=, is; their names and values."""

    step: Step

    def __init__(self) -> None:
        super().__init__()
        self.step = Step.BACK
        self.scales = [Scale.LARGE, Scale.SMALL]
        self.layout = Layout.NLC

    def forward(self, x: Tensor, layout: Layout = Layout.NLC) -> Tensor:
        for scale in self.scales:
            x = x * scale.value
        if layout == Layout.NCL or self.scales[0] == Scale.SMALL:
            return x
        if self.layout != Layout.NCL and layout == self.layout:
            x = x + len(layout.name) * len(Layout.NCL.value)
        places = {self.step.name: self.step.value, Step.ONE.name: 7}
        return x * places["BACK"] + places["ONE"] * (Step.ONE.value + 1) + x.sin()


class Refused(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.linalg.inv(x) if Step.ONE.value else x


@pytest.fixture(params=[False, True], ids=["scripted", "frozen"])
def saved(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    path = save_scripted(Chooses().double().eval(), tmp_path / "net.pt", frozen=request.param)
    for name in [name for name in _state._name_to_pyclass if name.endswith((".Layout", ".Scale", ".Step"))]:
        monkeypatch.delitem(_state._name_to_pyclass, name)
    return path


def test_a_file_runs_without_the_classes_that_it_was_made_from(saved: Path) -> None:
    before = dict(_state._name_to_pyclass)
    graph, script = build(saved, (4,)), load_script(saved)
    assert before == _state._name_to_pyclass
    x = torch.randn(3, 4, dtype=torch.float64, requires_grad=True)
    mine, theirs = graph(x)[0], script(x)
    assert_close(mine, theirs)
    assert_close(*(torch.autograd.grad(y.square().sum(), x)[0] for y in (mine, theirs)))


def test_another_class_of_that_name_in_this_process_is_not_asked(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    module = saved.parent / "other"
    for name in ("Layout", "Scale", "Step"):
        monkeypatch.setitem(_state._name_to_pyclass, f"__torch__.{__name__}.{name}", module)
    before = dict(_state._name_to_pyclass)
    x = torch.randn(2, 4, dtype=torch.float64)
    assert_close(build(saved, (4,))(x)[0], load_script(saved)(x))
    assert before == _state._name_to_pyclass


def test_values_are_literals_and_nothing_is_evaluated() -> None:
    source = """\
class Format(Enum):
  A = 1
  B = -2.5e-3
  C = "x y"
  D = open("x")
  __class__ = 1
  E = "\\x41"
class Other(Module):
  A = 1
"""
    (kind, found), *rest = enumerations("code/__torch__/a/b.py", source).items()
    assert (kind, rest) == ("__torch__.a.b.Format", [])
    assert {name: member.value for name, member in vars(found).items()} == {"A": 1, "B": -2.5e-3, "C": "x y"}
    assert found.A != enumerations("code/__torch__/c.py", source)["__torch__.c.Format"].A


def test_the_classes_go_even_after_an_error(tmp_path: Path) -> None:
    path, before = save_scripted(Refused(), tmp_path / "net.pt"), dict(_state._name_to_pyclass)
    with pytest.raises(UnsupportedOp, match="linalg_inv"):
        build(path, (2, 2))
    assert before == _state._name_to_pyclass
