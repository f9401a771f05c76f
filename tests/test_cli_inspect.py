"""`attrcli inspect` and `attrcli methods`: facts as text and as JSON."""

import json
import shutil
import tomllib

import h5py
import numpy as np
import pytest
import torch
from cli_runs import CNN, MLP, SAMPLES, TEST, attrcli, explain, linear, onnx_file, scripted, table
from onnx import TensorProto, helper

from attrcli.methods import METHODS


def facts(*arguments, code=0):
    """The JSON of `inspect`; NaN and Infinity, which are no JSON, are refused."""
    done = attrcli("inspect", *arguments, "--json")
    assert done.code == code, done.err

    def no(word):
        raise AssertionError(f"{word} is no JSON")

    return json.loads(done.out, parse_constant=no)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    shutil.copytree(TEST / "Bag", folder / "in")
    (folder / "in/broken.png").write_bytes(b"no image")
    explain(folder / "run.h5", "-o", "steps=8", model=CNN, inputs=folder / "in", method="integrated_gradients", code=3)
    return folder / "run.h5"


# -- models --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", ["pt", "onnx", "pt2"])
def test_a_model_in_each_format(suffix):
    told = facts(SAMPLES / f"fashion_cnn.{suffix}")
    assert told["format"] == {"pt": "torchscript"}.get(suffix, suffix)
    assert told["parameters"] == 84362
    assert told["sample_shape"] == [1, 28, 28]
    assert told["outputs"].endswith(" 10")
    assert told["batch"] == "free"
    assert told["final_activation"] == "none"
    assert told["preprocessing"] == "image, from fashion_cnn.toml"
    assert len(told["nodes"]) == told["graph_nodes"] == sum(told["op_classes"].values())
    refused = told["methods"].pop("attention_rollout")
    assert refused.startswith("no: ")
    assert "found no attention in the graph" in refused
    assert told["methods"] == dict.fromkeys([name for name in METHODS if name != "attention_rollout"], "works")
    assert sum(told["operations"].values()) > 15
    assert "note" not in told


def test_text_has_the_same_facts():
    text = attrcli("inspect", CNN).out
    assert "parameters:       84362" in text
    assert "integrated_gradients     works" in text
    assert "Conv                     5" in text
    assert "--json lists their names" in text


@pytest.mark.parametrize("head", ["Softmax", "Sigmoid", None])
def test_the_final_activation_is_detected(tmp_path, head):
    model = linear(tmp_path / "net.onnx", np.ones((3, 4)), head=head)
    assert facts(model)["final_activation"] == (head or "none").lower()


def test_torchscript_that_does_not_tell_its_size_says_what_to_do(tmp_path):
    shutil.copy(SAMPLES / "fashion_cnn.pt", tmp_path / "net.pt")
    told = facts(tmp_path / "net.pt")
    assert "--shape" in told["note"]
    assert "sidecar" in told["note"]
    assert all(text.startswith("not known: the file does not say") for text in told["methods"].values())
    assert told["operations"]["aten::batch_norm"] == 5
    assert "--preprocess" in told["preprocessing"]
    told = facts(tmp_path / "net.pt", "--shape", "1,28,28")
    assert told["outputs"] == "output 10"
    assert [name for name, text in told["methods"].items() if text != "works"] == ["attention_rollout"]
    told = facts(tmp_path / "net.pt", "--shape", "3x28x28")
    assert "note" in told
    for shape in ("1,a", "1,0,4", "3,", "9" * 5000):
        done = attrcli("inspect", tmp_path / "net.pt", "--shape", shape)
        assert done.code == 2
        assert "whole numbers" in done.err


@pytest.mark.parametrize("shape", ["99999999999,99999999999", "1,65536,1048576", ",".join(["9" * 18] * 30)])
def test_a_shape_that_no_memory_holds(tmp_path, shape):
    for model in (SAMPLES / "fashion_cnn.pt", CNN, shutil.copy(SAMPLES / "fashion_cnn.pt", tmp_path / "net.pt")):
        done = attrcli("inspect", model, "--shape", shape)
        assert (done.code, done.out) == (2, "")
        assert "does not fit into memory" in done.err
    done = attrcli("inspect", tmp_path / "net.pt", "--shape", shape, "--write-sidecar")
    assert (done.code, done.out) == (2, "")
    assert not (tmp_path / "net.toml").exists()


def test_an_operation_that_cannot_be_imported_is_shown(tmp_path):
    nodes = [
        helper.make_node("Unique", ["m"], ["u"], sorted=1),
        helper.make_node("Add", ["x", "u"], ["z"]),
    ]
    weights = {"m": np.array([1, 2, 1], np.float32)}
    told = facts(onnx_file(tmp_path / "n.onnx", nodes, {"x": ["N", 2]}, {"z": ["N", 2]}, weights))
    assert "Unique" in told["note"]
    assert told["operations"]["Unique"] == 1
    assert "Unique" in told["methods"]["gradient"]
    assert told["methods"]["occlusion"] == "works, in ONNX Runtime"


def test_several_inputs_without_sizes_are_not_said_to_work_with_nothing(tmp_path):
    """What `inspect` proposes is what works."""

    class Weighed(torch.nn.Module):
        def forward(self, x, m):
            return (x * m).cumsum(-1)

    model = scripted(tmp_path / "net.pt", Weighed())
    np.save(tmp_path / "x.npy", np.ones(4, np.float32))
    told = facts(model, "--shape", "4")
    assert set(told["methods"].values()) == {f"not known: {told['note']}"}
    assert told["note"] == "the file does not say the size of 'm': try explain with --input x --fix m=FILE"
    fix = ("--input", "x", "--fix", f"m={tmp_path / 'x.npy'}", "-t", "1")
    explain(tmp_path / "r.h5", *fix, model=model, inputs=tmp_path / "x.npy", method="gradient")


def test_several_inputs_and_outputs_are_listed(tmp_path):
    nodes = [
        helper.make_node("Cast", ["n"], ["f"], to=TensorProto.FLOAT),
        helper.make_node("Mul", ["x", "f"], ["y"]),
        helper.make_node("Neg", ["x"], ["z"]),
    ]
    inputs = {"n": (["N", 2], TensorProto.INT64), "x": ["N", 2]}
    told = facts(onnx_file(tmp_path / "n.onnx", nodes, inputs, {"y": ["N", 2], "z": ["N", 2]}, {}))
    assert told["inputs"] == "n Nx2 int64, x Nx2 float32"
    assert told["outputs"] == "y 2, z 2"
    assert told["methods"]["gradient"] == "works, with --input and --fix, --output"


def test_an_integer_input_has_no_gradient(tmp_path):
    nodes = [
        helper.make_node("Gather", ["t", "i"], ["e"]),
        helper.make_node("ReduceSum", ["e", "a"], ["z"], keepdims=0),
    ]
    weights = {"t": np.ones((5, 2), np.float32), "a": np.array([1])}
    told = facts(onnx_file(tmp_path / "n.onnx", nodes, {"i": (["N", 3], TensorProto.INT64)}, {"z": ["N", 2]}, weights))
    assert "--at NODE" in told["methods"]["gradient"]
    assert told["methods"]["occlusion"] == "works"


def test_files_that_are_no_model(tmp_path):
    cut = tmp_path / "cut.pt"
    cut.write_bytes((SAMPLES / "fashion_cnn.pt").read_bytes()[:5000])
    state = tmp_path / "state.pt"
    torch.save({"w": torch.ones(2)}, state)
    keras = tmp_path / "keras.h5"
    with h5py.File(keras, "w") as file:
        file.attrs["model_config"] = "{}"
    for path, word in {cut: "truncated", state: "state dict", keras: "tf2onnx", tmp_path / "no.pt": "no.pt"}.items():
        done = attrcli("inspect", path)
        assert done.code == 4
        assert word in done.err.lower()
        assert done.out == ""


# -- sidecars ------------------------------------------------------------------------------------------------------


def test_write_sidecar_for_an_image_model(tmp_path):
    shutil.copy(MLP, tmp_path / "net.onnx")
    done = attrcli("inspect", tmp_path / "net.onnx", "--write-sidecar")
    assert done.out.strip() == str(tmp_path / "net.toml")
    told = tomllib.loads((tmp_path / "net.toml").read_text())
    assert told["input"]["size"] == [28, 28]
    assert told["input"]["channels"] == "L"
    assert told["output"]["activation"] == "none"
    (tmp_path / "net.toml").write_text("mine")
    done = attrcli("inspect", tmp_path / "net.onnx", "--write-sidecar")
    assert done.code == 2
    assert "--force" in done.err
    assert (tmp_path / "net.toml").read_text() == "mine"
    assert attrcli("inspect", tmp_path / "net.onnx", "--write-sidecar", "--force").code == 0
    explain(tmp_path / "run.h5", model=tmp_path / "net.onnx")


def test_write_sidecar_needs_a_size_from_someone(tmp_path):
    shutil.copy(SAMPLES / "fashion_cnn.pt", tmp_path / "net.pt")
    assert attrcli("inspect", tmp_path / "net.pt", "--write-sidecar", "--shape", "1,28,28").code == 0
    explain(tmp_path / "run.h5", model=tmp_path / "net.pt")
    assert attrcli("inspect", tmp_path / "net.pt", "--write-sidecar", "--force").code == 0
    text = (tmp_path / "net.toml").read_text()
    assert "# size" in text
    assert 'resize = "none"' in text


def test_write_sidecar_for_a_table_an_array_and_channels_last(tmp_path):
    rows = table(tmp_path / "rows.csv", np.ones((2, 3)))
    model = linear(tmp_path / "table.onnx", np.eye(3), head="Softmax")
    assert attrcli("inspect", model, "--write-sidecar").code == 0
    told = tomllib.loads((tmp_path / "table.toml").read_text())
    assert told["input"]["kind"] == "table"
    assert told["output"]["activation"] == "softmax"
    explain(tmp_path / "a.h5", model=model, inputs=rows)

    flat = [helper.make_node("Flatten", ["x"], ["z"])]
    model = onnx_file(tmp_path / "array.onnx", flat, {"x": ["N", 5, 2, 2]}, {"z": ["N", 20]}, {})
    assert attrcli("inspect", model, "--write-sidecar").code == 0
    assert tomllib.loads((tmp_path / "array.toml").read_text())["input"]["size"] == [5, 2, 2]
    np.save(tmp_path / "array.npy", np.ones((3, 5, 2, 2)))
    explain(tmp_path / "b.h5", model=model, inputs=tmp_path / "array.npy")

    model = onnx_file(tmp_path / "last.onnx", flat, {"x": ["N", 8, 9, 3]}, {"z": ["N", 216]}, {})
    assert attrcli("inspect", model, "--write-sidecar").code == 0
    told = tomllib.loads((tmp_path / "last.toml").read_text())["input"]
    assert (told["layout"], told["size"], told["channels"]) == ("NHWC", [8, 9], "RGB")
    explain(tmp_path / "c.h5", model=model)


def test_write_sidecar_copies_what_the_file_carries(tmp_path):
    text = '[input]\nkind = "table"\ncolumns = ["x", "y"]\n[output]\nlabels = ["no", "yes"]\n'
    model = scripted(tmp_path / "net.pt", torch.nn.Linear(2, 2), sidecar=text)
    assert facts(model)["preprocessing"] == "table, from the file itself"
    assert attrcli("inspect", model, "--write-sidecar").code == 0
    told = tomllib.loads((tmp_path / "net.toml").read_text())
    assert told["input"]["columns"] == ["x", "y"]
    assert told["output"]["labels"] == ["no", "yes"]
    assert facts(model)["preprocessing"] == "table, from net.toml"


# -- run files -----------------------------------------------------------------------------------------------------


def test_a_run_file(run):
    told = facts(run)
    assert told["complete"] is True
    assert (told["rows"], told["rows_ok"], told["rows_error"]) == (7, 6, 1)
    assert told["method"] == "integrated_gradients"
    assert told["options"]["steps"] == 8
    assert told["attribution"] == [1, 28, 28]
    assert 0 <= told["gap_median"] <= told["gap_p95"] <= told["gap_max"] < 1
    assert told["gap_max_id"].endswith(".png")
    assert len(told["errors"]) == 1
    assert "broken.png" in told["errors"][0]
    text = attrcli("inspect", run).out
    assert "rows_ok:" in text
    assert "steps=8" in text


def test_explain_and_inspect_tell_the_same_median(run):
    """Also of an even number of gaps."""
    explained = explain(
        run, "-o", "steps=8", "--json", model=CNN, inputs=run.parent / "in", method="integrated_gradients", code=3
    )
    assert facts(run)["gap_median"] == json.loads(explained.out)["gap_median"]


def test_a_file_that_cannot_be_read():
    done = attrcli("inspect", "/proc/self/mem")
    assert done.code == 4
    assert "/proc/self/mem" in done.err


def test_a_run_without_gaps_and_one_without_any_good_row(tmp_path):
    explain(tmp_path / "a.h5")
    assert "gap_max" not in facts(tmp_path / "a.h5")
    (tmp_path / "broken.png").write_bytes(b"no image")
    explain(tmp_path / "b.h5", inputs=tmp_path / "broken.png", method="integrated_gradients", code=3)
    told = facts(tmp_path / "b.h5")
    assert told["rows_error"] == 1
    assert "gap_max" not in told


def test_a_gap_without_any_attribution_is_no_number_in_json(tmp_path):
    """A plateau: the gradient is zero everywhere on the path, the score rises all the same."""
    nodes = [helper.make_node("Floor", ["x"], ["f"]), helper.make_node("Gemm", ["f", "w"], ["z"], transB=1)]
    model = onnx_file(tmp_path / "n.onnx", nodes, {"x": ["N", 2]}, {"z": ["N", 1]}, {"w": np.ones((1, 2), np.float32)})
    data = table(tmp_path / "x.csv", [[1.5, 2.5]])
    arguments = ("explain", model, data, "-m", "integrated_gradients", "-b", "zero", "-t", "0", "--json")
    done = attrcli(*arguments, "--out", tmp_path / "run.h5")
    assert json.loads(done.out)["gap_max"] is None
    assert facts(tmp_path / "run.h5")["gap_max"] is None


def test_a_damaged_run_file(run, tmp_path):
    (tmp_path / "cut.h5").write_bytes(run.read_bytes()[:3000])
    done = attrcli("inspect", tmp_path / "cut.h5")
    assert done.code == 2
    assert "damaged or cut short" in done.err


# -- methods -------------------------------------------------------------------------------------------------------


def test_methods():
    text = attrcli("methods").out
    assert [line.split()[0] for line in text.splitlines()] == list(METHODS)
    listed = json.loads(attrcli("methods", "--json").out)
    assert [each["name"] for each in listed] == list(METHODS)


@pytest.mark.parametrize("name", METHODS)
def test_one_method(name):
    told = json.loads(attrcli("methods", name, "--json").out)
    assert set(told) == {"name", "summary", "text", "paper", "cost", "needs", "gives", "axioms", "options"}
    text = attrcli("methods", name).out
    assert told["paper"] in text
    for option in told["options"]:
        assert f"-o {option['name']}={option['default']}" in text
        assert option["help"] in text


def test_a_method_that_is_not_there():
    done = attrcli("methods", "salience")
    assert done.code == 2
    assert "did you mean 'saliency'" in done.err


def test_a_sidecar_that_lies_elsewhere_tells_size_and_type(tmp_path):
    class Tokens(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.embedding, self.head = torch.nn.Embedding(9, 4), torch.nn.Linear(4, 3)

        def forward(self, ids):
            return self.head(self.embedding(ids).mean(1))

    scripted(tmp_path / "tokens.pt", Tokens())
    (tmp_path / "told.toml").write_text('[input]\nkind = "array"\nsize = [5]\ndtype = "int64"\n')
    assert "nodes" not in facts(tmp_path / "tokens.pt")
    told = facts(tmp_path / "tokens.pt", "-p", tmp_path / "told.toml")
    assert told["sample_shape"] == [5]
    assert told["preprocessing"] == f"array, from {tmp_path / 'told.toml'}"
    assert "embedding" in told["nodes"]
    assert told["methods"]["occlusion"] == "works"
    assert "--at NODE" in told["methods"]["gradient"]


@pytest.mark.parametrize("flag", [("-b", "white"), ("-t", "Bag")])
def test_what_matters_to_complete_alone_is_refused_without(flag):
    done = attrcli("inspect", CNN, *flag)
    assert (done.code, done.out) == (2, "")
    assert f"{flag[1]}: it matters to --complete INPUT alone" in done.err


def test_loops_that_do_not_end_are_refused(tmp_path, monkeypatch):
    """By a limit that both formats share."""
    monkeypatch.setattr("attrcli.graph.bounded.MOST_STEPS", 20_000)
    names = [helper.make_tensor_value_info("i", TensorProto.INT64, []), helper.make_tensor_value_info("c", 9, [])]
    value, result, going = (
        helper.make_tensor_value_info(name, kind, None) for name, kind in (("v", 1), ("w", 1), ("d", 9))
    )
    nodes = [helper.make_node("Identity", ["c"], ["d"]), helper.make_node("Add", ["v", "v"], ["w"])]
    body = helper.make_graph(nodes, "b", [*names, value], [going, result])
    loop = helper.make_node("Loop", ["M", "C", "x"], ["z"], body=body, name="turns")
    weights = {"M": np.array(1 << 60), "C": np.array(True)}
    made = onnx_file(tmp_path / "n.onnx", [loop], {"x": ["N", 2]}, {"z": ["N", 2]}, weights)

    class Endless(torch.nn.Module):
        def forward(self, x):
            i = 0
            while i >= 0:
                i = 0
            return x * i

    np.save(tmp_path / "x.npy", np.ones((1, 2), np.float32))
    for model, place in ((made, "node 'turns' (Loop)"), (scripted(tmp_path / "n.pt", Endless()), "while")):
        told = facts(model, "--shape", "2")
        assert "unrolls to more than 20000 steps" in told["note"]
        assert place in told["note"]
        assert set(told["methods"].values()) == {f"no: {told['note']}"}
    done = attrcli("explain", made, tmp_path / "x.npy", "-m", "occlusion", "--out", tmp_path / "r.h5")
    assert done.code == 4
    assert "in the loop at node 'turns'" in done.err


def test_what_keeps_the_graph_from_being_built_is_every_methods_reason_and_printed_once(tmp_path):
    """Even where the input is of whole numbers, which alone would send to --at NODE."""
    nodes = [
        helper.make_node("Gather", ["t", "i"], ["e"]),
        helper.make_node("Unique", ["m"], ["u"], sorted=1),
        helper.make_node("Add", ["e", "u"], ["z"]),
    ]
    weights = {"t": np.ones((5, 2), np.float32), "m": np.array([1, 2, 1], np.float32)}
    made = onnx_file(tmp_path / "n.onnx", nodes, {"i": (["N", 3], TensorProto.INT64)}, {"z": ["N", 3, 2]}, weights)
    told = facts(made)
    assert {told["methods"][name] for name in ("gradient", "deeplift", "lrp")} == {f"no: {told['note']}"}
    text = attrcli("inspect", made).out
    assert text.count(told["note"]) == 1
    assert "gradient                 no: see the note" in text


def test_one_reason_of_all_methods_is_one_line(tmp_path):
    class Inverts(torch.nn.Module):
        def forward(self, x):
            return torch.linalg.inv(x)

    text = attrcli("inspect", scripted(tmp_path / "n.pt", Inverts()), "--shape", "2,2").out
    assert text.count("exporting the model to ONNX may help") == 1
    assert f"no: see the note, for all {len(METHODS)}" in text
