"""Where a model lies: the names of devices, checked."""

from __future__ import annotations

import torch

from mllm.cache import PAGE_SIZE


def parse(device: str | torch.device) -> torch.device:
    """The device of "cpu", "cuda" or "cuda:1".

    Raises `ValueError` for one without kernels, for a GPU that PyTorch does not see, and for one that is not its current
    one: that is where kernels are launched and streams lie.
    """
    try:
        place = torch.device(device)
    except RuntimeError as error:
        raise ValueError(f"device {device!r}: {str(error).splitlines()[0]}") from None
    if place.type not in PAGE_SIZE:
        raise ValueError(f"device {str(place)!r}: there are kernels for {' and '.join(PAGE_SIZE)}")
    if place.type != "cuda":
        return place
    if not torch.cuda.is_available():
        raise ValueError(f"device {str(place)!r}: PyTorch sees no GPU here; torch.__version__ is {torch.__version__}")
    if place.index is not None and place.index >= (count := torch.cuda.device_count()):
        raise ValueError(f"device {str(place)!r}: PyTorch sees {count}, from cuda:0 on")
    if place.index is not None and place.index != (current := torch.cuda.current_device()):
        raise ValueError(
            f"device {str(place)!r}: PyTorch's current device is cuda:{current}, and kernels run there; call "
            f"torch.cuda.set_device({place.index}) first, or set CUDA_VISIBLE_DEVICES={place.index} and use cuda"
        )
    return place


def choose(device: str) -> None:
    """Make the GPU that "cuda:1" names PyTorch's current one, for programs, which may; `parse` says what is wrong."""
    kind, _, number = device.partition(":")
    if kind == "cuda" and number.isdecimal() and int(number) < torch.cuda.device_count():
        torch.cuda.set_device(int(number))
