"""`hcx doctor`: findings with reasons, and the exit code that scripts rely on."""

import importlib.metadata
import json
import subprocess
import sys

from hcx.launch import doctor


def by_name(findings):
    return {(check.area, check.name): check for check in findings}


def test_doctor_reports_this_machine_and_calls_it_healthy():
    findings = doctor.examine()
    assert doctor.is_healthy(findings)
    found = by_name(findings)
    assert found["core", "torch"].status == "ok"
    assert found["distributed", "gloo"].status == "ok"
    assert found["machine", "memory"].value.endswith("GiB")


def test_everything_absent_or_broken_says_why():
    for check in doctor.examine():
        assert check.status == "ok" or check.reason, check


def test_a_missing_optional_package_names_the_extra_to_install(monkeypatch):
    real = importlib.metadata.version

    def without_wandb(name):
        if name == "wandb":
            raise importlib.metadata.PackageNotFoundError(name)
        return real(name)

    monkeypatch.setattr(importlib.metadata, "version", without_wandb)
    findings = doctor.examine()
    assert doctor.is_healthy(findings)
    assert "pip install 'hcx-llm[tracking]'" in by_name(findings)["extras", "tracking"].reason


def test_a_missing_base_package_is_broken(monkeypatch):
    real = importlib.metadata.version

    def old_pydantic(name):
        return "1.9.0" if name == "pydantic" else real(name)

    monkeypatch.setattr(importlib.metadata, "version", old_pydantic)
    findings = doctor.examine()
    assert not doctor.is_healthy(findings)
    assert "pydantic 1.9.0 is installed" in by_name(findings)["core", "dependencies"].reason


def test_a_check_that_fails_becomes_a_finding(monkeypatch):
    monkeypatch.setattr(doctor, "_gpu", lambda: (_ for _ in ()).throw(OSError("libcuda.so is damaged")))
    found = by_name(doctor.examine())
    assert "libcuda.so is damaged" in found["gpu", "gpu"].reason


def test_the_command_prints_json_and_exits_zero():
    command = [sys.executable, "-m", "hcx.cli.main", "doctor", "--json"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    answer = json.loads(done.stdout)
    assert answer["healthy"] is True
    assert {check["area"] for check in answer["checks"]} >= {"core", "machine", "extras"}
