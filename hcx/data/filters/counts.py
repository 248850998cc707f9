"""What a stage did, as the manifest and `hcx data report` tell it."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import Any


@dataclass
class StageCounts:
    """Documents that came to a stage, and what became of them.

    Attributes:
        seen: documents that came.
        changed: of those kept, how many have another text now.
        dropped: reason -> documents left out.
        details: what else is worth telling, such as how many addresses were masked.
    """

    seen: int = 0
    changed: int = 0
    dropped: Counter[str] = field(default_factory=Counter)
    details: Counter[str] = field(default_factory=Counter)

    @property
    def kept(self) -> int:
        """Documents that went on to the next stage."""
        return self.seen - sum(self.dropped.values())

    def to_json(self) -> dict[str, Any]:
        """For the manifest."""
        return {
            "seen": self.seen,
            "kept": self.kept,
            "changed": self.changed,
            "dropped": dict(sorted(self.dropped.items())),
            "details": dict(sorted(self.details.items())),
        }
