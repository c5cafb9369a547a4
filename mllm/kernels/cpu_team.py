"""Work for several threads: those of PyTorch's own OpenMP, called from compiled kernels.

numba's `prange` brings a second OpenMP. Its threads and PyTorch's, each spinning for the next piece of work, keep each
other from the cores: with two threads on a busy machine of two cores a step took 70 ms instead of 1.
"""

from __future__ import annotations

import ctypes
from pathlib import Path
from typing import Any

import llvmlite.binding
import torch
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from mllm.errors import MissingPackageError

ALONE = 2**20
"""Floats that one thread reads alone: 50 us and more. Two on idle cores halve that, and what waking them takes is 1 to 3
us; but where other programs are busy, all wait for the one that has no core: 4 ms each time."""
GRAIN = 2**16
"""Floats in a part, at least."""

_I32, _BYTES = ir.IntType(32), ir.IntType(8).as_pointer()
_VOID = ir.FunctionType(ir.VoidType(), [_BYTES])
_FUNCTIONS = {  # of OpenMP, by the name that compiled code, which outlives the process, knows them by
    "mllm_fork": ("GOMP_parallel", ir.FunctionType(ir.VoidType(), [_VOID.as_pointer(), _BYTES, _I32, _I32])),
    "mllm_thread": ("omp_get_thread_num", ir.FunctionType(_I32, [])),
    "mllm_threads": ("omp_get_num_threads", ir.FunctionType(_I32, [])),
}


def _find() -> None:
    """Tell LLVM where these functions are. Looked up in PyTorch, a name is found in the OpenMP that PyTorch uses."""
    library = Path(torch.__file__).parent / "lib" / "libtorch_cpu.so"
    try:
        torch_cpu = ctypes.CDLL(str(library))
        for name, (function, _) in _FUNCTIONS.items():
            llvmlite.binding.add_symbol(name, ctypes.cast(getattr(torch_cpu, function), ctypes.c_void_p).value)
    except (OSError, AttributeError) as error:
        raise MissingPackageError(f"the CPU kernels need a PyTorch that was built with OpenMP: {error}") from None


_find()


def parts_for(floats: int, rows: int) -> int:
    """In how many parts to read that many floats for `rows` rows. Up to 8 rows it is the reading that takes time."""
    work = floats * max(rows, 8) // 8
    return 1 if work < ALONE else max(1, min(torch.get_num_threads(), work // GRAIN))


def _call(b: Any, name: str, arguments: list[Any]) -> Any:
    return b.call(cgutils.get_or_insert_function(b.module, _FUNCTIONS[name][1], name), arguments)


def fork(part: Any) -> Any:
    """Makes f(parts, args), which runs part(i, parts, *args) for every i below `parts`, in as many threads.

    They may be fewer, where OpenMP has a limit: each takes every so many-th part.
    """

    @intrinsic
    def run(typing, parts, args):
        kinds = (types.int64, types.int64, *args)
        part.compile(kinds)
        made = part.overloads[kinds]

        def generate(context: Any, b: Any, signature: Any, values: Any) -> Any:
            context.active_code_library.add_linking_library(made.library)
            packed = cgutils.pack_struct(b, [values[0], *cgutils.unpack_tuple(b, values[1])])
            where = cgutils.alloca_once_value(b, packed)
            body = ir.Function(b.module, _VOID, b.module.get_unique_name("part"))
            body.linkage = "internal"
            inner = ir.IRBuilder(body.append_basic_block())
            given = cgutils.unpack_tuple(inner, inner.load(inner.bitcast(body.args[0], where.type)))
            whole = given[0].type
            first, step = (inner.zext(_call(inner, name, []), whole) for name in ("mllm_thread", "mllm_threads"))
            with cgutils.for_range_slice(inner, first, given[0], step, whole) as (index, _):
                context.call_internal_no_propagate(inner, made.fndesc, made.signature, [index, *given])
            inner.ret_void()
            _call(b, "mllm_fork", [body, b.bitcast(where, _BYTES), b.trunc(values[0], _I32), _I32(0)])
            return context.get_dummy_value()

        return types.void(types.int64, args), generate

    return run
