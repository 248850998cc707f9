"""Writes tiny GGUF files with the package of their makers, and finds the real one where somebody fetched it."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import torch

from hcx.model.config import ModelConfig
from hcx.testing.tiny import decoder_tensors, tiny_config, tiny_decoder

_NAMES = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


def smollm2_file() -> Path | None:
    """The GGUF file of SmolLM2-135M: `HCX_SMOLLM2` names it or a directory above it (`hcx data fetch smollm2`)."""
    named = os.environ.get("HCX_SMOLLM2")
    if not named:
        return None
    path = Path(named)
    return path if path.is_file() else next(iter(sorted(path.glob("**/SmolLM2-135M-*.gguf"))), None)


def permuted(weight: np.ndarray, heads: int) -> np.ndarray:
    """Rows as llama.cpp's converter orders them: from a head's halves to neighbouring pairs."""
    rows = weight.shape[0]
    return weight.reshape(heads, 2, rows // heads // 2, -1).swapaxes(1, 2).reshape(weight.shape)


def gguf_tensors(config: ModelConfig, seed: int = 0) -> dict[str, np.ndarray]:
    """A tiny random model under GGUF's names and in its order of rows."""
    found = {}
    for name, tensor in decoder_tensors(tiny_decoder(config, seed)).items():
        value, parts = tensor.numpy(), name.split(".")
        if name == "model.embed_tokens.weight":
            found["token_embd.weight"] = value
        elif name == "model.norm.weight":
            found["output_norm.weight"] = value
        elif name == "lm_head.weight":
            found["output.weight"] = value
        else:
            kind = _NAMES[".".join(parts[3:-1])]
            heads = {"attn_q": config.num_heads, "attn_k": config.kv_heads}.get(kind)
            found[f"blk.{parts[2]}.{kind}.weight"] = value if heads is None else permuted(value, heads)
    return found


def write_gguf(
    path: Path,
    config: ModelConfig | None = None,
    kind: str = "F32",
    tokenizer: Any = None,
    changes: dict[str, Any] | None = None,
    drop: tuple[str, ...] = (),
    extra: dict[str, np.ndarray] | None = None,
) -> Path:
    """Writes a tiny llama model with `gguf.GGUFWriter`.

    Args:
        path: the file.
        config: of the model; the usual tiny one if not given.
        kind: ggml's type of the matrices; norms stay F32.
        tokenizer: one of ours, whose vocabulary is written too.
        changes: metadata that replace or join the usual ones.
        drop: tensors to leave out.
        extra: further tensors.
    """
    import gguf

    config = tiny_config() if config is None else config
    metadata: dict[str, Any] = {
        "llama.block_count": config.num_layers,
        "llama.context_length": config.max_seq_len,
        "llama.embedding_length": config.hidden_size,
        "llama.feed_forward_length": config.intermediate_size,
        "llama.attention.head_count": config.num_heads,
        "llama.attention.head_count_kv": config.kv_heads,
        "llama.rope.freq_base": config.rope_theta,
        "llama.attention.layer_norm_rms_epsilon": config.norm_eps,
    } | (changes or {})
    writer = gguf.GGUFWriter(str(path), str(metadata.pop("general.architecture", "llama")))
    for key, value in metadata.items():
        if isinstance(value, bool):
            writer.add_bool(key, value)
        elif isinstance(value, int):
            writer.add_uint32(key, value)
        elif isinstance(value, float):
            writer.add_float32(key, value)
        elif isinstance(value, str):
            writer.add_string(key, value)
        elif value is not None:
            writer.add_array(key, value)
    if tokenizer is not None:
        _add_tokenizer(writer, tokenizer)
    for name, value in {**gguf_tensors(config), **(extra or {})}.items():
        if name in drop:
            continue
        stored = "F32" if value.ndim == 1 else kind
        quantized = gguf.quants.quantize(np.ascontiguousarray(value), gguf.GGMLQuantizationType[stored])
        writer.add_tensor(name, quantized, raw_dtype=gguf.GGMLQuantizationType[stored])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _add_tokenizer(writer: Any, tokenizer: Any) -> None:
    import json

    from hcx.tokenizer.gguf_vocab import llama_cpp_name

    parsed = json.loads(tokenizer.tokenizer_json)
    tokens = [""] * tokenizer.vocab_size
    for token, number in (parsed["model"]["vocab"] | tokenizer.special_tokens).items():
        tokens[number] = token
    special = set(tokenizer.special_tokens.values())
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(llama_cpp_name(tokenizer))
    writer.add_token_list(tokens)
    writer.add_token_types([3 if number in special else 1 for number in range(len(tokens))])
    writer.add_token_merges([" ".join(pair) for pair in parsed["model"]["merges"]])
    writer.add_eos_token_id(tokenizer.eos_id)
    writer.add_add_bos_token(False)
    writer.add_chat_template(tokenizer.chat_template)


def dequantized(weight: torch.Tensor, kind: str) -> torch.Tensor:
    """What is left of a weight after a type of ggml, by its makers' own code on the whole matrix."""
    import gguf

    number = gguf.GGMLQuantizationType[kind]
    return torch.from_numpy(gguf.quants.dequantize(gguf.quants.quantize(weight.numpy(), number), number))
