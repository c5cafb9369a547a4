"""Which table of ops serves which device: looked up once, when a model is made."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch

from mllm.errors import MissingPackageError
from mllm.kernels.cpu import CPU
from mllm.kernels.ops import Ops
from mllm.kernels.reference import REFERENCE

TABLES = {"cpu": CPU, "cuda": REFERENCE}


def ops_for(device: str | torch.device) -> Ops:
    """The table of a device, for batches of any shape. Raises `MissingPackageError` for a device without kernels."""
    if (kind := torch.device(device).type) not in TABLES:
        raise MissingPackageError(f"no kernels for device {kind!r}; there are tables for {', '.join(TABLES)}")
    return TABLES[kind]


def decode_ops_for(device: str | torch.device) -> Callable[[int], Ops] | None:
    """The tables of a device for decode steps, by their number of rows; None where its one table serves them too.

    Raises `MissingPackageError` where the kernels need a package that is not there.
    """
    if torch.device(device).type != "cuda":
        return None
    try:
        from mllm.kernels import cuda  # needs Triton, which machines without a GPU need not have
    except ImportError as error:
        raise MissingPackageError(
            f"decoding on {device} needs {error.name}: pip install 'mllm-runtime[cuda]'"
        ) from None
    return partial(cuda.decode_ops, pdl=torch.cuda.get_device_capability(device) >= (9, 0))
