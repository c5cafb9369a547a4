"""Vectors handed from program to program within one kernel, in words of 64 bits: two numbers, and whose turn they are of.

A program asks for a word until it is of the turn that it expects. So nobody waits for anything but what it needs, no program
counts the others, and a number takes one trip to the L2 cache and one from it, where a barrier of all programs takes three
before anything is read. A word is one access to memory, so its two halves are always of one turn, and no fence is needed.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl


@gluon.constexpr_function
def _receiving(count, pack):
    """To ask for count * pack words until they are all of this turn: (the instructions, their operands)."""
    n = count * pack
    turn, wanted = f"${2 * n}", f"${2 * n + pack}"
    names = ", ".join(f"w{i}" for i in range(n))
    nothing = "".join(f"mov.u32 ${i}, 0;\n" for i in range(n))
    asked = "".join(f"ld.relaxed.gpu.global.u64 w{i}, [${n + i}];\n" for i in range(n))
    told = "".join(f"mov.b64 {{${i}, t}}, w{i};\nxor.b32 t, t, {turn};\nor.b32 all, all, t;\n" for i in range(n))
    return (
        f"{{\n.reg .pred p;\n.reg .u32 t, all;\n.reg .u64 {names};\n{nothing}setp.eq.u32 p, {wanted}, 0;\n@p bra DONE;\n"
        f"ASK:\n{asked}mov.u32 all, 0;\n{told}setp.ne.u32 p, all, 0;\n@p bra ASK;\nDONE:\n}}",
        ",".join(["=&r"] * n + ["l"] * n + ["r"] * 2 * pack),
    )


@gluon.constexpr_function
def _types(count):
    return (gl.int32,) * count


@gluon.jit
def receive(words, turn, wanted, PACK: gl.constexpr = 1):
    """Of a tuple of tensors of addresses of words: their numbers, two in 32 bits, once they are of this turn (one tensor for
    each); zeros where not wanted.

    All words of a thread are asked for at once. PACK: how many of each tensor a thread has, all wanted or none.
    """
    COUNT: gl.constexpr = len(words)
    HOW: gl.constexpr = _receiving(COUNT, PACK)
    return gl.inline_asm_elementwise(
        HOW[0], HOW[1], words + (turn, wanted.to(gl.int32)), dtype=_types(COUNT), is_pure=False, pack=PACK
    )


@gluon.jit
def send(words, pairs, turn, mask=None):
    """Numbers, two in 32 bits, to words of this turn. The 32 bytes of a sector are best sent together: what is missing of
    one is read from memory."""
    gl.store(words, (turn.to(gl.int64) << 32) | (pairs.to(gl.int64) & 0xFFFFFFFF), mask=mask)


@gluon.jit
def pack(low, high, dtype: gl.constexpr):
    """Two numbers of 16 bits in 32."""
    low = low.to(dtype).to(gl.int16, bitcast=True).to(gl.int32) & 0xFFFF
    return (high.to(dtype).to(gl.int16, bitcast=True).to(gl.int32) << 16) | low


@gluon.jit
def halves(pairs, dtype: gl.constexpr):
    """The two numbers of 16 bits."""
    return pairs.to(gl.int16).to(dtype, bitcast=True), (pairs >> 16).to(gl.int16).to(dtype, bitcast=True)


@gluon.jit
def unpack(pairs, dtype: gl.constexpr):
    """The same in float32."""
    low, high = halves(pairs, dtype)
    return low.to(gl.float32), high.to(gl.float32)
