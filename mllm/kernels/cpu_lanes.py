"""What the compiled CPU kernels are made of: a decorator that compiles, and LLVM code for what numba cannot say.

The kernels take addresses, not arrays: a tensor's address costs 0.1 us, its numpy view and numba's look at it 1.5 us.
They allocate nothing, because numba would free what only an address refers to; scratch is a tensor of the caller's.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import llvmlite.binding
import numba
import numpy as np
import torch
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic
from torch import Tensor

from mllm.errors import ShapeError

HOST: dict[str, Any] = {"dtype": torch.float32, "device": "cpu"}
"""What the kernels take and give, whatever a caller's default dtype and device are."""
LANES = 16 if llvmlite.binding.get_host_cpu_features().get("avx512f") else 8
"""Numbers in a vector. Sums are taken in this many parts, so it is part of what a result's last bits depend on."""

AHEAD = 12288
"""Bytes: how long before it is used a weight is asked for. Alone, the processor asks only while a tile's first rows
wait for it, and the others then compute with the memory idle: 8 rows of 256 inputs took 1.4 times as long."""

_F32, _I32, _I64 = ir.FloatType(), ir.IntType(32), ir.IntType(64)
_BYTES = ir.IntType(8).as_pointer()
_VECTOR = ir.VectorType(_F32, LANES)
_ZERO = ir.Constant(_VECTOR, [0.0] * LANES)
_SOURCES = sorted(Path(__file__).parent.glob("cpu_*.py"))
_DIGEST = hashlib.sha256(b"".join(path.read_bytes() for path in _SOURCES)).hexdigest()[:12]


def address(x: Tensor) -> int:
    """Of the float32 numbers of x, for a kernel, which would read anything there. Raises `ShapeError` where x has others."""
    if x.dtype != torch.float32 or not x.is_contiguous():
        raise ShapeError(
            f"the compiled kernels of CPUs take contiguous float32, got {x.dtype} {list(x.shape)} with strides "
            f"{x.stride()}: is the KV pool of the model's dtype, and is torch.autocast off?"
        )
    return x.data_ptr()


def compiled(signature: str | None = None, **options: Any) -> Callable[[Callable[..., Any]], Any]:
    """Compile a function: at once where it has a `signature`, to machine code that is kept for the next process.

    numba keeps it beside the source, or else in the user's cache folder, and drops it when that one file changes. The
    kernels span several files, so the digest of all goes into the name that it is kept under.
    """

    def decorate(fn: Callable[..., Any]) -> Any:
        fn.__qualname__ = f"{fn.__qualname__}_{_DIGEST}"
        signatures = () if signature is None else (signature,)
        options.update(nogil=True, error_model="numpy")  # Python's would look at every divisor before it divides
        try:
            return numba.njit(*signatures, cache=signature is not None, **options)(fn)
        except RuntimeError as error:
            if "cannot cache" not in str(error):
                raise
            return numba.njit(*signatures, **options)(fn)  # nowhere to write: every process compiles

    return decorate


@intrinsic
def _pointer(typing: Any, address: Any) -> Any:
    def generate(context: Any, b: Any, signature: Any, args: Any) -> Any:
        return b.inttoptr(args[0], _BYTES)

    return types.voidptr(types.int64), generate


@intrinsic
def _two_to(typing: Any, shifted: Any) -> Any:
    """2 ** n for f32 n + 1.5 * 2 ** 23, whose low bits are n: f32. A cast to int would be undefined for a NaN."""

    def generate(context: Any, b: Any, signature: Any, args: Any) -> Any:
        return b.bitcast(b.add(b.shl(b.bitcast(args[0], _I32), _I32(23)), _I32(127 << 23)), _F32)

    return types.float32(types.float32), generate


@compiled(inline="always")
def f32(address, count):
    """The floats at an address as an array."""
    return numba.carray(_pointer(address), (count,), np.float32)


@compiled(inline="always")
def i32(address, count):
    return numba.carray(_pointer(address), (count,), np.int32)


@compiled(inline="always")
def i64(address, count):
    return numba.carray(_pointer(address), (count,), np.int64)


@compiled()
def exp(x):
    """e ** x in f32 to 1e-7 of it, between e ** -87 and e ** 88; NaN of NaN. A loop of these becomes vector code.

    Not for inlining into a function with fastmath, which would take the number out again before it has rounded.
    """
    x = np.float32(-87.0) if x < np.float32(-87.0) else x
    x = np.float32(88.0) if x > np.float32(88.0) else x
    shifted = x * np.float32(1.44269504) + np.float32(12582912.0)  # adding 1.5 * 2 ** 23 rounds to a whole number
    n = shifted - np.float32(12582912.0)
    r = x - n * np.float32(0.693359375) + n * np.float32(2.12194440e-4)  # ln 2 in two parts
    y = np.float32(1.9875691500e-4)  # the polynomial of Cephes' expf
    y = y * r + np.float32(1.3981999507e-3)
    y = y * r + np.float32(8.3334519073e-3)
    y = y * r + np.float32(4.1665795894e-2)
    y = y * r + np.float32(1.6666665459e-1)
    y = y * r + np.float32(5.0000001201e-1)
    y = y * r * r + r + np.float32(1.0)
    return y * _two_to(shifted)


def _at(b: Any, base: Any, stride: Any, index: int) -> Any:
    """The address of row `index` of rows that are `stride` floats apart."""
    return b.add(base, b.shl(b.mul(stride, _I64(index)), _I64(2)))


def _load(b: Any, address: Any, offset: Any, mask: Any = None) -> Any:
    """A vector of floats from `offset` on; where `mask` says so, and 0 elsewhere."""
    where = b.inttoptr(b.add(address, b.shl(offset, _I64(2))), _VECTOR.as_pointer())
    if mask is None:
        return b.load(where, align=4)
    kind = ir.FunctionType(_VECTOR, [where.type, _I32, mask.type, _VECTOR])
    load = cgutils.get_or_insert_function(b.module, kind, f"llvm.masked.load.v{LANES}f32.p0")
    return b.call(load, [where, _I32(4), mask, _ZERO])


def _fma(b: Any, x: Any, y: Any, z: Any) -> Any:
    kind = ir.FunctionType(_VECTOR, [_VECTOR] * 3)
    return b.call(cgutils.get_or_insert_function(b.module, kind, f"llvm.fma.v{LANES}f32"), [x, y, z])


def _ask(b: Any, address: Any) -> None:
    """Have the line at an address fetched into the caches."""
    kind = ir.FunctionType(ir.VoidType(), [_BYTES, _I32, _I32, _I32])
    read, keep, data = _I32(0), _I32(3), _I32(1)
    prefetch = cgutils.get_or_insert_function(b.module, kind, "llvm.prefetch.p0")
    b.call(prefetch, [b.inttoptr(address, _BYTES), read, keep, data])


@intrinsic
def ask(typing: Any, address: Any) -> Any:
    """Have the line at an address fetched into the caches."""

    def generate(context: Any, b: Any, signature: Any, args: Any) -> Any:
        _ask(b, args[0])
        return context.get_dummy_value()

    return types.void(types.int64), generate


def _spread(b: Any, value: Any, kind: Any = _VECTOR) -> Any:
    """A vector of one value."""
    one = b.insert_element(ir.Constant(kind, ir.Undefined), value, _I32(0))
    return b.shuffle_vector(one, one, ir.Constant(ir.VectorType(_I32, kind.count), [_I32(0)] * kind.count))


def _mask(b: Any, count: Any) -> Any:
    """True in the first `count` lanes."""
    whole = ir.VectorType(_I64, LANES)
    return b.icmp_signed("<", ir.Constant(whole, list(range(LANES))), _spread(b, count, whole))


def _sum(b: Any, v: Any) -> Any:
    """The sum of a vector, halves first."""
    width = LANES
    while width > 1:
        width //= 2
        low, high = (ir.Constant(ir.VectorType(_I32, width), [_I32(at + i) for i in range(width)]) for at in (0, width))
        v = b.fadd(b.shuffle_vector(v, v, low), b.shuffle_vector(v, v, high))
    return b.extract_element(v, _I32(0))


def tile(rows: int, outputs: int) -> Any:
    """Makes f(x, ldx, w, ldw, k, out, ldo): out[r, n] += x[r, :k] . w[n, :k]. An ld is the floats between two rows.

    `rows` x `outputs` sums are kept in registers, so that each vector that is loaded serves several. The order of
    every sum is the same in tiles of all sizes, so a row's result does not depend on how many rows there are.
    """

    @intrinsic
    def dot(typing, x, ldx, w, ldw, k, out, ldo):
        def generate(context: Any, b: Any, signature: Any, args: Any) -> Any:
            x, ldx, w, ldw, k, out, ldo = args
            xs, ws = [_at(b, x, ldx, r) for r in range(rows)], [_at(b, w, ldw, n) for n in range(outputs)]
            cells = [(r, n) for r in range(rows) for n in range(outputs)]
            sums = [cgutils.alloca_once_value(b, _ZERO) for _ in cells]

            def step(at: Any, mask: Any = None) -> None:
                weights = [_load(b, address, at, mask) for address in ws]
                inputs = [_load(b, address, at, mask) for address in xs]
                for address in ws if rows > 1 else ():
                    _ask(b, b.add(address, b.add(b.shl(at, _I64(2)), _I64(AHEAD))))
                for total, (r, n) in zip(sums, cells, strict=True):
                    b.store(_fma(b, inputs[r], weights[n], b.load(total)), total)

            whole = b.and_(k, _I64(-LANES))
            with cgutils.for_range_slice(b, _I64(0), whole, _I64(LANES)) as (at, _):
                step(at)
            with b.if_then(b.icmp_signed("<", whole, k)):
                step(whole, _mask(b, b.sub(k, whole)))
            for total, (r, n) in zip(sums, cells, strict=True):
                where = b.inttoptr(b.add(_at(b, out, ldo, r), _I64(4 * n)), _F32.as_pointer())
                b.store(b.fadd(b.load(where, align=4), _sum(b, b.load(total))), where, align=4)
            return context.get_dummy_value()

        return types.void(*[types.int64] * 7), generate

    return dot


def mix(rows: int, vectors: int) -> Any:
    """Makes f(p, ldp, v, ldv, n, out, ldo, width): out[r] += p[r, :n] @ v[:n], `vectors` vectors of floats wide.

    Of v only `width` floats a row are read; those of `out` that lie beyond get 0 added.
    """

    @intrinsic
    def add(typing, p, ldp, v, ldv, n, out, ldo, width):
        def generate(context: Any, b: Any, signature: Any, args: Any) -> Any:
            p, ldp, v, ldv, n, out, ldo, width = args
            cells = [(r, _I64(i * LANES)) for r in range(rows) for i in range(vectors)]
            sums = [cgutils.alloca_once_value(b, _load(b, _at(b, out, ldo, r), at)) for r, at in cells]
            masks = {at: _mask(b, b.sub(width, at)) for _, at in cells}
            with cgutils.for_range(b, n) as loop:
                token = b.add(v, b.shl(b.mul(ldv, loop.index), _I64(2)))
                values = {at: _load(b, token, at, mask) for at, mask in masks.items()}
                at_token = b.shl(loop.index, _I64(2))
                weights = [
                    _spread(b, b.load(b.inttoptr(b.add(_at(b, p, ldp, r), at_token), _F32.as_pointer()), align=4))
                    for r in range(rows)
                ]
                for total, (r, at) in zip(sums, cells, strict=True):
                    b.store(_fma(b, weights[r], values[at], b.load(total)), total)
            for total, (r, at) in zip(sums, cells, strict=True):
                where = b.add(_at(b, out, ldo, r), b.shl(at, _I64(2)))
                b.store(b.load(total), b.inttoptr(where, _VECTOR.as_pointer()), align=4)
            return context.get_dummy_value()

        return types.void(*[types.int64] * 8), generate

    return add
