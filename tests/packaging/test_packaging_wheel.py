"""The wheel works outside the checkout, without a compiler and without the optional packages."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
OPTIONAL = ("lm_eval", "transformers", "wandb", "deepspeed", "megatron", "kiwipiepy", "sacrebleu", "datasets")


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel, built without network and with no compiler on the path."""
    out = tmp_path_factory.mktemp("wheel")
    source = tmp_path_factory.mktemp("source") / "hcx"
    ignored = shutil.ignore_patterns(".git", ".venv", "demo", "runs", "dist", "build", "*_cache", "__pycache__")
    shutil.copytree(ROOT, source, ignore=ignored)
    environment = {**os.environ, "PATH": str(Path(sys.executable).parent), "CC": "/bin/false", "CXX": "/bin/false"}
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(out), str(source)]
    answer = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300, check=False)
    assert answer.returncode == 0, answer.stdout + answer.stderr
    return next(out.glob("hcx_llm-*.whl"))


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The environment of a process that sees the unpacked wheel, and none of the optional packages."""
    site = tmp_path_factory.mktemp("site")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(site)
    blocker = (
        "import sys\n"
        "class Blocked:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        f"        if name.split('.')[0] in {OPTIONAL!r}:\n"
        "            raise ModuleNotFoundError(f'No module named {name!r}', name=name)\n"
        "sys.meta_path.insert(0, Blocked())\n"
    )
    (site / "sitecustomize.py").write_text(blocker)
    return {**os.environ, "PYTHONPATH": str(site), "PATH": str(Path(sys.executable).parent)}


def hcx(environment: dict[str, str], directory: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "hcx.cli.main", *arguments]
    return subprocess.run(
        command, capture_output=True, text=True, env=environment, cwd=directory, timeout=300, check=False
    )


def test_wheel_is_pure_and_carries_the_data_folders(wheel: Path) -> None:
    assert wheel.name.endswith("py3-none-any.whl")
    names = zipfile.ZipFile(wheel).namelist()
    for wanted in ("hcx/_resources/launch/train/demo.yaml", "hcx/_resources/evals/suites/demo.yaml"):
        assert wanted in names
    assert not [name for name in names if name.startswith(("tests/", "kernels/", "evals/", "launch/"))]


def test_package_comes_from_the_wheel_and_not_from_the_checkout(installed: dict[str, str], tmp_path: Path) -> None:
    command = [sys.executable, "-c", "import hcx; print(hcx.__file__)"]
    answer = subprocess.run(command, capture_output=True, text=True, env=installed, cwd=tmp_path, check=True)
    assert str(ROOT) not in answer.stdout


def test_doctor_runs_without_optional_packages(installed: dict[str, str], tmp_path: Path) -> None:
    answer = hcx(installed, tmp_path, "doctor", "--json")
    assert answer.returncode == 0, answer.stderr
    assert json.loads(answer.stdout)


def test_tasks_are_listed_without_optional_packages(installed: dict[str, str], tmp_path: Path) -> None:
    answer = hcx(installed, tmp_path, "eval", "--list", "--json")
    assert answer.returncode == 0, answer.stderr
    assert {task["name"] for task in json.loads(answer.stdout)} >= {"hcx_bpb_ko", "hcx_kmmlu_dev225"}


def test_model_is_compressed_and_generates_without_optional_packages(
    installed: dict[str, str], tmp_path: Path, tiny_model: Path
) -> None:
    answer = hcx(installed, tmp_path, "compress", str(tiny_model), "--bits", "3", "--out", "small")
    assert answer.returncode == 0, answer.stderr
    answer = hcx(installed, tmp_path, "generate", "small", "--prompt", "안녕", "--max-tokens", "4")
    assert answer.returncode == 0, answer.stderr


@pytest.fixture(scope="module")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random model directory with a tokenizer."""
    from hcx.testing.tiny import tiny_model_directory

    return tiny_model_directory(tmp_path_factory.mktemp("tiny") / "model")
