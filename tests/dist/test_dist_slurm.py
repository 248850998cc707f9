"""What SLURM's variables mean: node lists, ports, and which process is a task at all."""

from __future__ import annotations

import shutil
import subprocess

import pytest

from hcx.dist.slurm import PORT_BASE, PORT_COUNT, expand_nodelist, first_node, in_step, place, port_of_job
from hcx.dist.slurm import rendezvous_address as address
from hcx.errors import LaunchError

LISTS = {
    "node1": ["node1"],
    "node[1-3]": ["node1", "node2", "node3"],
    "gpu[01-03,7,010],login": ["gpu01", "gpu02", "gpu03", "gpu7", "gpu010", "login"],
    "a,b-c.example.org": ["a", "b-c.example.org"],
    "r[1-2]n[08-10]": ["r1n08", "r1n09", "r1n10", "r2n08", "r2n09", "r2n10"],
    "n[098-101]": ["n098", "n099", "n100", "n101"],
}


@pytest.mark.parametrize("text", LISTS)
def test_a_node_list_names_its_nodes_in_order(text: str) -> None:
    assert expand_nodelist(text) == LISTS[text]


@pytest.mark.slurm
@pytest.mark.parametrize("text", LISTS)
def test_a_node_list_is_read_as_slurm_reads_it(text: str, tmp_path) -> None:  # type: ignore[no-untyped-def]
    conf = tmp_path / "slurm.conf"
    conf.write_text("ClusterName=x\nSlurmctldHost=localhost\nNodeName=node1\n", encoding="utf-8")
    scontrol = shutil.which("scontrol") or ""
    shown = subprocess.run(
        [scontrol, "show", "hostnames", text], env={"SLURM_CONF": str(conf)}, capture_output=True, text=True, check=True
    )
    assert shown.stdout.split() == expand_nodelist(text)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("node[1-3", "brackets do not match"),
        ("node1-3]", "brackets do not match"),
        ("node[[1]]", "brackets do not match"),
        ("node[a-b]", "is no list of numbers and ranges"),
        ("node[3-1]", "runs backwards"),
        ("node[1-99999999]", "too long"),
        ("node[1-1000]x[1-1000]", "more than 100000 nodes"),
        ("node 1", "is no host name"),
        ("$(id)", "is no host name"),
        ("a,,b", "an empty host name"),
        ("", "an empty host name"),
    ],
)
def test_what_is_no_node_list_is_refused_with_its_source(text: str, words: str) -> None:
    with pytest.raises(LaunchError) as refused:
        expand_nodelist(text, "SLURM_JOB_NODELIST")
    assert words in str(refused.value)
    assert f"SLURM_JOB_NODELIST = {text!r}" in str(refused.value)


TASK = {
    "SLURM_PROCID": "3",
    "SLURM_LOCALID": "1",
    "SLURM_NTASKS": "8",
    "SLURM_STEP_NUM_TASKS": "4",
    "SLURM_STEP_ID": "0",
    "SLURM_JOB_ID": "1234",
    "SLURM_STEP_NODELIST": "node[07-08]",
    "SLURM_JOB_NODELIST": "node[01-08]",
}


def test_a_task_knows_its_place_in_its_step() -> None:
    assert in_step(TASK)
    # Of the step, which may be smaller than the job.
    assert place(TASK) == (3, 4, 1)
    assert first_node(TASK) == "node07"
    # The shell of a batch job is no task, and a step of one task has nobody to meet.
    assert not in_step({name: value for name, value in TASK.items() if name != "SLURM_STEP_ID"})
    assert not in_step({**TASK, "SLURM_STEP_NUM_TASKS": "1"})
    with pytest.raises(LaunchError, match="SLURM_PROCID = 'x'"):
        place({**TASK, "SLURM_PROCID": "x"})
    with pytest.raises(LaunchError, match="set MASTER_ADDR"):
        first_node({})


def test_the_address_is_the_first_node_and_a_port_that_all_tasks_derive_alike() -> None:
    assert address(TASK) == ("node07", port_of_job(1234))
    assert address({**TASK, "SLURM_RESTART_COUNT": "2"}) == ("node07", port_of_job(1234, 2))
    assert address({**TASK, "MASTER_ADDR": "10.0.0.1", "MASTER_PORT": "29500"}) == ("10.0.0.1", 29500)
    with pytest.raises(LaunchError, match="MASTER_PORT = '70000': must be a port number"):
        address({**TASK, "MASTER_PORT": "70000"})


def test_jobs_side_by_side_and_restarts_of_one_have_ports_of_their_own() -> None:
    together = [port_of_job(job) for job in range(5000, 6000)]
    assert len(set(together)) == 1000
    restarts = [port_of_job(77, restart) for restart in range(500)]
    assert len(set(restarts)) == 500
    assert all(PORT_BASE <= port < PORT_BASE + PORT_COUNT <= 32768 for port in together + restarts)
