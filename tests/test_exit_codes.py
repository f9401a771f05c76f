"""The edge of the command line, in a process of its own: each way to end has its exit code, and none of them is 1."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import h5py
import numpy as np
import pytest
from store_runs import make, names

from attrcli import errors
from attrcli.methods import METHODS

SAMPLES = Path(__file__).parents[1] / "sample_models"
RUN = [sys.executable, "-m", "attrcli"]


def attrcli(*arguments, **options):
    return subprocess.run([*RUN, *map(str, arguments)], capture_output=True, text=True, **options)


def patched(body, *arguments, verb="methods.description"):
    """Run a command whose verb is replaced by one that runs `body`."""
    module, _, name = verb.partition(".")
    program = (
        "import sys\n"
        f"from attrcli import errors, {module}\n"
        f"def replaced(*_, **__):\n    {body}\n"
        f"{module}.{name} = replaced\n"
        "from attrcli.__main__ import main\n"
        "main()\n"
    )
    arguments = arguments or ("methods", "gradient")
    return subprocess.run([sys.executable, "-c", program, *arguments], capture_output=True, text=True)


# --- errors


@pytest.mark.parametrize(
    "error",
    [
        "RuntimeError('lost')",
        "ValueError('lost')",
        "KeyError('lost')",
        "AssertionError('lost')",
        "MemoryError('lost')",
        "OSError(28, 'lost')",
        "EOFError('lost')",  # which Typer takes for the end of a prompt, exit 1
        "ImportError('lost')",
        "errors.AttrcliError('lost')",
    ],
)
def test_whatever_is_not_caught_exits_70(error):
    done = patched(f"raise {error}")
    assert done.returncode == 70
    assert done.stdout == ""
    assert "lost" in done.stderr.splitlines()[-1]
    assert done.stderr.splitlines()[-1].startswith("attrcli: ")
    assert "Traceback" not in done.stderr


def test_a_crash_within_an_error_handler_and_an_endless_recursion_exit_70():
    assert patched("try:\n        1 / 0\n    finally:\n        raise BlockingIOError('lost')").returncode == 70
    assert patched("return replaced()").returncode == 70


@pytest.mark.parametrize("stop", ["'text'", "b'bytes'"])
def test_an_exit_with_something_that_is_no_code_is_a_crash(stop):
    assert patched(f"sys.exit({stop})").returncode == 70


def test_debug_shows_where():
    done = patched("raise EOFError('lost')", "methods", "gradient", "--debug")
    assert done.returncode == 70
    assert "in replaced" in done.stderr


@pytest.mark.parametrize("missing", ["typer", "attrcli.cli", "attrcli.methods"])
def test_a_broken_installation_exits_70(missing):
    program = f"import sys; sys.modules[{missing!r}] = None; from attrcli.__main__ import main; main()"
    done = subprocess.run([sys.executable, "-c", program, "methods"], capture_output=True, text=True)
    assert done.returncode == 70
    assert missing in done.stderr


@pytest.mark.parametrize(
    ("kind", "code"),
    [(kind.__name__, kind.exit_code) for kind in vars(errors).values() if hasattr(kind, "exit_code")],
)
def test_each_error_has_its_code_and_one_line(kind, code):
    done = patched(f"raise errors.{kind}('said')")
    assert (done.returncode, done.stderr) == (code, "attrcli: error: said\n")


@pytest.mark.parametrize(
    "arguments",
    [
        (),
        ("nope",),
        ("--nope",),
        ("methods", "--nope"),
        ("methods", "nope"),
        ("methods", "gradient", "extra"),
        ("explain",),
        ("explain", "net.onnx", "images", "--method", "gradient"),
        ("explain", "net.onnx", "images", "--out", "run.h5", "--method", "gradeint"),
        ("explain", "net.onnx", "images", "--out", "run.h5", "--method", "gradient", "-o", "steps=3"),
        ("explain", "net.onnx", "images", "--out", "run.h5", "--method", "gradient", "-o", "steps"),
        ("explain", "--limit", "many"),
        ("explain", "--config", "missing.toml"),
        ("render", "run.h5"),
        ("render", "missing.h5", "--out", "folder"),
        ("export", "missing.h5", "folder", "--to", "npz"),
    ],
    ids=" ".join,
)
def test_a_wrong_command_line_exits_2(tmp_path, arguments):
    done = attrcli(*arguments, cwd=tmp_path)
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


def test_typing_errors_are_told_what_was_meant(tmp_path):
    stderr = attrcli("methods", "gradeint").stderr
    assert stderr.startswith("attrcli: error: unknown method 'gradeint'; did you mean 'gradient'?")
    given = ("explain", "net.onnx", "images", "--out", "run.h5", "--method", "smoothgrad", "-o", "sample=3")
    assert "did you mean 'samples'?" in attrcli(*given, cwd=tmp_path).stderr
    assert "'\\x1b[31m'" in attrcli("methods", "\x1b[31m").stderr  # and no name from outside steers a terminal


# --- interruptions


def test_an_interrupt_before_there_is_work_exits_130():
    assert patched("raise KeyboardInterrupt").returncode == 130


def rows_done(part):
    try:
        with h5py.File(part, "r", locking=False) as file:
            return np.count_nonzero(file["status"][...])
    except (OSError, KeyError):  # not there yet, or only half of its header
        return 0


def test_ctrl_c_exits_130_and_the_same_command_goes_on(tmp_path):
    out, part = tmp_path / "run.h5", tmp_path / "run.h5.part"
    arguments = [SAMPLES / "fashion_cnn.pt", SAMPLES / "images/test", "--method", "integrated_gradients"]
    arguments += ["-o", "steps=25", "--batch-size", "2", "--limit", "24", "--threads", "1", "--out", out, "--json"]
    program = (  # a shell's background jobs ignore the signal, and a test may be run by one
        "import signal; signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "from attrcli.__main__ import main; main()"
    )
    command = [sys.executable, "-c", program, "explain", *map(str, arguments)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as running:
        until = time.monotonic() + 120
        while rows_done(part) == 0 and running.poll() is None and time.monotonic() < until:
            time.sleep(0.01)
        running.send_signal(signal.SIGINT)
        stdout, stderr = running.communicate(timeout=60)
    assert (running.returncode, stdout) == (130, ""), stderr
    assert f"interrupted; finished rows are in {part}; the same command goes on from there" in stderr
    assert "Traceback" not in stderr
    kept = rows_done(part)
    assert kept > 0
    assert not out.exists()

    done = attrcli("explain", *arguments)
    assert done.returncode == 0, done.stderr
    facts = json.loads(done.stdout)
    assert 0 < facts["kept"] <= kept
    assert facts["kept"] + facts["computed"] == facts["rows"] == facts["ok"]
    assert out.exists()
    assert not part.exists()


# --- stdout and stderr that are gone


def closed_pipe():
    """The writing end of a pipe that nobody reads."""
    reading, writing = os.pipe()
    os.close(reading)
    return writing


@pytest.fixture
def run(tmp_path):
    return make(tmp_path / "run.h5", names(3))


@pytest.mark.parametrize("unbuffered", ["", "1"])
@pytest.mark.parametrize("command", ["methods", "methods --json", "--help", "--version", "inspect {run}"])
def test_a_broken_pipe_is_quiet(run, command, unbuffered):
    pipe = closed_pipe()
    environment = os.environ | {"PYTHONUNBUFFERED": unbuffered}
    done = subprocess.run(
        [*RUN, *command.format(run=run).split()], stdout=pipe, stderr=subprocess.PIPE, text=True, env=environment
    )
    os.close(pipe)
    assert (done.returncode, done.stderr) == (141, "")  # 128 + SIGPIPE, as other tools end


def test_head_gets_its_line():
    line = f"{sys.executable} -m attrcli methods | head -n 1"
    done = subprocess.run(["bash", "-o", "pipefail", "-c", line], capture_output=True, text=True)
    assert done.returncode in (0, 141)
    assert done.stdout.startswith(f"{next(iter(METHODS))} ")
    assert done.stderr == ""


@pytest.mark.parametrize("unbuffered", ["", "1"])
@pytest.mark.parametrize("command", ["methods", "methods --json", "--help", "explain --help", "inspect {run}"])
def test_a_full_disk_under_stdout_is_no_failed_gate_and_no_crash(run, command, unbuffered):
    environment = os.environ | {"PYTHONUNBUFFERED": unbuffered}
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            [*RUN, *command.format(run=run).split()], stdout=full, stderr=subprocess.PIPE, text=True, env=environment
        )
    assert done.returncode == 2
    assert done.stderr == "attrcli: error: cannot write to stdout: no space left on device\n"


def test_explain_under_a_full_stdout_has_written_its_file(tmp_path):
    out = tmp_path / "run.h5"
    command = [*RUN, "explain", SAMPLES / "fashion_mlp.onnx", SAMPLES / "images/test/Bag", "-m", "saliency"]
    with open("/dev/full", "w") as full:
        done = subprocess.run([*command, "--out", out], stdout=full, stderr=subprocess.PIPE, text=True)
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert "cannot write to stdout" in done.stderr
    assert rows_done(out) == 6


def test_stdout_that_cannot_be_written_at_all():
    done = subprocess.run(["bash", "-c", f"{sys.executable} -m attrcli methods 1</dev/null"], capture_output=True)
    assert (done.returncode, done.stderr) == (2, b"attrcli: error: cannot write to stdout: bad file descriptor\n")


@pytest.mark.parametrize(("arguments", "code"), [("methods", 0), ("methods nope", 2), ("nope", 2)])
@pytest.mark.parametrize("closed", ["2>&-", ">&-", ">&- 2>&-"])
def test_the_exit_code_survives_closed_streams(arguments, code, closed):
    line = f"{sys.executable} -m attrcli {arguments} {closed}"
    assert subprocess.run(["bash", "-c", line], capture_output=True).returncode == code


def test_the_exit_code_survives_a_full_disk_under_stderr():
    with open("/dev/full", "w") as full:
        assert subprocess.run([*RUN, "methods", "nope"], stderr=full).returncode == 2
