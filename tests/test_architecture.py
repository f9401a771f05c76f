"""The architecture, read from the source with `ast`: who imports whom, what stays where, the registry, start-up."""

import ast
import hashlib
import inspect
import json
import re
import subprocess
import sys
import tomllib
from functools import cache
from pathlib import Path

import pytest
from PIL import Image
from store_runs import ATTRIBUTES, LAYOUT, batch, names

from attrcli import errors
from attrcli.methods import METHODS, description
from attrcli.preprocess import Preprocess
from attrcli.store import RunWriter

ROOT = Path(__file__).parents[1]
FILES = sorted((ROOT / "attrcli").rglob("*.py"))

# A unit is a module or a package directly in attrcli/; a row imports only rows above it.
MAY_IMPORT: dict[str, set[str]] = {
    "errors": set(),
    "graph": {"errors"},
    "formats": {"graph", "errors"},
    "score": {"graph", "errors"},
    "targets": {"score", "errors"},
    "session": {"errors"},
    "batching": {"graph", "formats", "errors"},
    "runtime": {"graph", "score", "session", "errors"},
    "model": {"batching", "runtime", "graph", "formats", "score", "errors"},
    "letters": {"errors"},
    "baselines": {"letters", "errors"},
    "preprocess": {"letters", "errors"},
    "sidecar": {"preprocess", "letters", "errors"},
    "data": {"errors"},
    "vae": {"model", "formats", "errors"},
    "training": {"model", "formats", "errors"},
    "methods": {"model", "score", "graph", "vae", "baselines", "errors"},
    "metrics": {"model", "score", "graph", "baselines", "errors"},  # never methods: it is handed a function
    "store": {"errors"},
    "render": {"errors"},
}
MAY_IMPORT["config"] = {"methods", "errors"}
MAY_IMPORT["aside"] = {"config", "formats", "data", "preprocess", "baselines", "errors"}
MAY_IMPORT["outputs"] = {"model", "methods", "errors"}
MAY_IMPORT["samples"] = {"data", "preprocess", "errors"}
MAY_IMPORT["source"] = {"data", "sidecar", "preprocess", "store", "errors"}
MAY_IMPORT["logos"] = {"letters", "render", "preprocess", "errors"}
MAY_IMPORT["sequences"] = {"data", "preprocess", "letters", "methods", "errors"}
MAY_IMPORT["sending"] = set()
MAY_IMPORT["plan"] = set(MAY_IMPORT)
MAY_IMPORT["batch"] = set(MAY_IMPORT)
MAY_IMPORT["provenance"] = set(MAY_IMPORT)
MAY_IMPORT["masked"] = set(MAY_IMPORT)
VERBS = {"explain", "evaluate", "compare", "prune", "train_vae", "inspect", "complete", "export", "overlays"}
MAY_IMPORT |= {verb: set(MAY_IMPORT) for verb in VERBS}
MAY_IMPORT["cli"] = VERBS | {"config", "methods", "metrics", "errors"}
MAY_IMPORT["__main__"] = {"cli", "errors"}

# Where a module of others may be used; a name ending in / is a folder.
CONFINED = {
    "onnx": ("formats/onnx.py", "formats/onnx_ops/", "formats/onnx_write.py"),
    "torch.jit": ("formats/torchscript.py", "formats/torchscript_write.py"),
    "torch.export": ("formats/pt2_write.py",),
    "onnxruntime": ("session.py",),
    "h5py": ("store/", "data/"),
    "PIL": ("data/", "render/", "preprocess.py", "overlays.py", "logos.py"),
    "matplotlib": ("render/",),
    "typer": ("cli/",),
    "rich": ("cli/_terminal.py",),
    "click": (),  # Typer vendors it
    "torchvision": (),
}
TORCH_FREE = {"errors", "letters", "baselines", "preprocess", "sidecar", "data", "store", "render"}
TORCH_FREE |= {"source", "logos", "samples", "config", "overlays", "export", "cli", "__main__"}
LONGEST_FILE, LONGEST_FUNCTION = 400, 40


def relative(file):
    return file.relative_to(ROOT / "attrcli").as_posix()


def unit(file):
    return relative(file).split("/")[0].removesuffix(".py")


@cache
def tree(file):
    return ast.parse(file.read_text(), str(file))


def type_checking(node):
    return isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)


def imports(file, node=None, *, nested=True):
    """(module, line) of all imports of a file; `from a import b` counts as a.b. Not those for type checking."""
    for child in ast.iter_child_nodes(node or tree(file)):
        if isinstance(child, ast.Import):
            yield from ((alias.name, child.lineno) for alias in child.names)
        elif isinstance(child, ast.ImportFrom):
            here = file.relative_to(ROOT).with_suffix("").parts
            parents = [*here[: len(here) - child.level]] if child.level else []
            module = ".".join([*parents, *([child.module] if child.module else [])])
            yield from ((f"{module}.{alias.name}", child.lineno) for alias in child.names)
        elif not type_checking(child) and (nested or not isinstance(child, ast.FunctionDef)):
            yield from imports(file, child, nested=nested)


def uses(file):
    """(dotted name, line) of what a file imports or reads as an attribute of a module, such as torch.jit.load."""
    yield from imports(file)
    for node in ast.walk(tree(file)):
        if isinstance(node, ast.Attribute):
            yield ast.unparse(node), node.lineno


def within(name, module):
    return name == module or name.startswith(module + ".")


# --- who imports whom


def test_every_module_has_a_row_in_the_table():
    assert {unit(file) for file in FILES} - {"__init__"} <= set(MAY_IMPORT)


def test_imports_between_the_parts():
    wrong = []
    for file in FILES:
        allowed = {unit(file)} | MAY_IMPORT.get(unit(file), set())
        for name, line in imports(file):
            part = name.split(".")[1] if within(name, "attrcli") else ""
            if part in MAY_IMPORT and part not in allowed:
                wrong.append(f"{relative(file)}:{line}: {name}")
    assert not wrong, "\n".join(wrong)


def test_confined_modules():
    wrong = [
        f"{relative(file)}:{line}: {name}"
        for file in FILES
        for name, line in uses(file)
        for module, places in CONFINED.items()
        if within(name, module) and not relative(file).startswith(places)
    ]
    assert not wrong, "\n".join(wrong)


def test_torch_free_modules():
    wrong = [
        f"{relative(file)}:{line}"
        for file in FILES
        if unit(file) in TORCH_FREE
        for name, line in imports(file)
        if within(name, "torch")
    ]
    assert not wrong, "\n".join(wrong)


def test_the_command_line_imports_nothing_heavy_at_the_top():
    light = sys.stdlib_module_names | {"typer"}
    at_top = {name for file in FILES if unit(file) == "cli" for name, _ in imports(file, nested=False)}
    assert {name for name in at_top if name.split(".")[0] not in light and not name.startswith("attrcli.cli")} <= {
        "attrcli.__version__",
        "attrcli.errors.AttrcliWarning",
        "attrcli.errors.UsageError",
    }


def test_what_is_imported_is_a_declared_dependency():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    declared = {re.split(r"[^\w-]", line)[0].replace("-", "_") for line in project["dependencies"]}
    module_of = {"pillow": "PIL", "protobuf": "google"}
    found = {name.split(".")[0] for file in FILES for name, _ in imports(file)}
    found -= sys.stdlib_module_names | {"attrcli"}
    assert found == {module_of.get(name, name) for name in declared}


# --- what stays where


def test_only_the_command_line_prints():
    wrong = [
        f"{relative(file)}:{node.lineno}"
        for file in FILES
        if unit(file) != "cli"
        for node in ast.walk(tree(file))
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in ("print", "input")
    ]
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize("name", METHODS)
def test_a_method_does_no_io_and_chooses_no_device(name):
    file = ROOT / f"attrcli/methods/{name}.py"
    modules = {"os", "io", "sys", "pathlib", "shutil", "tempfile", "subprocess"}
    wrong = [f"line {line}: {name}" for name, line in imports(file) if name.split(".")[0] in modules]
    for node in ast.walk(tree(file)):
        if isinstance(node, ast.Call) and re.search(r"(^|\.)(open|cuda)$", ast.unparse(node.func)):
            wrong.append(f"line {node.lineno}: {ast.unparse(node)}")
        if isinstance(node, ast.Constant) and node.value in ("cpu", "cuda"):
            wrong.append(f"line {node.lineno}: {node.value}")
    assert not wrong, "\n".join(wrong)


# --- the registry is the folder


def test_the_registry_is_the_folder():
    folder = ROOT / "attrcli/methods"
    assert sorted(METHODS) == sorted(file.stem for file in folder.glob("*.py") if not file.stem.startswith("_"))
    assert list(METHODS) == sorted(METHODS)


@pytest.mark.parametrize("name", METHODS)
def test_a_method_is_what_its_row_says(name):
    assert name.isidentifier()
    path, summary = METHODS[name]
    module, _, cls = path.partition(":")
    assert module == f"attrcli.methods.{name}"
    assert summary.strip() == summary != ""
    node = next(n for n in tree(ROOT / f"attrcli/methods/{name}.py").body if isinstance(n, ast.ClassDef))
    assert node.name == cls
    assert [ast.unparse(decorator) for decorator in node.decorator_list] == ["dataclass(frozen=True)"]
    described = description(name)
    assert described.text.splitlines()[0].strip()
    assert described.paper.strip()
    assert described.cost.strip()
    assert all(option.help for option in described.options)


def test_the_readme_lists_the_methods():
    text = (ROOT / "README.md").read_text()
    found = re.search(r"<!-- methods -->(.*)<!-- /methods -->", text, re.DOTALL)
    assert found, "README.md has no list of methods between <!-- methods --> and <!-- /methods -->"
    rows = [line for line in found[1].splitlines() if re.match(r"\s*[-*|]", line) and "`" in line]
    assert sorted(line.split("`")[1] for line in rows) == sorted(METHODS)


# --- code


def public(node, prefix=""):
    """(qualified name, node) of the public classes, functions and methods below a module or class."""
    for child in node.body:
        if isinstance(child, ast.ClassDef | ast.FunctionDef) and not child.name.startswith("_"):
            yield prefix + child.name, child
            if isinstance(child, ast.ClassDef):
                yield from public(child, f"{child.name}.")


def test_public_names_have_docstrings():
    wrong = [relative(file) for file in FILES if not ast.get_docstring(tree(file))]
    wrong += [
        f"{relative(file)}: {name}"
        for file in FILES
        for name, node in public(tree(file))
        if not (ast.get_docstring(node) or "").strip()
    ]
    assert not wrong, "\n".join(wrong)


def reasoned(lines, first, last):
    """Whether one of some lines, counted from 1, is a comment '# long: REASON'."""
    return any(re.search(r"# long: \S", line) for line in lines[max(0, first - 1) : last])


def test_files_are_short_or_say_why():
    """The reason stands above the first class or function."""
    wrong = []
    for file in FILES:
        lines = file.read_text().splitlines()
        top = next((n.lineno for n in tree(file).body if isinstance(n, ast.ClassDef | ast.FunctionDef)), len(lines))
        if len(lines) > LONGEST_FILE and not reasoned(lines, 1, top):
            wrong.append(f"{relative(file)}: {len(lines)} lines")
    assert not wrong, "\n".join(wrong)


def test_functions_are_short_or_say_why():
    """Lines of a function without its docstring and decorators; the reason stands just above it, or on the `def`."""
    wrong = []
    for file in FILES:
        lines = file.read_text().splitlines()
        for node in ast.walk(tree(file)):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                text = node.body[0] if ast.get_docstring(node) is not None else None
                length = node.end_lineno - node.lineno + 1 - (text.end_lineno - text.lineno + 1 if text else 0)
                above = min([node.lineno, *(decorator.lineno for decorator in node.decorator_list)]) - 1
                if length > LONGEST_FUNCTION and not reasoned(lines, above, node.body[0].lineno):
                    wrong.append(f"{relative(file)}:{node.lineno}: {node.name} has {length} lines")
    assert not wrong, "\n".join(wrong)


def test_what_is_ignored_is_named():
    bare = re.compile(r"# type: ignore(?!\[)|# noqa(?!: [A-Z])|# mypy: ignore|# ruff: noqa(?!: [A-Z])")
    wrong = [
        f"{relative(file)}:{number}"
        for file in FILES
        for number, line in enumerate(file.read_text().splitlines(), 1)
        if bare.search(line)
    ]
    assert not wrong, "\n".join(wrong)


# --- errors


def test_the_tree_in_the_docstring_of_errors_is_the_tree():
    drawn, path = {}, []
    for line in errors.__doc__.splitlines():
        if found := re.match(r"(\W*)(\w+)\s+(?:\((\d+)\))?", line if "──" in line or "(70)" in line else ""):
            depth = len(found[1]) // 4
            path[depth:] = [found[2]]
            parent = path[depth - 1] if depth else "Exception"
            drawn[found[2]] = (parent, int(found[3]) if found[3] else drawn[parent][1])
    real = {
        name: (kind.__bases__[0].__name__, kind.exit_code)
        for name, kind in inspect.getmembers(errors, inspect.isclass)
        if issubclass(kind, errors.AttrcliError)
    }
    assert drawn == real


def test_exit_codes_are_those_of_the_design():
    codes = {kind.__name__: kind.exit_code for kind in (errors.AttrcliError, *errors.AttrcliError.__subclasses__())}
    assert codes == {"AttrcliError": 70, "UsageError": 2, "InputError": 3, "ModelError": 4, "NoInputsError": 5}


def test_the_errors_of_a_user_are_defined_in_one_place():
    kinds = {name for name, kind in vars(errors).items() if isinstance(kind, type)}
    wrong = [
        f"{relative(file)}:{node.lineno}: {node.name}"
        for file in FILES
        if unit(file) != "errors"
        for node in ast.walk(tree(file))
        if isinstance(node, ast.ClassDef) and kinds & {ast.unparse(base).split(".")[-1] for base in node.bases}
    ]
    assert not wrong, "\n".join(wrong)


# --- start-up


def loaded_by(*arguments):
    """The modules of others that a command imports."""
    program = (
        "import json, sys\n"
        "from attrcli.__main__ import main\n"
        f"sys.argv = ['attrcli', *{arguments!r}]\n"
        "try:\n    main()\n"
        "except SystemExit as stop:\n"
        "    assert not stop.code, stop.code\n"
        "    print(json.dumps(sorted({name.split('.')[0] for name in sys.modules})), file=sys.stderr)\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return set(json.loads(done.stderr.splitlines()[-1])) & {
        "torch", "onnx", "onnxruntime", "numpy", "scipy", "PIL", "h5py", "matplotlib", "typer",
    }  # fmt: skip


@pytest.mark.parametrize(
    "arguments",
    [("--help",), ("--version",), ("methods",), ("methods", "--json"), ("methods", "integrated_gradients")],
    ids=" ".join,
)
def test_what_only_prints_imports_nothing_heavy(arguments):
    assert loaded_by(*arguments) == {"typer"}


@pytest.fixture
def run(tmp_path):
    """A run file and the images that it was made from."""
    columns = batch(names(3))
    for row, name in enumerate(names(3)):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        Image.new("RGB", (9, 8), "red").save(tmp_path / name)
        columns["sample_sha256"][row] = hashlib.sha256((tmp_path / name).read_bytes()).hexdigest()
    preprocess = Preprocess("image", size=(8, 9), mean=(0.0,) * 3, std=(1.0,) * 3)
    attributes = ATTRIBUTES | {"preprocess": preprocess.as_dict(), "inputs_root": str(tmp_path)}
    with RunWriter.open(tmp_path / "run.h5", names(3), LAYOUT, attributes) as writer:
        writer.write(slice(None), columns)
        writer.finish()
    return tmp_path / "run.h5"


@pytest.mark.parametrize(
    "command",
    [
        "inspect {run}",
        "render {run} --out {out}",
        "render {run} {run} --out {out}.png",
        "export {run} {out} --to npz",
        "export {run} {out} --to virelay",
    ],
)
def test_commands_on_run_files_import_no_torch(tmp_path, run, command):
    found = loaded_by(*command.format(run=run, out=tmp_path / "out").split())
    assert "h5py" in found
    assert not found & {"torch", "onnx", "onnxruntime"}
