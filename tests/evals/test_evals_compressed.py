"""Evaluation of a binary-coded model directory."""

import pytest

pytest.importorskip("lm_eval")

from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM

from hcx.compress import CompressPlan, compress_model
from hcx.evals import evaluate
from hcx.evals.lm import HcxLM
from hcx.model.convert.hf import export_hf
from hcx.model.convert.registration import register
from hcx.model.load import ModelFiles, iter_tensors
from hcx.testing.evaluation import PAIRS, evaluable_directory, write_tokenizer

TOLERANCE = 1e-4


@pytest.fixture(scope="module")
def directories(tmp_path_factory):
    """A binary-coded directory, and the same weights dequantized into a full-precision one."""
    root = tmp_path_factory.mktemp("models")
    evaluable_directory(root / "full", max_seq_len=256)
    plan = CompressPlan.model_validate({"default": {"bits": 3, "group_size": 32}})
    compress_model(root / "full", root / "bcq", plan)
    with ModelFiles(root / "bcq") as files:
        config = files.config
    (root / "dense").mkdir()
    export_hf(root / "dense", config, iter_tensors(root / "bcq"))
    write_tokenizer(root / "dense", config.vocab_size, adds_bos=False)
    return root


def test_log_probabilities_of_a_binary_coded_model_are_those_of_its_dequantized_weights(directories):
    requests = [Instance("loglikelihood", {}, pair, i) for i, pair in enumerate(PAIRS)]
    coded, dense, full = (
        [value for value, _ in HcxLM(directories / name, batch_size=4, dtype="float32").loglikelihood(requests)]
        for name in ("bcq", "dense", "full")
    )
    assert coded == pytest.approx(dense, abs=TOLERANCE)
    assert max(abs(a - b) for a, b in zip(coded, full, strict=True)) > 100 * TOLERANCE


def test_the_hf_backend_with_hcx_registered_gives_the_same_log_probabilities(directories):
    register()
    requests = [Instance("loglikelihood", {}, pair, i) for i, pair in enumerate(PAIRS)]
    ours = HcxLM(directories / "bcq", batch_size=4, dtype="float32").loglikelihood(requests)
    hf = HFLM(pretrained=str(directories / "bcq"), dtype="float32", device="cpu", batch_size=4)
    theirs = hf.loglikelihood(requests, disable_tqdm=True)
    assert [value for value, _ in ours] == pytest.approx([value for value, _ in theirs], abs=TOLERANCE)


def test_results_name_the_compressed_model(directories, item_files, tmp_path):
    results = evaluate(directories / "bcq", tasks=["hcx_bpb_en"], data=item_files, out=tmp_path / "out")
    assert results["model"].endswith("bcq")
    assert results["numerics"] == "reference"
    assert results["model_digest"].startswith("sha256:")
