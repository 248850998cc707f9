"""Batch files: what they ask for, what they do with every exit code, and that no value breaks out of them."""

from __future__ import annotations

import os
import shlex
import shutil
import stat
import subprocess
from pathlib import Path
from typing import Any

import pytest

from hcx.artifacts import find_resource, resource_names
from hcx.cli.main import main
from hcx.config import describe_fields, dump_yaml, resolve_extends
from hcx.errors import ConfigError, EvalError, HcxError, LaunchError
from hcx.launch.slurm import Shell, SlurmLaunch, _render, parse_array, plan_launch
from hcx.launch.slurm_config import SlurmConfig, load_slurm_profile
from hcx.launch.submit import sbatch_command, submit
from hcx.recipe import load_train_recipe

RECIPE = "launch/train/demo.yaml"
RANKS = ["optim.kind=adamw", "engine.data_parallel=16", "train.global_batch=128"]
SMALL: dict[str, Any] = {"partition": "main", "time": "1:00:00"}

HOSTILE = [
    "$(touch CANARY)",
    "`touch CANARY`",
    "x; touch CANARY",
    "x\ntouch CANARY",
    "x\n#SBATCH --uid=0",
    "' ; touch CANARY ; '",
    '" ; touch CANARY ; "',
    "x\\\ntouch CANARY",
    "x & touch CANARY &",
    "x\r\ntouch CANARY",
    "x\u2028touch CANARY",
    "{{ hcx }}",
    "-x --y",
    "한국어 값",
]


def plan(directory: Path, config: SlurmConfig, overrides: list[str] | None = None, **options: Any) -> SlurmLaunch:
    return plan_launch(find(RECIPE), overrides or [], 1, config, directory=directory, **options)


def find(name: str) -> Path:
    from hcx.artifacts import find_file

    return find_file(name, "launch/train")


STUBS = {
    "srun": """\
printf "%s\\0" "$@" >"$STUBS/srun.args"
env -0 >"$STUBS/srun.env"
eval "${SRUN_DOES:-}"
exit ${SRUN_CODE:-0}""",
    "squeue": """\
echo x >>"$STUBS/squeue.calls"
[ "$(wc -l <"$STUBS/squeue.calls")" -le "${AWAY:-0}" ] || echo ${STATE:-RUNNING}""",
    "scontrol": 'printf "%s\\n" "$*" >>"$STUBS/scontrol.args"',
    "module": 'printf "%s\\0" "$@" >>"$STUBS/module.args"',
}


class Bash:
    """Runs a batch file as SLURM would, with its commands replaced by ones that write down what they were asked for."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.stubs = directory / "stubs"
        self.stubs.mkdir()
        for name, body in STUBS.items():
            file = self.stubs / name
            file.write_text(f"#!/bin/bash\n{body}\n", encoding="utf-8")
            file.chmod(file.stat().st_mode | stat.S_IXUSR)

    def run(self, text: str, **variables: str) -> subprocess.CompletedProcess[str]:
        file = self.directory / "job.sbatch"
        file.write_text(text, encoding="utf-8")
        environment = {
            **{name: value for name, value in os.environ.items() if not name.startswith("SLURM_")},
            "PATH": f"{self.stubs}:{os.environ['PATH']}",
            "STUBS": str(self.stubs),
            "SLURM_JOB_ID": "17",
            "SLURM_JOB_NODELIST": "node[1-2]",
            **variables,
        }
        return subprocess.run(
            ["bash", str(file)],
            env=environment,
            cwd=self.directory,
            capture_output=True,
            text=True,
            timeout=30,
            check=False,
        )

    def words(self, name: str) -> list[str]:
        return (self.stubs / f"{name}.args").read_text(encoding="utf-8").split("\0")[:-1]

    def variables(self) -> dict[str, str]:
        pairs = (self.stubs / "srun.env").read_text(encoding="utf-8").split("\0")
        return dict(pair.split("=", 1) for pair in pairs if "=" in pair)

    def asked_to_requeue(self) -> bool:
        file = self.stubs / "scontrol.args"
        return file.exists() and file.read_text(encoding="utf-8") == "requeue 17\n"


@pytest.fixture
def bash(tmp_path: Path) -> Bash:
    return Bash(tmp_path)


def directives(text: str) -> dict[str, str]:
    """What sbatch reads: `#SBATCH` lines before the first line that is neither empty nor a comment."""
    found = {}
    for line in text.splitlines():
        if line.strip() and not line.startswith("#"):
            break
        if line.startswith("#SBATCH"):
            name, _, value = line.removeprefix("#SBATCH ").partition("=")
            found[name] = value
    return found


def test_a_batch_file_asks_for_what_profile_and_command_say(tmp_path: Path) -> None:
    config = load_slurm_profile("example")
    launch = plan_launch(find(RECIPE), RANKS, 2, config, directory=tmp_path)
    assert directives(launch.train.text) == {
        "--job-name": "demo",
        "--nodes": "2",
        "--ntasks-per-node": "8",
        "--partition": "gpu",
        "--account": "my-account",
        "--time": "24:00:00",
        "--mem": "0",
        "--cpus-per-task": "12",
        "--chdir": str(tmp_path),
        "--gpus-per-node": "8",
        "--exclusive": "",
        "--signal": "USR1@600",
        "--output": f"{tmp_path}/runs/demo/slurm-train-%j.out",
        "--requeue": "",
        "--open-mode": "append",
    }
    assert launch.world_size == 16
    old = config.model_copy(update={"gpu_request": "gres", "deadline": "2030-01-01T08:00", "qos": "low"})
    asked = directives(plan_launch(find(RECIPE), RANKS, 2, old, directory=tmp_path).train.text)
    assert asked["--gres"] == "gpu:8"
    assert "--gpus-per-node" not in asked
    assert asked["--deadline"] == "2030-01-01T08:00"
    assert asked["--qos"] == "low"


def test_the_job_reads_the_resolved_recipe_and_not_the_file_it_came_from(tmp_path: Path, bash: Bash) -> None:
    launch = plan(tmp_path, SlurmConfig(**SMALL), ["train.steps=77", "out=runs/한국"])
    ((path, text),) = launch.train.files.items()
    path.parent.mkdir(parents=True)
    path.write_text(text, encoding="utf-8")
    assert load_train_recipe(path) == load_train_recipe(find(RECIPE), ["train.steps=77", "out=runs/한국"])
    assert bash.run(launch.train.text).returncode == 0
    assert bash.words("srun")[-2:] == ["train", str(path)]
    assert bash.variables()["HCX_RENDEZVOUS_S"] == "300"


@pytest.mark.parametrize("kind", ["plain", "apptainer", "pyxis"])
def test_tasks_run_in_the_environment_or_in_a_container(tmp_path: Path, bash: Bash, kind: str) -> None:
    container = {
        "plain": None,
        "apptainer": {"kind": "apptainer", "image": "/i/hcx.sif", "binds": ("/data:/data",)},
        "pyxis": {"kind": "pyxis", "image": "/i/hcx.sqsh", "mounts": ("/data:/data",)},
    }[kind]
    config = SlurmConfig(**SMALL, container=container, gpus_per_node=1, cpus_per_task=3, modules=("cuda/12", "git"))
    launch = plan(tmp_path, config, ["out=/elsewhere/run"])
    assert bash.run(launch.train.text.replace("/elsewhere/run", str(tmp_path / "run"))).returncode == 0
    called = bash.words("srun")
    assert called[0] == "--ntasks-per-node=1"
    assert "--cpus-per-task=3" in called
    assert bash.words("module") == ["load", "cuda/12", "load", "git"]
    assert bash.variables()["OMP_NUM_THREADS"] == "3"
    if kind == "plain":
        assert called[-5:-2] == [os.sys.executable, "-m", "hcx.cli.main"]  # type: ignore[attr-defined]
    elif kind == "pyxis":
        assert "--container-image=/i/hcx.sqsh" in called
        mounts = next(word for word in called if word.startswith("--container-mounts="))
        assert mounts.split("=")[1].split(",")[0] == f"{tmp_path}:{tmp_path}"
        assert mounts.endswith(",/data:/data")
        assert called[-3] == "hcx"
    else:
        start = called.index("apptainer")
        assert called[start : start + 3] == ["apptainer", "exec", "--nv"]
        assert called[-4:-1] == ["/i/hcx.sif", "hcx", "train"]
        assert f"{tmp_path}:{tmp_path}" in called
        assert "/data:/data" in called


@pytest.mark.parametrize("value", HOSTILE)
def test_no_value_breaks_out_of_the_batch_file(tmp_path: Path, bash: Bash, value: str) -> None:
    """Each is refused, or arrives as the one word that it is; `setup` alone is the site's own code."""
    kept = 0
    container = {"kind": "apptainer", "image": "i.sif"}
    fields: dict[str, dict[str, Any]] = {
        "partition": {"partition": value},
        "account": {"account": value},
        "qos": {"qos": value},
        "constraint": {"constraint": value},
        "reservation": {"reservation": value},
        "mem": {"mem": value},
        "time": {"time": value},
        "deadline": {"deadline": value},
        "sbatch_options": {"sbatch_options": (value,)},
        "sbatch_options of a name": {"sbatch_options": (f"--comment={value}",)},
        "environment": {"environment": {"VALUE": value}},
        "a variable's name": {"environment": {value: "1"}},
        "modules": {"modules": (value,)},
        "srun_options": {"srun_options": (value,)},
        "command": {"command": (value,)},
        "image": {"container": {**container, "image": value}},
        "binds": {"container": {**container, "binds": (value,)}},
        "options": {"container": {**container, "options": (value,)}},
        "mounts": {"container": {"kind": "pyxis", "image": "i", "mounts": (value,)}},
    }
    for name, given in fields.items():
        try:
            launch = plan(tmp_path, SlurmConfig(**{**SMALL, **given}))
        except (ValueError, HcxError):
            continue
        expected = plan(tmp_path, SlurmConfig(**SMALL))
        known = set(directives(expected.train.text)) | {"--account", "--qos", "--constraint", "--reservation"}
        assert set(directives(launch.train.text)) <= known | {"--comment"}, name
        bash.run(launch.train.text)
        seen = [*bash.words("srun"), *bash.variables().values()]
        if (bash.stubs / "module.args").exists():
            seen += bash.words("module")
        if name not in ("partition", "account", "qos", "constraint", "reservation", "mem"):
            assert any(value in word for word in seen), name
            kept += 1
    assert not list(tmp_path.rglob("CANARY"))
    # Control characters are refused everywhere; the others are only words.
    assert (kept > 0) == value.isprintable()


@pytest.mark.parametrize("value", HOSTILE)
def test_neither_does_a_recipe_or_an_option(tmp_path: Path, bash: Bash, value: str) -> None:
    file = tmp_path / "recipe.yaml"
    base = load_train_recipe(find(RECIPE))
    expected = set(directives(plan(tmp_path, SlurmConfig(**SMALL)).train.text))
    file.write_text(dump_yaml(base.model_copy(update={"name": value})), encoding="utf-8")
    launch = plan_launch(file, [], 1, SlurmConfig(**SMALL), directory=tmp_path)
    assert bash.run(launch.train.text).returncode == 0
    assert set(directives(launch.train.text)) == expected
    file.write_text(dump_yaml(base.model_copy(update={"out": str(tmp_path / value)})), encoding="utf-8")
    with pytest.raises(HcxError, match="may stand in an #SBATCH line; choose another directory"):
        plan_launch(file, [], 1, SlurmConfig(**SMALL), directory=tmp_path)
    with pytest.raises(EvalError):
        plan(tmp_path, SlurmConfig(**SMALL), suite=value)
    with pytest.raises(ConfigError):
        parse_array(f"seed=1,{value} x")
    with pytest.raises(HcxError):
        load_slurm_profile(value)
    assert not list(tmp_path.rglob("CANARY"))


def test_setup_is_shell_and_is_read_by_bash_before_anything_is_submitted(tmp_path: Path, bash: Bash) -> None:
    launch = plan(tmp_path, SlurmConfig(**SMALL, setup=("export WHERE=$((40 + 2))", "ulimit -c 0")))
    assert bash.run(launch.train.text).returncode == 0
    assert bash.variables()["WHERE"] == "42"
    with pytest.raises(ConfigError, match=r"slurm\.setup of the profile: bash cannot read it: .*matching `''"):
        plan(tmp_path, SlurmConfig(**SMALL, setup=("echo 'open",)))


@pytest.mark.parametrize(
    ("code", "note", "state", "ends", "requeued"),
    [
        (0, None, "RUNNING", 0, False),
        (75, None, "RUNNING", 75, True),
        (137, None, "RUNNING", 75, True),
        (139, None, "RUNNING", 75, True),
        (2, None, "RUNNING", 2, False),
        (1, None, "RUNNING", 1, False),
        (127, None, "RUNNING", 127, False),
        # A mistake on one rank: the others lost it, or were ended for it.
        (75, "exit 2", "RUNNING", 2, False),
        (137, "exit 1", "RUNNING", 1, False),
        # Someone else has decided: scancel, scontrol requeue, preemption.
        (75, None, "COMPLETING", 75, False),
        (143, None, "CANCELLED", 75, False),
    ],
)
def test_the_batch_file_requeues_what_is_resumable_and_nothing_else(
    tmp_path: Path, bash: Bash, code: int, note: str | None, state: str, ends: int, requeued: bool
) -> None:
    launch = plan(tmp_path, SlurmConfig(**SMALL))
    failures = tmp_path / "runs" / "demo" / "failures"
    failures.mkdir(parents=True)
    (failures / "rank-00000.txt").write_text("exit 1\nof an earlier start\n", encoding="utf-8")
    text = f"{note}\nattempt x\nrank 1 on node2\n\nexit 0\n"
    does = "" if note is None else f"printf %s {shlex.quote(text)} >{shlex.quote(str(failures))}/rank-00001.txt"
    done = bash.run(launch.train.text, SRUN_CODE=str(code), SRUN_DOES=does, STATE=state)
    assert (done.returncode, bash.asked_to_requeue()) == (ends, requeued), done.stdout + done.stderr
    assert "start 1 of job 17 (demo) on node[1-2]" in done.stdout


def test_a_controller_that_is_away_for_a_while_does_not_end_the_run(tmp_path: Path, bash: Bash) -> None:
    launch = plan(tmp_path, SlurmConfig(**SMALL))
    assert bash.run(launch.train.text, SRUN_CODE="75", AWAY="3", HCX_RETRY_S="0.01").returncode == 75
    assert bash.asked_to_requeue()
    (bash.stubs / "scontrol.args").unlink()
    done = bash.run(launch.train.text, SRUN_CODE="75", AWAY="1000", HCX_RETRY_S="0.01")
    assert done.returncode == 75
    assert "the job is unknown to squeue" in done.stdout
    assert not bash.asked_to_requeue()


def test_starts_that_get_nowhere_are_not_repeated_for_ever(tmp_path: Path, bash: Bash) -> None:
    launch = plan(tmp_path, SlurmConfig(**SMALL, max_starts_without_progress=2))
    pointer = tmp_path / "runs" / "demo" / "checkpoints" / "last-good.json"
    pointer.parent.mkdir(parents=True)

    def start(does: str = "") -> int:
        (bash.stubs / "scontrol.args").unlink(missing_ok=True)
        done = bash.run(launch.train.text, SRUN_CODE="137", SRUN_DOES=does)
        assert bash.asked_to_requeue() == (done.returncode == 75)
        return done.returncode

    assert [start(), start()] == [75, 75]
    assert start(f"echo step-10 >{pointer}") == 75  # it got somewhere: the count begins anew
    assert [start(), start(), start()] == [75, 75, 137]
    assert start() == 75  # launched again by a person


def test_the_shell_waits_for_the_ranks_to_save_when_slurm_ends_the_job(tmp_path: Path, bash: Bash) -> None:
    launch = plan(tmp_path, SlurmConfig(**SMALL))
    # The parent of srun is the batch shell; SLURM signals both.
    does = 'kill -TERM "$PPID"; sleep 0.3; kill -TERM "$PPID"; sleep 0.3; : >"$STUBS/saved"'
    done = bash.run(launch.train.text, SRUN_CODE="75", SRUN_DOES=does, STATE="COMPLETING")
    assert done.returncode == 75
    assert (bash.stubs / "saved").exists()
    assert done.stdout.count("SIGTERM: waiting for the ranks to save") == 2
    assert not bash.asked_to_requeue()


def test_an_array_trains_once_for_each_value_in_a_directory_of_its_own(tmp_path: Path, bash: Bash) -> None:
    launch = plan(tmp_path, SlurmConfig(**SMALL), array=parse_array("optim.lr=1e-3,3e-3"), suite="smoke")
    assert directives(launch.train.text)["--array"] == "0-1"
    assert directives(launch.train.text)["--output"].endswith("/slurm-train-%A_%a.out")
    runs = [tmp_path / "runs/demo/optim.lr-1e-3", tmp_path / "runs/demo/optim.lr-3e-3"]
    assert list(launch.train.runs) == runs
    for number, rate in enumerate((1e-3, 3e-3)):
        assert bash.run(launch.train.text, SLURM_ARRAY_TASK_ID=str(number)).returncode == 0
        file = Path(bash.words("srun")[-1])
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(launch.train.files[file], encoding="utf-8")
        recipe = load_train_recipe(file)
        assert recipe.optim.lr == rate
        assert tmp_path / recipe.out == runs[number]
        assert launch.evaluation is not None
        assert bash.run(launch.evaluation.text, SLURM_ARRAY_TASK_ID=str(number)).returncode == 0
        assert str(runs[number] / "model") in bash.words("srun")
    assert "--dependency=aftercorr:9" in sbatch_command(launch.evaluation, 9)


def test_evaluation_waits_for_training_and_takes_one_gpu(tmp_path: Path, bash: Bash) -> None:
    launch = plan(tmp_path, SlurmConfig(**SMALL, gpus_per_node=1), suite="smoke")
    assert launch.evaluation is not None
    assert sbatch_command(launch.evaluation, 9)[2:4] == ["--dependency=afterok:9", "--kill-on-invalid-dep=yes"]
    asked = directives(launch.evaluation.text)
    assert (asked["--nodes"], asked["--ntasks"], asked["--gpus-per-node"]) == ("1", "1", "1")
    assert bash.run(launch.evaluation.text, SRUN_CODE="3").returncode == 3
    words = bash.words("srun")
    assert words[words.index("eval") :] == [
        "eval",
        f"{tmp_path}/runs/demo/model",
        "--suite",
        "smoke",
        "--device",
        "cuda",
        "--out",
        f"{tmp_path}/runs/demo/eval-17",
    ]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("slurm: {time: '60'}", "slurm.partition: required, but not given"),
        ("slurm: {partition: gpu}", "slurm.time: required, but not given"),
        ("name: x", "slurm: required, but not given"),
        ("slurm: [1]", "must be a mapping"),
        ("slurm: {partition: gpu, time: '60', gpus: 8}", "slurm.gpus: unknown key; "),
        ("slurm: {partition: gpu, time: soon}", "must be a time limit such as 24:00:00"),
        ("slurm: {partition: 'gpu x', time: '60'}", "slurm.partition = 'gpu x': only letters, digits"),
        ("slurm: {partition: gpu, time: '60', cpus_per_task: 0}", "cpus_per_task = 0: must be at least 1"),
        ("slurm: {partition: gpu, time: '60', container: {kind: docker, image: x}}", "valid: 'apptainer', 'pyxis'"),
        ("slurm: {partition: gpu, time: '60', environment: {A-B: x}}", "'A-B' is no name of a variable"),
    ],
)
def test_a_wrong_profile_is_told_by_its_key(tmp_path: Path, text: str, words: str) -> None:
    file = tmp_path / "profile.yaml"
    file.write_text(text, encoding="utf-8")
    with pytest.raises(ConfigError) as refused:
        load_slurm_profile(str(file))
    assert words in str(refused.value)
    assert "profile.yaml" in str(refused.value)


def test_every_shipped_profile_loads_and_takes_the_gpus_of_its_hardware_part(tmp_path: Path) -> None:
    # A profile that describes hardware alone is for plans.
    shipped = [name for name in resource_names("slurm/profiles") if "slurm" in resolve_extends(find_resource(name))]
    assert len(shipped) >= 3
    for name in shipped:
        config = load_slurm_profile(name)
        assert config == load_slurm_profile(Path(name).stem)
        nodes = 1 if config.tasks == 1 else 2
        plan_launch(find(RECIPE), RANKS if nodes == 2 else [], nodes, config, directory=tmp_path)
    assert load_slurm_profile("example").tasks == 8
    assert load_slurm_profile("local").tasks == 1
    with pytest.raises(HcxError, match=r"nowhere.*slurm/profiles/local\.yaml"):
        load_slurm_profile("nowhere")


def test_a_recipe_that_needs_another_number_of_processes_is_refused_with_the_arithmetic(tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as refused:
        plan_launch(find(RECIPE), ["engine.data_parallel=4"], 2, load_slurm_profile("local"), directory=tmp_path)
    assert "2 nodes x 1 processes = 2" in str(refused.value)


def ended_with(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    told = capsys.readouterr()
    return int(ended.value.code or 0), told.out, told.err


def test_the_command_prints_and_touches_nothing_in_a_dry_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PATH", str(tmp_path))  # no sbatch, no bash
    words = ["launch", "slurm", RECIPE, "--profile", "local", "--dry-run", "--then-eval", "smoke"]
    code, out, _ = ended_with(words, capsys)
    assert code == 0
    assert "#SBATCH --partition=main" in out
    assert "# sbatch --parsable --dependency=afterok:JOB" in out
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--profile", "nowhere"], "nowhere"),
        ([], "--profile: name a cluster profile"),
        (["--profile", "local", "--nodes", "0"], "--nodes 0: must be at least 1"),
        (["--profile", "local", "train.stepz=3"], "train.stepz: unknown key; did you mean 'steps'?"),
        (["--profile", "local", "--array", "seed=1,1"], "a value comes twice"),
        (["--profile", "local", "--array", "seed"], "write key=value,value"),
        (["--profile", "local", "--then-eval", "nothing"], "nothing"),
        (["--profile", "local"], "sbatch: not found"),
    ],
)
def test_mistakes_end_with_2_and_a_message(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    words: list[str],
    told: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PATH", str(tmp_path))
    code, _, err = ended_with(["launch", "slurm", RECIPE, *words], capsys)
    assert code == 2
    assert told in err
    assert "Traceback" not in err


def test_what_sbatch_says_is_passed_on_and_a_run_is_not_launched_twice(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bash = Bash(tmp_path)
    stub(bash, "sbatch", 'echo "invalid partition" >&2; exit 1')
    monkeypatch.setenv("PATH", f"{bash.stubs}:{os.environ['PATH']}")
    monkeypatch.setenv("STUBS", str(bash.stubs))
    launch = plan(tmp_path, SlurmConfig(**SMALL), suite="smoke")
    with pytest.raises(LaunchError, match=r"sbatch refused the job: invalid partition"):
        submit(launch, lambda line: None)
    stub(bash, "sbatch", 'echo "$*" >>"$STUBS/sbatch.args"; echo "4$(wc -l <"$STUBS/sbatch.args");cluster"')
    monkeypatch.setenv("SLURM_NTASKS", "8")  # of a job around it: not for the new one
    said: list[str] = []
    assert vars(submit(launch, said.append)) == {"train": 41, "evaluation": 42}
    asked = (bash.stubs / "sbatch.args").read_text(encoding="utf-8").splitlines()
    assert asked[1].startswith("--parsable --dependency=afterok:41 ")
    assert sum(line.startswith("wrote ") for line in said) == 3
    with pytest.raises(LaunchError, match=r"job 41 of an earlier launch trains this run already \(RUNNING\)"):
        submit(launch, said.append)
    stub(bash, "squeue", 'echo "slurm_load_jobs error: Invalid job id specified" >&2; exit 1')
    submit(launch, said.append)


def stub(bash: Bash, name: str, body: str) -> None:
    file = bash.stubs / name
    file.write_text(f"#!/bin/bash\n{body}\n", encoding="utf-8")
    file.chmod(0o755)


def test_rendered_files_are_clean_to_shellcheck(tmp_path: Path) -> None:
    if shutil.which("shellcheck") is None:
        pytest.skip("shellcheck is not installed")
    config = load_slurm_profile("example-container").model_copy(update={"setup": ("ulimit -c 0",)})
    for array in (None, parse_array("seed=1,2")):
        launch = plan_launch(find(RECIPE), RANKS, 2, config, array=array, suite="smoke", directory=tmp_path)
        assert launch.evaluation is not None
        for job in (launch.train, launch.evaluation):
            file = tmp_path / job.script.name
            file.write_text(job.text, encoding="utf-8")
            checked = subprocess.run(["shellcheck", str(file)], capture_output=True, text=True, check=False)
            assert checked.returncode == 0, checked.stdout


def test_the_page_explains_every_field_of_a_profile() -> None:
    text = (Path(__file__).parents[2] / "docs" / "slurm.md").read_text(encoding="utf-8")
    for path, *_ in describe_fields(SlurmConfig):
        assert f"| `{path}` |" in text, path


def test_templates_print_only_what_was_made_safe() -> None:
    with pytest.raises(TypeError, match="was not made safe"):
        _render("environment.sbatch", modules=["cuda"], setup=[], threads=Shell("1"), environment=[])
