"""What flows through the stages on the device: token batches, image patches, vision features, sampling settings."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any, TypeVar, cast

import numpy as np
import torch
from attrs import frozen
from numpy.typing import NDArray
from torch import Tensor

from mllm.cache import SINK
from mllm.state import State, leaves, map_leaves, state, tensor
from mllm.table import RequestTable

S = TypeVar("S", bound=State)


@state
class ForwardBatch(State):
    """Tokens of some rows, ready to run: T tokens of B rows, ragged. In decode T == B and the batch is the carry
    of the loop, which `advance` consumes and returns.

    `tokens[t]` stands at M-RoPE `positions[:, t]` and its keys and values go to pool slot `slots[t]`. Row b has
    tokens `q_indptr[b]` to `q_indptr[b + 1]`, which are the last of the `lengths[b]` tokens of its context (this
    batch's included); `pages[b]` lists the pages of that context. Logits are wanted at batch positions `last`.
    A padding row has length 0, the sink for a page, and a result that nobody reads.
    """

    tokens: Tensor = tensor("T", torch.int32)
    positions: Tensor = tensor("3 T", torch.int32)
    slots: Tensor = tensor("T", torch.int64)
    pages: Tensor = tensor("B N", torch.int32)
    lengths: Tensor = tensor("B", torch.int32)
    q_indptr: Tensor = tensor("B+1", torch.int32)
    last: Tensor = tensor("Q", torch.int64)
    host_rows: tuple[tuple[int, int], ...] | None = None

    def rows(self) -> tuple[tuple[int, int], ...]:
        """Of each row its tokens in this batch and those of its context, on the host.

        They are `host_rows`; where that is None, since the batch is padded or its rows grow, the host waits for the
        device.
        """
        if self.host_rows is not None:
            return self.host_rows
        return tuple(zip(self.q_indptr.diff().tolist(), self.lengths.tolist(), strict=True))


@state
class PatchBatch(State):
    """Image patches as bytes (`images.patches`), ready for the encoder; all images of the batch in one row of X.

    `coords` are, per patch, its row and column and the rows and columns of its image. Image i has patches
    `indptr[i]` to `indptr[i + 1]`. Merged patch m replaces the token at batch position `at[m]`. A byte x stands
    for the value `(x / 255 - mean) / std` of its channel. What pads the batch lies beyond the last of `indptr`,
    and its places in `at` are negative.
    """

    patches: Tensor = tensor("X U", torch.uint8)
    coords: Tensor = tensor("4 X", torch.int32)
    indptr: Tensor = tensor("I+1", torch.int32)
    at: Tensor = tensor("M", torch.int64)
    mean: tuple[float, ...]
    std: tuple[float, ...]
    host_indptr: tuple[int, ...] | None = None

    def spans(self) -> tuple[tuple[int, int], ...]:
        """First patch and last + 1 of each image, on the host.

        They come from `host_indptr`; where that is None, since the batch is padded, the host waits for the device.
        """
        return tuple(pairwise(self.indptr.tolist() if self.host_indptr is None else self.host_indptr))


@state
class VisionTokens(State):
    """What the decoder needs of images: `embed` replaces the embedding of the tokens at batch positions `at`, and
    `deep[j]` is added there to the residual stream after decoder layer j (deepstack)."""

    embed: Tensor = tensor("M E")
    deep: Tensor = tensor("J M E")
    at: Tensor = tensor("M", torch.int64)

    def first(self, count: int) -> VisionTokens:
        """The first `count` of them, which leaves out what padded the batch."""
        return VisionTokens(embed=self.embed[:count], deep=self.deep[:, :count], at=self.at[:count])

    def padded(self, count: int) -> VisionTokens:
        """As `count` of them, those that are added at negative places, where nothing is put."""
        free = count - len(self.at)
        if not free:
            return self
        embed, deep = (torch.nn.functional.pad(t, (0, 0, 0, free)) for t in (self.embed, self.deep))
        return VisionTokens(embed=embed, deep=deep, at=torch.nn.functional.pad(self.at, (0, free), value=-1))


@state
class SamplingBatch(State):
    """Per row how the next token is drawn; see `mllm.sampling.Sampling` for the meaning of each.

    What the rest says, on the host, decides what a step runs at all, and so has another graph for each: `greedy`, that
    every row takes the likeliest token; `has_top_k` and `has_top_p`, that some other row is limited so.
    """

    temperature: Tensor = tensor("B", torch.float32)
    top_k: Tensor = tensor("B", torch.int32)
    top_p: Tensor = tensor("B", torch.float32)
    min_p: Tensor = tensor("B", torch.float32)
    seed: Tensor = tensor("B", torch.int64)
    greedy: bool
    has_top_k: bool
    has_top_p: bool


@state
class Chunk(State):
    """Tokens of one row that are to run next: `tokens` at M-RoPE `positions`, after the row's committed length."""

    row: int
    tokens: Tensor = tensor("T", torch.int32)
    positions: Tensor = tensor("3 T", torch.int32)


@frozen
class Size:
    """What a batch is padded to: tokens, rows, pages listed for each row, and image tokens."""

    tokens: int
    rows: int
    listed: int
    merged: int = 0


def pack(
    table: RequestTable,
    chunks: Sequence[Chunk],
    *,
    device: str | torch.device,
    every: bool = False,
    size: Size | None = None,
) -> ForwardBatch:
    """One ragged batch of chunks of different rows, in the given order.

    Logits are wanted after the last token of each chunk, or after every token with `every`. With `size` it is padded:
    tokens that belong to no row and go to the sink, rows without tokens, whose logits nobody reads.
    """
    rows, held = [c.row for c in chunks], table.length.numpy()  # NumPy, as each step costs PyTorch four times as much
    start = [int(held[row]) for row in rows]
    count = [len(c.tokens) for c in chunks]
    total = [s + n for s, n in zip(start, count, strict=True)]
    listed = max(map(table.pages_for, total))
    host_rows = tuple(zip(count, total, strict=True)) if size is None else None
    size = size or Size(sum(count), len(rows), listed)
    slots = [slots_of(table, row, s, s + n).numpy() for row, s, n in zip(rows, start, count, strict=True)]
    ends = np.cumsum([0, *count])
    last = np.arange(ends[-1]) if every else ends[1:] - 1
    batch = ForwardBatch(
        tokens=padded_to(size.tokens, np.concatenate([c.tokens.numpy() for c in chunks])),
        positions=padded_to(size.tokens, np.concatenate([c.positions.numpy() for c in chunks], axis=1)),
        slots=padded_to(size.tokens, np.concatenate(slots)),
        pages=_listed(table, rows, listed, (size.rows, size.listed)),
        lengths=padded_to(size.rows, np.array(total, np.int32)),
        q_indptr=padded_to(size.rows + 1, ends.astype(np.int32), by=ends[-1]),
        last=torch.from_numpy(last) if every else padded_to(size.rows, last),
        host_rows=host_rows,
    )
    return upload(batch, device)


def padded_to(count: int, values: NDArray[Any], by: int = 0) -> Tensor:
    """Values [... n] as [... count], with `by` behind them."""
    padded = np.full((*values.shape[:-1], count), by, values.dtype)
    padded[..., : values.shape[-1]] = values
    return torch.from_numpy(padded)


def joined(parts: Sequence[Tensor], dim: int = 0) -> Tensor:
    """The parts as one tensor; a single one is not copied."""
    return parts[0] if len(parts) == 1 else torch.cat(list(parts), dim)


def _listed(table: RequestTable, rows: Sequence[int], listed: int, shape: tuple[int, int]) -> Tensor:
    """The first pages of some rows, `listed` of each, in so many rows and columns, which list the sink elsewhere."""
    pages = np.full(shape, SINK, np.int32)
    there = table.pages.numpy()[list(rows), :listed]
    pages[: len(rows), : there.shape[1]] = there
    return torch.from_numpy(pages)


def upload(host: S, device: str | torch.device) -> S:
    """A state made on the host, on the device."""
    parts = iter(upload_all(leaves(host), device))
    return cast(S, map_leaves(lambda _: next(parts), host))


def upload_all(tensors: Sequence[Tensor], device: str | torch.device) -> list[Tensor]:
    """Tensors of the host on the device, all in one pinned copy that nobody waits for."""
    if torch.device(device).type != "cuda":
        return [t.to(device) for t in tensors]
    at = np.cumsum([0, *(-(-t.nbytes // 16) * 16 for t in tensors)]).tolist()  # kernels like aligned addresses
    staged = torch.empty(at[-1], dtype=torch.uint8, device="cpu", pin_memory=True)
    host = staged.numpy()  # a small copy costs NumPy a quarter of what it costs PyTorch
    for t, begin in zip(tensors, at[:-1], strict=True):
        host[begin : begin + t.nbytes] = t.numpy().reshape(-1).view(np.uint8)
    there = staged.to(device, non_blocking=True)
    return [there[b : b + t.nbytes].view(t.dtype).view(t.shape) for t, b in zip(tensors, at[:-1], strict=True)]


def slots_of(table: RequestTable, row: int, start: int, stop: int) -> Tensor:
    """Pool slots of tokens [start, stop) of a row: int64 [stop - start], on the host."""
    return torch.from_numpy(_slots(table.pages.numpy(), row, np.arange(start, stop), table.page_size))


def _slots(
    pages: NDArray[np.int32], rows: int | NDArray[np.int64], tokens: NDArray[np.int64], page_size: int
) -> NDArray[np.int64]:
    """The slots of tokens [n] of one row, or one of each row, of the pages [rows N]."""
    page, place = np.divmod(tokens, page_size)
    return pages[rows, page].astype(np.int64) * page_size + place


def decode_batch(
    table: RequestTable,
    rows: Sequence[int],
    tokens: Sequence[int],
    delta: Sequence[int],
    *,
    size: int,
    listed: int,
    device: str | torch.device,
) -> ForwardBatch:
    """One token for each row, padded to `size` rows and `listed` pages a row: the carry of the decode loop.

    `tokens[i]` is the newest token of `rows[i]`, whose keys and values are not in the pool yet; `delta[i]` is what
    its M-RoPE position exceeds its index by (0 without images, negative after them).
    """
    index = table.length.numpy()[list(rows)]
    pages = _listed(table, rows, listed, (size, listed))
    slots = _slots(pages.numpy(), np.arange(len(rows)), index.astype(np.int64), table.page_size)
    position = padded_to(size, index + np.array(delta, np.int32))
    batch = ForwardBatch(
        tokens=padded_to(size, np.array(tokens, np.int32)),
        positions=position.expand(3, -1).contiguous(),
        slots=padded_to(size, slots),
        pages=pages,
        lengths=padded_to(size, index + 1),
        q_indptr=torch.arange(size + 1, dtype=torch.int32, device="cpu"),
        last=torch.arange(size, device="cpu"),
    )
    return upload(batch, device)
