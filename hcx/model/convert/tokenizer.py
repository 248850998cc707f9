"""A model directory's tokenizer as `transformers` reads it: for evaluation that must agree with its `hf` backend."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from hcx.errors import CheckpointError, MissingExtra


def transformers_tokenizer(directory: str | Path) -> Any:
    """`AutoTokenizer` of a local directory; never runs code from it and never goes to the network.

    Raises:
        MissingExtra: `transformers` is not installed.
        CheckpointError: the directory has no tokenizer that `transformers` can read.
    """
    try:
        from transformers import AutoTokenizer
    except ImportError:
        raise MissingExtra("transformers", "transformers", "reading a tokenizer as transformers does") from None
    if not (Path(directory) / "tokenizer.json").is_file():
        raise CheckpointError(f"{directory}: no tokenizer.json; a model directory for evaluation holds its tokenizer")
    try:
        return AutoTokenizer.from_pretrained(str(directory), trust_remote_code=False, local_files_only=True)
    except (OSError, ValueError, KeyError) as error:
        raise CheckpointError(f"{directory}: its tokenizer cannot be read: {error}") from None
