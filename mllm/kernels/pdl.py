"""Programmatic dependent launch (compute capability 9.0 and up): a kernel starts while the one before it still
runs, loads its weights, and then waits for that one's results.

Every kernel of a chain calls `launch_dependents` first and `wait` before it reads or writes anything that another
kernel of the chain touches; before the wait it may read only what never changes during a step. The gain comes from
the weights that are loaded before the wait, at most about 1 us a kernel.
"""

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait


@triton.jit
def launch_dependents(PDL: tl.constexpr):
    """Let the next kernel of the chain start as soon as there is room for it."""
    if PDL:
        gdc_launch_dependents()


@triton.jit
def wait(PDL: tl.constexpr):
    """Wait until the kernels before have finished and their writes can be seen."""
    if PDL:
        gdc_wait()


@triton.jit
def prefetch(at):
    """Ask for the lines of memory at the addresses `at`, which must be valid, into the L2 cache."""
    tl.inline_asm_elementwise(
        "prefetch.global.L2 [$1]; mov.u32 $0, 0;", "=r,l", [at], dtype=tl.int32, is_pure=False, pack=1
    )


FUSED = {"enable_fp_fusion": True}
"""A launch argument of every kernel: Triton 3.10 turns multiply-add off unless it is asked for."""


def options(pdl: bool) -> dict[str, bool]:
    """The launch arguments of a kernel of a chain. `launch_pdl` is named only where it is wanted: it needs 9.0."""
    return FUSED | ({"PDL": True, "launch_pdl": True} if pdl else {"PDL": False})
