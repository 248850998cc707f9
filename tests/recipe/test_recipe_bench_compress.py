"""`hcx bench compress`: equal bytes, peers as their libraries compute them, and what may not be compared."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from hcx.artifacts import artifact_input, new_artifact
from hcx.cli.main import main
from hcx.compress import InputStatistics
from hcx.errors import ConfigError
from hcx.recipe.bench_compress import budget_of, group_within
from hcx.recipe.compress_peers import PEERS, find_peers
from hcx.testing.shards import tiny_shards
from hcx.testing.tiny import tiny_model_directory


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("bench")
    shards = tiny_shards(root / "text", documents=60)
    with new_artifact(root / "full", "model", None, [artifact_input("shards", shards.directory)]) as artifact:
        # Sizes that groups of 32 divide, as the other libraries require.
        tiny_model_directory(
            artifact.path, with_tokenizer=False, vocab_size=shards.vocab_size, num_layers=1, intermediate_size=128
        )
    return root / "full"


@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("offset", [False, True])
def test_our_groups_are_the_smallest_that_take_no_more_bytes(bits: int, offset: bool) -> None:
    budget = PEERS["gptq"].bits_per_weight(bits, 64)
    size = group_within(bits, budget, offset)
    assert size % 32 == 0
    cost = 16 * bits + (32 if offset else 0)
    assert bits + cost / size <= budget + 1e-9 < bits + cost / (size - 32) + 1e-9
    with pytest.raises(ConfigError, match="no room"):
        group_within(bits, float(bits), offset)


@pytest.mark.slow  # importing the peers takes longer than all else here
def test_peers_give_a_weight_on_as_many_levels_as_they_have_bits() -> None:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(32, 64, generator=generator)
    mixing = torch.diag(torch.exp(torch.randn(64, generator=generator))) + 0.2 * torch.randn(
        64, 64, generator=generator
    )
    inputs = torch.randn(512, 64, generator=generator) @ mixing
    statistics = InputStatistics(inputs.t() @ inputs / 512, 512)
    lost = {}
    for name, peer in find_peers().items():
        found = peer.quantize(weight.clone(), statistics, 3, 32)
        for row, start in ((0, 0), (5, 32)):
            if name != "hqq-axis0":  # its groups run down the columns
                assert len(found[row, start : start + 32].unique()) <= 8
        lost[name] = float(((found - weight) @ inputs.t()).square().sum() / (weight @ inputs.t()).square().sum())
        assert 0 < lost[name] < 0.2
    assert find_peers().keys() >= {"rtn"}
    if "gptq" in lost:
        assert lost["gptq-actorder"] < 0.8 * lost["rtn"]
        assert lost["gptq"] < lost["rtn"]


def test_the_command_compares_at_equal_bytes_and_appends_rows(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["bench", "compress", str(model), "--bits", "3", "--group-size", "32", "--tokens", "1536"]
    arguments += [
        "--max-documents",
        "12",
        "--methods",
        "bcq,bcq-plain",
        "--peers",
        "rtn",
        "--out",
        str(tmp_path / "rows.csv"),
        "--json",
    ]
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    assert ended.value.code == 0
    rows = json.loads(capsys.readouterr().out)
    assert {row["language"] for row in rows} == {"ko", "en", "code"}
    leanest = min(row["bits_per_weight"] for row in rows if not row["contender"].startswith("bcq"))
    for language in ("ko", "en", "code"):
        found = {row["contender"]: row for row in rows if row["language"] == language}
        assert found.keys() >= {"bcq", "bcq-plain", "rtn"}
        assert found["bcq"]["bits_per_weight"] <= leanest + 1e-9
        assert min(row["kl_excess"] for name, row in found.items() if name.startswith("bcq")) == 0
        best = min(
            (row for row in found.values() if row["contender"] in ("bcq", "bcq-plain")), key=lambda row: row["kl"]
        )
        for row in found.values():
            more = row["bits_per_byte"] - best["bits_per_byte"]
            assert row["bits_per_byte_excess"] == pytest.approx(more, abs=1e-9)
            assert row["bits_per_byte_excess_low"] <= more <= row["bits_per_byte_excess_high"]
            assert row["kl_low"] < row["kl"] < row["kl_high"]
            assert row["bits_per_byte_low"] < row["bits_per_byte"] < row["bits_per_byte_high"]
    with open(tmp_path / "rows.csv", newline="", encoding="utf-8") as file:
        assert len(list(csv.DictReader(file))) == len(rows)


SMALL = ["--group-size", "32", "--tokens", "1536", "--max-documents", "6", "--json"]


def rows_of(model: Path, capsys: pytest.CaptureFixture[str], *arguments: str) -> list[dict[str, object]]:
    with pytest.raises(SystemExit) as ended:
        main(["bench", "compress", str(model), *SMALL, *arguments])
    assert ended.value.code == 0
    rows: list[dict[str, object]] = json.loads(capsys.readouterr().out)
    return rows


def test_between_whole_bits_a_plan_by_sensitivity_stands_beside_peers_within_its_bytes(
    model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = rows_of(model, capsys, "--bits", "2.5,3", "--methods", "bcq,bcq-mixed", "--peers", "rtn")
    at = {(row["contender"], row["bits"]): row for row in rows if row["language"] == "en"}
    assert at.keys() == {("bcq-mixed", 2.5), ("rtn", 2.5), ("bcq", 3), ("bcq-mixed", 3), ("rtn", 3)}
    for bits in (2.5, 3):
        budget = budget_of(bits, {"rtn": PEERS["rtn"]}, 32)
        assert all(row["bits_per_weight"] <= budget + 1e-9 for (_, one), row in at.items() if one == bits)  # type: ignore[operator]
    assert at["rtn", 2.5]["bits_per_weight"] == PEERS["rtn"].bits_per_weight(2, at["rtn", 2.5]["group_size"])  # type: ignore[arg-type]


def test_planes_can_go_by_type_after_few_documents(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = (
        "--bits",
        "2.5",
        "--methods",
        "bcq-mixed",
        "--peers",
        "",
        "--by",
        "type",
        "--sensitivity-documents",
        "2",
        "--sensitivities",
        str(tmp_path / "kept.json"),
    )
    rows = rows_of(model, capsys, *arguments)
    written = (tmp_path / "kept.json").read_bytes()
    assert rows_of(model, capsys, *arguments) == rows
    assert (tmp_path / "kept.json").read_bytes() == written
    assert {row["contender"] for row in rows} == {"bcq-mixed"}
    assert all(row["bits_per_weight"] <= budget_of(2.5, {}, 32) + 1e-9 for row in rows)
    for bad, message in (
        (("--by", "head"), "allowed: layer, type, matrix"),
        (("--sensitivity-documents", "0"), "at least 1"),
        (
            ("--sensitivity-documents", "3"),
            "sensitivities read with other settings (reading.max_documents: 2 there, 3 now)",
        ),
        (("--sensitivities", str(tmp_path / "none" / "kept.json")), "there is no directory"),
    ):
        with pytest.raises(SystemExit) as ended:
            main(["bench", "compress", str(model), *SMALL, *arguments, *bad])
        assert ended.value.code == 2
        assert message in capsys.readouterr().err


def test_one_nested_artifact_equals_its_narrowest_width_alone_and_is_behind_at_wider_ones(
    model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = rows_of(model, capsys, "--bits", "2,3", "--methods", "bcq,bcq-nested", "--peers", "")
    at = {(row["contender"], row["bits"]): row for row in rows if row["language"] == "en"}
    assert at["bcq-nested", 2]["kl"] == at["bcq", 2]["kl"]
    assert at["bcq", 3]["kl"] < at["bcq-nested", 3]["kl"] < at["bcq", 2]["kl"]  # type: ignore[operator]
    assert {row["group_size"] for row in rows} == {32}


def test_a_model_on_the_contenders_own_grid_is_refused(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """SmolLM2's file is such a model: 4 bits in groups of 32 would look lossless."""
    tensors = load_file(model / "model.safetensors")
    statistics = InputStatistics(torch.eye(1), 1)
    for name, tensor in tensors.items():
        if name.endswith("_proj.weight"):
            # Twice: the first rounding's own range may be a step narrower.
            once = PEERS["rtn"].quantize(tensor, statistics, 4, 32)
            tensors[name] = PEERS["rtn"].quantize(once, statistics, 4, 32)
    manifest = json.loads((model / "manifest.json").read_text())
    shards = next(item["path"] for item in manifest["inputs"] if item["role"] == "shards")
    (tmp_path / "on-grid").mkdir()
    save_file(tensors, tmp_path / "on-grid" / "model.safetensors", metadata={"format": "pt"})
    (tmp_path / "on-grid" / "config.json").write_text((model / "config.json").read_text())
    arguments = [
        "bench",
        "compress",
        str(tmp_path / "on-grid"),
        "--shards",
        shards,
        "--peers",
        "rtn",
        "--tokens",
        "768",
    ]
    with pytest.raises(SystemExit) as ended:
        main([*arguments, "--bits", "4", "--group-size", "32", "--methods", "bcq-plain"])
    assert ended.value.code == 2
    assert "gives the model's own weights back" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--methods", "bqc"], "valid: bcq"),
        (["--peers", "awq"], "valid: rtn, hqq"),
        (["--bits", "4,x"], "expected 4,3,2.5"),
        (["--bits", "2.5"], "add --methods bcq-mixed"),
        (["--methods", "bcq-mixed"], "say with --max-documents"),
        (["--methods", "bcq-mixed", "--max-documents", "500", "--tokens", "768"], "score fewer"),
        (["--methods", "bcq-nested"], "cannot match the bytes of peers"),
        (["--bits", "9"], "1 to 8 bits"),
        (["--max-documents", "1", "--tokens", "768"], "an interval needs two"),
        (["--shares", "kr=1"], "valid: code, en, ko"),
    ],
)
def test_mistakes_are_answered_with_what_is_valid(
    arguments: list[str], message: str, model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["bench", "compress", str(model), *arguments])
    assert ended.value.code == 2
    assert message in capsys.readouterr().err
