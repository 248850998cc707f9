"""An artifact is complete or absent, and its manifest leads back to its inputs."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from hcx.artifacts import (
    artifact_input,
    digest_file,
    find_file,
    find_resource,
    is_complete,
    new_artifact,
    read_manifest,
    verify,
)
from hcx.artifacts.manifest import scrub_secrets
from hcx.errors import HcxError


def make(out: Path, text: str = "hello", **kwargs: object) -> None:
    with new_artifact(out, "text", {"seed": 1}, **kwargs) as artifact:  # type: ignore[arg-type]
        (artifact.path / "a.txt").write_text(text)
        artifact.counts["documents"] = 1


def test_manifest_states_files_counts_and_config(tmp_path: Path) -> None:
    make(tmp_path / "out")
    manifest = verify(tmp_path / "out")
    assert manifest.files["a.txt"]["digest"] == digest_file(tmp_path / "out" / "a.txt")
    assert manifest.counts == {"documents": 1}
    assert manifest.config == {"seed": 1}


def test_interrupted_writing_leaves_nothing_and_keeps_what_was_there(tmp_path: Path) -> None:
    make(tmp_path / "out", "first")
    with pytest.raises(RuntimeError), new_artifact(tmp_path / "out", "text", overwrite=True) as artifact:
        (artifact.path / "a.txt").write_text("second")
        raise RuntimeError("killed")
    assert (tmp_path / "out" / "a.txt").read_text() == "first"
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_existing_output_is_refused_unless_overwritten(tmp_path: Path) -> None:
    make(tmp_path / "out", "first")
    with pytest.raises(HcxError, match="already exists"):
        make(tmp_path / "out", "second")
    make(tmp_path / "out", "third", overwrite=True)
    assert (tmp_path / "out" / "a.txt").read_text() == "third"


def test_damage_is_found_and_named(tmp_path: Path) -> None:
    make(tmp_path / "out")
    (tmp_path / "out" / "a.txt").write_text("jello")
    with pytest.raises(HcxError, match=r"a\.txt.*damaged"):
        verify(tmp_path / "out")
    (tmp_path / "out" / "a.txt").unlink()
    with pytest.raises(HcxError, match=r"a\.txt.*missing"):
        verify(tmp_path / "out")


def test_directory_without_manifest_is_not_complete(tmp_path: Path) -> None:
    assert not is_complete(tmp_path)
    with pytest.raises(HcxError, match="interrupted"):
        read_manifest(tmp_path)


def test_wrong_kind_is_refused(tmp_path: Path) -> None:
    make(tmp_path / "out")
    with pytest.raises(HcxError, match="'text' artifact, expected 'model'"):
        read_manifest(tmp_path / "out", "model")


def test_newer_format_is_refused(tmp_path: Path) -> None:
    make(tmp_path / "out")
    path = tmp_path / "out" / "manifest.json"
    values = json.loads(path.read_text())
    path.write_text(json.dumps({**values, "format_version": 99}))
    with pytest.raises(HcxError, match="newer"):
        read_manifest(tmp_path / "out")


def test_inputs_form_a_chain_by_digest(tmp_path: Path) -> None:
    make(tmp_path / "a")
    make(tmp_path / "b", inputs=[artifact_input("text", tmp_path / "a")])
    chained = read_manifest(tmp_path / "b").inputs[0]
    assert chained.digest == digest_file(tmp_path / "a" / "manifest.json")
    assert chained.kind == "text"


def test_foreign_directory_is_identified_by_all_its_files(tmp_path: Path) -> None:
    (tmp_path / "foreign").mkdir()
    (tmp_path / "foreign" / "config.json").write_text("{}")
    before = artifact_input("model", tmp_path / "foreign").digest
    (tmp_path / "foreign" / "config.json").write_text("{ }")
    assert artifact_input("model", tmp_path / "foreign").digest != before


def test_secrets_never_reach_a_manifest() -> None:
    scrubbed = scrub_secrets({"tracking": {"api_key": "abc", "project": "p"}, "hf_token": "t", "eos_token_id": 3})
    assert scrubbed == {
        "tracking": {"api_key": "(removed)", "project": "p"},
        "hf_token": "(removed)",
        "eos_token_id": 3,
    }


def test_unknown_resource_suggests_a_shipped_one() -> None:
    with pytest.raises(HcxError, match="not shipped with hcx"):
        find_resource("launch/absent.yaml")


def test_a_file_of_ones_own_comes_before_a_shipped_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    shipped = find_file("launch/data/demo.yaml")
    assert shipped.is_absolute()
    Path("launch/data").mkdir(parents=True)
    Path("launch/data/demo.yaml").touch()
    assert find_file("launch/data/demo.yaml") == Path("launch/data/demo.yaml")


def test_a_name_that_is_nowhere_is_answered_with_shipped_names_only(tmp_path: Path) -> None:
    with pytest.raises(HcxError, match="valid: evals/") as error:
        find_file("absent.yaml")
    assert "site-packages" not in str(error.value)
    (tmp_path / "other.yaml").touch()
    with pytest.raises(HcxError, match=r"absent\.yaml: no such file"):
        find_file(tmp_path / "absent.yaml")
