"""A binary-coded output matrix is multiplied by a kernel, and gives what the dense one gives within its class."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from hcx.compress import CompressPlan, ModulePlan, compress_model
from hcx.generate import Generator, SamplingParams
from hcx.model.load import load_model
from hcx.model.meta import ForwardMeta
from hcx.serve.describe import describe_model
from hcx.testing.tiny import tiny_model_directory


@pytest.fixture(scope="module", params=[True, False], ids=["tied", "untied"])
def coded(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("coded")
    tiny_model_directory(folder / "full", "hyperclovax", tie_embeddings=request.param)
    rows = ModulePlan(bits=5, group_size=32, offset=True)
    plan = CompressPlan(
        default=ModulePlan(bits=4, group_size=32),
        embedding=rows if request.param else None,
        output=None if request.param else rows,
    )
    compress_model(folder / "full", folder / "coded", plan)
    return folder / "coded"


@pytest.mark.parametrize(("numerics", "bound"), [("exact", 2e-3), ("fast", 2e-2)])
def test_logits_and_logprobs_stay_within_the_class(coded: Path, numerics: str, bound: float) -> None:
    reference, kernel = load_model(coded), load_model(coded, numerics=numerics)
    assert reference.decoder.output_source is None
    assert kernel.decoder.output_source is not None
    hidden = reference.decoder(torch.arange(36).view(3, 12), ForwardMeta())
    dense, served = (model.decoder.output(hidden).logits() for model in (reference, kernel))
    assert served.dtype == torch.float32
    assert not torch.equal(dense, served)  # or no kernel ran
    assert float((dense - served).abs().max() / dense.abs().max()) < bound
    labels = torch.arange(36).view(3, 12).flip(1)
    found = kernel.decoder.output(hidden).token_logprobs(labels)
    torch.testing.assert_close(found, served.log_softmax(-1).gather(-1, labels[..., None])[..., 0])


def test_the_servers_description_counts_the_outputs_kernel(coded: Path) -> None:
    model = load_model(coded, numerics="fast")
    source = model.decoder.output_source
    assert source is not None
    assert set(source.kernels) <= set(describe_model(model, 64)["kernels"])


def test_generation_reads_the_kernels_logits(coded: Path) -> None:
    # exact: a token alone has the bits that it has in a row of several, which fast does not promise.
    model = load_model(coded, numerics="exact")
    tokens = [3, 9, 27]
    made = Generator(model).generate([tokens], SamplingParams(max_tokens=4))[0].token_ids
    for token in made:
        hidden = model.decoder(torch.tensor([tokens]), ForwardMeta())[-1:]
        assert int(model.decoder.output(hidden).logits()[0, 0].argmax()) == token
        tokens.append(token)
