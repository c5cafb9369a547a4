"""Sizes that batches are padded to, so that few recordings serve many lengths. Pure functions of the host's counts.

A CPU computes what it is given, so nothing is padded there. A GPU's kernels read the bounds of a batch on the device
and pass over what lies beyond them, so a batch may be larger than what is in it: `mllm.model.Model.pads`.
"""

from __future__ import annotations

from mllm.batch import Size

CAPTURED_TOKENS = 2048
"""Prompt tokens up to which a prefill is recorded, as all of `generate` are; beyond, its kernels outlast their launches."""
CAPTURED_PATCHES = 4096
"""Patches of an image batch up to which its encoding is recorded."""


def power_of_two(count: int) -> int:
    """The first power of two from `count` on."""
    return 1 << (count - 1).bit_length()


def quarter(count: int, low: int) -> int:
    """The first size from `count` on, of four in every doubling and at least `low`: at most a quarter is padding."""
    if count <= low:
        return low
    step = max(power_of_two(count) // 8, 1)
    return -(-count // step) * step


def decode_size(pads: bool, rows: int, longest: int, held: int) -> tuple[int, int]:
    """Rows and listed pages of a decode batch whose longest row has `longest` pages now and holds `held` in all.

    Without padding little is listed, since a CPU gathers what is listed, and a new batch is made as rows grow. With it
    all is listed that the rows will ever need.
    """
    if not pads:
        return rows, power_of_two(longest)
    return power_of_two(rows), power_of_two(held)


def prompt_size(pads: bool, tokens: int, rows: int, listed: int, merged: int) -> Size | None:
    """What a prefill batch is padded to; None where it runs as it is, unrecorded."""
    if not pads or tokens > CAPTURED_TOKENS:
        return None
    return Size(
        tokens=quarter(tokens, 16),
        rows=power_of_two(rows),
        listed=power_of_two(listed),
        merged=quarter(merged, 64) if merged else 0,
    )


def patch_size(pads: bool, patches: int, images: int, unit: int) -> tuple[int, int] | None:
    """Patches, a multiple of `unit`, and images that an image batch is padded to; None where it runs as it is."""
    if not pads or patches > CAPTURED_PATCHES:
        return None
    return -(-quarter(patches, 64) // unit) * unit, power_of_two(images)
