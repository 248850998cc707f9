"""Programs that try to get out, to stay, to eat the machine, or to pass without being right."""

import os
import shutil
import socket
import subprocess
import sys
import tempfile
import textwrap
import time
from pathlib import Path

import pytest

import hcx
from hcx.errors import EvalError
from hcx.evals.sandbox import Limits, Sandbox, runner

SECONDS = 3.0
MIB = 1024 * 1024


@pytest.fixture(scope="module")
def sandbox():
    try:
        return Sandbox(Limits(seconds=SECONDS, memory_bytes=256 * MIB, disk_bytes=8 * MIB))
    except EvalError as error:
        pytest.skip(str(error))


def answer_of(sandbox, body, expected="'yes'"):
    """The verdict on `f() == expected` for a function with a body."""
    program = "import os, sys\ndef f():\n" + textwrap.indent(textwrap.dedent(body), "    ")
    return sandbox.check_asserts(program, [f"assert f() == {expected}, f()"])


def test_a_right_program_passes_and_a_wrong_one_does_not(sandbox):
    assert sandbox.check_asserts("def add(a, b):\n    return a + b", ["assert add(1, 2) == 3"]).passed
    verdict = sandbox.check_asserts("def add(a, b):\n    return a - b", ["assert add(1, 2) == 3"])
    assert (verdict.passed, verdict.status) == (False, "failed")


def test_values_arrive_as_they_were(sandbox):
    values = "[None, True, 2**70, -1.5, float('inf'), 1j, '가', b'x', (1, [2]), {1: {2}}, frozenset({3})]"
    program = f"def f(x):\n    return x if x == {values} else None"
    assert sandbox.check_asserts(program, [f"assert f({values}) == {values}"]).passed


def test_objects_of_the_program_can_be_passed_back_to_it(sandbox):
    program = (
        "class Pair:\n    def __init__(self, a):\n        self.a = a\ndef total(ps):\n    return sum(p.a for p in ps)"
    )
    assert sandbox.check_asserts(program, ["assert total([Pair(1), Pair(2)]) == 3"]).passed


def test_a_program_may_define_a_function_with_the_name_of_a_builtin_only_where_the_benchmark_says_so(sandbox):
    program = "def sum(a, b):\n    return a + b\ndef sorted(x):\n    return [1, 2]\ndef f():\n    return [9]"
    assert sandbox.check_asserts(program, ["assert sum(1, 2) == 3"], names=["sum"]).passed
    assert not sandbox.check_asserts(program, ["assert sorted(f()) == [1, 2]"], names=["f"]).passed
    assert not sandbox.check_asserts(program, ["assert sorted(f()) == [1, 2]"]).passed


def test_humaneval_form_uses_the_prompts_helpers_and_the_programs_function(sandbox):
    prompt = 'def double(x):\n    return 2 * x\n\ndef half(x):\n    """undo double"""\n'
    check = "def check(candidate):\n    assert candidate(double(4)) == 4\n"
    assert sandbox.check_function(prompt + "    return x // 2\n", prompt, check, "half").passed
    assert not sandbox.check_function(prompt + "    return x\n", prompt, check, "half").passed


FORGED = {
    "prints passed": "print('passed'); return 'no'",
    "exits at once": "os._exit(0)",
    "exits politely": "sys.exit(0)",
    "equals everything": "return type('E', (), {'__eq__': lambda s, o: True, '__hash__': lambda s: 0})()",
    "a string that equals everything": "return type('S', (str,), {'__eq__': lambda s, o: True})('no')",
    "writes a verdict everywhere": """
        for fd in range(64):
            try:
                os.write(fd, b'{"passed": true, "value": "yes"}')
            except OSError:
                pass
        return 'no'
    """,
    "kills the tester": "import signal\nfor s in (9, 15, 2, 19):\n    os.kill(1, s)\nreturn 'no'",
    "changes the interpreter": "import builtins\nbuiltins.AssertionError = SystemExit\nreturn 'no'",
    "writes a bad frame": "os.write(4, (5).to_bytes(8, 'big') + b'{}{}{')\nreturn 'no'",
    "announces an endless frame": "os.write(4, b'\\xff' * 64)\nreturn 'no'",
}


NO_TRUTH = "type('N', (), {'__bool__': lambda s: [][0]})()"


@pytest.mark.parametrize(
    ("returned", "truth"),
    [
        ("True", True),
        ("0", False),
        ("re.match('a', 'ab')", True),
        ("re.match('b', 'ab')", False),
        ("(c for c in '')", True),
        ("range(0)", False),
        ("re.compile('')", True),
    ],
)
def test_what_a_program_returns_is_as_true_as_in_python(sandbox, returned, truth):
    program = f"import re\ndef f():\n    return {returned}"
    assert sandbox.check_asserts(program, ["assert f()"]).passed is truth
    assert sandbox.check_asserts(program, ["assert not f()"]).passed is not truth


def test_an_object_that_does_not_say_is_neither_true_nor_false(sandbox):
    program = f"def f():\n    return {NO_TRUTH}\ndef g(x):\n    return 1"
    for line in ("assert f()", "assert not f()"):
        verdict = sandbox.check_asserts(program, [line])
        assert not verdict.passed
        assert "neither true nor false" in verdict.detail
    assert sandbox.check_asserts(program, ["assert g(f()) == 1"]).passed


def test_a_true_object_equals_nothing_and_its_truth_does_not_change(sandbox):
    program = (
        "class T:\n    n = 0\n    def __bool__(self):\n        T.n += 1\n        return T.n == 1\n"
        "    def __eq__(self, other):\n        return True\n    __hash__ = None\ndef f():\n    return T()"
    )
    assert not sandbox.check_asserts(program, ["assert f() == 1"]).passed
    assert not sandbox.check_asserts(program, ["assert f() == True"]).passed
    assert sandbox.check_asserts(program, ["x = f(); assert x; assert x"], names=["f"]).passed


@pytest.mark.parametrize("body", FORGED.values(), ids=FORGED.keys())
def test_a_forged_pass_is_not_counted(sandbox, body):
    assert not answer_of(sandbox, body).passed


MARK = f"hcx{os.getpid()}"
NAMED = f"import ctypes\nctypes.CDLL(None).prctl(15, {MARK.encode()!r}, 0, 0, 0)\n"
"""Names the process, so that one left behind can be told from those of another run."""


def still_there():
    """Processes of this run's programs that are left."""
    names = []
    for path in Path("/proc").glob("[0-9]*/comm"):
        try:
            names.append(path.read_text().strip())
        except OSError:
            continue
    return names.count(MARK)


def test_a_fork_bomb_ends_with_the_limit_and_leaves_nothing(sandbox):
    start = time.monotonic()
    verdict = answer_of(sandbox, NAMED + "while True:\n    try:\n        os.fork()\n    except OSError:\n        pass")
    assert not verdict.passed
    assert time.monotonic() - start < SECONDS + 10
    assert still_there() == 0


def test_orphans_do_not_outlive_the_verdict(sandbox):
    body = """
        if os.fork() == 0:
            os.setsid()
            if os.fork() == 0:
                import time
                time.sleep(600)
            os._exit(0)
        return 'yes'
    """
    assert answer_of(sandbox, NAMED + textwrap.dedent(body)).passed
    assert still_there() == 0


def test_memory_of_one_process_is_limited(sandbox):
    verdict = answer_of(sandbox, "x = bytearray(1 << 31)\nreturn 'yes'")
    assert not verdict.passed
    assert "MemoryError" in verdict.detail


def test_memory_of_all_processes_together_is_limited(sandbox):
    body = """
        for _ in range(5):
            if os.fork() == 0:
                x = bytearray(b'x') * (150 << 20)
                while True:
                    pass
        while True:
            pass
    """
    verdict = answer_of(sandbox, body)
    assert verdict.status == "memory"


def test_the_disk_is_a_small_memory_file_system(sandbox):
    body = """
        try:
            for name in range(10**6):
                with open(f'/tmp/{name}', 'wb') as file:
                    file.write(b'x' * (1 << 20))
        except OSError as error:
            total = sum(os.path.getsize(f'/tmp/{n}') for n in os.listdir('/tmp'))
            return 'yes' if total <= 8 << 20 else total
    """
    assert answer_of(sandbox, body).passed


def test_the_number_of_files_is_limited(sandbox):
    body = """
        try:
            for name in range(10**6):
                open(f'/tmp/{name}', 'w').close()
        except OSError:
            return 'yes' if len(os.listdir('/tmp')) < 1000 else 'no'
    """
    assert answer_of(sandbox, body).passed


def test_nothing_else_can_be_written(sandbox):
    body = f"""
        tried = ['/x', '/dev/x', '/dev/shm/x', '/usr/x', '/etc/x', '/root/x', '/proc/x', '/lib/x',
                 {str(Path(sys.base_prefix).resolve() / "x")!r}]
        made = []
        for path in tried:
            try:
                open(path, 'w').close()
                made.append(path)
            except OSError:
                pass
        return made
    """
    assert answer_of(sandbox, body, "[]").passed
    assert not Path("/dev/shm/x").exists()


def test_the_network_is_not_there(sandbox):
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        server.listen(1)
        server.settimeout(0.1)
        port = server.getsockname()[1]
        body = f"""
            import socket
            for family in (socket.AF_INET, socket.AF_INET6, socket.AF_NETLINK, socket.AF_PACKET):
                try:
                    s = socket.socket(family, socket.SOCK_RAW if family == socket.AF_PACKET else socket.SOCK_STREAM)
                    s.connect(('127.0.0.1', {port}))
                    return family
                except OSError:
                    pass
            return 'yes'
        """
        assert answer_of(sandbox, body).passed
        with pytest.raises(TimeoutError):
            server.accept()


def test_abstract_unix_sockets_of_the_machine_are_not_there(sandbox):
    name = f"\0hcx-sandbox-{os.getpid()}"
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(name)
        server.listen(1)
        body = f"""
            import socket
            try:
                socket.socket(socket.AF_UNIX).connect({name!r})
            except OSError:
                return 'yes'
        """
        assert answer_of(sandbox, body).passed


def test_kill_all_reaches_only_the_sandbox(sandbox):
    witness = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    try:
        assert not answer_of(sandbox, "import signal\nos.kill(-1, signal.SIGKILL)\nreturn 'yes'", "'no'").passed
        assert witness.poll() is None
    finally:
        witness.kill()
        witness.wait()


def test_processes_of_the_machine_cannot_be_seen_or_signalled(sandbox):
    body = f"""
        found = []
        for pid in ({os.getpid()}, {os.getppid()}):
            try:
                os.kill(pid, 0)
                found.append(pid)
            except ProcessLookupError:
                pass
        return [found, os.path.exists('/proc/self'), os.getpid() < 10]
    """
    if os.getpid() > 100 and os.getppid() > 100:
        assert answer_of(sandbox, body, "[[], False, True]").passed


SYSTEM_CALLS = {
    "ptrace": (101, 117, (16, 1, 0, 0)),
    "process_vm_writev": (311, 271, (1, 0, 0, 0, 0, 0)),
    "mount": (165, 40, (0, 0, 0, 0, 0)),
    "unshare": (272, 97, (0x10000000,)),
    "setns": (308, 268, (0, 0)),
    "keyctl": (250, 219, (0, 0)),
    "bpf": (321, 280, (0, 0, 0)),
    "io_uring_setup": (425, 425, (1, 0)),
    "memfd_create": (319, 279, (0, 0)),
    "userfaultfd": (323, 282, (0,)),
    "perf_event_open": (298, 241, (0, 0, 0, 0, 0)),
    "pidfd_getfd": (438, 438, (0, 0, 0)),
    "clone with a new user namespace": (56, 220, (0x10000000, 0, 0, 0, 0)),
}


@pytest.mark.parametrize("name", SYSTEM_CALLS)
def test_a_dangerous_system_call_is_refused(sandbox, name):
    import platform

    x86, arm, arguments = SYSTEM_CALLS[name]
    number = x86 if platform.machine() == "x86_64" else arm
    # Without libffi's own libraries in the way: the C library is loaded by the interpreter itself.
    body = f"""
        import ctypes, errno
        libc = ctypes.CDLL(None, use_errno=True)
        result = libc.syscall({number}, *[ctypes.c_long(a) for a in {arguments}])
        return (result, errno.errorcode.get(ctypes.get_errno()))
    """
    assert answer_of(sandbox, body, "(-1, 'EPERM')").passed


def test_the_programs_user_has_no_rights(sandbox):
    body = """
        import ctypes
        libc = ctypes.CDLL(None)
        buffer = ctypes.create_string_buffer(24)
        header = (ctypes.c_uint32 * 2)(0x20080522, 0)
        libc.capget(header, buffer)
        no_new_privs = libc.prctl(39, 0, 0, 0, 0)
        seccomp = libc.prctl(21, 0, 0, 0, 0)
        groups = os.getgroups() in ([], [65534])
        return [os.getuid(), os.geteuid(), groups, buffer.raw == bytes(24), no_new_privs, seccomp]
    """
    assert answer_of(sandbox, body, "[65534, 65534, True, True, 1, 2]").passed


def test_becoming_root_is_refused(sandbox):
    body = """
        for change in (lambda: os.setuid(0), lambda: os.setgid(0), lambda: os.setgroups([0])):
            try:
                change()
                return 'no'
            except OSError:
                pass
        return 'yes'
    """
    assert answer_of(sandbox, body).passed


def test_the_environment_and_the_files_of_the_evaluator_are_not_there(sandbox, tmp_path, monkeypatch):
    monkeypatch.setenv("SECRET_API_KEY", "sk-do-not-leak")
    (tmp_path / "key").write_text("sk-do-not-leak")
    body = f"""
        seen = [str(v) for v in os.environ.values()]
        for path in ({str(tmp_path / "key")!r}, '/proc/1/environ', '/proc/self/environ', '/etc/passwd', '/etc/shadow',
                     {str(Path(__file__).resolve())!r}):
            try:
                seen.append(open(path).read())
            except OSError:
                pass
        return [v for v in seen if v != 'C.UTF-8']
    """
    assert answer_of(sandbox, body, "[]").passed


def test_symlinks_lead_nowhere(sandbox, tmp_path):
    (tmp_path / "key").write_text("secret")
    body = f"""
        os.symlink({str(tmp_path / "key")!r}, '/tmp/link')
        os.symlink('../../../../..' + {str(tmp_path / "key")!r}, '/tmp/up')
        for name in ('/tmp/link', '/tmp/up'):
            try:
                return open(name).read()
            except OSError:
                pass
        return 'yes'
    """
    assert answer_of(sandbox, body).passed


def test_descriptors_of_the_evaluator_are_not_inherited(sandbox, tmp_path):
    (tmp_path / "open").write_text("secret")
    with open(tmp_path / "open") as file:
        os.set_inheritable(file.fileno(), True)
        body = """
            found = []
            for fd in range(5, 64):
                try:
                    os.fstat(fd)
                    found.append(fd)
                except OSError:
                    pass
            return found
        """
        assert answer_of(sandbox, body, "[]").passed


def test_shared_memory_of_the_machine_is_not_there(sandbox):
    path = Path(f"/dev/shm/hcx-sandbox-{os.getpid()}")
    if not path.parent.is_dir():
        pytest.skip("no /dev/shm here")
    path.write_text("secret")
    try:
        assert answer_of(sandbox, f"return os.path.exists({str(path)!r}) or os.path.exists('/dev/shm')", "False").passed
    finally:
        path.unlink()


def test_endless_output_goes_nowhere_and_fills_nothing(sandbox):
    body = "chunk = 'x' * (1 << 20)\nwhile True:\n    print(chunk)\n    print(chunk, file=sys.stderr)"
    verdict = answer_of(sandbox, body)
    assert verdict.status == "time"


def test_a_huge_answer_is_refused(sandbox):
    verdict = answer_of(sandbox, "return 'x' * (40 << 20)")
    assert not verdict.passed


def test_a_loop_is_ended_by_the_clock(sandbox):
    start = time.monotonic()
    assert answer_of(sandbox, "while True:\n    pass").status == "time"
    assert time.monotonic() - start < SECONDS + 10


def test_text_that_is_no_program_fails(sandbox):
    assert not sandbox.check_asserts("def f(:\n", ["assert f() == 1"]).passed
    assert not sandbox.check_asserts("\ud800", ["assert f() == 1"]).passed
    assert not sandbox.check_asserts("x = '\0'", ["assert f() == 1"]).passed


def test_a_problem_without_tests_is_not_passed(sandbox):
    assert not sandbox.check_asserts("def f():\n    return 1", []).passed


def test_without_namespaces_nothing_runs(monkeypatch):
    real = runner.subprocess.Popen
    mark = Path("/tmp") / f"hcx-sandbox-ran-{os.getpid()}"

    def refused(command, **options):
        code = "import json, os; os.write(1, json.dumps({'setup': 'unshare: Operation not permitted'}).encode())"
        return real([*command[:3], "-c", code], **options)

    monkeypatch.setattr(runner.subprocess, "Popen", refused)
    with pytest.raises(EvalError, match=r"no sandbox can be built here \(unshare: Operation not permitted\)"):
        Sandbox()
    assert not mark.exists()


AS_USER = """
import sys, types, os
sys.path.insert(0, {folder!r})
errors = types.ModuleType("hcx.errors")
class EvalError(Exception): pass
errors.EvalError = EvalError
for name in ("hcx", "hcx.evals"):
    sys.modules[name] = types.ModuleType(name)
sys.modules["hcx.errors"] = errors
import runner
sandbox = runner.Sandbox(runner.Limits(seconds=5))
right = sandbox.check_asserts("def f():\\n    return 1", ["assert f() == 1"])
hostile = sandbox.check_asserts({hostile!r}, ["assert f() == [65534, True, False, 2]"])
print(os.getuid(), right.passed, hostile)
"""

HOSTILE = """
import ctypes, os, socket
def f():
    try:
        socket.socket()
        offline = False
    except OSError:
        offline = True
    return [os.getuid(), offline, os.path.exists("/etc/passwd"), ctypes.CDLL(None).prctl(21, 0, 0, 0, 0)]
"""


@pytest.fixture
def as_user():
    """Runs a program with an interpreter that every user can read, as an ordinary user."""
    python = shutil.which("python3", path="/usr/bin:/usr/local/bin:/bin")
    if python is None or os.geteuid() != 0:
        pytest.skip("as another user: needs root, and an interpreter that every user can read")

    def run(*words, **options):
        return subprocess.run(
            [python, *words], user=1234, group=1234, extra_groups=[], capture_output=True, text=True, **options
        )

    return run


def test_the_sandbox_holds_for_an_ordinary_user_too(as_user):
    folder = Path("/var/tmp") / f"hcx-sandbox-{os.getpid()}"
    shutil.copytree(Path(runner.__file__).parent, folder)
    folder.chmod(0o755)
    try:
        code = AS_USER.format(folder=str(folder), hostile=HOSTILE)
        answer = as_user("-c", code, cwd="/")
    finally:
        shutil.rmtree(folder)
    if "no sandbox can be built" in answer.stderr:
        pytest.skip(answer.stderr.splitlines()[-1])
    assert answer.stdout.startswith("1234 True Verdict(passed=True"), answer.stdout + answer.stderr


@pytest.mark.slow  # every test of this file once more
def test_the_whole_hostile_set_fails_for_an_ordinary_user_too(as_user):
    with tempfile.TemporaryDirectory(dir="/var/tmp") as home:
        os.chown(home, 1234, 1234)
        packages = [str(Path(hcx.__file__).parents[1]), str(Path(pytest.__file__).parents[1])]
        environment = {
            "HOME": home,
            "PATH": os.environ["PATH"],
            "PYTHONPATH": os.pathsep.join(packages),
            "PYTHONDONTWRITEBYTECODE": "1",
        }
        seen = as_user("-c", "import numpy, pytest, hcx.evals.sandbox", cwd=home, env=environment)
        if seen.returncode:
            pytest.skip(f"an ordinary user cannot read the packages: {seen.stderr.splitlines()[-1]}")
        words = ["-m", "pytest", "-q", "-m", "not slow", "-p", "no:cacheprovider", f"--basetemp={home}/t", __file__]
        answer = as_user(*words, cwd=home, env=environment)
    assert answer.returncode == 0, answer.stdout + answer.stderr
    assert " failed" not in answer.stdout
