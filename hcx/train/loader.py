"""What the trainer needs of a data loader."""

from __future__ import annotations

from collections.abc import Generator, Mapping
from typing import Any, Protocol

from hcx.data.batch import MicroBatch


class Loader(Protocol):
    """The samples of a step as a pure function of its number."""

    def batches(
        self,
        start_step: int,
        stop_step: int,
        global_batch: int,
        micro_batch: int,
        dp_rank: int = 0,
        dp_size: int = 1,
        *,
        threads: int,
    ) -> Generator[list[MicroBatch]]:
        """The micro-batches of one replica in steps `start_step` to `stop_step - 1`, prepared ahead by threads."""
        ...

    def state_dict(self) -> dict[str, Any]:
        """What decides the order of the data, and where it stands."""
        ...

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Goes on where a state was taken; an error if the order would be another."""
        ...
