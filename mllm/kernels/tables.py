"""Which tables of ops serve which device: looked up once, when a model is made."""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import lru_cache, partial
from typing import NamedTuple

import torch

from mllm.errors import MissingPackageError
from mllm.kernels.cpu import CPU
from mllm.kernels.ops import Ops
from mllm.kernels.reference import REFERENCE


class Tables(NamedTuple):
    """The op tables of a device.

    `ops` takes batches of any shape and may read their bounds on the host. `decode_ops` gives the table of a decode
    step by its rows, `prompt_ops` that of a prompt batch by its tokens; `vision_ops` is that of an image batch. These
    read nothing on the host, so `capture` can record them. None: `ops` serves, as good as any.
    """

    ops: Ops
    decode_ops: Callable[[int], Ops] | None = None
    prompt_ops: Callable[[int], Ops] | None = None
    vision_ops: Ops | None = None


def tables_for(device: str | torch.device, dtype: torch.dtype) -> Tables:
    """The tables of a device. Raises `MissingPackageError` for one without kernels, or whose packages are not there."""
    kind = torch.device(device).type
    if kind == "cpu":
        compiled = dtype == torch.float32 and sys.platform == "linux"  # whose OpenMP the kernels know how to call
        return _compiled_tables() if compiled else Tables(ops=CPU)
    if kind != "cuda":
        raise MissingPackageError(f"no kernels for device {kind!r}; there are tables for cpu, cuda")
    capability = torch.cuda.get_device_capability(device)
    hopper = capability[0] == 9 and dtype in (torch.bfloat16, torch.float16)  # which its tensor cores take
    return _cuda_tables(wide=capability >= (9, 0), hopper=hopper)


@lru_cache(maxsize=1)
def _compiled_tables() -> Tables:
    try:
        from mllm.kernels.cpu_decode import DECODE, PROMPT  # here, as it imports numba and at first compiles
    except ImportError as error:
        raise MissingPackageError.of(error, needs="float32 on a CPU needs", install="numba") from error
    return Tables(ops=PROMPT, decode_ops=lambda rows: DECODE)


@lru_cache(maxsize=4)
def _cuda_tables(*, wide: bool, hopper: bool) -> Tables:
    try:
        # here, as they need Triton, which machines without a GPU need not have
        from mllm.kernels import cuda, cuda_prompts, cuda_vision
    except ImportError as error:
        raise MissingPackageError.of(error, needs="CUDA devices need", install="'mllm-runtime[cuda]'") from error
    prompts = partial(cuda_prompts.prompt_ops, wide=wide, hopper=hopper)
    general = cuda_vision.vision_ops(prompts(2**31, fa3=hopper), captured=False, wide=wide, hopper=hopper)
    return Tables(
        ops=general,
        decode_ops=partial(cuda.decode_ops, pdl=wide, hopper=hopper),
        prompt_ops=prompts,
        vision_ops=cuda_vision.vision_ops(REFERENCE, captured=True, wide=wide, hopper=hopper),
    )
