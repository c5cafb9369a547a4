"""The op table of CPUs for decode steps in float32: kernels that numba compiles when this module is first imported.

That takes some ten seconds on the first import of all; numba keeps the machine code for later processes.
"""

from __future__ import annotations

import attrs

from mllm.kernels import cpu_attend, cpu_linear, cpu_step
from mllm.kernels.cpu import CPU

DECODE = attrs.evolve(
    CPU,
    plan=cpu_attend.plan,
    norm_linear=cpu_linear.norm_linear,
    attend_=cpu_attend.attend_,
    linear_add=cpu_linear.linear_add,
    norm_gate=cpu_linear.norm_gate,
    head=cpu_linear.head,
    sample=cpu_step.sample,
    advance_=cpu_step.advance_,
)
