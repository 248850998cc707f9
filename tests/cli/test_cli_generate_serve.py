"""`hcx generate`, `hcx chat` and `hcx serve` as commands."""

from __future__ import annotations

import io
import json
import signal
import socket
import subprocess
import sys
from functools import partial
from pathlib import Path

import httpx
import pytest

from hcx.cli.main import main
from hcx.testing.tiny import tiny_model_directory


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model_directory(tmp_path_factory.mktemp("cli") / "tiny-model")


def _run(*arguments: str) -> int:
    with pytest.raises(SystemExit) as exit_:
        main([str(argument) for argument in arguments])
    return int(exit_.value.code or 0)


def test_generate_prints_what_its_json_says(model: Path, capsys: pytest.CaptureFixture) -> None:
    assert _run("generate", model, "--prompt", "대한", "--max-tokens", "12", "--json") == 0
    answer = json.loads(capsys.readouterr().out)
    assert len(answer["token_ids"]) == 12
    assert answer["finish_reason"] == "length"
    assert _run("generate", model, "--prompt", "대한", "--max-tokens", "12") == 0
    assert capsys.readouterr().out == answer["text"] + "\n"


def test_generate_reads_standard_input(
    model: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO("대한\n\n"))
    assert _run("generate", model, "--max-tokens", "3", "--json") == 0
    assert json.loads(capsys.readouterr().out)["prompt"] == "대한\n"


def test_generate_refuses_standard_input_that_is_no_text(
    model: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"ab\xff"), encoding="utf-8"))
    assert _run("generate", model) == 2
    assert "not UTF-8 text: invalid start byte at byte 2" in capsys.readouterr().err


def test_chat_remembers_resets_and_ends_with_its_input(
    model: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    from hcx.generate import Generator

    seen: list[list[str]] = []
    encode = Generator.encode_chat

    def recording(self: Generator, messages: list[dict[str, str]]) -> list[int]:
        seen.append([message["content"] for message in messages if message["role"] != "assistant"])
        return encode(self, messages)

    monkeypatch.setattr(Generator, "encode_chat", recording)
    monkeypatch.setattr(sys, "stdin", io.StringIO("하나\n둘\n/undo\n셋\n/reset\n넷\n"))
    assert _run("chat", model, "--max-tokens", "5", "--temperature", "0", "--system", "규칙") == 0
    assert seen[1:] == [["규칙", "하나"], ["규칙", "하나", "둘"], ["규칙", "하나", "셋"], ["규칙", "넷"]]
    assert "a new conversation" in capsys.readouterr().out


def test_chat_forgets_the_oldest_turns_when_the_context_is_full(
    model: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO("가나다라마바사\n" * 12))
    assert _run("chat", model, "--max-tokens", "20", "--temperature", "0") == 0
    assert "forgotten" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["generate", "/nowhere", "--prompt", "a"], "no such model directory"),
        (["generate", "MODEL", "--prompt", "a", "--temperature", "-1"], "temperature = -1.0; must be from 0"),
        (["generate", "MODEL", "--prompt", "a", "--max-tokens", "999"], "context of 256"),
        (["generate", "MODEL", "--prompt", "a", "--numerics", "best"], "valid: fast, exact, reference"),
        (["generate", "MODEL", "--prompt", "a", "--device", "abacus"], "valid: auto, cpu, cuda"),
        (["serve", "MODEL", "--port", "0", "--host", "0.0.0.0"], "needs --api-key-file"),
        (["serve", "MODEL", "--port", "0", "--api-key-file", "/nowhere"], "cannot be read"),
        (["serve", "MODEL", "--port", "0", "--adapter", "DIR"], "--adapter DIR: write NAME=DIR"),
        (["serve", "MODEL", "--adapter", "a=X", "--adapter", "b=Y"], "--adapter b=Y: one adapter per server"),
        (["serve", "MODEL", "--port", "0", "--adapter", "ko=/nowhere"], "no such adapter directory"),
        (["serve", "MODEL", "--adapter", "ko=X", "--name", "y"], "the name is the adapter's"),
        (["generate", "MODEL", "--prompt", "a", "--adapter", "/nowhere"], "no such adapter directory"),
        (["serve", "MODEL", "--port", "0", "--max-seq", "999"], "max_seq = 999; must be from 1"),
        (["serve", "MODEL", "--port", "0", "--max-batch", "99999999999"], "lower max_seq or max_batch"),
        (["serve", "MODEL", "--port", "0", "--host", "256.0.0.1", "--api-key-file", "KEYS"], "no such address"),
        (["serve", "/nowhere", "--port", "0"], "no such model directory"),
        (["serve", "MODEL", "--colour", "red"], "No such option"),
        (["serve", "MODEL", "--port", "99999"], "port"),
    ],
)
def test_mistakes_are_told_and_exit_2(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture, arguments: list[str], message: str
) -> None:
    (tmp_path / "keys").write_text("# a comment\nsecret\n")
    names = {"MODEL": str(model), "KEYS": str(tmp_path / "keys")}
    assert _run(*[names.get(argument, argument) for argument in arguments]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert "Traceback" not in error


def test_a_port_in_use_is_told_before_the_model_is_read(model: Path, capsys: pytest.CaptureFixture) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        assert _run("serve", model, "--port", str(taken.getsockname()[1])) == 2
    error = capsys.readouterr().err
    assert "cannot listen on 127.0.0.1" in error
    assert "--port" in error


def test_an_empty_key_file_is_refused(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    (tmp_path / "keys").write_text("# nothing yet\n\n")
    assert _run("serve", model, "--api-key-file", str(tmp_path / "keys"), "--host", "0.0.0.0") == 2
    assert "holds no key" in capsys.readouterr().err


def test_the_command_serves_until_it_is_interrupted(model: Path) -> None:
    command = [sys.executable, "-m", "hcx.cli.main", "serve", str(model), "--port", "0"]
    # A suite started in the background of a shell hands on that SIGINT is ignored; a person's terminal does not.
    restore = partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, preexec_fn=restore) as process:
        try:
            line = process.stdout.readline()
            assert line.startswith("serving tiny-model at http://127.0.0.1:")
            url = line.split(" at ")[1].split()[0]
            reply = httpx.post(f"{url}/v1/completions", json={"prompt": "대한", "max_tokens": 4}, timeout=60)
            assert reply.json()["model"] == "tiny-model"
            process.send_signal(2)
            assert process.wait(30) == 130
        finally:
            process.kill()
