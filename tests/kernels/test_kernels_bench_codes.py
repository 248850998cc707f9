"""`hcx bench fixed-to-fixed`: its rows, and refusals."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pytest

from hcx.cli.main import main
from hcx.errors import KernelError
from hcx.kernels import native
from hcx.kernels.bench_codes import CodesCase, cases, measure

pytestmark = pytest.mark.skipif(native.why_absent() is not None, reason=native.why_absent() or "")


def test_a_row_states_the_case_and_numbers_that_belong_together() -> None:
    row = measure(CodesCase(0.7, 1, 100_000))
    assert (row.n_in, row.n_out, row.n_s, row.weights) == (8, 26, 1, 100_000)
    assert row.efficiency == pytest.approx(0.991, abs=0.005)
    # Specification, section 6: n_in / n_out, ten bits per error, one flag in 512 bits.
    assert row.bits_per_bit == pytest.approx(8 / 26 + 0.3 * (1 - row.efficiency) * 10 + 1 / 512, abs=1e-3)
    assert row.encode_core_s_100m_3 == pytest.approx(row.encode_s * 3000)
    assert 0 < row.decode_gb_per_s_worst <= row.decode_gb_per_s


def test_the_usual_cases_are_those_of_the_specification() -> None:
    assert {(case.sparsity, case.n_s) for case in cases(False)} == {(s, n) for s in (0.5, 0.7, 0.9) for n in range(3)}
    with pytest.raises(KernelError, match="at least 1000 and 1"):
        measure(CodesCase(0.9, 1, 10))


def test_the_command_appends_rows_and_prints_them(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    printed = []
    for _ in range(2):
        with pytest.raises(SystemExit) as stopped:
            main(
                ["bench", "fixed-to-fixed", "--quick", "--weights", "50000", "--out", str(tmp_path / "x.csv"), "--json"]
            )
        assert stopped.value.code == 0
        printed += json.loads(capsys.readouterr().out)
    with open(tmp_path / "x.csv", newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert [float(row["efficiency"]) for row in rows] == [row["efficiency"] for row in printed]
    assert all(row["n_out"] == 80 and row["efficiency"] > 0.97 for row in printed)
