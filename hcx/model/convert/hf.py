"""Hugging Face model directories, both directions: `config.json` and safetensors, without importing transformers.

Canonical parameter names are those of the published llama files, so weights need no renaming. Options that this decoder
does not compute are refused by name: a wrong number that looks right is worse than an error.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hcx.artifacts.tensors import write_safetensors
from hcx.errors import CheckpointError
from hcx.model.config import ModelConfig

TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
    "hcx_bpe.model",
)
MAX_SHARD_BYTES = 4 << 30
_CLASSES = {"llama": "LlamaForCausalLM", "hyperclovax": "HyperCLOVAXForCausalLM"}
_HYPERCLOVAX_FIELDS = ("residual_multiplier", "embedding_multiplier", "logits_scaling", "attention_multiplier")


def config_from_hf(values: Mapping[str, Any], source: str = "config.json") -> ModelConfig:
    """Reads a published configuration.

    Args:
        values: the content of `config.json`.
        source: names it in errors.

    Raises:
        CheckpointError: the architecture or one of its options is not supported, or a size is missing.
    """
    kind = values.get("model_type")
    if kind not in _CLASSES:
        raise CheckpointError(f"{source}: model_type = {kind!r} is not supported; supported: {', '.join(_CLASSES)}")
    _refuse_unsupported(values, source)
    try:
        fields: dict[str, Any] = {
            "architecture": kind,
            "vocab_size": values["vocab_size"],
            "hidden_size": values["hidden_size"],
            "intermediate_size": values["intermediate_size"],
            "num_layers": values["num_hidden_layers"],
            "num_heads": values["num_attention_heads"],
        }
    except KeyError as error:
        raise CheckpointError(f"{source}: {error.args[0]} is missing") from None
    fields |= {
        "num_kv_heads": values.get("num_key_value_heads"),
        "head_dim": values.get("head_dim"),
        "max_seq_len": values.get("max_position_embeddings", 2048),
        "rope_theta": _rope_theta(values),
        "norm_eps": values.get("rms_norm_eps", 1e-6),
        "tie_embeddings": values.get("tie_word_embeddings", False),
        "initializer_range": values.get("initializer_range", 0.02),
    }
    if kind == "hyperclovax":
        fields |= {name: values[name] for name in _HYPERCLOVAX_FIELDS if values.get(name) is not None}
        fields["use_post_norm"] = values.get("use_post_norm", True)
    floats = ("rope_theta", "norm_eps", "initializer_range", *_HYPERCLOVAX_FIELDS)
    fields = {name: float(value) if name in floats else value for name, value in fields.items()}
    try:
        return ModelConfig(**fields)
    except ValueError as error:
        raise CheckpointError(f"{source}: {error}") from None


def _rope(values: Mapping[str, Any]) -> Mapping[str, Any]:
    # transformers 5 writes `rope_parameters`; earlier files have `rope_scaling` beside `rope_theta`.
    return values.get("rope_parameters") or values.get("rope_scaling") or {}


def _rope_theta(values: Mapping[str, Any]) -> float:
    return float(_rope(values).get("rope_theta", values.get("rope_theta", 10000.0)))


def _refuse_unsupported(values: Mapping[str, Any], source: str) -> None:
    rope_type = _rope(values).get("rope_type", _rope(values).get("type", "default"))
    checks = {
        "rope type": (rope_type, ("default",)),
        "hidden_act": (values.get("hidden_act", "silu"), ("silu", "swish")),
        "attention_bias": (bool(values.get("attention_bias")), (False,)),
        "mlp_bias": (bool(values.get("mlp_bias")), (False,)),
        "partial_rotary_factor": (float(_rope(values).get("partial_rotary_factor", 1.0)), (1.0,)),
    }
    for name, (found, allowed) in checks.items():
        if found not in allowed:
            raise CheckpointError(f"{source}: {name} = {found!r} is not supported; supported: {allowed[0]!r}")


def config_to_hf(
    config: ModelConfig,
    dtype: torch.dtype = torch.float32,
    eos_token_id: int | None = None,
    bos_token_id: int | None = None,
    pad_token_id: int | None = None,
) -> dict[str, Any]:
    """The published form of a configuration; everything is written out, because defaults differ between readers."""
    values: dict[str, Any] = {
        "architectures": [_CLASSES[config.architecture]],
        "model_type": config.architecture,
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.kv_heads,
        "head_dim": config.head_size,
        "max_position_embeddings": config.max_seq_len,
        "rms_norm_eps": config.norm_eps,
        "rope_theta": config.rope_theta,
        "rope_parameters": {"rope_type": "default", "rope_theta": config.rope_theta},
        "tie_word_embeddings": config.tie_embeddings,
        "initializer_range": config.initializer_range,
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "attention_dropout": 0.0,
        "use_cache": True,
        "bos_token_id": bos_token_id,
        "eos_token_id": eos_token_id,
        "pad_token_id": pad_token_id,
        "dtype": str(dtype).removeprefix("torch."),
    }
    if config.architecture == "hyperclovax":
        values |= {
            "attention_multiplier": config.attention_scale,
            "residual_multiplier": config.residual_multiplier,
            "embedding_multiplier": config.embedding_multiplier,
            "logits_scaling": config.logits_scaling,
            "use_post_norm": config.use_post_norm,
        }
    return values


def copy_tokenizer(source: str | Path, directory: str | Path) -> None:
    """Copies the tokenizer's files into a model directory."""
    if Path(source).resolve() == Path(directory).resolve():
        return
    for name in TOKENIZER_FILES:
        if (Path(source) / name).is_file():
            shutil.copyfile(Path(source) / name, Path(directory) / name)


def write_json(path: Path, values: Mapping[str, Any]) -> None:
    """Writes a JSON file as the model hub's tools do."""
    path.write_text(json.dumps(values, ensure_ascii=False, indent=2) + "\n", encoding="utf-8")


def write_weights(
    directory: Path, tensors: Iterable[tuple[str, Tensor]], stem: str = "model", max_bytes: int = MAX_SHARD_BYTES
) -> int:
    """Writes tensors one at a time into `STEM.safetensors`, or into numbered files with an index.

    Returns:
        The number of bytes of all tensors.
    """
    names: list[list[str]] = []
    pending: dict[str, Tensor] = {}
    size = total = 0

    def flush() -> None:
        # The final names hold the number of files, which is not known before the end.
        path = directory / f"{stem}-part{len(names)}.safetensors"
        write_safetensors(path, pending, metadata={"format": "pt"})
        names.append(list(pending))

    for name, tensor in tensors:
        length = tensor.numel() * tensor.element_size()
        if pending and size + length > max_bytes:
            flush()
            pending, size = {}, 0
        pending[name] = tensor.detach().cpu().contiguous()
        size += length
        total += length
    flush()
    if len(names) == 1:
        (directory / f"{stem}-part0.safetensors").rename(directory / f"{stem}.safetensors")
        return total
    weight_map = {}
    for number, held in enumerate(names):
        final = f"{stem}-{number + 1:05d}-of-{len(names):05d}.safetensors"
        (directory / f"{stem}-part{number}.safetensors").rename(directory / final)
        weight_map.update(dict.fromkeys(held, final))
    write_json(
        directory / f"{stem}.safetensors.index.json", {"metadata": {"total_size": total}, "weight_map": weight_map}
    )
    return total


def export_hf(
    directory: str | Path,
    config: ModelConfig,
    tensors: Iterable[tuple[str, Tensor]],
    tokenizer: str | Path | None = None,
    dtype: torch.dtype = torch.float32,
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> None:
    """Fills a directory that `transformers` loads unchanged.

    Args:
        directory: exists; files are added.
        config: the decoder's.
        tensors: (canonical name, full tensor), consumed one at a time.
        tokenizer: a directory whose tokenizer files are copied.
        dtype: of the written weights.
        max_shard_bytes: a new file begins beyond this size.
    """
    directory = Path(directory)
    special: dict[str, int | None] = {}
    if tokenizer is not None:
        copy_tokenizer(tokenizer, directory)
        special = special_token_ids(tokenizer)
    write_json(directory / "config.json", config_to_hf(config, dtype, **special))
    write_json(
        directory / "generation_config.json",
        {"_from_model_config": True, **{name: value for name, value in special.items() if value is not None}},
    )
    write_weights(directory, ((name, tensor.to(dtype)) for name, tensor in tensors), max_bytes=max_shard_bytes)


def special_token_ids(directory: str | Path) -> dict[str, int | None]:
    """`eos_token_id`, `bos_token_id` and `pad_token_id` of a tokenizer directory."""
    directory = Path(directory)
    try:
        stated = json.loads((directory / "tokenizer_config.json").read_text(encoding="utf-8"))
        added = json.loads((directory / "tokenizer.json").read_text(encoding="utf-8")).get("added_tokens", [])
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{directory}: no readable tokenizer ({error})") from None
    ids = {token["content"]: token["id"] for token in added}

    def find(role: str) -> int | None:
        value = stated.get(role)
        return ids.get(value["content"] if isinstance(value, dict) else value) if value else None

    return {f"{role}_id": find(role) for role in ("eos_token", "bos_token", "pad_token")}
