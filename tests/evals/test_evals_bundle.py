"""Bundles: what was loaded once is read again without a network, by lm-eval's tasks and ours alike."""

import json

import datasets
import pytest

pytest.importorskip("lm_eval")

from hcx.artifacts import verify
from hcx.errors import DataError, EvalError
from hcx.evals import evaluate
from hcx.evals.bundle import key, read_index, replaying
from hcx.evals.catalog import status_of, task_cards
from hcx.evals.fetch import cards_named, fetch
from hcx.evals.published_sets import published_sets
from hcx.testing.collection import shared_data
from hcx.testing.evaluation import evaluable_directory

HUB = {
    ("baber/piqa", None): {
        "train": [{"goal": f"g{i}", "sol1": "a", "sol2": "b", "label": i % 2} for i in range(3)],
        "validation": [{"goal": f"v{i}", "sol1": "this", "sol2": "that thing", "label": i % 2} for i in range(6)],
    },
    ("AmazonScience/bold", None): {"train": [{"domain": "x", "name": "y", "prompts": ["A baker is "]}]},
}


@pytest.fixture
def hub(monkeypatch):
    """The hub, as `datasets.load_dataset` shows it; the calls that reach it."""
    calls = []

    def load_dataset(path, name=None, **options):
        calls.append((path, name, options))
        if (path, name) not in HUB:
            raise FileNotFoundError(f"{path} is not on the hub")
        splits = {split: datasets.Dataset.from_list(rows) for split, rows in HUB[path, name].items()}
        return datasets.DatasetDict(splits)

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    monkeypatch.setattr("hcx.evals.fetch._revision", lambda path: f"commit-of-{path}")
    for variable in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE"):
        monkeypatch.setenv(variable, "1")
    return calls


@pytest.fixture
def bundle(hub, tmp_path):
    fetch(["hcx_piqa_letters"], tmp_path / "bundle")
    return tmp_path / "bundle"


def test_a_fetched_task_runs_from_the_bundle_with_its_revision_in_the_result(bundle, hub, tmp_path):
    assert hub == [("baber/piqa", None, {"revision": "commit-of-baber/piqa"})]
    card = task_cards()["hcx_piqa_letters"]
    assert status_of(card).status == "needs-data"
    assert status_of(card, bundle).status == "runs"
    model = evaluable_directory(tmp_path / "model", max_seq_len=256)
    task = evaluate(model, tasks=["hcx_piqa_letters"], data=bundle, out=tmp_path / "out")["tasks"]["hcx_piqa_letters"]
    assert task["items"] == 6
    assert task["metrics"]["acc"]["chance"] == 0.5
    assert task["data"] == [{"path": "baber/piqa", "name": None, "revision": "commit-of-baber/piqa", "part": None}]
    samples = [json.loads(line) for line in (tmp_path / "out" / task["samples"]).read_text().splitlines()]
    assert len(samples) == 6
    assert len(samples[0]["logprobs"]) == 2
    assert len(hub) == 1


def test_a_bundle_is_an_artifact_with_a_digest_of_every_file(bundle):
    assert verify(bundle).kind == "eval-data"
    (entry,) = read_index(bundle).datasets
    assert {name: split.rows for name, split in entry.splits.items()} == {"train": 3, "validation": 6}
    assert all(split.digest.startswith("sha256") for split in entry.splits.values())


def test_a_changed_file_is_refused(bundle):
    path = bundle / read_index(bundle).datasets[0].splits["validation"].file
    path.write_text(path.read_text().replace("this", "that"))
    with replaying(bundle), pytest.raises(DataError, match="changed since it was fetched"):
        datasets.load_dataset("baber/piqa")


def test_a_data_set_that_is_not_in_the_bundle_is_an_error_and_not_a_download(bundle, hub):
    with replaying(bundle), pytest.raises(EvalError, match=r"data set AmazonScience/bold: not in the bundle"):
        datasets.load_dataset("AmazonScience/bold")
    with replaying(None), pytest.raises(EvalError, match="no bundle is named"):
        datasets.load_dataset("baber/piqa")
    assert len(hub) == 1


def test_a_task_that_cannot_be_fetched_is_reported_and_the_others_are_kept(hub, tmp_path):
    found = fetch(["hcx_piqa_letters", "hcx_rtp500"], tmp_path / "bundle")
    assert found["tasks"] == ["hcx_piqa_letters"]
    assert "real-toxicity-prompts is not on the hub" in found["failed"]["hcx_rtp500"]
    with pytest.raises(EvalError, match="nothing could be fetched"):
        fetch(["hcx_rtp500"], tmp_path / "other")
    assert not (tmp_path / "other").exists()


def test_names_of_suites_and_tasks_may_be_mixed_and_in_house_sets_are_not_asked_for(hub):
    cards = [card.name for card in cards_named(["korean", "hcx_piqa_letters", "kmmlu"])]
    assert cards.count("kmmlu") == 1
    assert "hcx_piqa_letters" in cards


def test_keys_are_safe_folder_names():
    assert key("a/b", "c/../d") == "a__b--c__..__d"
    assert "/" not in key("../../etc", None)
    assert not key("..", None).startswith(".")


NEEDS_SHARED = pytest.mark.skipif(shared_data() is None, reason="no collection of data sets: set HCX_SHARED_DATA")


@NEEDS_SHARED
def test_published_files_become_the_hubs_schema_and_parts_are_named():
    wanted = {"skt/kobest_v1", "openai/gsm8k", "oskarvanderwal/bbq", "google-research-datasets/mbpp", "e9t/nsmc"}
    wanted |= {"klue/klue", "jungyeul/korean-parallel-corpora", "cynthia/stylekqc"}
    found = {(s.path, s.name): s for s in published_sets(shared_data(), wanted)}
    boolq = found["skt/kobest_v1", "boolq"].splits
    assert {name: len(rows) for name, rows in boolq.items()} == {"train": 3665, "validation": 700, "test": 1404}
    assert set(boolq["test"][0]) == {"paragraph", "question", "label"}
    hellaswag = found["skt/kobest_v1", "hellaswag"].splits["test"]
    assert len(hellaswag) == 500
    assert {row["label"] for row in hellaswag} == {0, 1, 2, 3}
    assert ("skt/kobest_v1", "copa") not in found
    assert found["openai/gsm8k", "main"].part == "GSM8K rows0-659 of test"
    assert found["oskarvanderwal/bbq", "All"].part == "BBQ 6 of 11 categories"
    mbpp = found["google-research-datasets/mbpp", "sanitized"].splits
    assert len(mbpp["test"]) == 257
    assert found["e9t/nsmc", None].part
    assert {row["label"] for row in found["e9t/nsmc", None].splits["test"]} == {0, 1}
    assert len(found["klue/klue", "nli"].splits["validation"]) == 3000
    assert found["jungyeul/korean-parallel-corpora", "jhe"].part == "jhe 648 of 720"
    requests = found["cynthia/stylekqc", None].splits["test"]
    assert len({row["ko"] for row in requests}) == len(requests) < 4290
    assert sorted(row["task_id"] for row in mbpp["prompt"]) == sorted(
        {2, 3, 4, 6, 7, 8, 9} & {r["task_id"] for r in mbpp["prompt"]}
    )


@NEEDS_SHARED
def test_a_folder_gives_a_bundle_of_what_it_holds(tmp_path):
    found = fetch(["hcx_ntrex_en_ko", "hcx_bbq", "kobest"], tmp_path / "bundle", shared_data())
    assert found["tasks"] == ["hcx_bbq", "hcx_ntrex_en_ko"]
    assert "sentineg" in found["failed"]["kobest"]
    assert status_of(task_cards()["hcx_bbq"], tmp_path / "bundle").status == "runs"
