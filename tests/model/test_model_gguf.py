"""GGUF files: the weights and the tokenizer that their makers meant, and nothing that a hostile header asks for."""

from __future__ import annotations

import contextlib
import json
import struct
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

pytest.importorskip("gguf", reason="gguf (extra gguf) is not installed")

import gguf

from hcx.cli.main import main
from hcx.errors import CheckpointError, DataError, HcxError
from hcx.model.convert.gguf import halves_of_pairs
from hcx.model.convert.gguf_file import GGUFFile
from hcx.model.load import ModelFiles, load_model
from hcx.model.meta import ForwardMeta
from hcx.testing.gguf import dequantized, gguf_tensors, permuted, write_gguf
from hcx.testing.tiny import TINY_TEXT, decoder_tensors, tiny_config, tiny_decoder
from hcx.tokenizer import train_tokenizer


def _logits(path: Path, tokens: torch.Tensor) -> torch.Tensor:
    decoder = load_model(path).decoder
    with torch.no_grad():
        return decoder.output(decoder(tokens, ForwardMeta())).logits()


@pytest.mark.parametrize("tied", [True, False])
def test_weights_come_back_in_the_order_of_rows_that_this_decoder_rotates(tied: bool, tmp_path: Path) -> None:
    config = tiny_config(tie_embeddings=tied)
    path = write_gguf(tmp_path / "tiny.gguf", config)
    with ModelFiles(path) as files:
        # Neither is a default there: the width of a head is stated, and what weights began as is not.
        assert files.config == config.model_copy(update={"head_dim": 16, "initializer_range": 0.02})
        for name, weight in decoder_tensors(tiny_decoder(config)).items():
            assert torch.equal(files.weight(name), weight), name
    heads = torch.arange(24.0).view(8, 3)
    assert torch.equal(halves_of_pairs(torch.from_numpy(permuted(heads.numpy(), 2)), 2), heads)


@pytest.mark.parametrize("kind", ["F16", "BF16", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0"])
def test_a_quantized_matrix_is_dequantized_as_by_its_makers(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Several pieces, the last one short.
    monkeypatch.setattr("hcx.model.convert.gguf_file.PIECE_VALUES", 7 * 64)
    path = write_gguf(tmp_path / "tiny.gguf", kind=kind)
    with ModelFiles(path) as files:
        for name, weight in decoder_tensors(tiny_decoder(tiny_config())).items():
            found = files.weight(name)
            expected = weight if weight.dim() == 1 else dequantized(weight, kind)
            assert torch.equal(found.float(), expected), name


@pytest.mark.parametrize("kind", ["Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "IQ4_NL", "IQ4_XS"])
def test_blocks_of_any_content_are_read_as_the_library_reads_them(kind: str, tmp_path: Path) -> None:
    number = gguf.GGMLQuantizationType[kind]
    block, size = gguf.GGML_QUANT_SIZES[number]
    # Bytes below 0x3c00 in both halves of an fp16 scale: no block holds an infinite one.
    packed = np.random.default_rng(0).integers(0, 0x3B, (5, 512 // block * size), dtype=np.uint8)
    writer = gguf.GGUFWriter(str(tmp_path / "one.gguf"), "llama")
    writer.add_tensor("weight", packed, raw_dtype=number)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    file = GGUFFile(tmp_path / "one.gguf")
    found = file.read("weight")
    file.close()
    assert found.shape == (5, 512)
    assert torch.equal(found, torch.from_numpy(gguf.quants.dequantize(packed, number)))


def test_a_model_that_was_split_is_read_from_all_its_parts(tmp_path: Path) -> None:
    names = list(gguf_tensors(tiny_config()))
    for part, held in enumerate((names[:9], names[9:]), 1):
        write_gguf(
            tmp_path / f"m-{part:05d}-of-00002.gguf",
            changes={"split.count": 2},
            drop=tuple(name for name in names if name not in held),
        )
    whole = write_gguf(tmp_path / "whole.gguf")
    tokens = torch.arange(16).view(1, 16)
    assert torch.equal(_logits(tmp_path / "m-00002-of-00002.gguf", tokens), _logits(whole, tokens))
    (tmp_path / "m-00001-of-00002.gguf").unlink()
    with pytest.raises(CheckpointError, match=r"m-00001-of-00002\.gguf: no such file"):
        ModelFiles(tmp_path / "m-00002-of-00002.gguf")


@pytest.mark.parametrize("pattern", ["llama3", "qwen2"])
def test_the_tokenizer_of_the_metadata_gives_the_ids_of_the_one_that_was_written(pattern: str, tmp_path: Path) -> None:
    tokenizer = train_tokenizer(TINY_TEXT, 384, pattern)
    path = write_gguf(tmp_path / "tiny.gguf", tokenizer=tokenizer)
    with ModelFiles(path) as files:
        found = files.tokenizer()
    assert found is not None
    texts = [*TINY_TEXT, "12345 67\n\n\tx  =  'll <|endoftext|> 한국어", ""]
    for text in texts:
        for special in (False, True):
            assert found.encode(text, allow_special=special) == tokenizer.encode(text, allow_special=special)
        assert found.decode(found.encode(text)) == text
    assert (found.eos_id, found.special_tokens) == (tokenizer.eos_id, tokenizer.special_tokens)
    assert found.chat_template == tokenizer.chat_template


def test_every_verb_that_takes_a_model_takes_the_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write_gguf(tmp_path / "tiny.gguf", kind="Q8_0", tokenizer=train_tokenizer(TINY_TEXT, 384))

    def run(*arguments: str) -> str:
        with pytest.raises(SystemExit) as ended:
            main([*arguments])
        assert ended.value.code == 0, capsys.readouterr().err
        return capsys.readouterr().out

    prompt = ("--prompt", "The capital", "--max-tokens", "4", "--ignore-eos", "--json")
    from_file = json.loads(run("generate", str(path), *prompt))
    run("convert", str(path), str(tmp_path / "hf"), "--to", "hf")
    assert json.loads(run("generate", str(tmp_path / "hf"), *prompt)) == from_file
    run("compress", str(path), "--bits", "3", "--group-size", "32", "--out", str(tmp_path / "one"), "--json")
    run("compress", str(tmp_path / "hf"), "--bits", "3", "--group-size", "32", "--out", str(tmp_path / "two"), "--json")
    tokens = torch.arange(20).view(1, 20)
    assert torch.equal(_logits(tmp_path / "one", tokens), _logits(tmp_path / "two", tokens))
    assert (tmp_path / "one" / "tokenizer.json").read_bytes() == (tmp_path / "hf" / "tokenizer.json").read_bytes()


def test_the_evaluation_finds_the_tokenizer_inside_the_file(tmp_path: Path) -> None:
    tokenizer = train_tokenizer(TINY_TEXT, 384)
    loaded = load_model(write_gguf(tmp_path / "tiny.gguf", tokenizer=tokenizer))
    folder = loaded.tokenizer_directory
    assert json.loads((folder / "tokenizer_config.json").read_text())["eos_token"] == "<|endoftext|>"
    transformers = pytest.importorskip("transformers")
    theirs = transformers.AutoTokenizer.from_pretrained(str(folder))
    assert theirs(TINY_TEXT[0], add_special_tokens=False).input_ids == tokenizer.encode(TINY_TEXT[0])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"changes": {"general.architecture": "gemma3"}}, r"general\.architecture = 'gemma3' is not supported.*llama"),
        ({"changes": {"llama.rope.scaling.type": "yarn"}}, r"rope\.scaling\.type = 'yarn'"),
        ({"changes": {"llama.expert_count": 8}}, "mixture of experts"),
        ({"changes": {"llama.embedding_length": None}}, r"llama\.embedding_length is missing"),
        ({"changes": {"llama.block_count": 3}}, "block_count = 3.*incomplete"),
        ({"changes": {"llama.block_count": 1}}, "block beyond"),
        ({"changes": {"llama.block_count": 1 << 31}}, "incomplete"),
        ({"changes": {"llama.feed_forward_length": [96, 64]}}, "the same for all blocks"),
        ({"changes": {"llama.feed_forward_length": 100}}, r"ffn_.*shape.*metadata say"),
        ({"changes": {"llama.rope.dimension_count": 8}}, "the width of a head"),
        ({"changes": {"llama.attention.head_count_kv": 3}}, "make no llama model"),
        ({"changes": {"llama.rope.freq_base": float("nan")}}, "freq_base = nan"),
        ({"drop": ("token_embd.weight",)}, r"no 'token_embd\.weight'"),
        ({"extra": {"rope_freqs.weight": np.ones(8, np.float32)}}, "scaled rotary frequencies"),
        ({"extra": {"blk.0.attn_q.bias": np.ones(64, np.float32)}}, "a bias"),
    ],
)
def test_what_this_decoder_does_not_compute_is_refused_by_name(
    options: dict[str, Any], message: str, tmp_path: Path
) -> None:
    path = write_gguf(tmp_path / "tiny.gguf", **options)
    with pytest.raises(CheckpointError, match=message):
        ModelFiles(path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tokenizer.ggml.model": "llama"}, "of the kind 'llama'"),
        ({"tokenizer.ggml.pre": "smolm"}, "did you mean 'smollm'"),
        ({"tokenizer.ggml.tokens": ["a", "b", "a"]}, "holds 'a' twice"),
        ({"tokenizer.ggml.merges": ["a z"]}, "no pair of its tokens"),
        ({"tokenizer.ggml.eos_token_id": 9}, "eos_token_id = 9"),
        ({"tokenizer.ggml.add_bos_token": True}, "does not say which"),
        ({"tokenizer.ggml.token_type": [1, 1]}, "2 entries"),
    ],
)
def test_a_tokenizer_that_does_not_fit_is_refused(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    usual = {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "gpt-2",
        "tokenizer.ggml.tokens": ["a", "b", "ab"],
        "tokenizer.ggml.merges": ["a b"],
        "tokenizer.ggml.eos_token_id": 2,
    }
    path = write_gguf(tmp_path / "tiny.gguf", changes={**usual, **changes})
    with ModelFiles(path) as files, pytest.raises(DataError, match=message):
        files.tokenizer()


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    path = write_gguf(
        tmp_path_factory.mktemp("gguf") / "tiny.gguf",
        tiny_config(num_layers=1),
        kind="Q8_0",
        tokenizer=train_tokenizer(TINY_TEXT, 384),
    )
    return path.read_bytes()


def _open_all(path: Path) -> None:
    with ModelFiles(path) as files:
        for name in files.names():
            files.read(name)
        files.tokenizer()


ALLOWED_BYTES = 16 << 20
"""The file has 100 kB. What its header claims must not be allocated before the file has been asked for it."""


def _refused_or_read(data: bytes, path: Path) -> None:
    path.write_bytes(data)
    tracemalloc.start()
    try:
        with contextlib.suppress(HcxError):
            _open_all(path)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < ALLOWED_BYTES


NUMBERS = st.sampled_from([0, 1, 2**16, 2**31, 2**32 - 1, 2**40, 2**62, 2**63, 2**64 - 1])


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_no_damaged_header_crashes_or_makes_the_reader_allocate(whole: bytes, tmp_path: Path, data: Any) -> None:
    header = whole.index(b"token_embd.weight") + 4000
    damaged = bytearray(whole)
    for _ in range(data.draw(st.integers(1, 3))):
        place = data.draw(st.one_of(st.integers(0, header), st.integers(0, 400), st.integers(header - 4200, header)))
        if data.draw(st.booleans()):
            damaged[place : place + 8] = struct.pack("<Q", data.draw(NUMBERS))
        else:
            damaged[place] = data.draw(st.integers(0, 255))
    if data.draw(st.integers(0, 3)) == 0:
        del damaged[data.draw(st.integers(0, len(damaged))) :]
    _refused_or_read(bytes(damaged), tmp_path / "damaged.gguf")


def _with_number(data: bytes, before: bytes, number: int, form: str = "<Q", skip: int = 0) -> bytes:
    place = data.index(before) + len(before) + skip
    return data[:place] + struct.pack(form, number) + data[place + struct.calcsize(form) :]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda data: b"GGML" + data[4:], "not a GGUF file"),
        (lambda data: data[:4] + struct.pack(">I", 3) + data[8:], "big-endian"),
        (lambda data: data[:4] + struct.pack("<I", 1) + data[8:], "GGUF version 1"),
        (lambda data: data[:8] + struct.pack("<Q", 2**60) + data[16:], "cannot hold them"),
        (lambda data: data[:16] + struct.pack("<Q", 2**60) + data[24:], "cannot hold them"),
        (lambda data: data[:24] + struct.pack("<Q", 2**60) + data[32:], "at most 65536 are allowed"),
        (lambda data: data[:5000], "are left"),
        (lambda data: data[:-1], "reaches to byte"),
        (lambda data: _with_number(data, b"tokenizer.ggml.tokens", 2**40, skip=8), "elements; all arrays may have"),
        (lambda data: _with_number(data, b"tokenizer.ggml.tokens", 9, "<I", skip=4), "array of the type 9"),
        (lambda data: _with_number(data, b"token_embd.weight", 200, "<I"), "200 dimensions"),
        (lambda data: _with_number(data, b"token_embd.weight", 2**62, skip=12), "reaches to byte"),
        (lambda data: _with_number(data, b"token_embd.weight", 0, skip=12), "which is empty"),
        (lambda data: _with_number(data, b"token_embd.weight", 31, skip=4), "cannot cut into 32"),
        (lambda data: _with_number(data, b"token_embd.weight", 99, "<I", skip=20), "unknown type 99"),
        (lambda data: _with_number(data, b"token_embd.weight", 2**62, skip=24), "reaches to byte"),
        (lambda data: _with_number(data, b"token_embd.weight", 5, skip=24), "no multiple of 32"),
        (lambda data: data.replace(b"llama.context_length", b"llama.context\xff\xfe\xfdgth"), "not UTF-8"),
        (lambda data: data.replace(b"blk.0.attn_v.weight", b"blk.0.attn_k.weight"), "occurs twice"),
        (lambda data: b"", "0 are left"),
    ],
)
def test_each_kind_of_damage_is_told_apart(whole: bytes, change: Any, message: str, tmp_path: Path) -> None:
    (tmp_path / "damaged.gguf").write_bytes(change(whole))
    with pytest.raises(CheckpointError, match=message):
        _open_all(tmp_path / "damaged.gguf")


def test_a_damaged_file_ends_the_command_with_a_message(
    whole: bytes, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "damaged.gguf").write_bytes(whole[:-100])
    damaged, out = str(tmp_path / "damaged.gguf"), str(tmp_path / "out")
    for arguments in (["convert", damaged, out, "--to", "hf"], ["compress", damaged, "--bits", "2", "--out", out]):
        with pytest.raises(SystemExit) as ended:
            main(arguments)
        assert ended.value.code == 2
        assert "cut short" in capsys.readouterr().err
        assert not (tmp_path / "out").exists()
