"""Files that options name: other inputs, baselines, backgrounds, labels; each mistake names option and file."""

import numpy as np
import pytest
import torch
from cli_runs import TEST, explain, image, linear, onnx_file, refused, rows, scripted, table
from onnx import TensorProto, helper

SIZE = '[input]\nkind = "array"\nsize = [4]\n'
VALUES = np.array([[1.0, 2.0, 3.0, 4.0], [0.5, -1.0, 2.0, 0.0]], np.float32)
MASK = np.array([1.0, 2.0, 1.0, 0.0], np.float32)


@pytest.fixture
def out(tmp_path):
    return tmp_path / "run.h5"


class Weighed(torch.nn.Module):
    """The sum of x times m, and of x alone."""

    def forward(self, x, m):
        return torch.stack([(x * m).sum(-1), x.sum(-1)], -1)


class Picture(torch.nn.Module):
    """The sum of x (N, 1, 2, 2) times m, which is a picture of one channel."""

    def forward(self, x, m):
        return (torch.cat([x, m], 1).flatten(1) ** 2).cumsum(1)[:, :3]


def saved(folder, **arrays):
    for name, array in arrays.items():
        np.save(folder / f"{name}.npy", array)
    return [folder / f"{name}.npy" for name in arrays]


# -- --fix ---------------------------------------------------------------------------------------------------------


def test_a_fixed_array_may_have_a_batch_axis_of_1_where_the_file_says_no_shape(tmp_path, out):
    model = scripted(tmp_path / "net.pt", Weighed(), SIZE)
    x, plain, batched = saved(tmp_path, x=VALUES, plain=MASK, batched=MASK[None])
    for file in (plain, batched):
        explain(
            out, "--input", "x", "--fix", f"m={file}", "-t", "0", "--force", model=model, inputs=x, method="gradient"
        )
        np.testing.assert_allclose(rows(out)["attribution"], [MASK, MASK])


def test_an_axis_of_1_that_is_the_sample_s_own_stays(tmp_path, out):
    model = scripted(tmp_path / "net.pt", Picture())
    x, m = saved(tmp_path, x=np.ones((1, 2, 2), np.float32), m=np.full((1, 2, 2), 2, np.float32))
    explain(out, "--input", "x", "--fix", f"m={m}", "-t", "2", model=model, inputs=x, method="gradient")
    np.testing.assert_allclose(rows(out)["attribution"], [[[[2, 2], [2, 0]]]])


class Counted(torch.nn.Module):
    """x as often as m is long."""

    def forward(self, x, m):
        return x * m.shape[1] + 0 * m.flatten(1)[:, :1]


def test_an_array_that_fits_both_ways_stays_as_it_is(tmp_path, out):
    model = scripted(tmp_path / "net.pt", Counted(), SIZE)
    x, m = saved(tmp_path, x=VALUES, m=np.ones((1, 7), np.float32))
    explain(out, "--input", "x", "--fix", f"m={m}", "-t", "0", model=model, inputs=x, method="gradient")
    np.testing.assert_allclose(rows(out)["attribution"], [[1, 0, 0, 0]] * 2)


def test_a_fixed_array_that_fits_neither_way_is_told_how_it_should_be(tmp_path, out):
    model = scripted(tmp_path / "net.pt", Weighed(), SIZE)
    x, wrong = saved(tmp_path, x=VALUES, wrong=np.ones(3, np.float32))
    message = refused(out, "--input", "x", "--fix", f"m={wrong}", model=model, inputs=x, code=4)
    assert "with or without a batch axis of 1" in message


def declared(path):
    """z = x m n, with m in floating and n in whole numbers."""
    nodes = [
        helper.make_node("Cast", ["n"], ["nf"], to=TensorProto.FLOAT),
        helper.make_node("Mul", ["x", "m"], ["xm"]),
        helper.make_node("Mul", ["xm", "nf"], ["z"]),
    ]
    inputs = {"x": ["N", 4], "m": ["N", 4], "n": (["N", 4], TensorProto.INT64)}
    return onnx_file(path, nodes, inputs, {"z": ["N", 4]}, {})


@pytest.mark.parametrize("m", [MASK, MASK[None], MASK.astype(np.float64), MASK.astype(np.int32)])
@pytest.mark.parametrize("n", [np.array([1, 2, 3, 4]), np.array([[1, 2, 3, 4]], np.float32)])
def test_fixed_arrays_get_the_shape_and_the_type_that_the_file_declares(tmp_path, out, m, n):
    files = saved(tmp_path, x=VALUES, m=m, n=n)
    fixed = ("--input", "x", "--fix", f"m={files[1]}", "--fix", f"n={files[2]}")
    explain(out, *fixed, "-t", "1", model=declared(tmp_path / "net.onnx"), inputs=files[0], method="gradient")
    np.testing.assert_allclose(rows(out)["attribution"], [[0, 4, 0, 0]] * 2)


@pytest.mark.parametrize(
    ("name", "array", "words"),
    [
        ("m", np.ones((2, 4)), ["the array is 2x4", "one sample, 4", "1x4"]),
        ("m", np.ones(()), ["the array is one number", "one sample, 4"]),
        ("m", np.ones((1, 5)), ["the array is 1x5"]),
        ("n", np.full(4, 0.5), ["whole numbers of torch.int64", "'n'"]),
    ],
)
def test_fixed_arrays_that_cannot_be(tmp_path, out, name, array, words):
    x, file = saved(tmp_path, x=VALUES, f=array)
    other = {"m": "n", "n": "m"}[name]
    message = refused(
        out, "--input", "x", "--fix", f"{name}={file}", "--fix", f"{other}=zero",
        model=declared(tmp_path / "net.onnx"), inputs=x,
    )  # fmt: skip
    assert all(word in message for word in (f"--fix {name}={file}", *words)), message


# -- whole numbers -------------------------------------------------------------------------------------------------


def test_tokens_take_the_type_that_the_file_declares(tmp_path, out):
    nodes = [
        helper.make_node("Gather", ["t", "x"], ["e"]),
        helper.make_node("ReduceSum", ["e", "a"], ["z"], keepdims=0),
    ]
    weights = {"t": np.arange(10, dtype=np.float32).reshape(5, 2), "a": np.array([1])}
    model = onnx_file(tmp_path / "e.onnx", nodes, {"x": (["N", 3], TensorProto.INT64)}, {"z": ["N", 2]}, weights)
    tokens = np.array([[0, 1, 4], [2, 2, 3]])
    for dtype in (np.int32, np.float32, np.uint8):
        (file,) = saved(tmp_path, ids=tokens.astype(dtype))
        explain(out, "-t", "0", "--force", model=model, inputs=file, method="occlusion")
        np.testing.assert_allclose(rows(out)["score"], [10, 14])
    (file,) = saved(tmp_path, ids=tokens + 0.5)
    done = explain(out, "--force", model=model, inputs=file, method="occlusion", code=3)
    assert "are not whole numbers of dtype int64" in done.err
    scaled = tmp_path / "scaled.toml"
    scaled.write_text('[input]\nkind = "array"\nmean = [0.5]\n')
    assert "no mean or std" in refused(tmp_path / "b.h5", "-p", scaled, model=model, inputs=file, method="occlusion")


# -- files that say no shape ---------------------------------------------------------------------------------------


def test_the_shape_comes_from_the_arrays(tmp_path, out):
    module = torch.nn.Sequential(torch.nn.Conv2d(3, 2, 3), torch.nn.Flatten(), torch.nn.Linear(72, 5))
    model = scripted(tmp_path / "net.pt", module)
    (tmp_path / "in").mkdir()
    saved(tmp_path / "in", a=np.ones((3, 8, 8), np.float32), b=np.zeros((3, 8, 8), np.float32))
    explain(out, model=model, inputs=tmp_path / "in")
    assert rows(out)["attribution"].shape == (2, 3, 8, 8)
    (batch,) = saved(tmp_path, batch=np.ones((5, 3, 8, 8), np.float32))
    message = refused(tmp_path / "b.h5", model=model, inputs=batch, code=4)
    assert "5x3x8x8, as the first array is, taken for one sample" in message
    assert "size = [...]" in message


def test_weights_that_are_nan_say_nothing_of_the_input(tmp_path, out):
    module = torch.nn.Linear(4, 3)
    module.weight.data[1, 2] = float("nan")
    (file,) = saved(tmp_path, rows=VALUES[0])
    for sidecar in (None, SIZE):
        message = refused(out, model=scripted(tmp_path / "net.pt", module, sidecar), inputs=file, code=4)
        assert message.endswith("net.pt: stored tensor 'weight' holds NaN")


def test_rows_taken_for_one_sample_are_told_with_the_way_out(tmp_path, out):
    model = scripted(tmp_path / "net.pt", torch.nn.Linear(4, 3))
    (file,) = saved(tmp_path, rows=VALUES)
    message = refused(out, model=model, inputs=file)
    assert "the output is 2x3 per sample" in message
    assert "size = [...]" in message
    (tmp_path / "net.toml").write_text(SIZE)
    explain(out, model=model, inputs=file)


def test_a_baseline_has_the_shape_of_the_arrays(tmp_path, out):
    class Sum(torch.nn.Module):
        def forward(self, x):
            return x.sum(2)

    model = scripted(tmp_path / "net.pt", Sum())
    x, base, wrong = saved(tmp_path, x=np.ones((2, 3)), base=np.full((2, 3), 0.5), wrong=np.ones((4, 3)))
    explain(out, "-b", base, "-t", "0", model=model, inputs=x, method="integrated_gradients")
    np.testing.assert_allclose(rows(out)["attribution"], [[[0.5] * 3, [0] * 3]])
    message = refused(tmp_path / "b.h5", "-b", wrong, model=model, inputs=x, method="integrated_gradients")
    assert f"--baseline {wrong}" in message
    assert "(4, 3)" in message


def test_of_a_set_of_baselines_the_file_that_does_not_fit_is_named(tmp_path, out):
    folder = tmp_path / "set"
    image(folder / "a.png", np.zeros((28, 28)))
    image(folder / "b.png", np.zeros((30, 28)))
    sidecar = tmp_path / "exact.toml"
    for size, code in (("size = [28, 28]", 2), ("", 3)):
        sidecar.write_text(f'[input]\nkind = "image"\nchannels = "L"\n{size}\n')
        done = explain(out, "-b", folder, "-p", sidecar, method="expected_gradients", code=code)
        assert "b.png" in done.err
        assert "a.png" not in done.err


def test_a_method_over_a_set_names_no_single_baseline_as_accepted(tmp_path, out):
    model, (x,) = linear(tmp_path / "net.onnx", np.eye(4)), saved(tmp_path, x=VALUES)
    for given in ((), ("-b", "black"), ("-b", "zero")):
        message = refused(out, *given, model=model, inputs=x, method="expected_gradients")
        assert message.endswith("at least 2 baselines; accepted: a directory, or a file of several inputs")
    assert "holds one input; accepted: 2 to 1000" in refused(
        out, "-b", saved(tmp_path, one=VALUES[0])[0], model=model, inputs=x, method="expected_gradients"
    )


# -- options that are empty, or name what is not there -------------------------------------------------------------


@pytest.mark.parametrize(
    "name", ["baseline", "background", "preprocess", "labels", "input", "output", "at", "overlays"]
)
def test_an_empty_option_is_refused_by_name(tmp_path, out, name):
    message = refused(out, f"--{name}", "", method="occlusion")
    assert f"--{name}: the text is empty" in message


def test_an_empty_file_for_a_fixed_input_is_refused_by_name(out):
    assert "--fix m=: the text is empty" in refused(out, "--fix", "m=")


@pytest.mark.parametrize("name", ["baseline", "background", "preprocess", "labels"])
def test_a_file_that_is_not_there_is_named_with_its_option(tmp_path, out, name):
    model, data = linear(tmp_path / "net.onnx", np.eye(3)), table(tmp_path / "x.csv", np.ones((1, 3)))
    given = ("--baseline", "zero") if name in ("preprocess", "labels") else ()
    missing = tmp_path / "missing.file"
    message = refused(out, f"--{name}", missing, *given, model=model, inputs=data, method="occlusion")
    assert f"--{name}" in message
    assert str(missing) in message


def test_a_background_without_a_header_is_named_with_its_option(tmp_path, out):
    model, data = linear(tmp_path / "net.onnx", np.eye(3)), table(tmp_path / "x.csv", np.ones((1, 3)))
    (tmp_path / "b.csv").write_text("1,2,3\n")
    message = refused(out, "--background", tmp_path / "b.csv", model=model, inputs=data, method="occlusion")
    assert f"--background {tmp_path / 'b.csv'}: " in message


def test_a_background_for_a_method_without_a_baseline_is_refused(tmp_path, out):
    message = refused(out, "--background", TEST / "Bag")
    assert "saliency uses no baseline; leave out --background" in message
