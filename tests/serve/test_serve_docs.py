"""What `docs/serving.md` shows runs, and what it names exists."""

from __future__ import annotations

import contextlib
import io
import re
import shlex
from pathlib import Path

import pytest
import typer

from hcx.cli.main import build_app, main
from hcx.testing.tiny import tiny_model_directory

PAGE = Path(__file__).parents[2] / "docs" / "serving.md"


def test_the_python_of_the_page_runs_and_prints(tmp_path: Path) -> None:
    directory = tiny_model_directory(tmp_path)
    (code,) = re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        exec(compile(code.replace('"MODEL"', repr(str(directory))), str(PAGE), "exec"), {})
    assert len(printed.getvalue()) > 20


def test_the_generate_command_of_the_page_runs(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    directory = tiny_model_directory(tmp_path)
    (line,) = re.findall(r"^hcx (generate .*)$", PAGE.read_text(encoding="utf-8"), re.MULTILINE)
    with pytest.raises(SystemExit) as exit_:
        main([str(directory) if word == "MODEL" else word for word in shlex.split(line)])
    assert exit_.value.code == 0
    assert capsys.readouterr().out.strip()


def test_every_option_on_the_page_exists() -> None:
    commands = typer.main.get_command(build_app()).commands
    known = {
        option for verb in ("generate", "chat", "serve") for param in commands[verb].params for option in param.opts
    }
    text = re.sub(r"```\nlm_eval.*?```", "", PAGE.read_text(encoding="utf-8"), flags=re.DOTALL)
    named = set(re.findall(r"(?<![\w-])--[a-z][a-z-]*", text))
    assert len(named) > 15
    assert named <= known
