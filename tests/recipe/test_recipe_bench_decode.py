"""`hcx bench decode`: every contender makes tokens, and what cannot be measured is refused."""

from __future__ import annotations

from pathlib import Path

import pytest

from hcx.compress.plan import CompressPlan, ModulePlan
from hcx.compress.run import compress_model
from hcx.errors import ConfigError
from hcx.kernels import native
from hcx.recipe.bench_decode import measure_decode
from hcx.testing.tiny import tiny_model_directory


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model_directory(tmp_path_factory.mktemp("decode") / "model")


def _coded(name: str) -> list[str]:
    """In one native call per token where there is a library, and in torch."""
    return [name] if native.why_absent() else [name, f"{name}-eager"]


def test_full_precision_binary_coded_and_transformers_take_turns(model: Path) -> None:
    pytest.importorskip("transformers")
    rows = measure_decode(model, [3, 2], "fast", 32, context=5, tokens=4)
    names = ["hcx-fp32", "hcx-bf16", *_coded("hcx-3bit"), *_coded("hcx-2bit"), "transformers-bf16"]
    assert [row.contender for row in rows] == names
    coded = measure_decode(model, [2], "fast", 32, context=5, tokens=4, output_bits=4)
    assert [row.contender for row in coded[2:-1]] == [*_coded("hcx-2bit"), *_coded("hcx-2bit-output4")]
    for row in (*rows, *coded):
        assert 0 < row.ms_p2 <= row.ms_p50
        assert row.products is None or 0 < row.products < 1
        assert row.parameters == rows[0].parameters > 0


def test_what_cannot_be_measured_is_refused(model: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="exceed the model's 256"):
        measure_decode(model, [3], "fast", 32, context=250, tokens=10)
    compress_model(model, tmp_path / "small", CompressPlan(default=ModulePlan(bits=2, group_size=32)))
    with pytest.raises(ConfigError, match="binary-coded already"):
        measure_decode(tmp_path / "small", [3], "fast", 32, context=5, tokens=4)
