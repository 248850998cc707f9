"""Ranks that cannot meet, or do not fit together, are told why before anything is read or written."""

from __future__ import annotations

import os
import socket
import threading
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch.distributed as dist

from hcx.dist import rendezvous
from hcx.dist.spawn import free_port
from hcx.errors import LaunchError, PeerLost


@pytest.fixture(autouse=True)
def no_place(monkeypatch: pytest.MonkeyPatch) -> None:
    """The rendezvous of a run that nobody started."""
    for name in [name for name in os.environ if name.startswith(("SLURM_", "MASTER_", "TORCHELASTIC_"))]:
        monkeypatch.delenv(name)
    monkeypatch.setattr(rendezvous, "_attempt", [])
    monkeypatch.setattr(rendezvous, "_shared", [])
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", str(free_port()))
    monkeypatch.setenv("HCX_RENDEZVOUS_S", "30")


def together(world_size: int, ranks: list[int] | None = None) -> dict[int, Any]:
    """What `join` gives or raises on each rank; ranks are threads that are told apart by their names."""
    found: dict[int, Any] = {}

    def one(rank: int) -> None:
        try:
            found[rank] = rendezvous.join(rank, world_size)
        except Exception as error:
            found[rank] = error

    threads = [threading.Thread(target=one, args=(rank,), name=str(rank)) for rank in ranks or range(world_size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    return found


def by_rank(values: list[Any]) -> Callable[[], Any]:
    return lambda: values[int(threading.current_thread().name)]


def test_ranks_meet_in_one_store_and_share_a_name_for_this_start() -> None:
    found = together(3)
    assert all(isinstance(store, dist.Store) for store in found.values()), found
    found[2].set("x", "1")
    assert found[1].get("x") == b"1"
    assert len(rendezvous.attempt_token()) == 16


def test_different_software_is_named_by_node_on_every_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    old = {"hcx": "1", "torch": "2.12.0", "python": "3.11.7"}
    new = {**old, "torch": "2.13.0"}
    monkeypatch.setattr(rendezvous, "versions", by_rank([old, old, new]))
    monkeypatch.setattr(socket, "gethostname", by_rank(["node1", "node1", "node2"]))
    for error in together(3).values():
        assert isinstance(error, LaunchError)
        assert not isinstance(error, PeerLost)  # exit code 2: nothing that another start would mend
        assert "node1: hcx 1, python 3.11.7, torch 2.12.0" in str(error)
        assert "node2: hcx 1, python 3.11.7, torch 2.13.0" in str(error)


def test_a_rank_that_does_not_come_is_named_on_all_others(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HCX_RENDEZVOUS_S", "1")
    found = together(4, ranks=[0, 1, 3])
    for error in found.values():
        assert isinstance(error, PeerLost), error
        assert "1 of 4 ranks did not arrive: 2 within 1 s" in str(error)


def test_an_unreachable_rank_0_is_told_with_its_address_and_what_to_look_at(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HCX_RENDEZVOUS_S", "0.5")
    monkeypatch.setenv("MASTER_PORT", "20001")
    start = time.monotonic()
    with pytest.raises(PeerLost) as told:
        rendezvous.join(1, 2)
    assert time.monotonic() - start < 20
    assert "cannot reach rank 0 at 127.0.0.1:20001 within 0.5 s" in str(told.value)
    assert "firewall" in str(told.value)
    assert "It comes from MASTER_ADDR" in str(told.value)


def test_a_node_list_that_does_not_resolve_is_told_with_the_list(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MASTER_ADDR")
    monkeypatch.delenv("MASTER_PORT")
    step = {"PROCID": "1", "NTASKS": "2", "STEP_ID": "0", "JOB_ID": "5", "STEP_NODELIST": "no-such-node-[1-2]"}
    for name, value in step.items():
        monkeypatch.setenv(f"SLURM_{name}", value)
    with pytest.raises(LaunchError) as told:
        rendezvous.join(1, 2)
    assert not isinstance(told.value, PeerLost)
    assert "'no-such-node-1', does not resolve" in str(told.value)
    assert "'no-such-node-[1-2]'" in str(told.value)


def test_a_port_that_is_taken_is_told_by_rank_0(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as other:
        other.bind(("0.0.0.0", 0))
        other.listen()
        monkeypatch.setenv("MASTER_PORT", str(other.getsockname()[1]))
        with pytest.raises(PeerLost, match="cannot listen at 127.0.0.1"):
            rendezvous.join(0, 2)


def test_without_an_address_the_ways_to_start_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MASTER_PORT")
    with pytest.raises(LaunchError, match="MASTER_PORT is not set.*torchrun or hcx launch"):
        rendezvous.join(0, 2)
    monkeypatch.setenv("MASTER_PORT", "1")
    monkeypatch.setenv("HCX_RENDEZVOUS_S", "soon")
    with pytest.raises(LaunchError, match="HCX_RENDEZVOUS_S = 'soon': must be seconds"):
        rendezvous.join(0, 2)


def test_ranks_end_after_rank_0_has_written_the_last_of_its_files() -> None:
    store = together(2)[0]
    done = threading.Event()

    def other() -> None:
        rendezvous._shared[:] = [store]
        rendezvous.leave_together(1)
        done.set()

    thread = threading.Thread(target=other)
    thread.start()
    assert not done.wait(0.3)
    rendezvous._shared[:] = [store]
    rendezvous.leave_together(0)
    assert done.wait(10)
    thread.join()
