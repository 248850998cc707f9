"""A llama GGUF file as a MODEL: its `config.json`, canonical names and weights, and its tokenizer.

llama.cpp rotates neighbouring pairs of a head where this decoder (as transformers) rotates its halves, so the writers
of GGUF permute the rows of `attn_q` and `attn_k`; here they are put back.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from hcx.errors import CheckpointError, DataError
from hcx.model.convert.gguf_file import GGUFFile, close_all, merged_metadata, open_shards

if TYPE_CHECKING:
    from hcx.tokenizer import Tokenizer

_BLOCK = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_GLOBAL = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
_REFUSED = {
    "rope_freqs": "scaled rotary frequencies (rope type llama3)",
    "ffn_gate_inp": "a mixture of experts",
    "ffn_gate_exps": "a mixture of experts",
    "attn_q_norm": "norms of queries and keys",
    "attn_k_norm": "norms of queries and keys",
}
"""Last part of a tensor's name -> what it would take to compute it."""


class GGUFModel:
    """Random access to the weights of a llama GGUF file, or of one that was split into parts.

    Attributes:
        path: the file that was named.
        values: what its `config.json` would say.

    Raises:
        CheckpointError: damaged, another architecture, or an option that this decoder does not compute.
        MissingExtra: the package gguf is not installed.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self._files: list[GGUFFile] = open_shards(path)
        try:
            self.metadata = merged_metadata(self._files)
            self._where: dict[str, tuple[GGUFFile, str]] = {}
            for file in self._files:
                for stored in file.tensors:
                    name = self._canonical(stored)
                    if name in self._where:
                        raise CheckpointError(f"{file.path}: {stored!r} is in another part of the model too")
                    self._where[name] = file, stored
            self.values = self._configuration()
            self._check_shapes()
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Closes the files."""
        close_all(self._files)

    @property
    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        """Canonical name of every stored weight -> its shape."""
        return {name: file.tensors[stored].shape for name, (file, stored) in self._where.items()}

    def read(self, name: str) -> Tensor:
        """One weight by canonical name, in this decoder's order of rows; quantized ones come in fp32.

        Raises:
            CheckpointError: its type cannot be dequantized.
        """
        file, stored = self._where[name]
        heads = {"q_proj": "num_attention_heads", "k_proj": "num_key_value_heads"}.get(name.split(".")[-2])
        if heads is None:
            return file.read(stored)
        return file.read(stored, lambda weight: halves_of_pairs(weight, self.values[heads]))

    def tokenizer(self) -> Tokenizer | None:
        """The tokenizer of the metadata; None if there is none.

        Raises:
            DataError: of a kind that is not read here.
        """
        if "tokenizer.ggml.model" not in self.metadata:
            return None
        from hcx.tokenizer.gguf_import import tokenizer_of_gguf

        return tokenizer_of_gguf(self.metadata, str(self.path))

    def _canonical(self, stored: str) -> str:
        if stored in _GLOBAL:
            return _GLOBAL[stored]
        parts = stored.split(".")
        block = len(parts) == 4 and parts[0] == "blk" and parts[1].isdecimal() and parts[1].isascii()
        if block and parts[2] in _BLOCK and parts[3] == "weight":
            return f"model.layers.{int(parts[1])}.{_BLOCK[parts[2]]}.weight"
        kind = parts[-2] if len(parts) > 1 else stored
        why = _REFUSED.get(kind) or ("a bias" if parts[-1] == "bias" else "a part that a llama model lacks")
        raise CheckpointError(f"{self.path}: {stored!r} belongs to {why}, which is not supported")

    def _configuration(self) -> dict[str, Any]:
        architecture = self.metadata.get("general.architecture")
        if architecture != "llama":
            raise CheckpointError(
                f"{self.path}: general.architecture = {architecture!r} is not supported; supported: llama"
            )
        self._refuse_options()
        hidden, layers = self._integer("embedding_length"), self._integer("block_count")
        heads = self._integer("attention.head_count")
        kv_heads = self._integer("attention.head_count_kv", heads)
        head_dim = self._integer("attention.key_length", hidden // heads)
        for key in ("attention.value_length", "rope.dimension_count"):
            if self._integer(key, head_dim) != head_dim:
                raise CheckpointError(
                    f"{self.path}: llama.{key} = {self._integer(key)}; supported: {head_dim}, the width of a head"
                )
        if "model.embed_tokens.weight" not in self._where:
            raise CheckpointError(f"{self.path}: it holds no 'token_embd.weight': a vocabulary, or not all of a model")
        if head_dim % 2 or heads % kv_heads:
            raise CheckpointError(
                f"{self.path}: {heads} heads of width {head_dim} and {kv_heads} for keys make no llama model"
            )
        return {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "vocab_size": self.shapes["model.embed_tokens.weight"][0],
            "hidden_size": hidden,
            "intermediate_size": self._integer("feed_forward_length"),
            "num_hidden_layers": layers,
            "num_attention_heads": heads,
            "num_key_value_heads": kv_heads,
            "head_dim": head_dim,
            "max_position_embeddings": self._integer("context_length", 2048),
            "rms_norm_eps": self._number("attention.layer_norm_rms_epsilon", 1e-5),
            "rope_theta": self._number("rope.freq_base", 10000.0),
            "tie_word_embeddings": "lm_head.weight" not in self._where,
            "hidden_act": "silu",
            "dtype": "float32",
        }

    def _refuse_options(self) -> None:
        scaling = self.metadata.get("llama.rope.scaling.type", "none")
        if scaling != "none":
            raise CheckpointError(
                f"{self.path}: llama.rope.scaling.type = {scaling!r} is not supported; supported: none"
            )
        if self._integer("expert_count", 0, least=0):
            raise CheckpointError(f"{self.path}: a mixture of experts (llama.expert_count) is not supported")

    def _integer(self, key: str, default: int | None = None, least: int = 1) -> int:
        value = self.metadata.get(f"llama.{key}", default)
        if hasattr(value, "tolist"):
            # One number per block; this decoder's blocks are alike.
            several = set(value.tolist())
            value = several.pop() if len(several) == 1 else None
        if not isinstance(value, int) or isinstance(value, bool) or value < least:
            raise CheckpointError(
                f"{self.path}: llama.{key} is {'missing' if value is None else repr(value)}; one number from {least} "
                "on is needed, the same for all blocks"
            )
        return value

    def _number(self, key: str, default: float) -> float:
        value = self.metadata.get(f"llama.{key}", default)
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value) or value <= 0:
            raise CheckpointError(f"{self.path}: llama.{key} = {value!r}; a positive number is needed")
        # Stored in fp32: 1e-5 comes as 9.999999747378752e-06, and was written as the former.
        return float(f"{value:.7g}")

    def _check_shapes(self) -> None:
        expected, shapes = _shapes(self.values), self.shapes
        if self.values["num_hidden_layers"] * len(_BLOCK) > len(self._where):
            raise CheckpointError(
                f"{self.path}: llama.block_count = {self.values['num_hidden_layers']}, but it holds only "
                f"{len(self._where)} tensors: incomplete"
            )
        for name, (file, stored) in self._where.items():
            parts = name.split(".")
            if parts[1] == "layers" and int(parts[2]) >= self.values["num_hidden_layers"]:
                raise CheckpointError(
                    f"{file.path}: {stored!r} is of a block beyond llama.block_count = "
                    f"{self.values['num_hidden_layers']}"
                )
            wanted = expected[parts[-2]]
            if shapes[name] != wanted:
                raise CheckpointError(
                    f"{file.path}: {stored!r} has the shape {shapes[name]}, its metadata say {wanted}"
                )


def _shapes(values: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """Shape by the last part of a module's name."""
    hidden, wide = values["hidden_size"], values["intermediate_size"]
    queries = values["num_attention_heads"] * values["head_dim"]
    keys = values["num_key_value_heads"] * values["head_dim"]
    norms = ("input_layernorm", "post_attention_layernorm", "norm")
    return dict.fromkeys(norms, (hidden,)) | {
        "embed_tokens": (values["vocab_size"], hidden),
        "lm_head": (values["vocab_size"], hidden),
        "q_proj": (queries, hidden),
        "k_proj": (keys, hidden),
        "v_proj": (keys, hidden),
        "o_proj": (hidden, queries),
        "gate_proj": (wide, hidden),
        "up_proj": (wide, hidden),
        "down_proj": (hidden, wide),
    }


def halves_of_pairs(weight: Tensor, heads: int) -> Tensor:
    """Rows `[heads * head_dim, in]` in llama.cpp's order, where a head's rotated pairs are neighbours, to halves.

    Row `2 i + h` of a head becomes row `h * head_dim / 2 + i`.
    """
    rows, columns = weight.shape
    return weight.view(heads, rows // heads // 2, 2, columns).transpose(1, 2).reshape(rows, columns)


def check_tokenizer(tokenizer: Tokenizer | None, vocab_size: int, source: Path) -> None:
    """Refuses a tokenizer with ids that the embedding has no rows for.

    Raises:
        DataError: naming both sizes.
    """
    if tokenizer is not None and tokenizer.vocab_size > vocab_size:
        raise DataError(f"{source}: the tokenizer has {tokenizer.vocab_size} ids, the embedding {vocab_size} rows")
