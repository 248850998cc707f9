"""The CPU redirection of CUDA calls: explicit, scoped, and never where CUDA is."""

from __future__ import annotations

import pytest
import torch

from hcx.dist import rehearsal
from hcx.errors import LaunchError


@pytest.fixture
def disabled(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rehearsal, "_enabled", False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


@pytest.fixture
def enabled(disabled: None) -> None:
    rehearsal.enable()


def test_importing_redirects_nothing(disabled: None) -> None:
    assert not rehearsal.is_enabled()
    assert torch.cuda.current_device.__module__ == "torch.cuda"


def test_without_enabling_the_user_is_told_to_rehearse(disabled: None) -> None:
    with pytest.raises(LaunchError, match="hcx train rehearses"), rehearsal.redirected():
        pass


def test_cuda_calls_land_on_the_cpu_inside_and_nowhere_else(enabled: None) -> None:
    before = torch.cuda.current_device, torch.cuda.synchronize
    with rehearsal.redirected():
        tensor = torch.zeros(2, device="cuda")
        assert tensor.device.type == "cpu"
        assert torch.empty(1, device=torch.cuda.current_device()).device.type == "cpu"
        assert tensor.cuda() is tensor
        assert tensor.type() == "torch.cuda.FloatTensor"
        assert tensor.bfloat16().type() == "torch.cuda.BFloat16Tensor"
        assert tensor.type(torch.float64).dtype == torch.float64
        torch.cuda.synchronize()
        with rehearsal.redirected():
            assert torch.ones(1, device="cuda:0").device.type == "cpu"
        assert torch.ones(1, device="cuda").device.type == "cpu"
    assert (torch.cuda.current_device, torch.cuda.synchronize) == before
    assert torch.zeros(1).type() == "torch.FloatTensor"


def test_redirection_ends_when_its_body_raises(enabled: None) -> None:
    before = torch.cuda.current_device
    with pytest.raises(ValueError), rehearsal.redirected():
        raise ValueError("from the body")
    assert torch.cuda.current_device is before
    assert torch.zeros(1).type() == "torch.FloatTensor"


def test_nothing_is_redirected_where_cuda_is_available(enabled: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    with rehearsal.redirected():
        assert torch.zeros(1).type() == "torch.FloatTensor"
        assert torch.cuda.current_device.__module__ == "torch.cuda"
    with pytest.raises(LaunchError, match="CUDA is available"):
        rehearsal.enable()
