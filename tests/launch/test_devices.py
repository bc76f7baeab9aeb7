"""What a machine computes on."""

import pytest
import torch

from prefopt_cli.errors import UserError
from prefopt_cli.launch import devices


@pytest.fixture
def two_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    monkeypatch.setattr(torch.accelerator, "device_count", lambda: 2)
    monkeypatch.setenv("PREFOPT_LAUNCH", "/tmp/somewhere")
    monkeypatch.delenv("ACCELERATE_USE_CPU", raising=False)


@pytest.mark.usefixtures("two_gpus")
def test_a_gpu_for_each_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    devices.require_accelerators(use_cpu=False)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    with pytest.raises(UserError, match="4 processes need a GPU each, and there are 2 here"):
        devices.require_accelerators(use_cpu=False)
    devices.require_accelerators(use_cpu=True)
    # srun may let each of its tasks see one GPU only.
    monkeypatch.delenv("PREFOPT_LAUNCH")
    devices.require_accelerators(use_cpu=False)


def test_counting_agrees_with_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(devices, "may_have_accelerator", lambda: True)
    seen = torch.accelerator.device_count() if torch.accelerator.is_available() else 0
    assert devices.count_accelerators() == seen


def test_without_a_driver_torch_is_not_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(devices, "may_have_accelerator", lambda: False)
    monkeypatch.setattr(devices.subprocess, "run", None)
    assert devices.count_accelerators() == 0


def test_cores() -> None:
    assert devices.count_cores() >= 1
