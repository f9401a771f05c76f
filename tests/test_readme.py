"""The README's commands run, and print what it says: the words exactly, measured numbers as numbers."""

import re
import shlex
from pathlib import Path

import pytest
from typer.testing import CliRunner

from attrcli.cli import app

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text()
MEASURED = re.compile(r"(?<=: )\s*[\d.]+(e-\d+)?$", re.MULTILINE)


def _sessions() -> list[tuple[str, str]]:
    """(command, output) of every console block."""
    found = []
    for block in re.findall(r"```console\n(.*?)```", README, re.DOTALL):
        for part in re.split(r"^\$ ", block, flags=re.MULTILINE)[1:]:
            command, _, output = part.partition("\n")
            found.append((command, output))
    return found


def test_every_console_command_prints_what_the_readme_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "sample_models").symlink_to(ROOT / "sample_models")
    monkeypatch.chdir(tmp_path)
    sessions = _sessions()
    assert len(sessions) >= 4
    for command, expected in sessions:
        program, *words = shlex.split(command)
        assert program == "attrcli"
        result = CliRunner().invoke(app, words)
        assert result.exit_code == 0, (command, result.output)
        assert MEASURED.sub(" #", result.stdout) == MEASURED.sub(" #", expected), command
        for key in ("rows", "ok", "errors"):  # counts are exact
            pattern = re.compile(rf"^{key}:\s+(\d+)$", re.MULTILINE)
            assert pattern.findall(result.stdout) == pattern.findall(expected), command


def test_the_python_example_runs(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(ROOT)
    [example] = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    exec(compile(example, "README.md", "exec"), {})
    assert "torch.Size([4, 1, 28, 28])" in capsys.readouterr().out


def test_links_point_at_files() -> None:
    targets = re.findall(r"\]\(([^)#]+)\)", README)
    assert targets
    assert [target for target in targets if not (ROOT / target).exists()] == []
