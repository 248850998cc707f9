"""A real SLURM of several nodes on one machine: for tests of batch files and recovery against the thing itself.

Each daemon gets a hostname, an `/etc/hosts` and a process namespace of its own. The namespace is what makes a power cut
honest: when its first process is killed, the kernel kills everything that was started in it, steps and tasks included,
at once. It also means that nothing outlives the cluster, however a test ends: each namespace goes with the test runner.

Needs root, the right to make namespaces (in a container: CAP_SYS_ADMIN), and Debian's packages `slurmctld`, `slurmd`,
`slurm-client` and `munge`. Nothing outside its directory is changed.
"""

from __future__ import annotations

import contextlib
import os
import random
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

from hcx.dist.spawn import die_with_parent

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "scontrol", "squeue", "scancel", "unshare", "mount")
SEARCH_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
START_S = 60.0
"""How long the cluster may take to be there."""

CONFIGURATION = """\
ClusterName=hcxtest
SlurmctldHost=ctl(127.0.0.1)
SlurmctldPort={port}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
# cred_expire is also how long a requeued job waits before it may start again.
AuthInfo=socket={home}/munge/socket,cred_expire=5
CommunicationParameters=NoCtldInAddrAny
StateSaveLocation={home}/state
SlurmdSpoolDir={home}/spool/%n
SlurmctldPidFile={home}/slurmctld.pid
SlurmdPidFile={home}/slurmd.%n.pid
SlurmctldLogFile={home}/log/slurmctld.log
SlurmdLogFile={home}/log/slurmd.%n.log
MailProg=/bin/true
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
MpiDefault=none
JobCompType=jobcomp/filetxt
JobCompLoc={home}/log/jobcomp.log
SchedulerType=sched/backfill
SchedulerParameters=sched_interval=1,bf_interval=1,batch_sched_delay=0,requeue_delay=0
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
# Believe the CPUs and memory written here, not the machine's.
SlurmdParameters=config_overrides
# Short times: a dead node is seen within seconds, not minutes.
SlurmdTimeout=8
SlurmctldTimeout=8
KillWait={kill_wait}
MinJobAge=3600
ReturnToService=2
OverTimeLimit=0
EnforcePartLimits=ANY
JobRequeue=1
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
{nodes}
PartitionName=main Nodes=ALL Default=YES MaxTime=INFINITE PriorityTier=1 PreemptMode=REQUEUE GraceTime={grace}
PartitionName=high Nodes=ALL MaxTime=INFINITE PriorityTier=10 PreemptMode=OFF
"""


def why_no_cluster() -> str | None:
    """The reason why a cluster cannot be started on this machine, or None."""
    missing = [program for program in PROGRAMS if shutil.which(program, path=SEARCH_PATH) is None]
    if missing:
        return f"no SLURM on this machine ({', '.join(missing)} not found; Debian: slurmctld slurmd slurm-client munge)"
    if os.geteuid() != 0:
        return "a SLURM cluster of one's own needs root"
    tried = subprocess.run([*NAMESPACES, "true"], capture_output=True, text=True, check=False)
    if tried.returncode:
        return f"namespaces cannot be made here (in a container: CAP_SYS_ADMIN): {tried.stderr.strip()}"
    return None


NAMESPACES = ("unshare", "--uts", "--mount", "--pid", "--fork", "--mount-proc", "--kill-child=KILL")


class SlurmCluster:
    """The cluster; a context that starts and stops it.

    Args:
        nodes: how many; they are called node1, node2, ...
        cpus: that each node claims to have.
        kill_wait_s: seconds between SLURM's SIGTERM and its SIGKILL.
        grace_s: seconds that a preempted job is given before that.

    Attributes:
        home: configuration, state and logs.
        environment: for clients; holds SLURM_CONF, and nothing of a job that surrounds the test.
    """

    def __init__(self, nodes: int = 2, cpus: int = 2, kill_wait_s: int = 20, grace_s: int = 20) -> None:
        self.nodes = [f"node{number}" for number in range(1, nodes + 1)]
        self._cpus, self._kill_wait, self._grace = cpus, kill_wait_s, grace_s
        # Sockets live below it, and the path of a socket has at most 107 characters: pytest's own paths are too long.
        self.home = Path(tempfile.mkdtemp(prefix="hcx-slurm-"))
        self._daemons: dict[str, subprocess.Popen[bytes]] = {}
        self._cut: list[str] = []
        kept = {name: value for name, value in os.environ.items() if not name.startswith(("SLURM_", "SBATCH_"))}
        self.environment = {**kept, "SLURM_CONF": str(self.home / "slurm.conf")}

    def __enter__(self) -> SlurmCluster:
        try:
            self._configure()
            self._start("munge", "ctl", self._munged())
            self._until(lambda: (self.home / "munge" / "socket").exists(), "munged")
            self._start("ctl", "ctl", ["slurmctld", "-D", "-f", str(self.home / "slurm.conf")])
            self._until(lambda: "is UP" in self.ask("scontrol", "ping"), "slurmctld")
            self.power_on(*self.nodes)
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        # The controller first, so that it does not see its nodes go.
        for name in ("ctl", *self.nodes, "munge"):
            self._kill(name)
        shutil.rmtree(self.home, ignore_errors=True)

    def _configure(self) -> None:
        home = self.home
        home.chmod(0o755)
        for name in ("state", "spool", "log", "munge", "hosts"):
            (home / name).mkdir()
        key = home / "munge" / "key"
        key.write_bytes(os.urandom(256))
        key.chmod(0o400)
        base = free_ports(len(self.nodes) + 1)
        # A cluster has a network of 127.0.0.0/8 to itself, told by its ports.
        network = f"127.{base // 256}.{base % 256}"
        hosts = "".join(f"{network}.{number} {name}\n" for number, name in enumerate(self.nodes, 1))
        ours = Path("/etc/hosts").read_text(encoding="utf-8")
        (home / "etc-hosts").write_text(f"127.0.0.1 localhost ctl\n{hosts}{ours}", encoding="utf-8")
        lines = [
            f"NodeName={name} NodeHostname={name} NodeAddr={network}.{number} Port={base + number} "
            f"CPUs={self._cpus} RealMemory=64000 State=UNKNOWN"
            for number, name in enumerate(self.nodes, 1)
        ]
        text = CONFIGURATION.format(
            home=home, port=base, nodes="\n".join(lines), kill_wait=self._kill_wait, grace=self._grace
        )
        (home / "slurm.conf").write_text(text, encoding="utf-8")

    def _munged(self) -> list[str]:
        where = self.home / "munge"
        options = ("key-file=key", "socket=socket", "pid-file=munged.pid", "seed-file=seed", "log-file=munged.log")
        paths = [f"--{name}={where / file}" for name, file in (option.split("=") for option in options)]
        return ["munged", "--foreground", "--force", "--num-threads=2", *paths]

    def _start(self, name: str, hostname: str, command: Sequence[str]) -> None:
        """Runs a daemon in namespaces of its own, with its hostname and the cluster's hosts."""
        script = 'hostname "$1" && mount --bind "$2" /etc/hosts && shift 2 && cd / && exec "$@"'
        with open(self.home / "log" / f"{name}.out", "ab") as log:
            self._daemons[name] = subprocess.Popen(
                [*NAMESPACES, "sh", "-c", script, "sh", hostname, str(self.home / "etc-hosts"), *command],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env={"PATH": SEARCH_PATH, "LANG": "C.UTF-8"},
                start_new_session=True,
                preexec_fn=die_with_parent,
            )

    def _kill(self, name: str) -> None:
        daemon = self._daemons.pop(name, None)
        if daemon is None:
            return
        inner = _children(daemon.pid)
        for process in inner:
            with contextlib.suppress(ProcessLookupError):
                os.kill(process, signal.SIGKILL)  # the first of its namespace: the kernel kills the rest
        daemon.kill()
        daemon.wait()
        _wait_gone(inner)

    def _until(self, holds: Callable[[], bool], what: str, seconds: float = START_S) -> None:
        deadline = time.monotonic() + seconds
        while not holds():
            ended = [name for name, daemon in self._daemons.items() if daemon.poll() is not None]
            if ended or time.monotonic() > deadline:
                raise RuntimeError(f"{what} is not there ({', '.join(ended) or 'nothing'} ended):\n{self.logs()}")
            time.sleep(0.1)

    def logs(self, lines: int = 15) -> str:
        """The last lines of every daemon's log."""
        parts = []
        for path in sorted((self.home / "log").iterdir()):
            text = path.read_text(encoding="utf-8", errors="replace").splitlines()[-lines:]
            parts.append("\n".join([f"--- {path.name}", *text]))
        return "\n".join(parts)

    def ask(self, *command: str, check: bool = False) -> str:
        """What a client command prints, its errors included."""
        done = subprocess.run(
            command, env=self.environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False
        )
        if check and done.returncode:
            raise RuntimeError(f"{' '.join(command)} ended with {done.returncode}: {done.stdout}")
        return done.stdout

    def power_cut(self, node: str) -> None:
        """SIGKILL to the daemon of a node and to all that runs there."""
        self._kill(node)
        self._cut.append(node)

    def power_on(self, *nodes: str) -> None:
        """Boots nodes that are not running, and waits until every node is of use."""
        # The controller has not missed a node that is back at once, and would wait for its steps for ever.
        for node in [node for node in nodes if node in self._cut]:
            self.ask("scontrol", "update", f"NodeName={node}", "State=DOWN", "Reason=power", check=True)
            self._cut.remove(node)
        for node in nodes:
            if node not in self._daemons:
                (self.home / "spool" / node).mkdir(exist_ok=True)
                self._start(node, node, ["slurmd", "-D", "-N", node, "-f", str(self.home / "slurm.conf")])
        self._until(self._all_up, "the nodes")

    def _all_up(self) -> bool:
        states = self.ask("sinfo", "-h", "-N", "-p", "main", "-o", "%N:%t").split()
        usable = [state for state in states if state.endswith((":idle", ":alloc", ":mix", ":comp"))]
        return len(usable) == len(self.nodes)

    def job(self, number: int) -> Mapping[str, str]:
        """What the controller knows of a job (`JobState`, `Restarts`, `ExitCode`, `Reason`, ...)."""
        shown = self.ask("scontrol", "--oneliner", "show", "job", str(number))
        return dict(word.split("=", 1) for word in shown.split() if "=" in word)

    def ranks(self, job: int) -> dict[int, int]:
        """SLURM_PROCID -> process number of the tasks of a job that run Python now."""
        found: dict[int, int] = {}
        for process, environment in _environments():
            ours = environment.get("SLURM_CONF") == self.environment["SLURM_CONF"]
            if not ours or environment.get("SLURM_JOB_ID") != str(job) or "SLURM_STEP_ID" not in environment:
                continue
            if "python" in _program(process):
                found[int(environment["SLURM_PROCID"])] = process
        return found


def free_ports(count: int) -> int:
    """The first of `count` free TCP ports in a row, below the range that the kernel hands out to clients."""
    for _ in range(200):
        base = random.randrange(20000, 32000)
        with contextlib.ExitStack() as held:
            try:
                for number in range(count):
                    held.enter_context(socket.socket()).bind(("0.0.0.0", base + number))
            except OSError:
                continue
        return base
    raise RuntimeError(f"no {count} free ports in a row")


def _children(process: int) -> list[int]:
    try:
        return [int(p) for p in Path(f"/proc/{process}/task/{process}/children").read_text(encoding="utf-8").split()]
    except FileNotFoundError:
        return []


def _wait_gone(processes: Sequence[int]) -> None:
    deadline = time.monotonic() + 20
    while any(Path(f"/proc/{process}").exists() for process in processes):
        if time.monotonic() > deadline:
            raise RuntimeError(f"processes {processes} do not die")
        time.sleep(0.02)


def _program(process: int) -> str:
    try:
        return os.path.basename(os.readlink(f"/proc/{process}/exe"))
    except OSError:
        return ""


def _environments() -> Iterator[tuple[int, dict[str, str]]]:
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit():
            continue
        try:
            pairs = (entry / "environ").read_bytes().decode(errors="replace").split("\0")
        except OSError:
            continue
        yield int(entry.name), dict(pair.split("=", 1) for pair in pairs if "=" in pair)
