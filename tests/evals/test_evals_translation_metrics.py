"""Corpus scores against sacrebleu's public functions."""

import json
import subprocess
import sys

import pytest

pytest.importorskip("sacrebleu")

import sacrebleu

from hcx.evals.scoring import bleu_english, bleu_korean, chrf
from hcx.evals.translation_metrics import metric

PAIRS = [
    ("파일을 엽니다.", "파일을 여십시오."),
    ("저장하려면 저장을 누르십시오.", "저장하려면 저장 단추를 누르십시오."),
    ("연결할 수 없습니다.", ""),
]
ENGLISH = [("To save it, choose Save.", "To save it, press Save."), ("Cannot connect.", "Cannot connect.")]


def columns(pairs):
    return [hypothesis for _, hypothesis in pairs], [[reference for reference, _ in pairs]]


def test_scores_of_a_whole_set_equal_sacrebleu():
    hypotheses, references = columns(PAIRS)
    assert chrf(PAIRS) == pytest.approx(sacrebleu.corpus_chrf(hypotheses, references, word_order=2).score)
    assert bleu_korean(PAIRS) == pytest.approx(sacrebleu.corpus_bleu(hypotheses, references, tokenize="char").score)
    hypotheses, references = columns(ENGLISH)
    assert bleu_english(ENGLISH) == pytest.approx(sacrebleu.corpus_bleu(hypotheses, references).score)


def test_a_resampled_score_equals_the_score_of_the_resampled_set():
    scorer = metric("chrf++")
    again = [PAIRS[0], PAIRS[0], PAIRS[1]]
    assert scorer.score(scorer.counts(PAIRS)[[0, 0, 1]]) == pytest.approx(scorer.corpus(again))


def test_a_perfect_translation_scores_100_and_the_signature_names_the_metric():
    pairs = [("The same words in the same order.",) * 2, ("One more sentence to be sure.",) * 2]
    assert chrf(pairs) == pytest.approx(100)
    assert bleu_english(pairs) == pytest.approx(100)
    assert "nw:2" in metric("chrf++").signature


@pytest.mark.parametrize(
    ("target", "pairs"),
    [("ko", PAIRS), ("en", ENGLISH), ("zh", [("今天下雨了。", "今天下雨。"), ("他在看书。", "他看书。")])],
)
def test_scores_equal_those_of_sacrebleus_command_line_on_the_same_files(target, pairs, tmp_path):
    from hcx.evals.scoring import bleu_chinese

    hypotheses, (references,) = columns(pairs)
    (tmp_path / "out.txt").write_text("".join(f"{line}\n" for line in hypotheses), encoding="utf-8")
    (tmp_path / "reference.txt").write_text("".join(f"{line}\n" for line in references), encoding="utf-8")
    tokenizer = {"ko": "char", "en": "13a", "zh": "zh"}[target]
    command = f"-i out.txt -m bleu chrf --chrf-word-order 2 --tokenize {tokenizer} --width 8 --force"
    answer = subprocess.run(
        [sys.executable, "-m", "sacrebleu", "reference.txt", *command.split()],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        timeout=120,
    )
    assert answer.returncode == 0, answer.stderr
    bleu, chrf2 = (row["score"] for row in json.loads(answer.stdout))
    ours = {"ko": bleu_korean, "en": bleu_english, "zh": bleu_chinese}[target]
    assert ours(pairs) == pytest.approx(bleu, abs=1e-6)
    assert chrf(pairs) == pytest.approx(chrf2, abs=1e-6)
