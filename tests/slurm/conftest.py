"""One cluster for the room, where the machine allows one."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from hcx.testing.slurm import SlurmCluster, why_no_cluster


@pytest.fixture(scope="session")
def cluster() -> Iterator[SlurmCluster]:
    """Two nodes of a real SLURM; skips with the reason where there can be none."""
    reason = why_no_cluster()
    if reason is not None:
        pytest.skip(reason)
    with SlurmCluster(nodes=2) as running:
        yield running
