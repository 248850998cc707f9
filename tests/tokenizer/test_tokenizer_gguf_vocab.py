"""The GGUF vocabulary says what the tokenizer says, and refuses tokenizers that llama.cpp would read differently."""

from __future__ import annotations

import json

import pytest

pytest.importorskip("gguf", reason="gguf (extra gguf) is not installed")

import gguf

from hcx.errors import DataError
from hcx.testing.tiny import TINY_TEXT
from hcx.tokenizer import Tokenizer, train_tokenizer
from hcx.tokenizer.gguf_vocab import llama_cpp_name, write_gguf_vocab


@pytest.mark.parametrize(("pattern", "name"), [("llama3", "llama-bpe"), ("qwen2", "qwen2")])
def test_the_file_holds_every_token_merge_and_type(tmp_path, pattern: str, name: str) -> None:
    tokenizer = train_tokenizer(TINY_TEXT, 512, pattern)
    write_gguf_vocab(tokenizer, tmp_path / "vocab.gguf")
    fields = gguf.GGUFReader(str(tmp_path / "vocab.gguf")).fields
    parsed = json.loads(tokenizer.tokenizer_json)
    tokens = fields["tokenizer.ggml.tokens"].contents()
    types = fields["tokenizer.ggml.token_type"].contents()
    assert fields["tokenizer.ggml.pre"].contents() == name
    assert len(tokens) == tokenizer.vocab_size
    assert {token: number for number, token in enumerate(tokens)} == {
        **parsed["model"]["vocab"],
        **tokenizer.special_tokens,
    }
    assert [tuple(merge.split(" ")) for merge in fields["tokenizer.ggml.merges"].contents()] == [
        tuple(pair) for pair in parsed["model"]["merges"]
    ]
    control = {number for number, kind in enumerate(types) if kind == gguf.TokenType.CONTROL}
    assert control == set(tokenizer.special_tokens.values())
    assert fields["tokenizer.ggml.eos_token_id"].contents() == tokenizer.eos_id
    assert fields["tokenizer.ggml.add_bos_token"].contents() is False
    assert fields["tokenizer.chat_template"].contents() == tokenizer.chat_template


def test_a_tokenizer_that_llama_cpp_would_read_differently_is_refused() -> None:
    parsed = json.loads(train_tokenizer(TINY_TEXT, 512).tokenizer_json)
    assert llama_cpp_name(Tokenizer(json.dumps(parsed), {})) == "llama-bpe"
    parsed["model"]["ignore_merges"] = False
    with pytest.raises(DataError, match="convert it with the tools of its makers"):
        llama_cpp_name(Tokenizer(json.dumps(parsed), {}))
    del parsed["pre_tokenizer"]
    with pytest.raises(DataError, match=r"llama\.cpp"):
        llama_cpp_name(Tokenizer(json.dumps(parsed), {}))
