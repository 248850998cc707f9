"""Starts sandboxes and reads verdicts; refuses where none can be built."""

from __future__ import annotations

import json
import os
import secrets
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from hcx.errors import EvalError

HERE = Path(__file__).parent
MODULES = "hcx.evals.sandbox."

LOADER_PATHS = ("/lib", "/lib64", "/usr/lib", "/usr/lib64", "/etc/ld.so.cache")
"""What a Python interpreter may need beside its own prefix: shared libraries."""


@dataclass(frozen=True)
class Limits:
    """What one problem may use.

    Attributes:
        seconds: wall time, start of the interpreter included.
        memory_bytes: address space of each process, and resident memory of all together.
        processes: processes and threads together.
        disk_bytes: the only writable place, a tmpfs, and each file in it.
        files: files in it.
    """

    seconds: float = 10.0
    memory_bytes: int = 512 * 1024 * 1024
    processes: int = 8
    disk_bytes: int = 16 * 1024 * 1024
    files: int = 256


@dataclass(frozen=True)
class Verdict:
    """What came of a program.

    Attributes:
        passed: all tests held; nothing else makes it true.
        status: `failed` by a test or an error, `time` or `memory` by a limit, `crashed` when no verdict came.
        detail: the error, for people.
    """

    passed: bool
    status: Literal["passed", "failed", "time", "memory", "crashed"]
    detail: str = ""


class Sandbox:
    """Runs model-written programs against a benchmark's tests.

    Args:
        limits: of each program.

    Raises:
        EvalError: this machine allows no sandbox; nothing is run outside one.
    """

    def __init__(self, limits: Limits | None = None) -> None:
        self.limits = limits or Limits()
        # Root never takes the user's way: its programs would be the machine's root outside their namespace.
        self._as_root = os.geteuid() == 0
        self._probe()

    def _probe(self) -> None:
        program = {"program": "def f():\n    return 1\n", "setup": "", "asserts": ["assert f() == 1"], "names": ["f"]}
        try:
            verdict = self._run(program)
            reason = "" if verdict.passed else f"a right program did not pass ({verdict.status}: {verdict.detail})"
        except EvalError as error:
            reason = str(error)
        if reason:
            raise EvalError(
                f"no sandbox can be built here ({reason}), so generated code is not run; needed: Linux 5.14 or newer "
                "with user namespaces (sysctl kernel.unprivileged_userns_clone, user.max_user_namespaces; in a "
                "container: allow unshare and mount), on x86_64 or aarch64"
            )

    def check_function(self, program: str, prompt: str, check: str, entry_point: str) -> Verdict:
        """HumanEval's form: `check(candidate)` calls the function `entry_point` of the program.

        Args:
            program: what the model wrote, whole.
            prompt: the benchmark's prompt, whose helpers the tests may use.
            check: source that defines `check`.
            entry_point: name of the function.
        """
        test = {"program": program, "prompt": prompt, "check": check, "entry_point": entry_point}
        return self._run(test)

    def check_asserts(
        self, program: str, asserts: Sequence[str], setup: str = "", names: Sequence[str] = ()
    ) -> Verdict:
        """MBPP's form: `assert` statements that call the program's functions.

        Args:
            program: what the model wrote, whole.
            asserts: the tests.
            setup: imports and definitions of the tests.
            names: what the tests call of the program (a benchmark's own solution says); all names that the tests do
                not define themselves if none are given. A program cannot add to them, so it cannot replace `sorted`.
        """
        return self._run({"program": program, "setup": setup, "asserts": list(asserts), "names": list(names)})

    def check_all(self, tests: Sequence[dict[str, Any]], workers: int = 1) -> list[Verdict]:
        """Many programs, several sandboxes at a time; the order is kept."""
        with ThreadPoolExecutor(max_workers=workers) as pool:
            return list(pool.map(lambda test: self._run(test), tests))

    def _run(self, test: dict[str, Any]) -> Verdict:
        # Lone surrogates, which a model's bytes can decode to, would not survive the way in.
        if any("\ud800" <= c <= "\udfff" for c in str(test["program"])):
            return Verdict(False, "failed", "SyntaxError: not valid Unicode")
        secret = secrets.token_hex(16)
        spec = {
            "as_root": self._as_root,
            "secret": secret,
            "seconds": self.limits.seconds,
            "limits": asdict(self.limits),
            "python": os.path.realpath(sys.executable),
            "read_only": _read_only_paths(),
            "tester": _sources("wire", "tester"),
            "candidate": _sources("wire", "candidate"),
            "test": test,
        }
        process = subprocess.Popen(
            [os.path.realpath(sys.executable), "-I", "-S", "-B", str(HERE / "launcher.py")],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env={},
            cwd="/",
            start_new_session=True,
        )
        try:
            out, err = process.communicate(json.dumps(spec).encode(), timeout=self.limits.seconds + 20)
        except subprocess.TimeoutExpired:
            # The launcher keeps the time itself; this is for a launcher that hangs. Its death ends the namespace.
            process.kill()
            process.communicate()
            return Verdict(False, "time", "the sandbox did not end in time")
        return _verdict(out, err, process.returncode, secret)


def _verdict(out: bytes, err: bytes, code: int, secret: str) -> Verdict:
    killed = _json(err).get("killed")
    if killed:
        return Verdict(False, killed, f"over the limit of {killed}")
    answer = _json(out)
    if "setup" in answer:
        raise EvalError(str(answer["setup"]))
    if code == 0 and answer.get("secret") == secret and answer.get("passed") is True:
        return Verdict(True, "passed")
    if answer.get("secret") == secret:
        return Verdict(False, "failed", str(answer.get("error", "")))
    return Verdict(False, "crashed", err.decode(errors="replace")[-500:])


def _json(data: bytes) -> dict[str, Any]:
    try:
        value = json.loads(data)
    except ValueError:
        return {}
    return value if isinstance(value, dict) else {}


def _sources(*names: str) -> dict[str, str]:
    return {MODULES + name: (HERE / f"{name}.py").read_text(encoding="utf-8") for name in names}


def _read_only_paths() -> list[str]:
    """The interpreter's prefix and the loader's folders; a folder inside another one is left out."""
    real = [str(Path(p).resolve()) for p in (sys.base_prefix, sys.base_exec_prefix)]
    paths = {*real, *LOADER_PATHS, str(Path(os.path.realpath(sys.executable)).parent)}
    return sorted(
        path for path in paths if os.path.lexists(path) and not any(path.startswith(f"{p}/") for p in real if p != path)
    )
