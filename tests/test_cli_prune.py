"""`attrcli prune`: masks, their comparison, masked models reloaded in plain torch and ONNX Runtime, and bad input."""

import json
import os
import warnings

import numpy as np
import onnxruntime
import pytest
import torch
from cli_runs import CNN, MLP, SAMPLES, SIDECAR, TEST, attrcli, image, onnx_file
from onnx import helper
from PIL import Image

from attrcli import model as models
from attrcli import prune as verb
from attrcli.errors import UsageError
from attrcli.graph import engine
from attrcli.methods import _pruning as pruning
from attrcli.store import Lock, MaskFile

BAG = TEST / "Bag"


def prune(out, *arguments, model=CNN, inputs=BAG, code=0):
    done = attrcli("prune", model, inputs, "--out", out, *arguments)
    assert done.code == code, f"exit {done.code}: {done.out}{done.err}"
    return done


def facts(out, *arguments, **options):
    return json.loads(prune(out, "--json", *arguments, **options).out)


def pixels(path):
    values = np.asarray(Image.open(path), np.float32)[None, None] / np.float32(255)
    return torch.from_numpy((values - np.float32(0.2860)) / np.float32(0.3530))


def loaded(path):
    """A written model as its own runtime has it: plain torch or ONNX Runtime."""
    if path.suffix == ".onnx":
        session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
        return lambda x: torch.from_numpy(session.run(None, {session.get_inputs()[0].name: x.numpy()})[0])
    if path.suffix == ".pt2":
        return torch.export.load(path).module()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        return torch.jit.load(path)


def masked_by_hand(masks, x):
    """The sample MLP or CNN in its own eager form, with masks as constants after each ReLU."""
    net = models.load(CNN if len(masks) == 5 else MLP)
    graph = net.engine((1, 28, 28)).graph
    env = {}
    for node in graph.graph.nodes:
        if node.op == "placeholder":
            env[node] = x
        elif node.op == "get_attr":
            env[node] = (
                graph.get_parameter(node.target)
                if node.target in dict(graph.named_parameters())
                else (graph.get_buffer(node.target))
            )
        elif node.op == "output":
            return env[node.args[0][0]]
        else:
            args = torch.fx.map_arg(node.args, env.__getitem__)
            env[node] = node.target(*args, **node.kwargs)
            if node.name in masks:
                env[node] = env[node] * torch.from_numpy(masks[node.name])
    return None


@pytest.mark.parametrize("criterion", ["prune_grad", "prune_int", "greedy", "random"])
def test_masks_statistics_and_predictions_agree(criterion, tmp_path):
    told = facts(tmp_path / "out", "--criterion", criterion, "--sparsity", 0.8, model=MLP)
    assert (told["rows"], told["ok"], told["errors"], told["neurons"]) == (6, 6, 0, 192)
    with MaskFile(tmp_path / "out/masks.h5") as file:
        assert file.attributes["criterion"] == criterion
        assert file.layers == {"relu": (128,), "relu_1": (64,)}
        assert file.ids == sorted(file.ids)
        assert file["sample_sha256"][0].decode() != ""
        assert told["sparsity"] == pytest.approx(file["sparsity"].mean(), abs=1e-4)
        jaccard = file["jaccard"]
        kept = []
        for row, name in enumerate(file.ids):
            masks = file.masks(row)
            flat = np.concatenate([mask.ravel() for mask in masks.values()])
            kept.append(flat)
            assert file["kept"][row].tolist() == [int(mask.sum()) for mask in masks.values()]
            assert file["sparsity"][row] == pytest.approx(1 - flat.mean(), abs=1e-12)
            assert file["sparsity"][row] >= 0.8 - 1 / 192
            x = pixels(BAG / name)
            expected = masked_by_hand(masks, x)[0].detach().numpy()
            np.testing.assert_allclose(file["prediction_pruned"][row], expected, rtol=1e-4, atol=1e-5)
            p, q = (torch.tensor(file[key][row]).softmax(0) for key in ("prediction", "prediction_pruned"))
            target = int(file["target"][row])
            assert file["change"][row] == pytest.approx(float((q - p).abs()[target] / p[target]), rel=1e-3, abs=1e-6)
        for i, j in ((0, 1), (2, 5), (3, 3)):
            one, other = (kept[file["jaccard_row"][k]] for k in (i, j))
            assert jaccard[i, j] == pytest.approx((one & other).sum() / (one | other).sum(), rel=1e-6)
        dead = file["dead_kept"]
    assert (dead > 0.1).all() if criterion == "random" else criterion == "greedy" or (dead == 0).all()
    with Image.open(tmp_path / "out/jaccard.png") as picture:
        assert picture.width > 500


@pytest.mark.parametrize("steps", [None, 3])
def test_options_of_the_criterion_are_those_of_the_method(steps, tmp_path):
    given = [] if steps is None else ["-o", f"steps={steps}"]
    facts(tmp_path / "out", "--criterion", "prune_int", "-o", "sparsity=0.93", "--limit", 2, *given)
    net = pruning.Network(models.load(CNN), torch.zeros(1, 1, 28, 28), "relu", "prune_int")
    with MaskFile(tmp_path / "out/masks.h5") as file:
        assert file.attributes["options"]["steps"] == (steps or 10)
        assert (file.attributes["sparsity"], file.attributes["options"]["ops"]) == (0.93, "relu")
        differ = 0
        for row, name in enumerate(file.ids):
            target = models.Target(torch.tensor([int(file["target"][row])]))
            for each in (1, steps or 10):
                scores, _ = pruning.integrated_scores(net, pixels(BAG / name), target, each)
                masks = {key: mask[0].numpy() for key, mask in pruning.masks_at(scores, [0.93]).items()}
                same = all(np.array_equal(masks[key], kept) for key, kept in file.masks(row).items())
                assert same or each == 1
                differ += not same
    assert differ > 0  # one step would keep others


def test_one_input_is_compared_with_nothing(tmp_path):
    assert "jaccard" not in prune(tmp_path / "one", "--limit", 1, model=MLP).out
    assert sorted(path.name for path in (tmp_path / "one").iterdir()) == ["masks.h5"]
    assert "jaccard" not in facts(tmp_path / "json", "--limit", 1, model=MLP)
    inputs = tmp_path / "in"
    image(inputs / "a.png", np.full((28, 28), 90))
    (inputs / "b.png").write_bytes(b"no image")
    assert "jaccard" not in prune(tmp_path / "bad", model=MLP, inputs=inputs, code=3).out
    assert not (tmp_path / "bad/jaccard.png").exists()
    assert "jaccard, mean over pairs of 2 inputs" in prune(tmp_path / "two", "--limit", 2, model=MLP).out
    assert (tmp_path / "two/jaccard.png").exists()


def test_random_masks_do_not_depend_on_the_batch(tmp_path):
    found = []
    for name, size in (("one", 1), ("seven", 7)):
        facts(tmp_path / name, "--criterion", "random", "--batch-size", size, model=MLP)
        with MaskFile(tmp_path / name / "masks.h5") as file:
            found.append([np.concatenate([m.ravel() for m in file.masks(row).values()]) for row in range(6)])
    assert np.array_equal(found[0], found[1])
    assert not np.array_equal(found[0][0], found[0][1])


def test_each_input_keeps_its_own_change(tmp_path):
    facts(tmp_path / "out", "--max-output-change", 0.15, model=MLP)
    facts(tmp_path / "greedy", "--max-output-change", 0.15, "--criterion", "greedy", model=MLP)
    for name in ("out", "greedy"):
        with MaskFile(tmp_path / name / "masks.h5") as file:
            assert (file["change"] <= 0.15).all()
            assert len(set(file["sparsity"])) > 1
            assert (file["sparsity"] > 0.5).all()


@pytest.mark.parametrize("suffix", [".pt", ".onnx", ".pt2"])
@pytest.mark.parametrize("stem", ["fashion_mlp", "fashion_cnn"])
def test_each_exported_model_makes_the_masked_prediction(stem, suffix, tmp_path):
    told = facts(tmp_path / "out", "--export", "each", "--limit", 2, model=SAMPLES / f"{stem}{suffix}")
    assert told["models"] == 2
    with MaskFile(tmp_path / "out/masks.h5") as file:
        for row, name in enumerate(file.ids):
            net = loaded(tmp_path / f"out/models/{name}{suffix}")
            expected = file["prediction_pruned"][row]
            for x in (pixels(BAG / name), pixels(BAG / name).expand(7, -1, -1, -1)):
                assert np.abs(net(x).detach().numpy() - expected).max() < 1e-5 * np.abs(expected).max()
    if stem == "fashion_mlp":
        assert told["parameters"] < 0.5
        assert told["bytes"] < 0.7


@pytest.mark.parametrize("suffix", [".pt", ".onnx", ".pt2"])
@pytest.mark.parametrize("how", ["union", "intersection"])
def test_one_model_for_all_inputs(how, suffix, tmp_path):
    told = facts(tmp_path / "out", "--export", how, "--limit", 3, model=SAMPLES / f"fashion_mlp{suffix}")
    assert told["models"] == 1
    with MaskFile(tmp_path / "out/masks.h5") as file:
        rows = [file.masks(row) for row in range(3)]
    join = np.logical_or if how == "union" else np.logical_and
    masks = {name: join.reduce([row[name] for row in rows]) for name in rows[0]}
    x = torch.cat([pixels(path) for path in sorted(TEST.rglob("*.png"))[:7]])
    expected = masked_by_hand(masks, x).detach().numpy()
    found = loaded(tmp_path / f"out/models/{how}{suffix}")(x).detach().numpy()
    assert np.abs(found - expected).max() < 1e-5 * np.abs(expected).max()
    assert told["parameters"] < 0.6


def test_a_finished_folder_is_kept_unless_forced_and_then_holds_nothing_stale(tmp_path):
    out = tmp_path / "out"
    prune(out, "--export", "each", "--limit", 2, model=MLP)
    assert len(list((out / "models").iterdir())) == 2
    assert "holds the masks of an earlier run" in prune(out, model=MLP, code=2).err
    assert len(list((out / "models").iterdir())) == 2
    prune(out, "--force", "--export", "union", "--limit", 2, model=MLP)
    assert [path.name for path in (out / "models").iterdir()] == ["union.onnx"]
    assert sorted(path.name for path in out.iterdir()) == ["jaccard.png", "masks.h5", "models"]


def test_an_interrupted_run_leaves_nothing_and_starts_anew(tmp_path, monkeypatch):
    real = verb._Run._finish

    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(verb._Run, "_finish", interrupted)
    done = prune(tmp_path / "out", model=MLP, code=130)
    assert "nothing is kept" in done.err
    assert list((tmp_path / "out").iterdir()) == []
    monkeypatch.setattr(verb._Run, "_finish", real)
    prune(tmp_path / "out", model=MLP)


def test_one_process_at_a_time_and_what_a_killed_one_left_goes(tmp_path):
    out = tmp_path / "out"
    (out / ".pruning-killed/models").mkdir(parents=True)
    lock = Lock(out / "masks.h5")
    try:
        assert "another attrcli is writing" in prune(out, code=2).err
        assert {path.name for path in out.iterdir()} == {".pruning-killed", "masks.h5.lock"}
    finally:
        lock.release()
    prune(out)
    assert {path.name for path in out.iterdir()} == {"masks.h5", "jaccard.png"}


def test_two_runs_started_together_do_not_replace_each_other(tmp_path):
    """The second was planned while the folder was empty, and runs when the first has finished."""
    config = {"model": str(MLP), "inputs": (str(BAG),), "out": str(tmp_path / "out")}
    first, second = (verb.plan(verb.Wanted(), **config) for _ in range(2))
    verb.prune(first, verb.Wanted())
    with pytest.raises(UsageError, match="holds the masks of an earlier run"):
        verb.prune(second, verb.Wanted())


def test_an_unreadable_input_is_a_row_with_an_error(tmp_path):
    inputs = tmp_path / "in"
    image(inputs / "a.png", np.zeros((28, 28)))
    (inputs / "b.png").write_bytes(b"no image")
    image(inputs / "c.png", np.full((28, 28), 90))
    done = prune(tmp_path / "out", model=MLP, inputs=inputs, code=3)
    assert "b.png" in done.err
    with MaskFile(tmp_path / "out/masks.h5") as file:
        assert file["status"].tolist() == [1, 2, 1]
        assert np.isnan(file["change"][1])
        assert file.masks(0)["relu"].sum() > 0 == file.masks(1)["relu"].sum()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--sparsity", "1.5"], "must lie between 0 and 1"),
        (["--sparsity", "0.5", "--max-output-change", "0.1"], "give one of them"),
        (["--max-output-change", "-1"], "not negative"),
        (["--criterion", "greed"], "--criterion greed: choose from"),
        (["--export", "all"], "--export all: choose from"),
        (["--ops", "rleu"], "did you mean 'relu'"),
        (["--export", "each", "--precision", "bf16"], "leave out --precision bf16"),
        (["-o", "steps=3"], "prune_grad has no option 'steps'"),
        (["-o", "steps=3", "--criterion", "greedy"], "greedy has no option 'steps'"),
        (["-o", "step=3", "--criterion", "prune_int"], "prune_int has no option 'step'; did you mean 'steps'?"),
        (["-o", "steps=0", "--criterion", "prune_int"], "steps=0 must be at least 1"),
        (["-o", "steps"], "write it as -o NAME=VALUE"),
        (["-o", "sparsity=0.5", "--sparsity", "0.5"], "--sparsity and -o sparsity= say the same"),
        (["-o", "max_output_change=1", "--sparsity", "0.5"], "give one of them"),
    ],
)
def test_usage(arguments, message, tmp_path):
    assert message in prune(tmp_path / "out", *arguments, model=MLP, code=2).err
    assert not (tmp_path / "out").exists()


def test_an_empty_folder_of_inputs(tmp_path):
    (tmp_path / "in").mkdir()
    prune(tmp_path / "out", model=MLP, inputs=tmp_path / "in", code=5)
    assert not (tmp_path / "out").exists()


def test_a_folder_that_is_not_ours(tmp_path):
    (tmp_path / "full").mkdir()
    (tmp_path / "full/thesis.txt").write_text("")
    assert "holds other files, such as thesis.txt" in prune(tmp_path / "full", "--force", model=MLP, code=2).err
    (tmp_path / "file").write_text("")
    assert "there is a file of that name" in prune(tmp_path / "file", model=MLP, code=2).err
    image(tmp_path / "in/a.png", np.zeros((28, 28)))
    assert "lies in the folder of inputs" in prune(tmp_path / "in/out", model=MLP, inputs=tmp_path / "in", code=2).err


def test_a_folder_that_cannot_be_made(tmp_path):
    (tmp_path / "file").write_text("")
    assert "choose another place" in prune(tmp_path / "file/out", model="missing.onnx", code=2).err


def test_weights_that_are_nan_and_a_linear_model(tmp_path):
    (tmp_path / "in").mkdir()
    image(tmp_path / "in/a.png", np.zeros((28, 28)))
    path = onnx_file(
        tmp_path / "linear.onnx",
        [helper.make_node("Flatten", ["x"], ["f"]), helper.make_node("MatMul", ["f", "w"], ["y"])],
        {"x": ["N", 1, 28, 28]},
        {"y": ["N", 3]},
        {"w": np.ones((784, 3), np.float32)},
    )
    done = attrcli("prune", path, tmp_path / "in", "-p", "unit", "--out", tmp_path / "out")
    assert done.code == 4, done.err
    assert "no neurons that could be pruned" in done.err
    weights = torch.full((3, 784), torch.nan)
    net = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(784, 3), torch.nn.ReLU()).requires_grad_(False)
    net[1].weight.copy_(weights)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        torch.jit.save(torch.jit.trace(net, torch.zeros(2, 1, 28, 28)), tmp_path / "nan.pt")
    (tmp_path / "nan.toml").write_text(SIDECAR)
    done = attrcli("prune", tmp_path / "nan.pt", tmp_path / "in", "--out", tmp_path / "out")
    assert done.code == 4
    assert "NaN" in done.err
    assert not (tmp_path / "out").exists()


def test_the_verb_from_python(tmp_path):
    wanted = verb.Wanted("prune_grad", sparsity=0.5)
    plan = verb.plan(wanted, model=str(MLP), inputs=(os.fspath(BAG),), out=str(tmp_path / "out"))
    summary = verb.prune(plan, wanted)
    assert summary.rows == 6
    assert summary.kept.keys() == {"relu", "relu_1"}
    with pytest.raises(UsageError, match="earlier run"):
        verb.plan(wanted, model=str(MLP), inputs=(os.fspath(BAG),), out=str(tmp_path / "out"))


class Net(torch.nn.Module):
    """Two channels, batch norm, GELU and SiLU, a softmax at the end."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.one, self.norm, self.two = torch.nn.Conv2d(1, 8, 3), torch.nn.BatchNorm2d(8), torch.nn.Conv2d(8, 6, 3)
        self.last = torch.nn.Linear(6, 3)

    def forward(self, x):
        h = torch.nn.functional.gelu(self.norm(self.one(x)))
        return self.last(torch.nn.functional.silu(self.two(h)).mean((2, 3)) * 9).softmax(1)


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("heavy", [False, True])
def test_a_folded_graph_a_frozen_batch_other_nonlinearities_and_a_softmax(frozen, heavy, tmp_path, monkeypatch):
    if heavy:
        monkeypatch.setattr(engine, "HEAVY", 1)
    net, x = Net().eval().requires_grad_(False), torch.zeros(1 if frozen else 2, 1, 28, 28)
    shapes = None if frozen else ({0: torch.export.Dim("batch", min=1)},)
    path = tmp_path / "net.pt2"
    torch.export.save(torch.export.export(net, (x,), dynamic_shapes=shapes), path)
    (tmp_path / "net.toml").write_text(SIDECAR.replace('activation = "none"', 'activation = "softmax"'))
    told = facts(
        tmp_path / "out", "--ops", "gelu,silu", "--sparsity", 0.7, "--limit", 2, "--export", "each", model=path
    )
    assert (told["ok"], told["models"], told["change_of"]) == (2, 2, "softmax")
    with MaskFile(tmp_path / "out/masks.h5") as file:
        assert list(file.layers) == ["gelu", "silu"]
        for row, name in enumerate(file.ids):
            masks = [torch.from_numpy(mask) for mask in file.masks(row).values()]
            x = pixels(BAG / name)
            h = torch.nn.functional.gelu(net.norm(net.one(x))) * masks[0]
            expected = net.last((torch.nn.functional.silu(net.two(h)) * masks[1]).mean((2, 3)) * 9).softmax(1)
            assert float((loaded(tmp_path / f"out/models/{name}.pt2")(x) - expected).abs().max()) < 1e-5
            assert np.abs(file["prediction_pruned"][row] - expected[0].numpy()).max() < 1e-5
