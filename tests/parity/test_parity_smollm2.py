"""SmolLM2-135M from its GGUF file, beside what transformers makes of the same file and a tokenizer written out by hand.

Needs the file: `hcx data fetch smollm2 --out DIR`, then `HCX_SMOLLM2=DIR`.
"""

from __future__ import annotations

import itertools
import json
import re
from pathlib import Path

import pytest
import torch

from hcx.artifacts import find_resource
from hcx.cli.main import main
from hcx.compress import CompressPlan, ModulePlan, compress_model
from hcx.model.load import ModelFiles, load_model
from hcx.model.meta import ForwardMeta
from hcx.testing.gguf import smollm2_file

FILE = smollm2_file()
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(FILE is None, reason="HCX_SMOLLM2 names no SmolLM2 GGUF file (hcx data fetch smollm2)"),
]

# fp32 products in another order, through 30 blocks; the largest logit is 36 and the measured difference 6e-5.
LOGIT_TOLERANCE = 2e-4


def _texts() -> list[str]:
    readme = find_resource("launch").parent
    pages = [readme / "README.md", readme / "README.ko.md", Path(__file__)]
    found = [page.read_text(encoding="utf-8")[:3000] for page in pages if page.is_file()]
    return [*found, "x = 12345 + 67\n\tif  a:\n    <|im_end|> I'll we've  \n\n 3.14"]


@pytest.fixture(scope="module")
def file() -> Path:
    assert FILE is not None
    return FILE


def test_weights_logits_and_ids_are_those_of_transformers(file: Path) -> None:
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("gguf")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.float32)
    tokenizer = transformers.AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
    ours = load_model(file)
    stated = theirs.state_dict()
    with ModelFiles(file) as files:
        for name in files.names():
            assert torch.equal(files.weight(name), stated[name]), name
    assert ours.tokenizer is not None
    for text in _texts():
        # transformers' reader of GGUF does not know that `smollm` cuts every digit off first, which shows where blanks
        # stand before a digit. The next test has digits.
        text = re.sub(r"\d", "", text)
        expected = tokenizer(text, add_special_tokens=False).input_ids
        assert ours.tokenizer.encode(text, allow_special=True) == expected
    tokens = torch.tensor([ours.tokenizer.encode(_texts()[0])[:192]])
    with torch.no_grad():
        expected = theirs(tokens).logits
        found = ours.decoder.output(ours.decoder(tokens, ForwardMeta())).logits()
    assert float(expected.abs().max()) > 10
    torch.testing.assert_close(found, expected, rtol=0, atol=LOGIT_TOLERANCE)


def _pieces(word: str, ranks: dict[tuple[str, str], int]) -> list[str]:
    """Byte-pair encoding as published: the pair with the lowest rank is joined, everywhere, until none is left."""
    pieces = list(word)
    while len(pieces) > 1:
        best = min(itertools.pairwise(pieces), key=lambda pair: ranks.get(pair, 1 << 60))
        if best not in ranks:
            break
        joined, place = [], 0
        while place < len(pieces):
            if tuple(pieces[place : place + 2]) == best:
                joined.append(pieces[place] + pieces[place + 1])
                place += 2
            else:
                joined.append(pieces[place])
                place += 1
        pieces = joined
    return pieces


def test_ids_are_those_of_a_slow_loop_over_the_published_pattern(file: Path) -> None:
    regex = pytest.importorskip("regex")
    from hcx.tokenizer.alphabet import BYTE_OF

    with ModelFiles(file) as files:
        tokenizer = files.tokenizer()
    assert tokenizer is not None
    model = json.loads(tokenizer.tokenizer_json)["model"]
    ranks = {tuple(pair): rank for rank, pair in enumerate(model["merges"])}
    character = {byte: letter for letter, byte in BYTE_OF.items()}
    cut = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
    for text in _texts():
        words = [
            word for part in regex.findall(r"\p{N}|[^\p{N}]+", text) for word in regex.findall(cut, part)
        ]  # each digit alone first, then GPT-2's own pattern
        assert "".join(words) == text
        mapped = ("".join(character[byte] for byte in word.encode()) for word in words)
        assert tokenizer.encode(text) == [model["vocab"][piece] for word in mapped for piece in _pieces(word, ranks)]


# Bar of the equality at `reference`: dequantized weights are equal, products are summed in another order.
CODED_TOLERANCE = 1e-4


def test_compressed_from_the_file_it_computes_alike_here_and_in_transformers(file: Path, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    from hcx.model.convert.registration import register

    register()
    plan = CompressPlan(default=ModulePlan(bits=4, group_size=96, method="uniform"))
    compress_model(file, tmp_path / "bcq", plan)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "bcq", dtype=torch.float32)
    ours = load_model(tmp_path / "bcq")
    assert ours.tokenizer is not None
    tokens = torch.tensor([ours.tokenizer.encode(_texts()[0])[:96]])
    with torch.no_grad():
        expected = theirs(tokens).logits
        found = ours.decoder.output(ours.decoder(tokens, ForwardMeta())).logits()
    torch.testing.assert_close(found, expected, rtol=0, atol=CODED_TOLERANCE)


def test_it_knows_the_capital_of_france(file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["generate", str(file), "--prompt", "The capital of France is", "--max-tokens", "1"])
    assert ended.value.code == 0
    assert capsys.readouterr().out.split() == ["Paris"]
