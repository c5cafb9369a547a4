"""Prompts in, tokens and text out: `generate`, `stream`, `score`. The loop that they run is `mllm.loop`: start there.

Rows are admitted as they come free, and the tokens of a request do not depend on who shares its batch.
"""

from __future__ import annotations

import sys
from collections import deque
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor
from tqdm import tqdm

from mllm import budget, memory, requests, segments, stages
from mllm.batch import pack
from mllm.budget import MAX_ROWS, PREFILL_TOKENS
from mllm.completion import Completion, Piece, join
from mllm.loop import Loop, commit, encode
from mllm.model import Model
from mllm.programs import new_lease
from mllm.prompts import Prompt
from mllm.requests import Request
from mllm.sampling import Sampling
from mllm.table import RequestTable

GREEDY = Sampling()


def generate(
    model: Model,
    prompts: Sequence[Prompt],
    *,
    max_new_tokens: int | Sequence[int] = 128,
    sampling: Sampling | Sequence[Sampling] = GREEDY,
    max_running_requests: int | None = None,
    max_total_tokens: int | None = None,
    progress: bool = False,
) -> list[Completion]:
    """Complete every prompt; `max_new_tokens` and `sampling` are one for all or one for each.

    `max_running_requests` bounds the rows that decode together, `max_total_tokens` the KV pool (rounded down to
    pages; it bounds what `model.memory` has room for, and is cut to that with a warning). `progress` prints the memory
    budget and a bar to standard error.

    Raises `PromptError`, `ImageError`, `MemoryBudgetError`, `ValueError` or `TypeError` before anything runs for what
    can never run. What fails later fails its own request, with `finish_reason` "error": a picture that cannot be
    decoded, logits that are not finite. Memory that runs out fails the requests of the batch that needed it (one in
    the encoder, those of a prefill batch, those that decode together); the others' keys and values are as they were,
    and they go on. Any other exception, and closing a stream, ends the call. The next one finds every page free: what
    a GPU keeps for it, programs and pool, is let go of where a stage was at work on the pool.
    """
    made = requests.make_all(model, prompts, max_new_tokens, sampling)
    pieces: list[list[Piece]] = [[] for _ in made]
    with tqdm(total=len(made), desc="prompts", disable=not progress) as bar:
        for piece in _run(model, made, max_running_requests, max_total_tokens, progress=progress):
            pieces[piece.index].append(piece)
            bar.update(piece.finish_reason is not None)
    return [join(own, request.length) for request, own in zip(made, pieces, strict=True)]


def stream(
    model: Model,
    prompts: Sequence[Prompt],
    *,
    max_new_tokens: int | Sequence[int] = 128,
    sampling: Sampling | Sequence[Sampling] = GREEDY,
    max_running_requests: int | None = None,
    max_total_tokens: int | None = None,
) -> Iterator[Piece]:
    """As `generate`, token by token as they are made. Closing the iterator early abandons what still runs."""
    made = requests.make_all(model, prompts, max_new_tokens, sampling)
    return _run(model, made, max_running_requests, max_total_tokens)


def score(model: Model, prompts: Sequence[Prompt]) -> list[Tensor]:
    """Logits at every prompt position: f32 [T V] for each prompt, on the model's device.

    Raises `PromptError`, `ImageError` or `TypeError` before anything runs for what can never run, and for the first prompt
    that fails `ImageError` (a picture that cannot be decoded), `MemoryBudgetError` or what PyTorch raises.
    """
    return [_score(model, request) for request in requests.make_all(model, prompts, 1, GREEDY)]


def _score(model: Model, request: Request) -> Tensor:
    """Over a pool of its own, which is free again before the next one is made."""
    memory.check_score(model, request.length)
    table = memory.allocate(model, [request], rows=1, profile=model.memory, reuse=False)
    memory.fit(request, table, model.memory)
    lease = new_lease(model, len(table.free), table.page_size)
    table, rows = stages.admit(table, [request.slots])
    features = {request.index: encode(model, lease.programs, request)} if request.prompt.images else {}
    parts = []
    for batch in segments.cut([(request, rows[0])], limit=PREFILL_TOKENS):
        tokens = pack(table, [segment.chunk() for segment in batch], device=model.device, every=True)
        vision = segments.crop(features, batch)
        lease.pool, logits = lease.programs.prefill(lease.pool, tokens, vision, padded=False)
        table = commit(table, batch)
        parts.append(logits)
    return torch.cat(parts)


def _run(
    model: Model,
    made: Sequence[Request],
    max_running_requests: int | None,
    max_total_tokens: int | None,
    *,
    progress: bool = False,
) -> Iterator[Piece]:
    """Check the limits, which are the caller's, and only then hand out the loop, which runs when it is asked."""
    requests.check_limit("max_running_requests", max_running_requests, 1)
    requests.check_limit("max_total_tokens", max_total_tokens, model.memory.page_size)
    if not made:
        return iter(())
    profile = budget.bound(model.memory, max_total_tokens)
    if progress:
        print(budget.table(profile), file=sys.stderr)
    rows = min(len(made), max_running_requests or MAX_ROWS)
    table = memory.allocate(model, made, rows=rows, profile=profile)
    return _loop(model, [memory.fit(request, table, profile) for request in made], table)


def _loop(model: Model, made: Sequence[Request], table: RequestTable) -> Iterator[Piece]:
    """Lend the loop what it runs on, and take it back however it ends."""
    lease = model.shelf.take(
        len(table.free), lambda: new_lease(model, memory.pool_pages(model, table), table.page_size)
    )
    try:
        yield from Loop(model=model, lease=lease, table=table, waiting=deque(made)).turns()
    finally:
        model.shelf.put(lease, keep=model.pads)
