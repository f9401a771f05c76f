"""What a method says of itself without being imported, and how its options are read."""

import dataclasses
import importlib
import json
import subprocess
import sys
from typing import Any, Literal, get_type_hints

import pytest
import torch
from method_nets import SAMPLES, images, predicted

import attrcli.methods
import attrcli.model
from attrcli import methods
from attrcli.errors import UsageError
from attrcli.methods import METHODS
from attrcli.methods._describe import Description, Option, convert
from attrcli.methods._method import Ruling
from attrcli.model import Target


def class_of(name: str) -> type:
    module, _, cls = METHODS[name][0].partition(":")
    found: type = getattr(importlib.import_module(module), cls)
    return found


# -- description ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", METHODS)
def test_description_is_that_of_the_class(name: str) -> None:
    described, kind = methods.description(name), class_of(name)
    assert (described.name, described.summary) == (name, METHODS[name][1])
    assert (described.paper, described.cost) == (kind.paper, kind.cost)
    assert set(described.needs) == kind.needs
    assert issubclass(kind, Ruling) == (not kind.needs.isdisjoint({"rules", "node"}))
    assert set(described.gives) == kind.gives
    assert set(described.axioms) == kind.axioms
    assert described.text.split() == (kind.__doc__ or "").split()
    fields = dataclasses.fields(kind)
    assert [(option.name, option.default) for option in described.options] == [(f.name, f.default) for f in fields]
    made = methods.load(name)
    assert all(getattr(made, option.name) == option.default for option in described.options)


@pytest.mark.parametrize("name", METHODS)
def test_every_option_is_explained_and_its_default_fits_its_type(name: str) -> None:
    described = methods.description(name)
    for option in described.options:
        assert option.help.endswith("."), option.name
        assert "Literal" not in option.type
        assert getattr(methods.load(name, {option.name: str(option.default)}), option.name) == option.default


def test_types_are_written_for_people() -> None:
    types = {option.name: option.type for option in methods.description("integrated_gradients").options}
    assert types == {
        "steps": "int | auto",
        "rule": "gausslegendre | trapezoid",
        "tolerance": "float",
        "max_steps": "int",
    }


@pytest.mark.parametrize("name", METHODS)
def test_a_method_is_frozen_and_comparable(name: str) -> None:
    made = methods.load(name)
    assert made == methods.load(name)
    for field in dataclasses.fields(made):
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(made, field.name, None)


@pytest.mark.parametrize(
    "command", ["attrcli methods", "attrcli methods integrated_gradients", "attrcli methods occlusion --json"]
)
def test_describing_imports_no_torch(command: str) -> None:
    program = (
        f"import sys; sys.argv = {command.split()!r}\n"
        "from attrcli.__main__ import main\n"
        "try:\n    main()\n"
        "except SystemExit as end:\n    assert not end.code, end.code\n"
        "loaded = {'torch', 'onnx', 'onnxruntime', 'scipy', 'matplotlib'} & set(sys.modules)\n"
        "sys.exit(f'loaded: {loaded}' if loaded else 0)\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    if "--json" in command:
        assert {option["name"] for option in json.loads(done.stdout)["options"]} == {"patch", "stride"}
    else:
        assert "integrated" in done.stdout


# -- loading -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "hint"), [("integrated_gradient", "integrated_gradients"), ("smooth_grad", "smoothgrad")]
)
def test_a_typo_in_a_method_gets_a_suggestion(name: str, hint: str) -> None:
    for find in (methods.load, methods.description):
        with pytest.raises(
            UsageError, match=f"unknown method '{name}'; did you mean '{hint}'.; choose from: .*deeplift, "
        ):
            find(name)


def test_a_name_like_no_other_gets_the_list() -> None:
    with pytest.raises(UsageError, match=f"unknown method 'xyz'; choose from: {', '.join(sorted(METHODS))}$"):
        methods.load("xyz")


def test_an_unknown_option_gets_a_suggestion_and_the_list() -> None:
    message = (
        r"smoothgrad has no option 'sample'; did you mean 'samples'\?; its options: samples=50, noise=0.15, reduce"
    )
    with pytest.raises(UsageError, match=message):
        methods.load("smoothgrad", {"sample": 3})
    with pytest.raises(UsageError, match="gradient has no option 'steps'; its options: none"):
        methods.load("gradient", {"steps": 3})


@pytest.mark.parametrize(
    ("name", "given", "option", "value"),
    [
        ("integrated_gradients", "auto", "steps", "auto"),
        ("integrated_gradients", "64", "steps", 64),
        ("integrated_gradients", 64, "steps", 64),
        ("integrated_gradients", "trapezoid", "rule", "trapezoid"),
        ("integrated_gradients", "1e-3", "tolerance", 0.001),
        ("occlusion", "7", "patch", 7),
        ("occlusion", "auto", "stride", "auto"),
        ("smoothgrad", 1, "noise", 1.0),
        ("smoothgrad", "variance", "reduce", "variance"),
    ],
)
def test_text_becomes_the_type_of_the_option(name: str, given: object, option: str, value: object) -> None:
    found = getattr(methods.load(name, {option: given}), option)
    assert (found, type(found)) == (value, type(value))


@pytest.mark.parametrize(
    ("name", "option", "value", "kind"),
    [
        ("integrated_gradients", "steps", "many", "int | auto"),
        ("integrated_gradients", "steps", "2.5", "int | auto"),
        ("integrated_gradients", "steps", 2.5, "int | auto"),
        ("integrated_gradients", "steps", 50.0, "int | auto"),
        ("integrated_gradients", "steps", True, "int | auto"),
        ("integrated_gradients", "steps", [50], "int | auto"),
        ("integrated_gradients", "steps", "", "int | auto"),
        ("integrated_gradients", "rule", "simpson", "gausslegendre | trapezoid"),
        ("integrated_gradients", "tolerance", "nan", "float: it is not a finite number"),
        ("lrp", "epsilon", "NaN", "float: it is not a finite number"),
        ("lrp", "epsilon", float("nan"), "float: it is not a finite number"),
        ("integrated_gradients", "steps", "inf", "int | auto: it is not a finite number"),
        ("integrated_gradients", "max_steps", "auto", "int"),
        ("smoothgrad", "noise", "-inf", "float: it is not a finite number"),
        ("smoothgrad", "noise", "1e400", "float: it is not a finite number"),
        ("smoothgrad", "noise", "loud", "float"),
        ("smoothgrad", "noise", False, "float"),
        ("smoothgrad", "reduce", "Mean", "mean | squared | variance"),
        ("occlusion", "patch", None, "int | auto"),
        ("occlusion", "patch", {"side": 3}, "int | auto"),
    ],
)
def test_a_value_that_does_not_fit_names_option_value_and_type(
    name: str, option: str, value: object, kind: str
) -> None:
    with pytest.raises(UsageError) as caught:
        methods.load(name, {option: value})
    assert str(caught.value) == f"{name}: option {option}={value!r} does not fit its type, {kind}"


@dataclasses.dataclass(frozen=True)
class Sample:
    """Option types that no method has yet."""

    flag: bool = False
    limit: float | None = None
    level: Literal["low", "high"] | int = "low"


def converted(**options: Any) -> dict[str, Any]:
    hints = get_type_hints(Sample)
    listed = tuple(Option(name, str(kind), getattr(Sample, name), "") for name, kind in hints.items())
    return convert(Sample, "sample", Description("sample", "", "", "", "", (), (), (), listed), options)


@pytest.mark.parametrize(
    ("text", "value"),
    [("true", True), ("FALSE", False), ("1", True), ("0", False), ("yes", True), ("no", False), (True, True)],
)
def test_switches(text: object, value: bool) -> None:
    assert converted(flag=text) == {"flag": value}
    assert converted(flag=text)["flag"] is value


def test_other_types() -> None:
    assert converted(limit="none", level="3") == {"limit": None, "level": 3}
    assert converted(limit="0.5", level="high") == {"limit": 0.5, "level": "high"}
    for options in ({"flag": "maybe"}, {"flag": 2}, {"limit": "no"}, {"limit": "nan"}, {"level": "middle"}):
        with pytest.raises(UsageError, match="does not fit its type"):
            converted(**options)


# -- Python --------------------------------------------------------------------------------------------------------


def three_lines(doc: str | None) -> str:
    """The example of a docstring: the lines that assign."""
    return "\n".join(line for line in (doc or "").splitlines() if " = " in line)


def test_the_example_of_the_package_runs() -> None:
    source = three_lines(attrcli.methods.__doc__).replace("net.onnx", str(SAMPLES / "fashion_mlp.onnx"))
    assert len(source.splitlines()) == 3
    inputs, baseline = (part[:5] for part in images())
    names = {"attrcli": attrcli, "Target": Target, "inputs": inputs, "baseline": baseline}
    names["index"] = predicted("fashion_mlp")[:5]
    exec(source, names)
    assert names["values"].shape == inputs.shape


def test_the_example_of_the_model_runs() -> None:
    source = three_lines(attrcli.model.__doc__).replace("net.onnx", str(SAMPLES / "fashion_mlp.onnx"))
    names = {"attrcli": attrcli, "Target": Target, "batch": images()[0][:5], "index": torch.tensor([0, 1, 2, 3, 4])}
    exec(source, names)
    assert names["logits"].shape == (5, 10)
    assert names["gradient"].shape == (5, 1, 28, 28)
