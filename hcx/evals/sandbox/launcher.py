"""Confines itself, then runs tester and candidate. Started as a script with `python -I -S`: standard library only.

Order matters: namespaces, a new root of read-only binds with one small tmpfs, an unprivileged user without
capabilities, limits, `no_new_privs`, the system call filter; only then does anything of the model's run. Every step
that fails ends the process with a message (exit 3), so that a half-built sandbox runs nothing.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import platform
import resource
import signal
import struct
import sys
import time
import types
from typing import Any

LIBC = ctypes.CDLL(None, use_errno=True)
NOBODY = 65534

CLONE_NEWNS, CLONE_NEWCGROUP, CLONE_NEWUTS, CLONE_NEWIPC = 0x20000, 0x02000000, 0x04000000, 0x08000000
CLONE_NEWUSER, CLONE_NEWPID, CLONE_NEWNET = 0x10000000, 0x20000000, 0x40000000
NAMESPACES = CLONE_NEWNS | CLONE_NEWCGROUP | CLONE_NEWUTS | CLONE_NEWIPC | CLONE_NEWPID | CLONE_NEWNET

MS_RDONLY, MS_NOSUID, MS_NODEV, MS_NOEXEC, MS_REMOUNT = 1, 2, 4, 8, 32
MS_BIND, MS_REC, MS_PRIVATE = 4096, 16384, 1 << 18
MNT_DETACH = 2
AT_FDCWD, AT_RECURSIVE = -100, 0x8000
MOUNT_ATTR_LOCKED = 0x1 | 0x2
"""Read-only and nosuid, for whole trees at once."""

PR_SET_PDEATHSIG, PR_SET_DUMPABLE, PR_SET_SECCOMP, PR_CAPBSET_DROP, PR_SET_NO_NEW_PRIVS = 1, 4, 22, 24, 38
PR_CAP_AMBIENT, PR_CAP_AMBIENT_CLEAR_ALL = 47, 4

MACHINES = {
    # audit architecture, and the numbers of calls that are made or filtered by name
    "x86_64": (0xC000003E, {"pivot_root": 155, "clone": 56, "clone3": 435, "socket": 41}),
    "aarch64": (0xC00000B7, {"pivot_root": 41, "clone": 220, "clone3": 435, "socket": 198}),
}
MOUNT_SETATTR = 442

DENIED = {
    # ptrace, process_vm_readv and _writev, mount and umount2, pivot_root, chroot, unshare, setns, keys (3), bpf,
    # perf_event_open, userfaultfd, memfd_create, kexec_load, kexec_file_load, modules (3), handles (2), quotactl,
    # swapon, swapoff, reboot, hostname (2), clocks (3), acct, personality, System V memory, messages and semaphores,
    # mq_open, kcmp, seccomp-protected extras of either machine
    "x86_64": (
        *(101, 310, 311, 165, 166, 155, 161, 272, 308, 248, 249, 250, 321, 298, 323, 319, 246, 320, 175, 176, 313),
        *(
            303,
            304,
            179,
            167,
            168,
            169,
            170,
            171,
            164,
            227,
            159,
            163,
            135,
            29,
            30,
            31,
            68,
            69,
            70,
            64,
            65,
            66,
            240,
            312,
        ),
        *(172, 173, 305, 103, 153, 154, 156, 212),
    ),
    "aarch64": (
        *(117, 270, 271, 40, 39, 41, 51, 97, 268, 217, 218, 219, 280, 241, 282, 279, 104, 294, 105, 106, 273),
        *(
            264,
            265,
            60,
            224,
            225,
            142,
            161,
            162,
            170,
            112,
            171,
            89,
            92,
            194,
            195,
            196,
            186,
            187,
            188,
            189,
            190,
            191,
            193,
        ),
        *(180, 272, 266, 116, 58),
    ),
}
DENIED_EVERYWHERE = (425, 426, 427, 428, 429, 430, 431, 432, 433, 438, 440, 442, 447)
"""io_uring (3), the new mount calls (6), pidfd_getfd, process_madvise, mount_setattr, memfd_secret."""


class SetupError(Exception):
    """The sandbox cannot be built here."""


def _check(result: int, what: str) -> int:
    if result < 0:
        error = ctypes.get_errno()
        raise SetupError(f"{what}: {os.strerror(error)}")
    return result


def _mount(source: str | None, target: str, kind: str | None, flags: int, options: str = "") -> None:
    def text(value: str | None) -> bytes | None:
        return None if value is None else value.encode()

    _check(
        LIBC.mount(text(source), text(target), text(kind), ctypes.c_ulong(flags), text(options)),
        f"mount {target}",
    )


def _read_only(target: str) -> None:
    """Makes a tree of mounts read-only and nosuid, submounts included."""
    attributes = struct.pack("QQQQ", MOUNT_ATTR_LOCKED, 0, 0, 0)
    result = LIBC.syscall(
        MOUNT_SETATTR, AT_FDCWD, target.encode(), AT_RECURSIVE, ctypes.c_char_p(attributes), len(attributes)
    )
    _check(result, f"mount_setattr {target} (Linux 5.12 or newer is needed)")


def _pivot(new: str, old: str) -> None:
    _check(LIBC.syscall(MACHINES[platform.machine()][1]["pivot_root"], new.encode(), old.encode()), "pivot_root")


def build_root(spec: dict[str, Any]) -> None:
    """A root of read-only binds and one tmpfs; nothing else of the machine's files, no /proc, no /sys."""
    _mount(None, "/", None, MS_REC | MS_PRIVATE)
    # As bubblewrap does: the base lies on /tmp, and after the first pivot the whole old tree is under /old.
    _mount("tmpfs", "/tmp", "tmpfs", MS_NOSUID | MS_NODEV, "size=1m,mode=755")
    os.mkdir("/tmp/old")
    os.mkdir("/tmp/new")
    _pivot("/tmp", "/tmp/old")
    os.chdir("/")
    _mount("tmpfs", "/new", "tmpfs", MS_NOSUID | MS_NODEV, "size=1m,mode=755")
    for path in sorted(spec["read_only"], key=len):
        source, target = f"/old{path}", f"/new{path}"
        if os.path.islink(source):
            os.makedirs(os.path.dirname(target), exist_ok=True)
            if not os.path.lexists(target):
                os.symlink(os.readlink(source), target)
            continue
        if not os.path.exists(source) or os.path.exists(target):
            continue
        if os.path.isdir(source):
            os.makedirs(target)
        else:
            os.makedirs(os.path.dirname(target), exist_ok=True)
            with open(target, "w"):
                pass
        _mount(source, target, None, MS_BIND | MS_REC)
        _read_only(target)
    os.makedirs("/new/dev", exist_ok=True)
    for name in ("null", "zero", "random", "urandom"):
        with open(f"/new/dev/{name}", "w"):
            pass
        _mount(f"/old/dev/{name}", f"/new/dev/{name}", None, MS_BIND)
    os.makedirs("/new/tmp", exist_ok=True)
    limits = spec["limits"]
    options = f"size={limits['disk_bytes']},nr_inodes={limits['files']},mode=1777"
    _mount("tmpfs", "/new/tmp", "tmpfs", MS_NOSUID | MS_NODEV | MS_NOEXEC, options)
    os.makedirs("/new/old", exist_ok=True)
    _pivot("/new", "/new/old")
    os.chdir("/tmp")
    _check(LIBC.umount2(b"/old", MNT_DETACH), "umount /old")
    os.rmdir("/old")
    _mount(None, "/", None, MS_REMOUNT | MS_BIND | MS_RDONLY | MS_NOSUID | MS_NODEV)


def map_user(proc: int, uid: int, gid: int) -> None:
    """Makes the caller's user the only one of its new user namespace."""
    for name, text in (
        ("setgroups", "deny"),
        ("uid_map", f"{NOBODY} {uid} 1"),
        ("gid_map", f"{NOBODY} {gid} 1"),
    ):
        try:
            descriptor = os.open(f"self/{name}", os.O_WRONLY, dir_fd=proc)
            os.write(descriptor, text.encode())
            os.close(descriptor)
        except OSError as error:
            raise SetupError(f"{name}: {error.strerror}") from None


def drop_privileges(proc: int, as_root: bool) -> None:
    """Leaves no user, capability or way back."""
    if as_root:
        os.setgroups([])
        os.setresgid(NOBODY, NOBODY, NOBODY)
        os.setresuid(NOBODY, NOBODY, NOBODY)
        # Changing the user made /proc/self the machine root's.
        _check(LIBC.prctl(PR_SET_DUMPABLE, 1, 0, 0, 0), "prctl dumpable")
        _check(LIBC.unshare(CLONE_NEWUSER), "unshare user")
        map_user(proc, NOBODY, NOBODY)
    os.close(proc)
    for capability in range(64):
        if LIBC.prctl(PR_CAPBSET_DROP, capability, 0, 0, 0) < 0:
            break
    LIBC.prctl(PR_CAP_AMBIENT, PR_CAP_AMBIENT_CLEAR_ALL, 0, 0, 0)
    header = struct.pack("Ii", 0x20080522, 0)
    _check(LIBC.capset(ctypes.c_char_p(header), ctypes.c_char_p(bytes(24))), "capset")
    _check(LIBC.prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0), "prctl no_new_privs")
    _check(LIBC.prctl(PR_SET_DUMPABLE, 0, 0, 0, 0), "prctl dumpable")
    # Set last: a change of credentials clears it.
    _check(LIBC.prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0), "prctl pdeathsig")


def limit(limits: dict[str, int], seconds: float) -> None:
    """Limits of each process; those of all together are the namespace's and the watcher's."""
    for name, value in (
        (resource.RLIMIT_AS, limits["memory_bytes"]),
        (resource.RLIMIT_FSIZE, limits["disk_bytes"]),
        (resource.RLIMIT_NPROC, limits["processes"]),
        (resource.RLIMIT_NOFILE, 64),
        (resource.RLIMIT_CORE, 0),
        (resource.RLIMIT_MEMLOCK, 0),
        (resource.RLIMIT_MSGQUEUE, 0),
        (resource.RLIMIT_CPU, int(seconds) + 2),
    ):
        resource.setrlimit(name, (value, value))


def filter_system_calls() -> None:
    """A seccomp filter: refused calls answer EPERM, another architecture's kill."""
    machine = platform.machine()
    architecture, numbers = MACHINES[machine]
    load, jump_equal, jump_at_least, jump_set, answer = 0x20, 0x15, 0x35, 0x45, 0x06
    allow, refuse, unknown, kill = 0x7FFF0000, 0x00050001, 0x00050026, 0x80000000
    program = [
        (load, 0, 0, 4),
        (jump_equal, 1, 0, architecture),
        (answer, 0, 0, kill),
        (load, 0, 0, 0),
        # x86-64's second numbering of the same calls
        (jump_at_least, 0, 1, 0x40000000),
        (answer, 0, 0, kill if machine == "x86_64" else refuse),
        # clone3 hides its flags in memory: "not implemented" makes the C library use clone
        (jump_equal, 0, 1, numbers["clone3"]),
        (answer, 0, 0, unknown),
        (jump_equal, 0, 4, numbers["clone"]),
        (load, 0, 0, 16),
        (jump_set, 0, 1, NAMESPACES | CLONE_NEWUSER),
        (answer, 0, 0, refuse),
        (answer, 0, 0, allow),
        # sockets: AF_UNIX only, which asyncio needs for itself
        (jump_equal, 0, 4, numbers["socket"]),
        (load, 0, 0, 16),
        (jump_equal, 0, 1, 1),
        (answer, 0, 0, allow),
        (answer, 0, 0, refuse),
    ]
    for number in (*DENIED[machine], *DENIED_EVERYWHERE):
        program += [(jump_equal, 0, 1, number), (answer, 0, 0, refuse)]
    program.append((answer, 0, 0, allow))
    code = ctypes.create_string_buffer(b"".join(struct.pack("HBBI", *line) for line in program))
    header = struct.pack("HxxxxxxP", len(program), ctypes.addressof(code))
    _check(LIBC.prctl(PR_SET_SECCOMP, 2, ctypes.c_char_p(header), 0, 0), "seccomp")


BOOTSTRAP = """import sys, types
for name, source in {modules!r}.items():
    module = sys.modules[name] = types.ModuleType(name)
    exec(compile(source, name, "exec"), module.__dict__)
sys.modules["hcx.evals.sandbox.candidate"].serve(3, 4)
"""


def start_candidate(spec: dict[str, Any]) -> tuple[int, int]:
    """Starts the candidate's process; the descriptors to read from and to write to."""
    to_candidate, from_candidate = os.pipe(), os.pipe()
    code = BOOTSTRAP.format(modules=spec["candidate"])
    if os.fork() == 0:
        null = os.open("/dev/null", os.O_RDWR)
        # Above the range first, so that no dup2 lands on a descriptor that is still needed.
        high = [os.dup2(fd, 50 + i) for i, fd in enumerate((to_candidate[0], from_candidate[1], null))]
        for target, source in ((0, high[2]), (1, high[2]), (2, high[2]), (3, high[0]), (4, high[1])):
            os.dup2(source, target)
        os.closerange(5, 64)
        os.setsid()
        os.execve(spec["python"], [spec["python"], "-I", "-S", "-B", "-c", code], {})
    os.close(to_candidate[0])
    os.close(from_candidate[1])
    return from_candidate[0], to_candidate[1]


def be_tester(spec: dict[str, Any], verdict: int, proc: int) -> None:
    """Pid 1 of the namespace. Its end ends every process in it."""
    answer: dict[str, Any] = {"secret": spec["secret"], "passed": False}
    try:
        LIBC.sethostname(b"sandbox", 7)
        drop_privileges(proc, spec["as_root"])
        limit(spec["limits"], spec["seconds"])
        filter_system_calls()
    except (SetupError, OSError, ValueError) as error:
        os.write(verdict, json.dumps({"setup": str(error)}).encode())
        os._exit(3)
    try:
        for name, source in spec["tester"].items():
            module = sys.modules[name] = types.ModuleType(name)
            exec(compile(source, name, "exec"), module.__dict__)
        tester: Any = sys.modules["hcx.evals.sandbox.tester"]
        incoming, outgoing = start_candidate(spec)
        tester.run(spec["test"], tester.Channel(incoming, outgoing))
        answer["passed"] = True
    except BaseException as error:
        answer["error"] = f"{type(error).__name__}: {error}"[:500]
    os.write(verdict, json.dumps(answer).encode())
    os._exit(0)


def resident_bytes(proc: int, root: int) -> int:
    """Memory of a process and all its descendants."""
    total, todo = 0, [root]
    page = resource.getpagesize()
    while todo:
        pid = todo.pop()
        with contextlib.suppress(OSError, IndexError, ValueError):
            total += int(_slurp(proc, f"{pid}/statm").split()[1]) * page
            todo += [int(child) for child in _slurp(proc, f"{pid}/task/{pid}/children").split()]
    return total


def _slurp(proc: int, name: str) -> bytes:
    descriptor = os.open(name, os.O_RDONLY, dir_fd=proc)
    try:
        return os.read(descriptor, 1 << 16)
    finally:
        os.close(descriptor)


def watch(spec: dict[str, Any], tester: int, proc: int) -> str:
    """Waits for pid 1, or kills it: it and all of its namespace are gone when this returns."""
    deadline = time.monotonic() + spec["seconds"]
    pause = 0.001
    reason = ""
    while os.waitpid(tester, os.WNOHANG)[0] == 0:
        if time.monotonic() > deadline:
            reason = "time"
        elif pause > 0.01 and resident_bytes(proc, tester) > spec["limits"]["memory_bytes"]:
            reason = "memory"
        if reason:
            os.kill(tester, signal.SIGKILL)
            os.waitpid(tester, 0)
            break
        time.sleep(pause)
        pause = min(0.02, pause * 1.5)
    return reason


def main() -> int:
    """Reads the task from standard input; writes the verdict, as JSON, to standard output."""
    spec = json.load(sys.stdin)
    if platform.machine() not in MACHINES:
        raise SetupError(f"no system call filter for {platform.machine()}; x86_64 and aarch64 have one")
    uid, gid = os.getuid(), os.getgid()
    os.umask(0o077)
    proc = os.open("/proc", os.O_RDONLY | os.O_DIRECTORY)
    _check(LIBC.unshare(NAMESPACES | (0 if spec["as_root"] else CLONE_NEWUSER)), "unshare")
    if not spec["as_root"]:
        map_user(proc, uid, gid)
    os.umask(0o022)
    build_root(spec)
    # Modules that would otherwise be looked for once the machine's files are gone.
    import ast  # noqa: F401
    import decimal  # noqa: F401
    import fractions  # noqa: F401

    tester = os.fork()
    if tester == 0:
        be_tester(spec, 1, proc)
    reason = watch(spec, tester, proc)
    if reason:
        os.write(2, json.dumps({"killed": reason}).encode())
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except (SetupError, OSError) as error:
        os.write(1, json.dumps({"setup": str(error)}).encode())
        sys.exit(3)
