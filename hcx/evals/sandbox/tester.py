"""The tester's side: the benchmark's own tests, run over a proxy of the model's program.

The tests are the benchmark's and trusted; what the candidate answers is not. Only this process knows the verdict's
channel, and the candidate can neither trace nor signal it: it is pid 1 of their namespace.
"""

from __future__ import annotations

import ast
import builtins
from typing import Any

from hcx.evals.sandbox.wire import Handle, decode, encode, receive, send


class CandidateGone(Exception):
    """The candidate's process ended, or answered with something that is not an answer."""


class Channel:
    """Calls into the candidate."""

    def __init__(self, incoming: int, outgoing: int) -> None:
        self._incoming, self._outgoing = incoming, outgoing

    def program(self, source: str) -> None:
        """Runs the program's top level."""
        self._ask({"program": source})

    def call(self, name: str | int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Calls a function by name, or an object by its handle."""
        request = {"call": name, "args": encode(args, _own), "kwargs": encode(kwargs, _own)}
        return decode(self._ask(request), self._remote)

    def _remote(self, body: Any) -> Remote:
        number, truth = body
        return Remote(self, int(number), truth)

    def _ask(self, request: dict[str, Any]) -> Any:
        try:
            send(self._outgoing, request)
            answer = receive(self._incoming)
            if "value" in answer:
                return answer["value"]
            kind, message = str(answer["error"]), str(answer["message"])
        except (OSError, EOFError, ValueError, KeyError, TypeError) as error:
            raise CandidateGone(f"{type(error).__name__}: {error}") from None
        raise_as = getattr(builtins, kind, Exception)
        if not (isinstance(raise_as, type) and issubclass(raise_as, Exception)):
            raise CandidateGone(f"{kind}: {message}")
        raise RemoteError.of(raise_as, message)


class RemoteError:
    """Errors of the candidate as errors here, so that tests may expect one."""

    @staticmethod
    def of(kind: type[Exception], message: str) -> Exception:
        """An exception of a built-in kind; kinds that want other arguments become plain ones."""
        try:
            return kind(message)
        except TypeError:
            return Exception(f"{kind.__name__}: {message}")


class Remote(Handle):
    """An object that stays with the candidate. It can be called and passed back; it equals nothing but itself.

    It is true or false as it was when the candidate returned it. That lends a program nothing: one that wants an object
    to be true where the tests ask for no more could as well have returned `True`.
    """

    def __init__(self, channel: Channel, number: int, truth: Any) -> None:
        super().__init__(number)
        self._channel = channel
        self._truth = truth

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._channel.call(self.number, args, kwargs)

    def __bool__(self) -> bool:
        if isinstance(self._truth, bool):
            return self._truth
        raise TypeError("the program returned an object that is neither true nor false")


def _own(value: Any) -> int:
    raise TypeError(f"the tests pass a {type(value).__name__}, which cannot be sent to the program")


def _function(channel: Channel, name: str) -> Any:
    def proxy(*args: Any, **kwargs: Any) -> Any:
        return channel.call(name, args, kwargs)

    proxy.__name__ = name
    return proxy


def _compiling(source: str) -> str:
    """The longest run of first lines that is a program: a prompt may end in the middle of a function."""
    lines = source.splitlines(keepends=True)
    for end in range(len(lines), 0, -1):
        text = "".join(lines[:end])
        try:
            compile(text, "<prompt>", "exec")
        except SyntaxError:
            continue
        return text
    return ""


def free_names(sources: list[str], known: dict[str, Any]) -> set[str]:
    """Names that the tests read and neither define, import nor find among the built-ins: the program's."""
    read: set[str] = set()
    bound: set[str] = set(known) | set(dir(builtins))
    for source in sources:
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, ast.Name):
                (read if isinstance(node.ctx, ast.Load) else bound).add(node.id)
            elif isinstance(node, ast.alias):
                bound.add((node.asname or node.name).split(".")[0])
            elif isinstance(node, ast.arg):
                bound.add(node.arg)
            elif isinstance(node, (ast.FunctionDef, ast.ClassDef)):
                bound.add(node.name)
    return read - bound


def run(test: dict[str, Any], channel: Channel) -> None:
    """Runs one problem's tests; returns if all of them hold and raises otherwise.

    Args:
        test: `program`, and either `check` with `entry_point` and `prompt` (HumanEval), or `setup`, `asserts` and
            `names` (MBPP).
        channel: to the candidate.
    """
    # MBPP's solutions may rely on what its tests import.
    channel.program(f"{test.get('setup', '')}\n{test['program']}")
    names: dict[str, Any] = {"__name__": "tests"}
    if "check" in test:
        # Helpers that the prompt defines (an encoder whose decoder is asked for) are the benchmark's own.
        exec(compile(_compiling(test["prompt"]), "<prompt>", "exec"), names)
        names[test["entry_point"]] = _function(channel, test["entry_point"])
        exec(compile(test["check"], "<check>", "exec"), names)
        names["check"](names[test["entry_point"]])
        return
    if not test["asserts"]:
        raise ValueError("a problem without tests")
    exec(compile(test["setup"], "<setup>", "exec"), names)
    for name in test["names"] or free_names(list(test["asserts"]), names):
        names[name] = _function(channel, name)
    for line in test["asserts"]:
        exec(compile(line, "<assert>", "exec"), names)
