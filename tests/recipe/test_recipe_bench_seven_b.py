"""`hcx bench compress-7b` writes a real layout, keeps to little memory, and cleans up behind itself."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from hcx.cli.main import main
from hcx.kernels import native
from hcx.model.load import load_model
from hcx.recipe.bench_seven_b import SEVEN_B, measure_compress, write_random_model


def test_the_random_model_is_one_that_loads(tmp_path: Path) -> None:
    config = SEVEN_B.model_copy(
        update={"hidden_size": 64, "intermediate_size": 96, "num_layers": 2, "num_heads": 4, "vocab_size": 256}
    )
    write_random_model(tmp_path / "model", config)
    assert load_model(tmp_path / "model").config.num_layers == 2


def test_every_contender_gets_a_row_and_the_model_is_removed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["bench", "compress-7b", "--work", str(tmp_path / "work"), "--quick", "--method", "greedy", "--json"]
    with pytest.raises(SystemExit) as ended:
        main([*arguments, "--threads", "1", "--out", str(tmp_path / "rows.csv")])
    assert ended.value.code == 0
    rows = json.loads(capsys.readouterr().out)
    assert [row["contender"] for row in rows][:3] == ["hcx compress", "hcx in memory", "hcx in memory"]
    # 3 planes and 3 fp16 scales per 128 inputs; rows of 1408 divide evenly.
    assert rows[0]["bits_per_weight"] == pytest.approx(3 + 3 * 16 / 128)
    assert rows[0]["parameters"] == 2 * (4 * 512 * 512 + 3 * 512 * 1408 + 2 * 512) + 2 * 4096 * 512 + 512
    assert 0 < rows[0]["peak_gib"] < 3
    assert 0.1 < rows[2]["relative_error"] < 0.4
    assert len((tmp_path / "rows.csv").read_text().splitlines()) == 1 + len(rows)
    assert not (tmp_path / "work").exists()


@pytest.mark.skipif(native.why_absent() is not None, reason=native.why_absent() or "")
def test_the_native_coder_is_timed_beside_its_reference(tmp_path: Path) -> None:
    small = SEVEN_B.model_copy(
        update={"hidden_size": 64, "intermediate_size": 96, "num_layers": 1, "num_heads": 4, "vocab_size": 256}
    )
    rows = measure_compress(tmp_path / "work", 1, 3, 32, "alternating", 1, small)
    errors = {(row.contender, row.method): row.relative_error for row in rows}
    assert errors["hcx in torch", "alternating"] == pytest.approx(errors["hcx in memory", "alternating"], rel=1e-3)
