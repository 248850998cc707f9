"""Files are whole or absent, safetensors are those of the library, and a sealed manifest shows damage to itself."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from hcx.artifacts import NewerFormat, digest_file, read_manifest
from hcx.artifacts.durable import write_atomically, write_durably
from hcx.artifacts.manifest import write_manifest
from hcx.artifacts.tensors import write_safetensors
from hcx.errors import HcxError


def test_written_tensors_are_the_bytes_of_the_library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # Pieces smaller than a tensor.
    monkeypatch.setattr("hcx.artifacts.durable.PIECE_BYTES", 13)
    tensors = {
        "b": torch.randn(3, 5),
        "a|한글": torch.randn(7),
        "c": torch.arange(3, dtype=torch.uint8),
        "none": torch.zeros(0, 4),
        "half": torch.randn(4).to(torch.bfloat16),
        "numbers": torch.arange(4),
        "one": torch.tensor(2.0),
        "wide": torch.randn(2, dtype=torch.float64),
    }
    save_file(tensors, tmp_path / "library")
    stated = write_safetensors(tmp_path / "ours", tensors)
    assert (tmp_path / "ours").read_bytes() == (tmp_path / "library").read_bytes()
    assert stated == {
        "size_bytes": (tmp_path / "library").stat().st_size,
        "digest": digest_file(tmp_path / "library"),
    }
    for name, tensor in load_file(tmp_path / "ours").items():
        assert torch.equal(tensor, tensors[name])


def test_metadata_stands_in_the_header_and_the_group_may_read_the_file(tmp_path: Path) -> None:
    tensors = {"w": torch.arange(6.0).view(2, 3), "b": torch.ones(2, dtype=torch.bfloat16)}
    write_safetensors(tmp_path / "ours", tensors, metadata={"format": "pt"})
    save_file(tensors, tmp_path / "library", metadata={"format": "pt"})
    assert (tmp_path / "ours").read_bytes() == (tmp_path / "library").read_bytes()
    (tmp_path / "any new file").touch()
    assert (tmp_path / "ours").stat().st_mode == (tmp_path / "any new file").stat().st_mode


def test_a_partial_write_goes_on_and_an_error_leaves_what_was_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write = os.write
    monkeypatch.setattr(os, "write", lambda descriptor, data: write(descriptor, data[:3]))
    stated = write_durably(tmp_path / "file", [b"0123456789", b"abc"])
    assert (tmp_path / "file").read_bytes() == b"0123456789abc"
    assert stated["size_bytes"] == 13

    def fails(descriptor: int) -> None:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(os, "fsync", fails)
    with pytest.raises(OSError, match="Input/output"):
        write_atomically(tmp_path / "file", b"new")
    assert (tmp_path / "file").read_bytes() == b"0123456789abc"
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_a_sealed_manifest_shows_a_changed_number_and_others_have_no_seal(tmp_path: Path) -> None:
    write_manifest(tmp_path, "text", {"ratio": 0.1, "none": None}, (), {"documents": 7}, sealed=True)
    assert read_manifest(tmp_path).counts == {"documents": 7}
    path = tmp_path / "manifest.json"
    path.write_text(path.read_text().replace('"documents": 7', '"documents": 8'))
    with pytest.raises(HcxError, match="does not match its own digest"):
        read_manifest(tmp_path)
    write_manifest(tmp_path, "text", {}, (), {})
    assert "seal" not in json.loads(path.read_text())


def test_a_newer_format_is_named_although_its_fields_are_unknown(tmp_path: Path) -> None:
    write_manifest(tmp_path, "text", {}, (), {})
    path = tmp_path / "manifest.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "format_version": 2, "later": 1}))
    with pytest.raises(NewerFormat, match="format version 2 is newer"):
        read_manifest(tmp_path)
