"""What kernels in Gluon for Hopper (capability 9.0) share: a language for what Triton's own compiler would not arrange.

There a warp that only copies, by tensor descriptors and through a ring in shared memory, and groups of four warps, each
with 64 rows of a product on the tensor cores, run side by side and hand over by barriers.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, tma, warpgroup_mma_wait
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from mllm.kernels.room import rows_of

copy = getattr(tma, "async_load", None) or tma.async_copy_global_to_shared  # its name from Triton 3.8 on, and before
TYPES = {torch.bfloat16: gl.bfloat16, torch.float16: gl.float16}
"""Types that the tensor cores multiply from shared memory, as PyTorch and Gluon have them."""
MULTIPROCESSORS = 132
"""Streaming multiprocessors of an H100 or H200. The kernels' programs take one each."""


@gluon.constexpr_function
def mma(columns):
    """The layout of 64 rows of a product in four warps, as the tensor cores leave it."""
    return gl.NVMMADistributedLayout([3, 0], [4, 1], [16, columns, 16])


@gluon.constexpr_function
def lines(columns):
    """A layout of 64 rows in four warps to write 16 bytes a thread; by fours (`mma`) a kernel takes 0.3 to 0.8 us more."""
    return gl.BlockedLayout([1, 8], [256 // columns, columns // 8], [4, 1], [1, 0])


@gluon.constexpr_function
def parts_layout(warps):
    """The layout of a product [warps 16 8] by the older instruction, where each warp has that of its own inputs."""
    return gl.NVMMADistributedLayout([2, 0], [warps, 1, 1], [1, 16, 8])


@gluon.constexpr_function
def factor_layout(index, warps, inputs):
    """The layout of a factor of `parts_layout`: the weight [warps 16 n], or x [warps n 8]; `inputs` of them in a row."""
    return gl.DotOperandLayout(index, parts_layout(warps), inputs)


@gluon.jit
def nothing(columns: gl.constexpr):
    """Zeros [64 columns], where a product is to be added."""
    return gl.zeros([64, columns], gl.float32, mma(columns))


@gluon.jit
def for_rows(factor, x):
    """factor [64], one for each row of x [64 n], laid out as those are: [64 1]."""
    return gl.convert_layout(factor, gl.SliceLayout(1, x.type.layout))[:, None]


@gluon.jit
def halves(acc):
    """The first and the last columns of acc [64 BN]."""
    return gl.split(gl.permute(gl.reshape(acc, [64, 2, acc.shape[1] // 2]), [0, 2, 1]))


@gluon.jit
def finished(coming, left: gl.constexpr):
    """What is under way, when all but the `left` products handed in last are there."""
    if len(coming) == 1:
        accs = (warpgroup_mma_wait(left, deps=coming),)
    else:
        accs = warpgroup_mma_wait(left, deps=coming)
    return accs


@gluon.jit
def new_barriers(COUNT: gl.constexpr, arrivals: gl.constexpr):
    """Barriers [COUNT 1], each of which opens with so many arrivals."""
    bars = gl.allocate_shared_memory(gl.int64, [COUNT, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(COUNT):
        mbarrier.init(bars.index(i), count=arrivals)
    return bars


@lru_cache(maxsize=16)
def multiprocessors(device: torch.device) -> int:
    """Streaming multiprocessors of a GPU; an H100's for tensors on any other device (compiled or interpreted there)."""
    if device.type != "cuda":
        return MULTIPROCESSORS
    return int(torch.cuda.get_device_properties(device).multi_processor_count)


def descriptor(x: Tensor, rows: int, columns: int) -> TensorDescriptor:
    """To copy `rows` by `columns` of x [... columns] at once; all but its first dimension lie side by side."""
    return TensorDescriptor(
        x, [rows_of(x, rows), x.shape[1:].numel()], [x.stride(0), 1], [rows, columns], _layout(rows, columns, x.dtype)
    )


@lru_cache(maxsize=64)
def _layout(rows: int, columns: int, dtype: torch.dtype) -> Any:
    """The layout of a tile in shared memory; kept, as it takes longer to make than all else of a descriptor."""
    return gl.NVMMASharedLayout.get_default_for([rows, columns], TYPES[dtype])
