"""What is done to text before it is tokenized: one module per stage, each a pure function or a small class."""

from hcx.data.filters.config import FiltersConfig
from hcx.data.filters.counts import StageCounts
from hcx.data.filters.decontaminate import DecontaminateConfig, Decontaminator
from hcx.data.filters.near_duplicates import NearDeduplicator, NearDuplicateConfig
from hcx.data.filters.normalise import NormaliseConfig, normalise
from hcx.data.filters.pii import PiiConfig, mask_pii
from hcx.data.filters.quality import QualityConfig, quality_reason

__all__ = [
    "DecontaminateConfig",
    "Decontaminator",
    "FiltersConfig",
    "NearDeduplicator",
    "NearDuplicateConfig",
    "NormaliseConfig",
    "PiiConfig",
    "QualityConfig",
    "StageCounts",
    "mask_pii",
    "normalise",
    "quality_reason",
]
