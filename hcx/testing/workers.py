"""A pool of worker processes over gloo, which import once and run many distributed tests.

Starting processes and importing the training libraries takes longer than most distributed tests run. So the workers
stay, and so does their process group, while the number of ranks does. Any error ends the workers: their collectives may
be out of step, and the next test shall not inherit that.
"""

from __future__ import annotations

import atexit
import contextlib
import importlib
import importlib.util
import inspect
import multiprocessing
import os
import pickle
import signal
import socket
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

MAX_WORKERS = 8


class WorkerError(AssertionError):
    """A function failed in one or more workers; the message holds each rank's traceback."""


class WorkerPool:
    """Processes on this machine; started by the first `run` that needs them.

    Args:
        timeout_s: how long a `run` may take before its workers are killed.
    """

    def __init__(self, timeout_s: float = 180.0) -> None:
        self._timeout_s = timeout_s
        self._workers: list[tuple[Any, Connection]] = []
        self._runs = 0
        self._directory = tempfile.TemporaryDirectory(prefix="hcx-workers-")
        self._port = _free_port()

    def run(self, fn: Callable[..., Any], world_size: int, *args: Any, timeout_s: float | None = None) -> list[Any]:
        """Calls `fn(*args)` on ranks 0 .. world_size - 1 and returns their results in rank order.

        The default process group is initialised (gloo) and RANK, WORLD_SIZE, LOCAL_RANK are set. `fn` is a module-level
        function; arguments and results must pickle.

        Raises:
            WorkerError: a rank raised, or died.
            TimeoutError: a rank did not answer in time; stacks of all ranks are on stderr.
        """
        if not 1 <= world_size <= MAX_WORKERS:
            raise ValueError(f"world_size = {world_size}; must be 1 to {MAX_WORKERS}")
        self._start(world_size)
        self._runs += 1
        target = (fn.__module__, inspect.getsourcefile(fn), fn.__qualname__)
        payload = pickle.dumps(args)
        store = str(Path(self._directory.name) / f"store-{self._runs}")
        for rank in range(world_size):
            request = (target, rank, world_size, store, self._port, payload)
            self._workers[rank][1].send_bytes(pickle.dumps(request))
        return self._collect(world_size, timeout_s or self._timeout_s)

    def _collect(self, world_size: int, timeout_s: float) -> list[Any]:
        deadline = time.monotonic() + timeout_s
        answers: dict[int, Any] = {}
        failures: dict[int, str] = {}
        rank_of = {connection: rank for rank, (_, connection) in enumerate(self._workers[:world_size])}
        while len(answers) + len(failures) < world_size:
            if failures:
                # The others may wait for the failed rank forever; their own error, if any, comes at once.
                deadline = min(deadline, time.monotonic() + 2.0)
            waiting = [c for c, rank in rank_of.items() if rank not in answers and rank not in failures]
            ready = wait(waiting, timeout=max(0.0, deadline - time.monotonic()))
            if not ready:
                break
            for connection in ready:
                rank = rank_of[connection]  # type: ignore[index]
                try:
                    ok, answer = pickle.loads(connection.recv_bytes())  # type: ignore[union-attr]
                except (EOFError, OSError):
                    self._workers[rank][0].join(1.0)
                    ok, answer = False, f"the process died (exit code {self._workers[rank][0].exitcode})"
                (answers if ok else failures)[rank] = answer
        if failures:
            self.close()
            text = "\n".join(f"rank {rank} of {world_size}: {failures[rank]}" for rank in sorted(failures))
            raise WorkerError(text)
        if len(answers) < world_size:
            silent = sorted(set(range(world_size)) - set(answers))
            self._dump_stacks()
            self.close()
            raise TimeoutError(f"no answer from ranks {silent} of {world_size} within {timeout_s:g} s")
        return [answers[rank] for rank in range(world_size)]

    def _start(self, count: int) -> None:
        if len(self._workers) != count:
            # Libraries keep process groups in globals: another number of ranks gets other processes.
            self.close()
        context = multiprocessing.get_context("spawn")
        while len(self._workers) < count:
            ours, theirs = context.Pipe()
            process = context.Process(target=_serve, args=(theirs,), daemon=True)
            with quiet_main():
                process.start()
            theirs.close()
            self._workers.append((process, ours))

    def _dump_stacks(self) -> None:
        for process, _ in self._workers:
            if process.is_alive():
                os.kill(process.pid, signal.SIGUSR1)
        time.sleep(0.5)

    def close(self) -> None:
        """Ends all workers; a later `run` starts new ones."""
        for process, connection in self._workers:
            connection.close()
            process.kill()
        for process, _ in self._workers:
            process.join(5.0)
        self._workers = []


_session: list[WorkerPool] = []


def session_pool() -> WorkerPool:
    """The pool that all tests of a session share."""
    if not _session:
        _session.append(WorkerPool())
        atexit.register(_session[0].close)
    return _session[0]


@contextlib.contextmanager
def quiet_main() -> Any:
    """Keeps spawn from importing the test runner's main module into the worker."""
    main = sys.modules["__main__"]
    spec, file = getattr(main, "__spec__", None), getattr(main, "__file__", None)
    main.__spec__ = None
    if file is not None:
        del main.__file__
    try:
        yield
    finally:
        main.__spec__ = spec
        if file is not None:
            main.__file__ = file


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _serve(connection: Connection) -> None:
    """The worker's main loop."""
    import faulthandler

    faulthandler.register(signal.SIGUSR1, all_threads=True)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    import torch

    torch.set_num_threads(1)
    joined = 0
    while True:
        try:
            request = pickle.loads(connection.recv_bytes())
        except (EOFError, OSError):
            return
        target, rank, world_size, store, port, payload = request
        try:
            if joined != world_size:
                _join(rank, world_size, store, port)
                joined = world_size
            fn = _find(*target)
            answer = (True, fn(*pickle.loads(payload)))
            data = pickle.dumps(answer)
        except BaseException:
            data = pickle.dumps((False, traceback.format_exc()))
        connection.send_bytes(data)


def _join(rank: int, world_size: int, store: str, port: int) -> None:
    import torch.distributed as dist

    if dist.is_initialized():
        dist.destroy_process_group()
    os.environ.update(
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        WORLD_SIZE=str(world_size),
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
    )
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world_size)


def _find(module_name: str, file: str, qualname: str) -> Callable[..., Any]:
    """The function, from an importable module or from a test file (which pytest imports by path)."""
    module = sys.modules.get(module_name)
    if module is None:
        try:
            module = importlib.import_module(module_name)
        except ImportError:
            spec = importlib.util.spec_from_file_location(module_name, file)
            if spec is None or spec.loader is None:
                raise
            module = importlib.util.module_from_spec(spec)
            sys.modules[module_name] = module
            spec.loader.exec_module(module)
    found: Any = module
    for part in qualname.split("."):
        found = getattr(found, part)
    return found  # type: ignore[no-any-return]
