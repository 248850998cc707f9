"""From raw text to packed batches: sources, filters, shards, the loader, held-out accounting.

Light by design: importing this package loads no tokenizer and no shard.
"""

from hcx.data.batch import MicroBatch
from hcx.data.fim import FimConfig, infill_prompt
from hcx.data.loader import PackedLoader
from hcx.data.recipe import DataRecipe
from hcx.data.shards import ShardSet
from hcx.data.shipped import translation_pairs
from hcx.data.validation import bits_per_byte, validation_batches, validation_bytes, validation_documents

__all__ = [
    "DataRecipe",
    "FimConfig",
    "MicroBatch",
    "PackedLoader",
    "ShardSet",
    "bits_per_byte",
    "infill_prompt",
    "translation_pairs",
    "validation_batches",
    "validation_bytes",
    "validation_documents",
]
