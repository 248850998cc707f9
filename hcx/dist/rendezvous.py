"""How the processes of a run find each other, and what they make sure of before anything is read or written.

Every way in which this fails is told by what to look at: a node that has no address, a port that nothing listens on, a
rank that never came, nodes with different software. All of it happens before the run's directory is touched.
"""

from __future__ import annotations

import contextlib
import datetime
import importlib.metadata
import json
import os
import platform
import secrets
import socket
import time
from collections import defaultdict
from collections.abc import Mapping

import torch
import torch.distributed as dist

from hcx.dist import slurm
from hcx.errors import LaunchError, PeerLost

RENDEZVOUS_VARIABLE = "HCX_RENDEZVOUS_S"
RENDEZVOUS_S = 300.0
"""Seconds for all ranks to arrive, unless the variable says otherwise: nodes load Python from a shared disk at once."""
ACKNOWLEDGE_S = 10.0
"""How long rank 0, which holds the store, waits for the others to have read why the run ends."""

_attempt: list[str] = []
_shared: list[dist.Store] = []


def attempt_token() -> str:
    """A random name that all ranks of this start of the run share; of a lone process, its own."""
    if not _attempt:
        _attempt.append(secrets.token_hex(8))
    return _attempt[0]


def address() -> tuple[str, int]:
    """(host, port) of rank 0, from torchrun's variables or SLURM's.

    Raises:
        LaunchError: there is none.
    """
    if slurm.in_step():
        return slurm.rendezvous_address()
    for name in ("MASTER_ADDR", "MASTER_PORT"):
        if name not in os.environ:
            raise LaunchError(f"{name} is not set, but several processes were started; use torchrun or hcx launch")
    return slurm.rendezvous_address()


def patience_s() -> float:
    """Seconds for all ranks to arrive."""
    given = os.environ.get(RENDEZVOUS_VARIABLE)
    try:
        seconds = RENDEZVOUS_S if given is None else float(given)
    except ValueError:
        seconds = 0.0
    if not 0 < seconds < 86400:
        raise LaunchError(f"{RENDEZVOUS_VARIABLE} = {given!r}: must be seconds, above 0")
    return seconds


def join(rank: int, world_size: int) -> dist.Store:
    """The store that all ranks share, once all are there and have the same software.

    Raises:
        LaunchError: the address does not resolve, or software differs between nodes.
        PeerLost: rank 0 cannot be reached, or ranks did not come; another start may go well.
    """
    host, port = address()
    deadline = time.monotonic() + patience_s()
    place = f"rank {rank} of {world_size} on {socket.gethostname()}"
    store = _store(host, port, rank, deadline, place)
    restart = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    shared = dist.PrefixStore(f"hcx-{restart}", store)
    _check_in(shared, rank, world_size, deadline, place)
    _shared[:] = [shared]
    return shared


def leave_together(rank: int) -> None:
    """Ranks other than 0 wait until it has written the last of its files; then all may end.

    A launcher may take the end of one rank for a sign to end the others. This is no collective, which would time out
    while a large model is written.

    """
    if not _shared:
        return
    store = _shared.pop()
    # The store goes with rank 0, which may be quicker to end than this rank to ask; what it had to do is done or not.
    with contextlib.suppress(RuntimeError, TimeoutError):
        if rank == 0:
            store.set("done", "1")
        while rank and not store.check(["done"]):
            time.sleep(0.1)


def _store(host: str, port: int, rank: int, deadline: float, place: str) -> dist.Store:
    try:
        socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    except OSError as error:
        raise LaunchError(
            f"{place}: the node of rank 0, {host!r}, does not resolve ({error}). {_origin()}; check the resolver of "
            "this node, or set MASTER_ADDR to a name or an address that every node knows"
        ) from None
    # torchrun's agent holds the store itself, and even rank 0 is its client.
    holds = rank == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
    if not holds:
        _reach(host, port, deadline, place)
    left = datetime.timedelta(seconds=max(1.0, deadline - time.monotonic()))
    try:
        return dist.TCPStore(host, port, None, holds, left, wait_for_workers=False)
    except (RuntimeError, TimeoutError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        if holds:
            raise PeerLost(
                f"{place}: cannot listen at {host}:{port} ({reason}); another program may hold the port. A restart "
                "of the job takes another one, or set MASTER_PORT"
            ) from None
        raise PeerLost(_unreachable(host, port, place, reason)) from None


def _reach(host: str, port: int, deadline: float, place: str) -> None:
    """Waits for rank 0 to listen; torch's own client would retry without a word on what is wrong."""
    while True:
        try:
            with socket.create_connection((host, port), timeout=max(0.1, min(5.0, deadline - time.monotonic()))):
                return
        except OSError as error:
            if time.monotonic() > deadline:
                raise PeerLost(_unreachable(host, port, place, str(error))) from None
        time.sleep(0.05)


def _unreachable(host: str, port: int, place: str, reason: str) -> str:
    return (
        f"{place}: cannot reach rank 0 at {host}:{port} within {patience_s():g} s ({reason}). {_origin()}; look whether "
        f"rank 0 runs (its log comes first), whether a firewall closes ports {slurm.PORT_BASE} to "
        f"{slurm.PORT_BASE + slurm.PORT_COUNT - 1} between nodes, and whether {host} is the right interface "
        f"(MASTER_ADDR, GLOO_SOCKET_IFNAME, NCCL_SOCKET_IFNAME); {RENDEZVOUS_VARIABLE} is how long to try"
    )


def _origin() -> str:
    if "MASTER_ADDR" in os.environ:
        return "It comes from MASTER_ADDR"
    return f"It is the first of SLURM's node list, {os.environ.get('SLURM_STEP_NODELIST', '')!r}"


def versions() -> dict[str, str]:
    """What must be the same on every node."""
    import hcx

    found = {"hcx": hcx.__version__, "torch": torch.__version__, "python": platform.python_version()}
    for package in ("deepspeed", "megatron-core"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[package] = importlib.metadata.version(package)
    return found


def _check_in(store: dist.Store, rank: int, world_size: int, deadline: float, place: str) -> None:
    """All ranks arrive with what they run on; rank 0 judges, and every rank ends or goes on alike."""
    mine = {"host": socket.gethostname(), "versions": versions()}
    try:
        store.set(f"arrived/{rank}", json.dumps(mine))
        if rank == 0:
            missing = _wait_for(store, [f"arrived/{other}" for other in range(world_size)], deadline)
            if missing:
                verdict = {"late": f"{len(missing)} of {world_size} ranks did not arrive: {_some(missing)}"}
            else:
                arrived = [json.loads(store.get(f"arrived/{other}")) for other in range(world_size)]
                verdict = {"differs": differing(arrived), "token": attempt_token()}
            store.set("verdict", json.dumps(verdict))
        else:
            if _wait_for(store, ["verdict"], deadline + ACKNOWLEDGE_S):
                raise PeerLost(f"{place}: rank 0 was reached, but did not say that all ranks have arrived")
            verdict = json.loads(store.get("verdict"))
            store.add("read", 1)
        if rank == 0 and (verdict.get("late") or verdict["differs"]):
            _linger(store, world_size - 1)
    except (RuntimeError, TimeoutError) as error:
        raise PeerLost(f"{place}: the rendezvous broke off ({str(error).splitlines()[0]})") from None
    if verdict.get("late"):
        raise PeerLost(
            f"{place}: {verdict['late']} within {patience_s():g} s; look at the logs of their nodes, or raise "
            f"{RENDEZVOUS_VARIABLE} if they are only slow to start"
        )
    if verdict["differs"]:
        raise LaunchError(
            f"{place}: nodes run different software, and such a run would not be the one that was asked for:\n"
            f"{verdict['differs']}\ninstall the same versions on all nodes (a shared environment, or a container)"
        )
    if rank:
        _attempt[:] = [verdict["token"]]


def _wait_for(store: dist.Store, keys: list[str], deadline: float) -> list[str]:
    """The keys that are not there at the deadline."""
    while True:
        keys = [key for key in keys if not store.check([key])]
        if not keys or time.monotonic() > deadline:
            return keys
        time.sleep(0.02)


def _linger(store: dist.Store, others: int) -> None:
    deadline = time.monotonic() + ACKNOWLEDGE_S
    while store.add("read", 0) < others and time.monotonic() < deadline:
        time.sleep(0.02)


def _some(keys: list[str], most: int = 16) -> str:
    numbers = [key.rsplit("/", 1)[1] for key in keys]
    return ", ".join(numbers[:most]) + (f" and {len(numbers) - most} more" if len(numbers) > most else "")


def differing(arrived: list[Mapping[str, object]]) -> str:
    """A line per kind of node, most frequent first; empty if all run the same."""
    kinds: defaultdict[str, list[str]] = defaultdict(list)
    for entry in arrived:
        found = entry["versions"]
        assert isinstance(found, Mapping)
        hosts = kinds[", ".join(f"{name} {value}" for name, value in sorted(found.items()))]
        if entry["host"] not in hosts:
            hosts.append(str(entry["host"]))
    if len(kinds) == 1:
        return ""
    ordered = sorted(kinds.items(), key=lambda kind: -len(kind[1]))
    return "\n".join(f"  {', '.join(hosts[:8])}{' ...' if len(hosts) > 8 else ''}: {kind}" for kind, hosts in ordered)
