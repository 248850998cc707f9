"""What the pages tell people to type exists, and README's commands run in their order."""

from __future__ import annotations

import contextlib
import io
import re
import shlex
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path
from typing import Any

import pytest
import typer

from hcx.artifacts import find_resource
from hcx.cli.main import build_app, main
from hcx.evals.lm_eval_flags import LM_EVAL_FLAGS, SHARED_FLAGS, is_lm_eval_line
from hcx.recipe import load_train_recipe

ROOT = Path(__file__).parents[2]
PAGES = sorted(path for pattern in ("*.md", "docs/*.md", "*/README.md", "kernels/*.md") for path in ROOT.glob(pattern))
PLACEHOLDER = re.compile(r"^[A-Z][A-Z_]*$|[/=][A-Z][A-Z_]*$|^\[|\.\.\.")

SMALL_TEXT = [
    f"languages.{name}.sources=[{source}, max_bytes: 150000}}]"
    for name, source in (
        ("ko", "{kind: embedded, language: ko"),
        ("en", "{kind: embedded, language: en"),
        ("code", "{kind: stdlib"),
    )
]
SMALL_RUN = [
    "train.steps=4",
    "train.global_batch=2",
    "train.micro_batch=2",
    "optim.schedule.warmup_steps=1",
    "validation.max_documents=1",
    "data.seq_len=64",
    "model.num_layers=1",
]
REDUCED: dict[str, list[str]] = {
    "data build": SMALL_TEXT,
    "tokenizer train": ["max_bytes_per_language=100000", "vocab_size=1024"],
    "tokenizer report": ["--text", "page.txt"],
    "train": SMALL_RUN,
    "generate": ["--max-tokens", "4"],
    "eval": ["--limit", "1"],
}
"""What makes a command of README small, and nothing else about it."""


def commands_of(page: Path) -> list[str]:
    """Every `hcx ...` of a page, in order: lines of fenced blocks, and spans of code."""
    found = []
    text = page.read_text(encoding="utf-8").replace("\\\n", " ")
    for block, span in re.findall(r"```[a-z]*\n(.*?)```|`([^`\n]+)`", text, re.DOTALL):
        for line in (block or span).splitlines():
            line = re.sub(r"\s{2,}.*$", "", line.strip())  # an explanation stands behind two spaces
            if line.startswith("hcx ") and "{" not in line:
                found.append(line.removesuffix(";").strip())
    return found


def verb_of(words: list[str]) -> tuple[Any, list[str], str]:
    """(the command or group, its arguments, its name) of `hcx VERB [VERB] ...`."""
    command: Any = typer.main.get_command(build_app())
    name: list[str] = []
    rest = list(words)
    while rest and hasattr(command, "commands") and not PLACEHOLDER.search(rest[0]):
        assert rest[0] in command.commands, f"{' '.join(words)}: no such verb"
        command = command.commands[rest[0]]
        name.append(rest.pop(0))
    return command, rest, " ".join(name)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_command_of_a_page_exists_with_its_options_and_keys(page: Path) -> None:
    for line in commands_of(page):
        words = [word for word in shlex.split(line, comments=True)[1:] if word not in ("[--json]", "|", "head")]
        if not words or PLACEHOLDER.search(words[0]):
            continue
        command, rest, name = verb_of(words)
        known = {option for param in command.params for option in param.opts + param.secondary_opts}
        if name == "eval" and is_lm_eval_line(rest):
            known = {*LM_EVAL_FLAGS, *SHARED_FLAGS, "--data", "--allow-code"}
        for word in rest:
            if word.startswith("--"):
                assert word.split("=")[0] in known, f"{line}: {word}"
        if name == "train" and rest and not PLACEHOLDER.search(rest[0]):
            keys = [word for word in rest[1:] if "=" in word and not PLACEHOLDER.search(word)]
            load_train_recipe(find_resource(rest[0]), keys)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_file_that_a_page_names_exists(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    folders = "docs|hcx|kernels|launch|evals|tokenizer|slurm|tests"
    named = set(re.findall(rf"`((?:{folders})/[\w./-]+)`", text)) | set(re.findall(r"\]\(([\w./-]+\.md)\)", text))
    named.discard("hcx/_resources/")  # of an installed wheel
    for name in named:
        assert (ROOT / name).exists() or (page.parent / name).exists(), f"{page.name} names {name}"


def table_commands(page: Path) -> list[str]:
    """The commands of the table of verbs, in order."""
    rows = [line for line in page.read_text(encoding="utf-8").splitlines() if line.startswith("| ")]
    return [span for row in rows for span in re.findall(r"`(hcx [^`]+)`", row)]


def test_both_readmes_show_the_same_commands() -> None:
    assert table_commands(ROOT / "README.md") == table_commands(ROOT / "README.ko.md")


def test_the_commands_of_readme_run_in_their_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("page.txt").write_text("파일을 저장하려면 저장을 누르십시오.\nTo save it, choose Save.\n", encoding="utf-8")
    commands = table_commands(ROOT / "README.md")
    assert len(commands) >= 12
    for line in commands:
        words = shlex.split(line)[1:]
        _, _, name = verb_of(words)
        if name == "serve":
            answers_over_http(words)
            continue
        monkeypatch.setattr(sys, "stdin", io.StringIO("안녕\n"))
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed), pytest.raises(SystemExit) as ended:
            main([*words, *REDUCED.get(name, [])])
        assert ended.value.code == 0, line
        assert printed.getvalue(), line
    (report,) = tmp_path.rglob("index.html")
    assert "software-documentation register" in report.read_text(encoding="utf-8")


def answers_over_http(words: list[str]) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    process = subprocess.Popen([sys.executable, "-m", "hcx.cli.main", *words, "--port", str(port)])
    try:
        deadline = time.monotonic() + 60
        while True:
            assert process.poll() is None, "the server ended"
            try:
                with urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5) as answer:
                    assert answer.status == 200
                    return
            except OSError:
                assert time.monotonic() < deadline
                time.sleep(0.2)
    finally:
        process.terminate()
        process.wait(20)
