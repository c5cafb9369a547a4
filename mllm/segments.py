"""Segments: prompts cut into batches to prefill, and the image features that fall into each."""

from __future__ import annotations

from collections.abc import Container, Iterable, Iterator, Sequence

import numpy as np
import torch
from attrs import frozen
from torch import Tensor

from mllm.batch import Chunk, VisionTokens, joined, upload_all
from mllm.prompts import Expanded
from mllm.requests import Request, image_indices


@frozen(eq=False, kw_only=True)
class Segment:
    """Tokens [start, stop) of a request, to run in row `row`."""

    request: Request
    row: int
    start: int
    stop: int

    @property
    def completes(self) -> bool:
        """Whether the prompt ends with this segment, so that its last logits choose the first new token."""
        return self.stop == self.request.length

    def chunk(self) -> Chunk:
        return chunk(self.request.layout, self.row, self.start, self.stop)


def chunk(layout: Expanded, row: int, start: int = 0, stop: int | None = None) -> Chunk:
    """Tokens [start, stop) of a prompt, to run in row `row`."""
    return Chunk(
        row=row,
        tokens=torch.from_numpy(layout.tokens[start:stop]),
        positions=torch.from_numpy(layout.positions[:, start:stop]),
    )


def cut(requests: Sequence[tuple[Request, int]], *, limit: int) -> Iterator[list[Segment]]:
    """Cut prompts of (request, row) into batches of at most `limit` tokens, in order; a long one takes several."""
    batch: list[Segment] = []
    room = limit
    for request, row in requests:
        start = 0
        while start < request.length:
            stop = min(start + room, request.length)
            batch.append(Segment(request=request, row=row, start=start, stop=stop))
            room -= stop - start
            start = stop
            if room == 0:
                yield batch
                batch, room = [], limit
    if batch:
        yield batch


def without(batches: Iterable[list[Segment]], rows: Container[int]) -> Iterator[list[Segment]]:
    """Batches of segments without those of some rows."""
    left = ([segment for segment in batch if segment.row not in rows] for batch in batches)
    return filter(None, left)


def join(parts: Sequence[VisionTokens]) -> VisionTokens:
    """The features of images that were encoded in several batches, as one."""
    if len(parts) == 1:
        return parts[0]
    return VisionTokens(
        embed=torch.cat([p.embed for p in parts]),
        deep=torch.cat([p.deep for p in parts], dim=1),
        at=torch.cat([p.at for p in parts]),
    )


def crop(
    features: dict[int, VisionTokens], segments: Sequence[Segment], merged: int | None = None
) -> VisionTokens | None:
    """The image tokens that fall into a batch of segments, padded to `merged`; None where there are none.

    `features` holds those of each request, by its index.
    """
    embed: list[Tensor] = []
    deep: list[Tensor] = []
    at: list[np.ndarray] = []
    offset = 0
    for segment in segments:
        index = _pictured(segment)
        first, last = np.searchsorted(index, (segment.start, segment.stop))
        if first < last:
            mine = features[segment.request.index]
            embed.append(mine.embed[first:last])
            deep.append(mine.deep[:, first:last])
            at.append(index[first:last] - segment.start + offset)
        offset += segment.stop - segment.start
    if not embed:
        return None
    (places,) = upload_all([torch.from_numpy(np.concatenate(at))], embed[0].device)
    found = VisionTokens(embed=joined(embed), deep=joined(deep, 1), at=places)
    return found if merged is None else found.padded(merged)


def pictured(segments: Sequence[Segment]) -> int:
    """Image tokens in a batch of segments."""
    counts = [np.searchsorted(_pictured(s), (s.start, s.stop)) for s in segments]
    return int(sum(last - first for first, last in counts))


def _pictured(segment: Segment) -> np.ndarray:
    layout = segment.request.layout
    return image_indices(layout.starts, layout.counts)
