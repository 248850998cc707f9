"""AlphaTuning from the command line: small task files over one binary-coded model, alone and several in one batch."""

from __future__ import annotations

import json
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from hcx.artifacts import digest_file, verify
from hcx.compress import CompressPlan, compress_model
from hcx.errors import CheckpointError, ConfigError
from hcx.model.config import ModelConfig
from hcx.model.load import ModelFiles, load_model
from hcx.model.meta import ForwardMeta
from hcx.model.tasks import read_task
from hcx.recipe import check_recipe, load_train_recipe
from hcx.serve.config import ServeConfig
from hcx.testing.commands import hcx
from hcx.testing.serving import running_server
from hcx.testing.tiny import TINY_TEXT, tiny_model_directory

TOLERANCE = 1e-5


def write_recipe(directory: Path, base: Path, name: str, texts: int, **changes: Any) -> Path:
    rows = [
        {"prompt": TINY_TEXT[(number + texts) % 5][: 8 + number], "response": TINY_TEXT[texts][: 3 + 2 * number]}
        for number in range(24)
    ]
    chat = directory / f"{name}.jsonl"
    chat.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    values: dict[str, Any] = {
        "name": name,
        "out": str(directory / name),
        "init_from": str(base),
        "data": {"kind": "chat", "sources": [{"path": str(chat)}], "seq_len": 160, "validation_fraction": 0.1},
        "adapter": {"kind": "alphatuning"},
        "train": {"steps": 6, "global_batch": 512, "micro_batch": 256, "checkpoint_every": 3},
        "optim": {"lr": 0.02, "eps": 1e-3, "schedule": {"warmup_steps": 1}},
        **changes,
    }
    path = directory / f"{name}.yaml"
    path.write_text(json.dumps(values, ensure_ascii=False), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("alphatuning")
    tiny_model_directory(path / "full")
    plan = {"default": {"bits": 3, "group_size": 128}}
    compress_model(path / "full", path / "base", CompressPlan.model_validate(plan, strict=False))
    for number, name in enumerate(("korean", "code")):
        assert hcx("train", write_recipe(path, path / "base", name, 4 * number)) == 0
    return path


def logits(model: Path, adapter: Path | None = None) -> Tensor:
    loaded = load_model(model, adapter=adapter)
    with torch.no_grad():
        return loaded.decoder.output(loaded.decoder(torch.arange(80, 120)[None], ForwardMeta())).logits()


def test_a_task_file_holds_its_scales_and_little_else(directory: Path) -> None:
    task = directory / "korean" / "adapter"
    manifest = verify(task)
    with ModelFiles(directory / "base") as files:
        count = sum(int(entry["out_features"]) for entry in files.modules.values())
    assert (
        manifest.counts["trained_numbers"]
        == count
        == sum(t.numel() for t in load_file(task / "task.safetensors").values())
    )
    size = (task / "task.safetensors").stat().st_size
    assert manifest.counts["task_file_bytes"] == size
    assert 0 < size - 4 * count < 120 * 14 + 64  # a header entry per layer
    assert {item.role for item in manifest.inputs} == {"checkpoint", "text", "model"}


def test_the_planes_are_shared_and_the_task_changes_the_model(directory: Path) -> None:
    stored = load_file(directory / "base" / "bcq.safetensors")
    loaded = load_model(directory / "base", adapter=directory / "korean" / "adapter")
    task = read_task(directory / "korean" / "adapter")
    with ModelFiles(directory / "base") as files:
        for stem in files.modules:
            merged = task.merged(stem, files.packed(stem))
            assert torch.equal(merged.planes, stored[f"{stem}.planes"])
            assert torch.equal(merged.scales[1:], stored[f"{stem}.scales"][1:].float())
            assert not torch.equal(merged.scales[0], stored[f"{stem}.scales"][0].float())
    assert loaded.decoder is not None
    assert (
        float((logits(directory / "base", directory / "korean" / "adapter") - logits(directory / "base")).abs().max())
        > 0.1
    )


def test_a_checkpoint_of_the_run_converts_to_the_dense_model_that_the_task_makes(
    directory: Path, tmp_path: Path
) -> None:
    assert hcx("convert", directory / "korean" / "checkpoints" / "step-000006", tmp_path / "hf", "--to", "hf") == 0
    expected = logits(directory / "base", directory / "korean" / "adapter")
    torch.testing.assert_close(logits(tmp_path / "hf"), expected, rtol=0, atol=TOLERANCE * float(expected.abs().max()))


def test_a_learning_rate_of_almost_nothing_leaves_the_model_as_it_was(directory: Path, tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path, directory / "base", "still", 0, optim={"lr": 1e-30})
    assert hcx("train", recipe) == 0
    assert torch.equal(logits(directory / "base", tmp_path / "still" / "adapter"), logits(directory / "base"))


def test_a_run_goes_on_from_a_task_and_refuses_other_scales(
    directory: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    start = {"kind": "alphatuning", "init_from": str(directory / "korean" / "adapter")}
    recipe = write_recipe(tmp_path, directory / "base", "more", 0, adapter=start, optim={"lr": 1e-30})
    assert hcx("train", recipe) == 0
    first = load_file(directory / "korean" / "adapter" / "task.safetensors")
    again = load_file(tmp_path / "more" / "adapter" / "task.safetensors")
    assert all(torch.equal(again[name], tensor) for name, tensor in first.items())
    capsys.readouterr()
    assert hcx("train", write_recipe(tmp_path, directory / "base", "all", 0, adapter={**start, "train": "all"})) == 2
    assert "holds train = first, the recipe says all" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"init_from": "full"}, "has no binary-coded linear layers"),
        ({"adapter": {"kind": "alphatuning", "targets": ["*.qproj"]}}, "did you mean '*.q_proj'?"),
        ({"adapter": {"kind": "alphatuned"}}, "alphatuning"),
        ({"regularise": {}}, "regularise beside adapter"),
    ],
)
def test_what_cannot_run_is_told_before_the_first_step(
    directory: Path, tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    if changes.get("init_from"):
        changes = {"init_from": str(directory / "full")}
    with pytest.raises(ConfigError) as error:
        check_recipe(load_train_recipe(write_recipe(tmp_path, directory / "base", "bad", 0, **changes)))
    assert message in str(error.value)


def test_a_task_of_another_model_is_refused(directory: Path, tmp_path: Path) -> None:
    plan = {"default": {"bits": 3, "group_size": 16}}
    compress_model(directory / "full", tmp_path / "groups", CompressPlan.model_validate(plan, strict=False))
    with pytest.raises(CheckpointError, match="give the model that the task was trained on"):
        load_model(tmp_path / "groups", adapter=directory / "korean" / "adapter")
    with pytest.raises(CheckpointError, match="is not binary-coded"):
        load_model(directory / "full", adapter=directory / "korean" / "adapter")


def test_tasks_in_one_batch_answer_as_each_does_alone(directory: Path) -> None:
    tasks = {name: directory / name / "adapter" for name in ("korean", "code")}
    names = ["base", "korean", "code", "korean", "base", "code"]

    def ask(client: Any, name: str, number: int) -> tuple[str, list[float], str]:
        body = {"model": name, "prompt": TINY_TEXT[number % 5][:12], "max_tokens": 12, "temperature": 0, "logprobs": 1}
        answer = client.post("/v1/completions", json=body).json()
        choice = answer["choices"][0]
        return choice["text"], choice["logprobs"]["token_logprobs"], answer["model"]

    served = load_model(directory / "base", tasks=tasks)
    with (
        running_server(served, ServeConfig(model_name="base", max_batch=8)) as (url, _),
        httpx.Client(base_url=url) as client,
    ):
        listed = client.get("/v1/models").json()["data"]
        assert [entry["id"] for entry in listed] == ["base", "korean", "code"]
        assert [entry.get("parent") for entry in listed] == [None, "base", "base"]
        alone = [ask(client, name, number) for number, name in enumerate(names)]
        gate = threading.Barrier(len(names))

        def together(number: int) -> tuple[str, list[float], str]:
            gate.wait()
            return ask(client, names[number], number)

        with ThreadPoolExecutor(len(names)) as threads:
            found = list(threads.map(together, range(len(names))))
        unknown = client.post("/v1/completions", json={"model": "english", "prompt": "a"})
        assert unknown.status_code == 404
        assert "valid: base, korean, code" in unknown.json()["error"]["message"]
    for number, name in enumerate(names):
        assert found[number][2] == name
        assert found[number][0] == alone[number][0]
        assert found[number][1] == pytest.approx(alone[number][1], abs=1e-4)
        # And as a server of that task only.
        only = load_model(directory / "base", adapter=None if name == "base" else tasks[name])
        with running_server(only, ServeConfig(model_name="only")) as (url, _), httpx.Client(base_url=url) as client:
            text, logprobs, _ = ask(client, "only", number)
        assert logprobs == pytest.approx(alone[number][1], abs=1e-3)
        assert text == alone[number][0]
    assert len({digest_file(path / "task.safetensors") for path in tasks.values()}) == 2


@pytest.mark.parametrize(
    ("layers", "hidden", "count"),
    [(24, 1024, 221_184), (36, 1280, 414_720)],
    ids=["GPT-2 medium", "GPT-2 large"],
)
def test_counts_of_the_published_shapes(layers: int, hidden: int, count: int) -> None:
    # The published models fuse q, k, v and have two feed-forward matrices: 3 h + h + 4 h + h rows per block.
    assert layers * (3 * hidden + hidden + 4 * hidden + hidden) == count
    # Ours has a third one; its count is exact too, from the shapes alone.
    from hcx.compress.regularise import matrix_shapes

    config = ModelConfig(
        vocab_size=384,
        hidden_size=hidden,
        intermediate_size=4 * hidden,
        num_layers=layers,
        num_heads=16,
        num_kv_heads=16,
        max_seq_len=64,
    )
    rows = sum(shape[0] for stem, shape in matrix_shapes(config).items() if stem.startswith("model.layers."))
    assert rows == count + layers * 4 * hidden
