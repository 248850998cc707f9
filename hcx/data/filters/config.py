"""Which stages a data recipe runs."""

from __future__ import annotations

from hcx.config import Config
from hcx.data.filters.decontaminate import DecontaminateConfig
from hcx.data.filters.near_duplicates import NearDuplicateConfig
from hcx.data.filters.normalise import NormaliseConfig
from hcx.data.filters.pii import PiiConfig


class FiltersConfig(Config):
    """Stages for all languages, in the order in which they run; null: the stage is left out.

    Between masking and near-duplicates come the shortest length, the language's own `quality`, the division into
    splits, byte budgets, and exact de-duplication.
    """

    normalise: NormaliseConfig | None = None
    """One spelling for text that looks the same."""
    pii: PiiConfig | None = None
    """Mask personal data."""
    near_duplicates: NearDuplicateConfig | None = None
    """Leave nearly equal documents out; held-out ones win over training ones."""
    decontaminate: DecontaminateConfig | None = None
    """Take evaluation items out of the training text."""
