"""The loop over the stages: prompts in, tokens and text out. Start reading here.

    admit -> (vit -> prefill) in chunks -> sample -> [decode -> sample -> advance] ... -> commit -> release

Rows are admitted as they come free, and the tokens of a request do not depend on who shares its batch.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from functools import partial
from itertools import islice
from typing import Any

import torch
from attrs import define, field, frozen
from torch import Tensor
from tqdm import tqdm

from mllm import requests, stages
from mllm.batch import VisionTokens, decode_batch, pack
from mllm.cache import KVPool
from mllm.errors import ImageError, PromptError
from mllm.model import Model
from mllm.prompts import Prompt
from mllm.requests import Request
from mllm.sampling import Sampling, sampling_batch
from mllm.table import RequestTable
from mllm.tokenizer import TextStream
from mllm.transform import capture

PREFILL_TOKENS = 2048
"""Prompt tokens in one prefill batch: enough to be bound by arithmetic, few enough to bound the activations."""
PAGE_SIZE = {"cpu": 16, "cuda": 64}
MAX_ROWS = 64
"""Rows that decode together unless `max_running_requests` says otherwise."""


@frozen(kw_only=True)
class Completion:
    """What became of one prompt.

    `tokens` are the new ones, an end token included; `text` is what they spell (empty without a tokenizer).
    `finish_reason`: "stop" (an end token), "length" (`max_new_tokens`, or the model's context is full), "capacity"
    (the KV pool cannot hold more of it), or "error", and then `error` says why.
    """

    text: str
    tokens: tuple[int, ...]
    finish_reason: str
    prompt_tokens: int
    error: str | None = None


@frozen(kw_only=True)
class Piece:
    """One new token of prompt `index` and the text that it completes: possibly none, never half a character.

    The last piece of a prompt carries its `finish_reason`. Where that is "error", `token` is -1.
    """

    index: int
    token: int
    text: str
    finish_reason: str | None = None
    error: str | None = None


def generate(
    model: Model,
    prompts: Sequence[Prompt],
    *,
    max_new_tokens: int | Sequence[int] = 128,
    sampling: Sampling | Sequence[Sampling] = Sampling(),  # noqa: B008  (immutable)
    max_running_requests: int | None = None,
    max_total_tokens: int | None = None,
    progress: bool = False,
) -> list[Completion]:
    """Complete every prompt; `max_new_tokens` and `sampling` are one for all or one for each.

    `max_running_requests` bounds the rows that decode together, `max_total_tokens` the KV pool (rounded down to
    pages). Raises `PromptError`, `ImageError`, `ValueError` or `TypeError` before anything runs for what can never
    run; what fails later fails its own request, with `finish_reason` "error".
    """
    made = _requests(model, prompts, max_new_tokens, sampling)
    tokens: list[list[int]] = [[] for _ in made]
    texts: list[list[str]] = [[] for _ in made]
    ends: list[Piece | None] = [None] * len(made)
    with tqdm(total=len(made), desc="prompts", disable=not progress) as bar:
        for piece in _run(model, made, max_running_requests, max_total_tokens):
            if piece.token >= 0:
                tokens[piece.index].append(piece.token)
            texts[piece.index].append(piece.text)
            if piece.finish_reason:
                ends[piece.index] = piece
                bar.update()
    return [
        Completion(
            text="".join(texts[r.index]),
            tokens=tuple(tokens[r.index]),
            finish_reason=end.finish_reason or "",
            prompt_tokens=r.length,
            error=end.error,
        )
        for r, end in zip(made, ends, strict=True)
        if end is not None
    ]


def stream(
    model: Model,
    prompts: Sequence[Prompt],
    *,
    max_new_tokens: int | Sequence[int] = 128,
    sampling: Sampling | Sequence[Sampling] = Sampling(),  # noqa: B008  (immutable)
    max_running_requests: int | None = None,
    max_total_tokens: int | None = None,
) -> Iterator[Piece]:
    """As `generate`, token by token as they are made. Closing the iterator early abandons what still runs."""
    made = _requests(model, prompts, max_new_tokens, sampling)
    return _run(model, made, max_running_requests, max_total_tokens)


def score(model: Model, prompts: Sequence[Prompt]) -> list[Tensor]:
    """Logits at every prompt position: f32 [T V] for each prompt, on the model's device."""
    result = []
    for request in _requests(model, prompts, 1, Sampling()):
        pool, table = _memory(model, [request], rows=1, max_total_tokens=None)
        table, (row,) = stages.admit(table, [request.slots])
        features = _encode(model, [request])
        logits = []
        for pieces in requests.cut([(request, row)], limit=PREFILL_TOKENS):
            pool, table, part = _prefill(model, pool, table, pieces, features, every=True)
            logits.append(part)
        result.append(torch.cat(logits))
    return result


@define(eq=False)
class _Running:
    """A request that holds a row. The one mutable thing here: what was made of the request so far."""

    request: Request
    row: int
    text: TextStream | None
    tokens: list[int] = field(factory=list)

    def push(self, token: int, end_tokens: Sequence[int]) -> Piece:
        """Take the next token, and say what it completes and whether it is the last."""
        if token < 0:
            error = f"the logits after {self.request.length + len(self.tokens)} tokens are not finite"
            return Piece(index=self.request.index, token=-1, text="", finish_reason="error", error=error)
        self.tokens.append(token)
        reason = None
        if token in end_tokens:
            reason = "stop"
        elif len(self.tokens) == self.request.new_tokens:
            reason = self.request.limit_reason
        text = ""
        if self.text is not None:
            text = self.text.push(token) + (self.text.flush() if reason else "")
        return Piece(index=self.request.index, token=token, text=text, finish_reason=reason)


def _run(
    model: Model, made: Sequence[Request], max_running_requests: int | None, max_total_tokens: int | None
) -> Iterator[Piece]:
    """The loop itself."""
    if not made:
        return iter(())
    rows = min(len(made), MAX_ROWS if max_running_requests is None else max_running_requests)
    if rows < 1:
        raise ValueError(f"max_running_requests: expected 1 or more, got {max_running_requests}")
    pool, table = _memory(model, made, rows=rows, max_total_tokens=max_total_tokens)
    return _loop(model, deque(_fit(request, table) for request in made), pool, table)


def _loop(model: Model, waiting: deque[Request], pool: KVPool, table: RequestTable) -> Iterator[Piece]:
    config, page_size = model.config, table.page_size
    step = capture(
        partial(stages.step, model.weights, config=config, ops=model.ops),
        donate=("pool",), carry=("batch",), limit=1024,
    )  # fmt: skip
    running: list[_Running] = []
    while waiting or running:
        table, rows = stages.admit(table, [r.slots for r in islice(waiting, len(table.live))])
        admitted = [_Running(waiting.popleft(), row, model.tokenizer and model.tokenizer.stream()) for row in rows]
        for pool, table, first in _start(model, pool, table, admitted):  # noqa: B020  (donated: taken and given back)
            for run, piece in first:
                yield piece
                if piece.finish_reason:
                    table = stages.release(table, [run.row])
                else:
                    running.append(run)
        if not running:
            continue
        held = [run.row for run in running]
        longest = max(int(table.length[row]) for row in held) + 1
        listed = _listed(table.pages_for(longest), table.pages.shape[1])
        batch = decode_batch(
            table, held, [run.tokens[-1] for run in running], [run.request.layout.delta for run in running],
            size=len(held), listed=listed, device=model.device,
        )  # fmt: skip
        sampling = sampling_batch([run.request.sampling for run in running], size=len(held), device=model.device)
        done: list[_Running] = []
        while not done and longest <= listed * page_size:
            pool, batch, tokens = step(pool, batch, sampling)
            table = stages.commit(table, held, [1] * len(held))
            longest += 1
            for run, token in zip(running, tokens.tolist(), strict=True):
                piece = run.push(token, config.end_tokens)
                yield piece
                if piece.finish_reason:
                    done.append(run)
        table = stages.release(table, [run.row for run in done])
        running = [run for run in running if run not in done]


def _start(
    model: Model, pool: KVPool, table: RequestTable, admitted: Sequence[_Running]
) -> Iterator[tuple[KVPool, RequestTable, list[tuple[_Running, Piece]]]]:
    """Encode and prefill the newly admitted; yields the state, and the first piece of each prompt that is through."""
    by_row = {run.row: run for run in admitted}
    features: dict[int, VisionTokens] = {}
    ready = []
    for run in admitted:
        try:
            features |= _encode(model, [run.request])
            ready.append((run.request, run.row))
        except ImageError as error:
            failed = Piece(index=run.request.index, token=-1, text="", finish_reason="error", error=str(error))
            yield pool, table, [(run, failed)]
    for pieces in requests.cut(ready, limit=PREFILL_TOKENS):
        pool, table, logits = _prefill(model, pool, table, pieces, features)
        settings = sampling_batch([p.request.sampling for p in pieces], size=len(pieces), device=model.device)
        lengths = torch.tensor([p.stop for p in pieces], dtype=torch.int32, device=model.device)
        tokens = stages.sample(logits, settings, lengths, ops=model.ops).tolist()
        first = []
        for piece, token in zip(pieces, tokens, strict=True):
            if piece.completes:
                features.pop(piece.request.index, None)
                run = by_row[piece.row]
                first.append((run, run.push(token, model.config.end_tokens)))
        yield pool, table, first


def _encode(model: Model, admitted: Sequence[Request]) -> dict[int, VisionTokens]:
    """The features of the images of each request that has any, by its index."""
    vision, weights = model.config.vision, model.weights.vision
    if vision is None or weights is None:
        return {}
    return {
        r.index: stages.vit(weights, requests.patch_batch(model, r), config=vision, ops=model.ops)
        for r in admitted
        if r.prompt.images
    }


def _prefill(
    model: Model,
    pool: KVPool,
    table: RequestTable,
    pieces: Sequence[requests.Segment],
    features: dict[int, VisionTokens],
    *,
    every: bool = False,
) -> tuple[KVPool, RequestTable, Tensor]:
    """Prefill one batch of pieces; logits after the last token of each, or after every token."""
    batch = pack(table, [piece.chunk() for piece in pieces], device=model.device, every=every)
    vision = requests.crop(features, pieces)
    pool, logits = stages.prefill(model.weights, pool, batch, vision, config=model.config, ops=model.ops)
    table = stages.commit(table, [p.row for p in pieces], [p.stop - p.start for p in pieces])
    return pool, table, logits


def _memory(
    model: Model, made: Sequence[Request], *, rows: int, max_total_tokens: int | None
) -> tuple[KVPool, RequestTable]:
    """A KV pool and a request table: as large as the `rows` largest requests need, or as `max_total_tokens` says."""
    page_size = PAGE_SIZE.get(model.device.type, 64)
    needed = sorted((-(-r.slots // page_size) for r in made), reverse=True)
    pages = sum(needed[:rows])
    if max_total_tokens is not None:
        if max_total_tokens < page_size:
            raise ValueError(f"max_total_tokens: expected a page of {page_size} or more, got {max_total_tokens}")
        pages = min(pages, max_total_tokens // page_size)
    pool = KVPool.empty(model.config.text, pages=pages, page_size=page_size, device=model.device, dtype=model.dtype)
    return pool, RequestTable.empty(rows=rows, pages=pages, page_size=page_size, row_pages=needed[0])


def _fit(request: Request, table: RequestTable) -> Request:
    """The request, cut to what the pool can hold of it. Raises `PromptError` where that is not even its prompt."""
    if request.slots <= table.row_tokens:
        return request
    if request.length > table.row_tokens:
        what = requests.describe(request.layout)
        raise PromptError(f"prompts[{request.index}]: {what} exceed the KV pool of {table.row_tokens} tokens")
    return request.cut_to(table.row_tokens)


def _listed(needed: int, most: int) -> int:
    """Pages that a decode batch lists per row: a power of two, so that growing rows cause few recordings."""
    return min(1 << (needed - 1).bit_length(), most)


def _requests(model: Model, prompts: Sequence[Prompt], new_tokens: Any, sampling: Any) -> list[Request]:
    """All prompts laid out and checked, before anything runs."""
    if isinstance(prompts, Prompt):
        raise TypeError("prompts: expected a sequence of prompts, got one; pass [prompt]")
    limits = _for_each(new_tokens, int, len(prompts), "max_new_tokens")
    settings = _for_each(sampling, Sampling, len(prompts), "sampling")
    if wrong := [n for n in limits if n < 1]:
        raise ValueError(f"max_new_tokens: expected 1 or more, got {wrong[0]}")
    return [
        requests.make(model, prompt, index=i, new_tokens=n, sampling=s)
        for i, (prompt, n, s) in enumerate(zip(prompts, limits, settings, strict=True))
    ]


def _for_each(value: Any, kind: type, count: int, name: str) -> list[Any]:
    """`value` for every prompt, or its items where it is a sequence with one for each."""
    values = [value] * count if isinstance(value, kind) else list(value)
    if len(values) != count:
        raise ValueError(f"{name}: got {len(values)} values for {count} prompts")
    for item in values:
        if not isinstance(item, kind) or isinstance(item, bool):
            raise TypeError(f"{name}: expected {kind.__name__}, got {item!r}")
    return values
