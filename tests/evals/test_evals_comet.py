"""COMET in an interpreter of its own: a stand-in of its package is called as it is; what is missing is said."""

import sys

import pytest

from hcx.errors import EvalError
from hcx.evals.catalog import task_cards
from hcx.evals.comet import PYTHON, WEIGHTS, chosen_scorer
from hcx.evals.measure import translations

STAND_IN = """
from types import SimpleNamespace

class Model:
    def predict(self, rows, batch_size, gpus, progress_bar):
        import os
        assert os.environ["HF_HUB_OFFLINE"] == "1" and not progress_bar
        shares = [len(set(row["mt"]) & set(row["ref"])) / len(set(row["ref"])) for row in rows]
        return SimpleNamespace(scores=shares[:LIMIT])

def load_from_checkpoint(path):
    assert open(path).read() == "weights"
    return Model()
"""

TRIPLES = [("파일을 엽니다.", "abcd", "abcd"), ("닫습니다.", "ab", "abcd")]


def install(folder, monkeypatch, limit=None):
    (folder / "comet.py").write_text(STAND_IN.replace("LIMIT", str(limit)))
    (folder / "model.ckpt").write_text("weights")
    monkeypatch.setenv("PYTHONPATH", str(folder))
    monkeypatch.setenv(WEIGHTS, str(folder / "model.ckpt"))
    monkeypatch.setenv(PYTHON, sys.executable)


def test_translations_are_scored_and_the_weights_go_with_the_score(tmp_path, monkeypatch):
    pytest.importorskip("sacrebleu")
    install(tmp_path, monkeypatch)
    scorer = chosen_scorer()
    assert scorer.score(TRIPLES) == [1.0, 0.5]
    assert scorer.identity.startswith("model.ckpt ")
    rows = [
        {"doc_id": i, "doc": {"source": s, "reference": r}, "chrf++": (r, t), "bleu": (r, t)}
        for i, (s, t, r) in enumerate(TRIPLES)
    ]
    metrics, samples = translations(task_cards()["hcx_translation_ko_en"], rows, scorer)
    assert metrics["comet"]["value"] == pytest.approx(75.0)
    assert metrics["comet"]["signature"] == scorer.identity
    assert [sample["comet"] for sample in samples] == [1.0, 0.5]
    assert "comet" not in translations(task_cards()["hcx_translation_ko_en"], rows)[0]


def test_nothing_named_is_no_scorer(monkeypatch):
    monkeypatch.delenv(WEIGHTS, raising=False)
    assert chosen_scorer() is None


def test_what_is_named_and_missing_ends_the_run_before_it_begins(tmp_path, monkeypatch):
    install(tmp_path, monkeypatch)
    monkeypatch.setenv(WEIGHTS, str(tmp_path / "none.ckpt"))
    with pytest.raises(EvalError, match=r"none.ckpt: no such file"):
        chosen_scorer()
    monkeypatch.setenv(WEIGHTS, str(tmp_path / "model.ckpt"))
    monkeypatch.setenv(PYTHON, str(tmp_path / "no-python"))
    with pytest.raises(EvalError, match=r"no-python.*name an interpreter"):
        chosen_scorer()
    monkeypatch.setenv(PYTHON, sys.executable)
    (tmp_path / "comet.py").unlink()
    with pytest.raises(EvalError, match=r"does not have COMET.*pip install unbabel-comet.*HCX_COMET_PYTHON"):
        chosen_scorer()


def test_a_translation_without_a_score_is_an_error_and_not_a_zero(tmp_path, monkeypatch):
    install(tmp_path, monkeypatch, limit=1)
    with pytest.raises(EvalError, match="1 scores for 2 translations"):
        chosen_scorer().score(TRIPLES)
    (tmp_path / "model.ckpt").write_text("broken")
    with pytest.raises(EvalError, match="did not score the translations"):
        chosen_scorer().score(TRIPLES)
