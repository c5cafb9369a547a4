"""M-RoPE positions: where each token of a multimodal prompt stands, in time, height and width.

Every token has three positions (t, h, w). A text token has three equal ones, and text counts upwards by one, as in
an ordinary rotary embedding. An image starts where the text before it stopped, at position p: its token in row r
and column c (after merging) gets (p, p + r, p + c). The text after it goes on from the first position that the image
did not use, p + max(rows, columns). An image of 4 x 6 tokens thus advances the count by 6, not by 24:

    token       a   b  <---- image of 2 x 3 ---->   c
    t           0   1   2   2   2   2   2   2       5
    h           0   1   2   2   2   3   3   3       5
    w           0   1   2   3   4   2   3   4       5

Since positions run behind the token count, a decoded token at index i stands at i + delta, with delta <= 0.
"""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray


def positions(length: int, starts: Sequence[int], sizes: Sequence[tuple[int, int]]) -> tuple[NDArray[np.int32], int]:
    """Positions of a prompt of `length` tokens, as `int32 [3, length]` (t, h, w), and the delta of what follows.

    starts: index of the first token of each image, ascending.
    sizes: (rows, columns) of each image in merged tokens; it covers rows * columns tokens from its start.
    Images may touch; each one counts by itself. The ranges must fit: `mllm.prompts.expand` checks that.
    """
    out = np.empty((3, length), np.int32)
    index = position = 0
    for start, (rows, cols) in zip(starts, sizes, strict=True):
        out[:, index:start] = np.arange(position, position + start - index)
        position += start - index
        index = start + rows * cols
        image = out[:, start:index].reshape(3, rows, cols)  # splitting the last axis of a slice makes a view
        image[0] = position
        image[1] = np.arange(position, position + rows)[:, None]
        image[2] = np.arange(position, position + cols)
        position += max(rows, cols)
    out[:, index:] = np.arange(position, position + length - index)
    return out, position - index
