"""The image task learns, counts its bytes, and refuses what it cannot slice."""

from __future__ import annotations

import json

import pytest

from hcx.errors import ConfigError
from hcx.recipe.bench_digits import measure_digits
from hcx.testing.commands import hcx

pytest.importorskip("sklearn", reason="scikit-learn is not installed")


def test_every_rate_learns_and_its_bytes_are_counted() -> None:
    rows = measure_digits((0,), width=40, epochs=6)
    assert [(row.method, row.bits) for row in rows[:2]] == [("dense", 32), ("1-bit codes", 1)]
    assert [row.bits for row in rows[2:]] == pytest.approx([0.4, 0.6, 0.8, 1.0, 1.2])
    assert all(row.accuracies[0] > 0.6 for row in rows)  # chance is 0.1
    # 40 x 40 weights at 0.8 bits, and 40 fp32 scales.
    assert rows[4].matrix_bytes == pytest.approx(0.8 * 1600 / 8 + 160)
    assert rows[1].matrix_bytes == rows[5].matrix_bytes


def test_a_width_that_cuts_slices_is_refused() -> None:
    with pytest.raises(ConfigError, match="multiple of 10"):
        measure_digits((0,), width=64)


def test_the_command_prints_rows(capsys: pytest.CaptureFixture[str]) -> None:
    assert hcx("bench", "digits", "--quick", "--seeds", "2", "--json") == 0
    rows = json.loads(capsys.readouterr().out)
    assert len(rows) == 7
    assert all(row["seeds"] == 2 and 0 <= row["lowest"] <= row["accuracy"] <= row["highest"] <= 1 for row in rows)
