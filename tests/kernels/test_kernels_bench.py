"""`hcx bench kernels`: the rows, that every contender multiplies what it says, and refusals."""

from __future__ import annotations

import csv
import itertools
import json
import shlex
from pathlib import Path

import pytest
import torch

from hcx.cli.main import main
from hcx.errors import KernelError
from hcx.kernels import native, peers
from hcx.kernels.bench import KernelCase, cases, check_peers, measure
from hcx.report.kernel_plot import apart, plot_kernels

pytestmark = pytest.mark.skipif(native.why_absent() is not None, reason=native.why_absent() or "")

COLUMNS = shlex.split("kernel device out in bits group batch threads numerics us_p2 us_p50 floor_us_p2 relative_error")
"""What every kernel row has, for readers of the CSV and JSON."""
ERRORS = {"fast": 2e-2, "exact": 2e-4, "fp32": 1e-5, "bf16": 1e-2, "int8": 3e-2}
"""Of a product of some hundred inputs, by what it is computed in: a contender that multiplies something else fails."""


def test_every_contender_multiplies_the_weights_that_it_states() -> None:
    torch.manual_seed(0)
    found = measure(
        KernelCase(256, 384, 3, 1, (1, 3)),
        seconds=0,
        footprint=1,
        peers=[make for name, make in peers.available().items() if name != "ggml"],
    )
    names = {row.kernel for row in found}
    assert names >= {"cpu-fast", "cpu-exact", "biqgemm", "torch-fp32", "torch-bf16"}
    for row in found:
        assert row.relative_error < ERRORS[row.numerics], row
        assert 0 < row.us_p2 <= row.us_p50 <= row.us_p90
        assert row.samples >= 30
        assert (row.floor_us_p2 is None) == row.kernel.startswith("onnxruntime")


def test_the_command_appends_rows_and_prints_them(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "rows.csv"
    options = shlex.split("--shape 64x128 --bits 2 --peers '' --seconds 0.01 --megabytes 1 --json")
    for _ in range(2):
        with pytest.raises(SystemExit, match=r"^0$"):
            main(["bench", "kernels", *options, "--out", str(out), "--plot", str(tmp_path / "rows.svg")])
    printed = json.loads(capsys.readouterr().out.split("\n]\n")[0] + "\n]")
    assert set(COLUMNS) <= set(printed[0])
    with open(out, newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 2 * len(printed)
    assert {row["kernel"] for row in rows} == {row["kernel"] for row in printed}
    assert {row["in"] for row in rows} == {"128"}
    picture = (tmp_path / "rows.svg").read_text(encoding="utf-8")
    assert all(name in picture for name in ("cpu-fast, 2 bits", "torch-bf16", "memory bound"))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--shape", "64"], "expected OUTxIN"),
        (["--shape", "64x100"], "a multiple of 128"),
        (["--bits", "9"], "1 to 8 planes"),
        (["--batch", "0"], "must be positive"),
        (["--seconds", "0", "--quick"], "--seconds 0"),
        (["--plot", "a.svg", "--quick"], "add --out FILE"),
        (["--peers", "mkl", "--quick"], "peer 'mkl' does not exist; valid"),
    ],
)
def test_options_that_cannot_be_are_refused(
    options: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit, match=r"^2$"):
        main(["bench", "kernels", *options])
    assert message in " ".join(capsys.readouterr().err.split())


def test_the_usual_cases_hold_decoding_batches_prompts_and_resident_weights() -> None:
    usual = cases(quick=False)
    assert {case.batch for case in usual} >= {1, 8, 32, 128}
    assert any(case.resident for case in usual)
    assert len(cases(quick=True)) <= 2


def test_a_ggml_library_that_is_none_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HCX_GGML_LIBRARY", str(tmp_path / "libggml.so"))
    assert "ggml" in peers.available()
    with pytest.raises(KernelError, match=r"HCX_GGML_LIBRARY = .*name ggml's shared library"):
        list(peers.ggml_contenders(KernelCase(64, 128, 1, 1), torch.ones(1, 128), 1))
    with pytest.raises(KernelError, match="peer 'x' does not exist; valid: ggml"):
        check_peers(["x"], ["ggml"])


def test_labels_of_equal_contenders_do_not_lie_on_each_other() -> None:
    places = apart([50.0, 10.0, 50.0, 51.0], factor=1.1)
    assert places[1] == 10.0
    ordered = sorted(places)
    assert all(above >= below * 1.1 * (1 - 1e-12) for below, above in itertools.pairwise(ordered))
    assert places[3] == max(places)


def test_a_gpu_comparison_without_a_gpu_says_what_is_missing(capsys: pytest.CaptureFixture[str]) -> None:
    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    with pytest.raises(SystemExit) as stopped:
        main(["bench", "kernels", "--quick", "--device", "cuda"])
    assert stopped.value.code == 2
    assert "kernels cannot be timed on a GPU" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--device", "tpu"], "--device tpu: valid are cpu and cuda"),
        (["--device", "cuda", "--threads", "2"], "are of --device cpu"),
        (["--shape", "64x100"], "a multiple of 128"),
        (["--shape", "wide"], "expected OUTxIN"),
    ],
)
def test_what_cannot_be_compared_is_refused(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(["bench", "kernels", *arguments])
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err


def test_rows_of_a_gpu_can_be_drawn(tmp_path: Path) -> None:
    common = {"device": "some GPU", "out": 4096, "in": 4096, "threads": 0, "weights": "memory"}
    rows = [
        {**common, "kernel": name, "bits": bits, "batch": batch, "us_p2": us, "size_bytes": size, "floor_us_p2": floor}
        for name, bits, us, size, floor in (
            ("triton", 3, 4.0, 6_500_000, 2.5),
            ("cublas-bf16", 16, 12.0, 33_554_432, 9),
        )
        for batch in (1, 8)
    ]
    older = {**rows[0], "device": "a processor", "threads": 1, "kernel": "cpu-fast"}
    plot_kernels([older, *rows], tmp_path / "plot.svg")
    text = (tmp_path / "plot.svg").read_text()
    assert "triton, 3 bits" in text
    assert "some GPU" in text
    assert "cpu-fast" not in text
