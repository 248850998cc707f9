"""Fixtures of the launch room's tests."""

from __future__ import annotations

import pytest

from hcx.testing.workers import WorkerPool, session_pool


@pytest.fixture(scope="session")
def pool() -> WorkerPool:
    """Worker processes over gloo, shared by the whole session."""
    return session_pool()
