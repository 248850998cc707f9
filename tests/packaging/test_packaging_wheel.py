"""The wheel works outside the checkout, without a compiler and without the optional packages."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import sysconfig
import venv
import zipfile
from pathlib import Path

import pytest

import hcx as package
from hcx.kernels import native

ROOT = Path(__file__).resolve().parents[2]
OPTIONAL = ("lm_eval", "transformers", "wandb", "deepspeed", "megatron", "kiwipiepy", "sacrebleu", "datasets")


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel, built without network and with no compiler on the path."""
    out = tmp_path_factory.mktemp("wheel")
    source = tmp_path_factory.mktemp("source") / "hcx"
    made = (".git", ".venv", "demo", "runs", "dist", "build")  # at the top only: hcx/dist is a room of the package
    source.mkdir()
    for path in ROOT.iterdir():
        if path.is_dir() and path.name not in made:
            shutil.copytree(path, source / path.name, ignore=shutil.ignore_patterns("*_cache", "__pycache__"))
        elif path.is_file():
            shutil.copyfile(path, source / path.name)
    environment = {**os.environ, "PATH": str(Path(sys.executable).parent), "CC": "/bin/false", "CXX": "/bin/false"}
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(out), str(source)]
    answer = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300, check=False)
    assert answer.returncode == 0, answer.stdout + answer.stderr
    return next(out.glob("hcx_llm-*.whl"))


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The python of an environment that has the wheel and the packages of this one, but none of the optional ones."""
    environment = tmp_path_factory.mktemp("environment")
    venv.create(environment, with_pip=False, symlinks=True)
    (site,) = environment.glob("lib/python*/site-packages")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(site)
    # Folders that a .pth file names are searched, but their own .pth files are not read: so the checkout that the
    # tests' environment has installed in editable form stays out of sight.
    (site / "packages.pth").write_text(sysconfig.get_path("purelib") + "\n")
    (site / "sitecustomize.py").write_text(
        "import sys\n"
        "class Blocked:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        f"        if name.split('.')[0] in {OPTIONAL!r}:\n"
        "            raise ModuleNotFoundError(f'No module named {name!r}', name=name)\n"
        "sys.meta_path.insert(0, Blocked())\n"
    )
    return environment / "bin" / "python"


def hcx(python: Path, directory: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [str(python), "-m", "hcx.cli.main", *arguments]
    environment = {**os.environ, "PATH": str(python.parent)}
    return subprocess.run(
        command, capture_output=True, text=True, env=environment, cwd=directory, timeout=300, check=False
    )


def test_wheel_is_pure_and_carries_the_data_folders(wheel: Path) -> None:
    assert wheel.name.endswith("py3-none-any.whl")
    names = zipfile.ZipFile(wheel).namelist()
    for wanted in ("hcx/_resources/launch/train/demo.yaml", "hcx/_resources/evals/suites/demo.yaml"):
        assert wanted in names
    assert not [name for name in names if name.startswith(("tests/", "kernels/", "evals/", "launch/"))]


@pytest.mark.skipif(not shutil.which("cmake") or not shutil.which("c++"), reason="no CMake or no C++ compiler")
def test_a_wheel_built_with_a_compiler_carries_the_kernels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HCX_KERNELS_LIBRARY", raising=False)
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(tmp_path), str(ROOT)]
    answer = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert answer.returncode == 0, answer.stdout + answer.stderr
    (built,) = tmp_path.glob("hcx_llm-*-py3-none-*.whl")
    assert not built.name.endswith("-any.whl")
    # Where the loader looks first, which is beside itself.
    beside = Path("hcx/kernels") / native.library_paths()[0].name
    with zipfile.ZipFile(built) as archive:
        archive.extract(str(beside), tmp_path)
    script = "from hcx.kernels import native; print(native.library_path(), native.why_absent())"
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "HCX_KERNELS_LIBRARY": str(tmp_path / beside)}
    command = [sys.executable, "-c", script]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=ROOT, check=True)
    assert done.stdout.split() == [str(tmp_path / beside), "None"]


def test_package_comes_from_the_wheel_and_not_from_the_checkout(installed: Path, tmp_path: Path) -> None:
    command = [str(installed), "-c", "import hcx; print(*hcx.__path__)"]
    answer = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, check=True)
    assert Path(answer.stdout.strip()).is_relative_to(installed.parents[1])


def test_an_editable_install_finds_the_package_in_its_folder_only() -> None:
    # Once the folder above the checkout was on it, and the linter took the checkout for a subpackage.
    assert [Path(found) for found in package.__path__] == [ROOT / "hcx"]


def test_doctor_runs_without_optional_packages(installed: Path, tmp_path: Path) -> None:
    answer = hcx(installed, tmp_path, "doctor", "--json")
    assert answer.returncode == 0, answer.stderr
    assert json.loads(answer.stdout)


def test_tasks_are_listed_without_optional_packages(installed: Path, tmp_path: Path) -> None:
    answer = hcx(installed, tmp_path, "eval", "--list", "--json")
    assert answer.returncode == 0, answer.stderr
    assert {task["name"] for task in json.loads(answer.stdout)} >= {"hcx_bpb_ko", "hcx_kmmlu_dev225"}


def test_model_is_compressed_and_generates_without_optional_packages(
    installed: Path, tmp_path: Path, tiny_model: Path
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
