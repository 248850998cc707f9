"""Model directories from strangers: damaged or hostile files end in a message, not in a crash or a huge allocation."""

from __future__ import annotations

import contextlib
import json
import struct
import tracemalloc
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from hcx.cli.main import main
from hcx.compress import CompressPlan, ModulePlan, compress_model
from hcx.errors import CheckpointError, HcxError
from hcx.model.load import load_model
from hcx.testing.tiny import tiny_model_directory

ALLOWED_BYTES = 16 << 20
"""The files have 1 MB. What a header claims must not be allocated before the file has been asked for it."""


@pytest.fixture(scope="module")
def full(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model_directory(tmp_path_factory.mktemp("models") / "full", with_tokenizer=False, num_layers=1)


@pytest.fixture(scope="module")
def coded(full: Path) -> Path:
    plan = CompressPlan(default=ModulePlan(bits=2, group_size=32, method="greedy"))
    compress_model(full, full.parent / "coded", plan)
    return full.parent / "coded"


def _copy(source: Path, target: Path, weights: bytes | None = None, config: dict[str, Any] | None = None) -> Path:
    target.mkdir(exist_ok=True)
    name = next(source.glob("*.safetensors")).name
    (target / name).write_bytes((source / name).read_bytes() if weights is None else weights)
    stated = json.loads((source / "config.json").read_text()) if config is None else config
    (target / "config.json").write_text(json.dumps(stated))
    return target


def _refused_or_loaded(directory: Path) -> None:
    tracemalloc.start()
    try:
        with contextlib.suppress(HcxError):
            load_model(directory)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < ALLOWED_BYTES


@pytest.mark.parametrize("kind", ["full", "coded"])
@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_no_damaged_header_of_safetensors_crashes(
    kind: str, full: Path, coded: Path, tmp_path: Path, data: Any
) -> None:
    source = full if kind == "full" else coded
    damaged = bytearray(next(source.glob("*.safetensors")).read_bytes())
    header = 8 + int.from_bytes(damaged[:8], "little")
    for _ in range(data.draw(st.integers(1, 3))):
        if data.draw(st.integers(0, 4)) == 0:
            damaged[:8] = struct.pack("<Q", data.draw(st.sampled_from([0, 1, 2**20, 2**32, 2**62, 2**64 - 1])))
        else:
            # Digits change sizes and offsets, quotes and braces the structure.
            damaged[data.draw(st.integers(0, header))] = data.draw(st.sampled_from(b'0123456789"{}[],:-eF'))
    if data.draw(st.integers(0, 3)) == 0:
        del damaged[data.draw(st.integers(0, len(damaged))) :]
    _refused_or_loaded(_copy(source, tmp_path / "damaged", bytes(damaged)))


SIZES = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "head_dim")


@pytest.mark.parametrize("kind", ["full", "coded"])
@pytest.mark.parametrize("key", SIZES)
def test_a_configuration_of_absurd_sizes_is_refused_before_anything_is_built(
    kind: str, key: str, full: Path, coded: Path, tmp_path: Path
) -> None:
    source = full if kind == "full" else coded
    stated = json.loads((source / "config.json").read_text())
    for value in (1 << 24, 1 << 62):
        directory = _copy(source, tmp_path / f"{value}", config={**stated, key: value})
        with pytest.raises(CheckpointError, match=r"shape|stored|configuration says"):
            load_model(directory)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "gemma3"}, "model_type = 'gemma3' is not supported; supported: llama, hyperclovax"),
        ({"model_type": None}, "model_type = None"),
        ({"quantization_config": [1]}, "must be an object"),
        ({"quantization_config": {"quant_method": "gptq"}}, "quant_method = 'gptq' is not supported"),
        ({"quantization_config": {"quant_method": "bcq", "version": 1, "modules": {"a": 1}}}, "names to settings"),
    ],
)
def test_a_model_that_is_not_supported_is_named_and_leaves_no_directory(
    change: dict[str, Any], message: str, full: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    stated = json.loads((full / "config.json").read_text())
    source = _copy(full, tmp_path / "other", config={**stated, **change})
    with pytest.raises(SystemExit) as ended:
        main(["compress", str(source), "--bits", "2", "--out", str(tmp_path / "out")])
    assert ended.value.code == 2
    assert message in " ".join(capsys.readouterr().err.split())
    assert sorted(path.name for path in tmp_path.iterdir()) == ["other"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"weight_map": {"a": "../../elsewhere.safetensors"}}', "listed in model.safetensors.index.json but missing"),
        ('{"weight_map": [1, 2]}', "no weight_map"),
        ("[]", "must hold a JSON object"),
        ("[" * 100_000, "not JSON"),
    ],
)
def test_a_hostile_index_is_refused(text: str, message: str, full: Path, tmp_path: Path) -> None:
    directory = _copy(full, tmp_path / "indexed")
    (directory / "model.safetensors.index.json").write_text(text)
    with pytest.raises(CheckpointError, match=message):
        load_model(directory)


def test_reading_a_tensor_leaves_no_file_mapped(full: Path) -> None:
    from hcx.model.load import ModelFiles

    def mapped() -> bool:
        return str(full / "model.safetensors") in Path("/proc/self/maps").read_text()

    if not Path("/proc/self/maps").is_file():
        pytest.skip("no /proc/self/maps here")
    with ModelFiles(full) as files:
        assert not mapped()
        weight = files.read("model.embed_tokens.weight")
        assert float(weight.abs().sum()) > 0
        assert mapped()  # while it is alive, and no longer
        del weight
        assert not mapped()
