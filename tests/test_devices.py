"""Names of devices: what is refused says why, with GPUs that are not there."""

from __future__ import annotations

import pytest
import torch

import mllm
from mllm import devices


@pytest.fixture
def current(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Two GPUs, of which the last of these numbers is PyTorch's current one."""
    chosen = [0]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: chosen[-1])
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    return chosen


@pytest.mark.parametrize("name", ["cpu", "cuda", "cuda:0"])
def test_a_device_is_its_name(current: list[int], name: str) -> None:
    assert devices.parse(name) == devices.parse(torch.device(name)) == torch.device(name)


@pytest.mark.parametrize(
    ("name", "wrong"),
    [
        ("cuda:1", r"current device is cuda:0.*set_device\(1\).*CUDA_VISIBLE_DEVICES=1"), ("cuda:2", "PyTorch sees 2"),
        ("mps", "kernels for cpu and cuda"), ("gpu", "device 'gpu'"), ("cuda:x", "device 'cuda:x'"), ("", "device ''"),
    ],
)  # fmt: skip
def test_what_cannot_be_run_on_is_refused_before_anything_is_loaded(current: list[int], name: str, wrong: str) -> None:
    for call in (mllm.load, lambda device: mllm.dummy("qwen3-0.6b", device=device)):
        with pytest.raises(ValueError, match=wrong):
            call(device=name)


def test_a_program_may_choose_and_what_is_wrong_is_left_to_say(current: list[int]) -> None:
    for name in ("cpu", "cuda", "cuda:2", "cuda:x", "cuda:-1", "mps:1"):
        devices.choose(name)
    assert current == [0]
    devices.choose("cuda:1")
    assert current == [0, 1]
    assert devices.parse("cuda:1") == torch.device("cuda:1")
    with pytest.raises(ValueError, match="current device is cuda:1"):
        devices.parse("cuda:0")
