"""`.pt2`: outputs and gradients of the graph are the eager module's; nothing in a hostile archive is ever run."""

import json
import pickle
import random
import sys
import zipfile
from contextlib import suppress
from functools import cache

import pytest
import torch
from nets import ANY_WAY, Residual, assert_close, assert_same, build, exported, quiet, ready, save_exported
from torch import Tensor, nn

from attrcli import formats
from attrcli.errors import ModelError, UnsupportedOp
from attrcli.formats.spec import Sample, TensorSpec
from attrcli.graph.build import FREE

# --- right


@cache
def program(name):
    """A module and its program, made once: to export is slow."""
    make, shape = ANY_WAY[name]
    module = ready(make())
    return module, exported(module, shape)


@pytest.mark.parametrize("name", ANY_WAY)
def test_outputs_and_gradients_are_the_modules(name, tmp_path):
    (_, shape), (module, made), path = ANY_WAY[name], program(name), tmp_path / "net.pt2"
    with quiet():
        torch.export.save(made, path)
    assert_same(build(path, shape), module, shape)


QUICK = {"residual", "attention", "writes_into"}
"""Networks whose decomposition is tried in the default suite."""


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=() if name in QUICK else pytest.mark.slow)
        for name in ANY_WAY
        if name != "writes_to_chunks"  # whose batch torch's own decomposition fixes
    ],
)
def test_decomposed_outputs_and_gradients_are_the_modules(name, tmp_path):
    (_, shape), (module, made), path = ANY_WAY[name], program(name), tmp_path / "net.pt2"
    with quiet():
        torch.export.save(made.run_decompositions(), path)
    assert_same(build(path, shape), module, shape, (1, 3))


class Several(nn.Module):
    """Two inputs, three outputs, one of them no tensor; a part without gradient."""

    def forward(self, x: Tensor, y: Tensor, scale: float) -> tuple[Tensor, Tensor, int]:
        with torch.no_grad():
            held = torch.cat(x.split([1, 2], dim=1)[::-1], dim=1) * y
        return held + x * scale, y.max(dim=1)[0], 3


def test_several_inputs_and_outputs(tmp_path):
    batch = {0: torch.export.Dim("batch")}
    x, y = torch.rand(5, 3, dtype=torch.float64, requires_grad=True), torch.rand(5, 3, dtype=torch.float64)
    with quiet():
        program = torch.export.export(Several(), (x.detach(), y, 2.0), dynamic_shapes=(batch, batch, None))
        torch.export.save(program, tmp_path / "net.pt2")
    source = formats.load(tmp_path / "net.pt2")
    assert source.inputs == tuple(TensorSpec(name, (None, 3), torch.float64) for name in ("x", "y"))
    assert source.outputs == tuple(
        TensorSpec(*spec, torch.float64) for spec in (("output_0", (None, 3)), ("output_1", (None,)))
    )
    sample = Sample((3,), torch.float64)
    graph = source.build({"x": sample, "y": sample}, torch.float64, FREE)
    expected = Several()(x, y, 2.0)
    for mine, theirs in zip(graph(x, y), expected[:2], strict=True):
        assert_close(mine, theirs, 0)
    assert torch.autograd.grad(graph(x, y)[0].sum(), x)[0].eq(2).all()


def test_names_counts_and_metadata(tmp_path):
    module = ready(Residual())
    with quiet():
        program = torch.export.export(module, (torch.rand(2, 3, 5, 5, dtype=torch.float64),))
        torch.export.save(program, tmp_path / "net.pt2", extra_files={"attrcli.toml": "[input]"})
    source = formats.load(tmp_path / "net.pt2")
    assert source.metadata["attrcli.toml"] == "[input]"
    assert source.operations()["aten.conv2d"] == 2
    assert source.parameter_count() == sum(p.numel() for p in module.parameters())
    graph = source.build({"x": Sample((3, 5, 5), torch.float32)}, torch.float64, (2, 2))
    names = {name for name, _ in graph.named_parameters()}
    assert names == {name for name, _ in module.named_parameters()}


def test_tied_weights_are_one(tmp_path):
    path = save_exported(ready(ANY_WAY["tied"][0]()), (5,), tmp_path / "net.pt2")
    assert formats.load(path).parameter_count() == 25
    assert len(list(build(path, (5,)).parameters())) == 1


def test_weights_that_are_views_of_one_storage(tmp_path):
    module = nn.Linear(4, 4).double()
    base = torch.rand(64, dtype=torch.float64)
    module.weight = nn.Parameter(base.as_strided((4, 4), (1, 8), 3))
    path = save_exported(module, (4,), tmp_path / "net.pt2")
    assert_same(build(path, (4,)), module, (4,))


@pytest.mark.parametrize("batch", [1, 4])
def test_a_frozen_batch_is_in_the_inputs_shape(batch, tmp_path):
    module = ready(Residual())
    path = save_exported(module, (3, 5, 5), tmp_path / "net.pt2", batch=batch)
    assert formats.load(path).inputs[0].shape == (batch, 3, 5, 5)
    assert_same(build(path, (3, 5, 5), batches=(batch, batch)), module, (3, 5, 5), (batch,))


class Autocast(nn.Module):
    """A part in half precision, which the graph computes in its own."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            y = self.linear(x)
        return y.float() + x


def test_autocast_is_left_out(tmp_path):
    module = ready(Autocast(), dtype=torch.float32)
    path = save_exported(module, (3,), tmp_path / "net.pt2")
    exact = module.linear.double()
    assert_same(build(path, (3,)), lambda x: exact(x) + x, (3,))


def test_height_and_width_that_are_free_are_those_of_the_sample(tmp_path):
    module, free = ready(Residual()), {0: torch.export.Dim("batch"), 2: torch.export.Dim("h"), 3: torch.export.Dim("w")}
    with quiet():
        program = torch.export.export(module, (torch.rand(3, 3, 6, 7, dtype=torch.float64),), dynamic_shapes=(free,))
        torch.export.save(program, tmp_path / "net.pt2")
    assert formats.load(tmp_path / "net.pt2").inputs[0].shape == (None, 3, None, None)
    for shape in ((3, 5, 8), (3, 9, 4)):
        assert_same(build(tmp_path / "net.pt2", shape), module, shape)


class Named(nn.Module):
    """Outputs in containers, some of them no tensors."""

    def forward(self, x: Tensor) -> dict[str, object]:
        return {"logits": x * 2, "rest": (x + 1, None, 3, [x - 1])}


def test_outputs_have_the_names_that_torchscript_gives_them(tmp_path):
    path = save_exported(Named(), (3,), tmp_path / "net.pt2")
    assert [spec.name for spec in formats.load(path).outputs] == ["logits", "rest_0", "rest_3_0"]
    graph = build(path, (3,))
    assert graph.meta["outputs"] == ("logits", "rest_0", "rest_3_0")
    x = torch.rand(2, 3, dtype=torch.float64)
    assert [torch.equal(y, z) for y, z in zip(graph(x), (x * 2, x + 1, x - 1), strict=True)] == [True] * 3


@pytest.mark.parametrize("spec", ["", "[1]", "[1, 2]", '[1, {"type": "x", "children_spec": []}]', None])
def test_outputs_whose_containers_are_not_described_are_numbered(spec, tmp_path):
    path = save_exported(Named(), (3,), tmp_path / "net.pt2")

    def change(tree):
        tree["graph_module"]["module_call_graph"][0]["signature"]["out_spec"] = spec

    source = formats.load(edited(path, tmp_path / "e.pt2", MODEL, change))
    assert [item.name for item in source.outputs] == ["output_0", "output_1", "output_4"]


class Chooses(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.cond(x.sum() > 0, lambda x: x + 1, lambda x: x * 2, (x,))


class Inverts(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.linalg.inv(x)


CHOOSES = Chooses()


@pytest.mark.parametrize(
    ("module", "shape", "message"),
    [
        (CHOOSES, (3,), "a nested graph, control flow.*is not supported.*node 'cond"),
        (
            Inverts(),
            (3, 3),
            "op aten.linalg_inv.*not supported.*node '.*linalg.inv.*; exporting the model to ONNX may help",
        ),
    ],
)
def test_refused_by_name_and_line(module, shape, message, tmp_path):
    path = save_exported(module, shape, tmp_path / "net.pt2")
    with pytest.raises(UnsupportedOp, match=message) as caught:
        build(path, shape)
    assert "test_pt2.py:" in str(caught.value) or module is CHOOSES


class OnSeveralLines(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.linalg.inv(
            x,
        )


def test_a_source_line_that_goes_on_is_closed_in_the_message(tmp_path):
    path = save_exported(OnSeveralLines(), (3, 3), tmp_path / "net.pt2")
    with pytest.raises(UnsupportedOp, match=r"inv\(\.\.\.\)\); exporting"):
        build(path, (3, 3))


# --- hostile archives


class Opens:
    """A pickle of this creates a file when it is loaded."""

    def __init__(self, file):
        self.file = str(file)

    def __reduce__(self):
        return open, (self.file, "w")


@pytest.fixture(scope="module")
def honest(tmp_path_factory):
    return save_exported(ready(nn.Linear(3, 2)), (3,), tmp_path_factory.mktemp("honest") / "net.pt2")


def rewritten(source, target, edit=lambda name, data: data, more=()):
    """Copy an archive, each entry through edit(name without the folder, data); add more entries."""
    with zipfile.ZipFile(source) as archive, zipfile.ZipFile(target, "w") as copy:
        for entry in archive.infolist():
            data = edit(entry.filename.partition("/")[2], archive.read(entry))
            if data is not None:
                copy.writestr(entry.filename, data)
        for name, data in more:
            copy.writestr(f"net/{name}", data)
    return target


def edited(source, target, name, change, more=()):
    """Copy an archive with the JSON of one entry changed in place."""

    def edit(entry, data):
        if entry != name:
            return data
        tree = json.loads(data)
        change(tree)
        return json.dumps(tree).encode()

    return rewritten(source, target, edit, more)


MODEL = "models/model.json"
WEIGHTS = "data/weights/model_weights_config.json"
CONSTANTS = "data/constants/model_constants_config.json"


def load_and_build(path):
    source = formats.load(path)
    return source.build({spec.name: Sample((3,), torch.float32) for spec in source.inputs}, torch.float64, FREE)


def test_pickled_sample_inputs_are_never_read(honest, tmp_path):
    file = tmp_path / "written"
    evil = rewritten(
        honest, tmp_path / "e.pt2", lambda n, d: pickle.dumps(Opens(file)) if n.startswith("data/sample_inputs") else d
    )
    load_and_build(evil)
    assert not file.exists()


def test_pickled_weights_are_refused(honest, tmp_path):
    file = tmp_path / "written"

    def change(tree):
        tree["config"]["weight"]["use_pickle"] = True

    evil = edited(honest, tmp_path / "e.pt2", WEIGHTS, change)
    evil = rewritten(
        evil, tmp_path / "f.pt2", lambda n, d: pickle.dumps(Opens(file)) if n == "data/weights/weight_0" else d
    )
    with pytest.raises(ModelError, match=r"f\.pt2: refused: 'weight' is a pickled object"):
        formats.load(evil)
    assert not file.exists()


@pytest.mark.parametrize("kind", ["opaque_obj_0", "custom_obj_0", "../../x"])
def test_objects_are_refused(kind, honest, tmp_path):
    file = tmp_path / "written"

    def change(tree):
        tree["config"]["thing"] = {"path_name": kind, "is_param": False, "use_pickle": False, "tensor_meta": None}

    entry = [(f"data/constants/{kind}", pickle.dumps(Opens(file)))]
    for more, message in (((), "refused: 'thing' is a pickled object"), (entry, "refused: unexpected entry")):
        with pytest.raises(ModelError, match=message):
            formats.load(edited(honest, tmp_path / "e.pt2", CONSTANTS, change, more))
    assert not file.exists()


def test_expressions_are_never_evaluated(honest, tmp_path):
    file = tmp_path / "written"

    def change(tree):
        values = tree["graph_module"]["graph"]["tensor_values"]
        for meta in values.values():
            for size in meta["sizes"]:
                if "as_expr" in size:
                    size["as_expr"]["expr_str"] = f"__import__('pathlib').Path('{file}').write_text('x')"
        tree["range_constraints"] = {f"open('{file}', 'w')": {"min_val": 0, "max_val": 9}}
        tree["guards_code"] = [f"open('{file}', 'w')"]

    load_and_build(edited(honest, tmp_path / "e.pt2", MODEL, change))
    assert not file.exists()


@pytest.mark.parametrize("target", ["torch.os.system", "torch.hub.load", "os.system", "builtins.eval", "torch.ops.x"])
def test_targets_that_are_no_operators_are_refused(target, honest, tmp_path):
    def change(tree):
        tree["graph_module"]["graph"]["nodes"][0]["target"] = target

    with pytest.raises(ModelError, match=f"call target '{target}'"):
        formats.load(edited(honest, tmp_path / "e.pt2", MODEL, change))


class Mapped(nn.Linear):
    """A linear layer and a ReLU, for one sample."""

    def forward(self, x):
        return torch.vmap(lambda row: nn.functional.linear(row, self.weight, self.bias).relu())(x)


def test_vmap_is_an_operation_that_is_not_supported_and_decomposed_it_is_none(tmp_path):
    module = ready(Mapped(4, 3))
    program = exported(module, (4,))
    with quiet():
        torch.export.save(program, tmp_path / "net.pt2")
        torch.export.save(program.run_decompositions({}), tmp_path / "plain.pt2")
    with pytest.raises(UnsupportedOp, match=r"torch\.vmap .* is not supported; .*run_decompositions") as caught:
        formats.load(tmp_path / "net.pt2")
    assert "refused" not in str(caught.value)
    assert_same(build(tmp_path / "plain.pt2", (4,)), module, (4,))


@pytest.mark.parametrize(
    "target", ["torch.ops.aten.save.default", "torch.ops.aten.from_file.default", "math.exp", "_operator.delitem"]
)
def test_operators_outside_the_table_are_refused(target, honest, tmp_path):
    def change(tree):
        tree["graph_module"]["graph"]["nodes"][0]["target"] = target

    with pytest.raises(ModelError):
        load_and_build(edited(honest, tmp_path / "e.pt2", MODEL, change))


def test_names_never_become_code(honest, tmp_path):
    """torch.export.load itself makes source code of the inputs' names: a sixth way to run code."""
    file = tmp_path / "written"
    name = f"input=open('{file}','w')"

    def rename(tree):
        text = (
            json.dumps(tree)
            .replace('{"name": "input"}', json.dumps({"name": name}))
            .replace('"input": {', json.dumps(name) + ": {")
        )
        tree.clear()
        tree.update(json.loads(text))

    source = formats.load(edited(honest, tmp_path / "e.pt2", MODEL, rename))
    assert source.inputs[0].name == name
    graph = source.build({name: Sample((3,), torch.float32)}, torch.float64, FREE)
    assert graph(torch.ones(2, 3, dtype=torch.float64))[0].shape == (2, 2)
    assert not file.exists()


def test_modules_are_never_imported(honest, tmp_path):
    """torch.export.load imports the modules that the description of the inputs names: a seventh way."""
    sys.modules.pop("this", None)
    context = json.dumps([{"__enum__": True, "fqn": "this:s", "name": "y"}])

    def change(tree):
        spec = json.dumps([1, {"type": "builtins.dict", "context": context, "children_spec": []}])
        for entry in tree["graph_module"]["module_call_graph"]:
            if entry["signature"]:
                entry["signature"]["in_spec"] = entry["signature"]["out_spec"] = spec

    load_and_build(edited(honest, tmp_path / "e.pt2", MODEL, change))
    assert "this" not in sys.modules


# --- damaged archives


@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_two_entries_of_one_name_are_refused(honest, tmp_path):
    with pytest.raises(ModelError, match=r"two entries 'models/model\.json'"):
        formats.load(rewritten(honest, tmp_path / "e.pt2", more=[(MODEL, b"{}")]))


@pytest.mark.parametrize("name", ["../../x", "data/../../x"])
def test_an_entry_outside_the_archive_is_no_older_torchs(name, honest, tmp_path):
    with pytest.raises(ModelError, match=r"refused: unexpected entry .*outside the archive's folder") as caught:
        formats.load(rewritten(honest, tmp_path / "e.pt2", more=[(name, b"x")]))
    assert "older than" not in str(caught.value)


def test_compressed_entries_are_refused(honest, tmp_path):
    with zipfile.ZipFile(honest) as archive, zipfile.ZipFile(tmp_path / "e.pt2", "w", zipfile.ZIP_DEFLATED) as copy:
        for entry in archive.infolist():
            copy.writestr(entry.filename, archive.read(entry))
    with pytest.raises(ModelError, match="torch writes its archives uncompressed"):
        formats.load(tmp_path / "e.pt2")


def test_unknown_entries_are_refused(honest, tmp_path):
    for name in ("data/aotinductor/x.so", "models/../x", "data/weights/model.pt", "secrets"):
        with pytest.raises(ModelError, match=r"unexpected entry|AOTInductor"):
            formats.load(rewritten(honest, tmp_path / "e.pt2", more=[(name, b"x")]))


def test_two_models_and_other_versions_are_refused(honest, tmp_path):
    with pytest.raises(ModelError, match="holds 2 models"):
        formats.load(rewritten(honest, tmp_path / "e.pt2", more=[("models/other.json", b"{}")]))
    with pytest.raises(ModelError, match=r"version 9 of the format, by torch .*; attrcli reads version 8"):
        formats.load(edited(honest, tmp_path / "e.pt2", MODEL, lambda t: t["schema_version"].update(major=9)))
    with pytest.raises(ModelError, match="big-endian"):
        formats.load(rewritten(honest, tmp_path / "e.pt2", lambda n, d: b"big" if n == "byteorder" else d))


@pytest.mark.parametrize(
    "meta",
    [
        {"sizes": [{"as_int": 1 << 40}, {"as_int": 3}]},
        {"sizes": [{"as_int": -2}, {"as_int": 3}]},
        {"strides": [{"as_int": 1 << 50}, {"as_int": 1}]},
        {"strides": [{"as_int": -1}, {"as_int": 1}]},
        {"storage_offset": {"as_int": 1 << 30}},
        {"dtype": 99},
        {"layout": 1},
        {"sizes": "x"},
    ],
)
def test_stored_tensors_outside_their_bytes_are_refused(meta, honest, tmp_path):
    def change(tree):
        tree["config"]["weight"]["tensor_meta"].update(meta)

    with pytest.raises(ModelError, match=r"e\.pt2: "):
        formats.load(edited(honest, tmp_path / "e.pt2", WEIGHTS, change))


def test_a_huge_tensor_without_bytes_is_refused(honest, tmp_path):
    evil = rewritten(honest, tmp_path / "e.pt2", lambda n, d: b"" if n == "data/weights/weight_0" else d)
    with pytest.raises(ModelError, match="has 0 bytes"):
        formats.load(evil)


def test_a_missing_weight_is_named(honest, tmp_path):
    with pytest.raises(ModelError, match="lacks the stored tensor 'weight'"):
        formats.load(edited(honest, tmp_path / "e.pt2", WEIGHTS, lambda tree: tree["config"].pop("weight")))


def places(tree, path=()):
    """The paths of everything in a JSON tree."""
    items = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ()
    for key, item in items:
        yield (*path, key)
        yield from places(item, (*path, key))


@pytest.mark.parametrize("entry", [MODEL, WEIGHTS])
def test_whatever_is_wrong_in_the_json_is_a_model_error(entry, honest, tmp_path):
    """300 random places of the description, each replaced by something else or dropped: an error, or a good graph."""
    with zipfile.ZipFile(honest) as archive:
        tree = json.loads(archive.read(f"net/{entry}"))
    draw = random.Random(0)
    candidates = [path for path in places(tree) if path[0] not in ("opset_version", "verifiers", "module_call_graph")]
    for path in draw.sample(candidates, min(150, len(candidates))):
        value = draw.choice(
            [None, -1, 1 << 62, "x", "weight", [], {}, [[[]]], {"as_tensor": {"name": "linear"}}, 0.5, True]
        )

        def change(tree, path=path, value=value):
            for key in path[:-1]:
                tree = tree[key]
            tree[path[-1]] = value

        evil = edited(honest, tmp_path / "e.pt2", entry, change)
        with suppress(ModelError):
            load_and_build(evil)
