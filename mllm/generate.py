"""The loop over the stages: prompts in, tokens and text out. Start reading here.

    admit -> vit -> prefill -> sample -> [decode -> sample -> advance] ... -> commit -> release

Rows are admitted as they come free, and the tokens of a request do not depend on who shares its batch.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from functools import partial
from itertools import islice

import torch
from attrs import define, field, frozen
from torch import Tensor
from tqdm import tqdm

from mllm import memory, requests, stages
from mllm.batch import ForwardBatch, SamplingBatch, VisionTokens, decode_batch, pack
from mllm.cache import KVPool
from mllm.errors import ImageError
from mllm.model import Model
from mllm.prompts import Prompt
from mllm.requests import Request, Segment
from mllm.sampling import Sampling, sampling_batch
from mllm.table import RequestTable
from mllm.tokenizer import TextStream
from mllm.transform import capture

PREFILL_TOKENS = 2048
"""Prompt tokens in one prefill batch: enough to be bound by arithmetic, few enough to bound the activations."""
MAX_ROWS = 64
"""Rows that decode together unless `max_running_requests` says otherwise."""
RECORDINGS = 1024
"""Recordings of the decode step that one call may make: a size of batch times a power of two of listed pages."""
GREEDY = Sampling()
INFERENCE = torch.inference_mode()
"""Around whole stages, never around a `yield`, which would hand it to the caller: a small model's step is a tenth
shorter without autograd's part in every call."""


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
    sampling: Sampling | Sequence[Sampling] = GREEDY,
    max_running_requests: int | None = None,
    max_total_tokens: int | None = None,
    progress: bool = False,
) -> list[Completion]:
    """Complete every prompt; `max_new_tokens` and `sampling` are one for all or one for each.

    `max_running_requests` bounds the rows that decode together, `max_total_tokens` the KV pool (rounded down to
    pages). Raises `PromptError`, `ImageError`, `ValueError` or `TypeError` before anything runs for what can never
    run; what fails later fails its own request, with `finish_reason` "error".
    """
    made = requests.make_all(model, prompts, max_new_tokens, sampling)
    pieces: list[list[Piece]] = [[] for _ in made]
    with tqdm(total=len(made), desc="prompts", disable=not progress) as bar:
        for piece in _run(model, made, max_running_requests, max_total_tokens):
            pieces[piece.index].append(piece)
            bar.update(piece.finish_reason is not None)
    return [_completion(request, own) for request, own in zip(made, pieces, strict=True)]


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
    """Logits at every prompt position: f32 [T V] for each prompt, on the model's device."""
    scores = []
    for request in requests.make_all(model, prompts, 1, GREEDY):
        pool, table = memory.allocate(model, [request], rows=1, max_total_tokens=None)
        table, rows = stages.admit(table, [request.slots])
        features = {request.index: _encode(model, request)} if request.prompt.images else {}
        parts = []
        for segments in requests.cut([(request, rows[0])], limit=PREFILL_TOKENS):
            pool, table, logits = _prefill(model, pool, table, segments, features, every=True)
            parts.append(logits)
        scores.append(torch.cat(parts))
    return scores


def _run(
    model: Model, made: Sequence[Request], max_running_requests: int | None, max_total_tokens: int | None
) -> Iterator[Piece]:
    """Check the limits, which are the caller's, and only then hand out the loop, which runs when it is asked."""
    requests.check_limit("max_running_requests", max_running_requests, 1)
    if not made:
        return iter(())
    rows = min(len(made), max_running_requests or MAX_ROWS)
    pool, table = memory.allocate(model, made, rows=rows, max_total_tokens=max_total_tokens)
    return _loop(model, deque(memory.fit(request, table) for request in made), pool, table)


@define(eq=False)
class _Run:
    """A request that holds a row. The one mutable thing here: what was made of the request so far."""

    request: Request
    row: int
    text: TextStream | None
    tokens: list[int] = field(factory=list)

    def push(self, token: int, end_tokens: Sequence[int]) -> Piece:
        """Take the next token, and say what it completes and whether it is the last."""
        if token < 0:
            return self.fail(f"the logits after {self.request.length + len(self.tokens)} tokens are not finite")
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

    def fail(self, error: str) -> Piece:
        """End the request here, and only it."""
        text = self.text.flush() if self.text else ""
        return Piece(index=self.request.index, token=-1, text=text, finish_reason="error", error=error)


def _loop(model: Model, waiting: deque[Request], pool: KVPool, table: RequestTable) -> Iterator[Piece]:
    """The loop itself. Each turn admits what fits, then runs one prefill batch or else one decode step."""
    step = INFERENCE(capture(partial(_step, model), donate=("pool",), carry=("batch",), limit=RECORDINGS))
    runs: dict[int, _Run] = {}  # by row
    prompts: deque[list[Segment]] = deque()  # the admitted prompts' tokens, in batches to prefill
    features: dict[int, VisionTokens] = {}  # of their images, by request
    decoding: list[_Run] = []  # the runs whose prompts are through,
    batch: ForwardBatch | None = None  # their batch, the carry of decode: None once it has to be made anew,
    longest = 0  # and the tokens of their longest context
    while waiting or runs:
        pieces: list[tuple[int, Piece]] = []
        if waiting and batch is None:
            table, rows = stages.admit(table, [r.slots for r in islice(waiting, len(table.live))])
            for row in rows:
                runs[row] = _Run(waiting.popleft(), row, model.tokenizer.stream() if model.tokenizer else None)
            pieces = _encode_all(model, [runs[row] for row in rows], features)
            failed = {row for row, _ in pieces}
            prompts.extend(requests.cut([(runs[r].request, r) for r in rows if r not in failed], limit=PREFILL_TOKENS))
        drawn: dict[int, int] = {}  # the next token of each row that has one
        if prompts:
            pool, table, drawn = _prefill_and_draw(model, pool, table, prompts.popleft(), features)
            batch = None
        elif len(pieces) < len(runs):
            if batch is None or batch.pages.shape[1] < table.pages_for(longest + 1):
                decoding = [run for run in runs.values() if run.tokens]
                longest = max(int(table.length[run.row]) for run in decoding)
                batch, sampling = _decode_batch(model, table, decoding, longest + 1)
            pool, batch, tokens = step(pool, batch, sampling)
            longest += 1
            table = stages.commit(table, [run.row for run in decoding], [1] * len(decoding))
            drawn = dict(zip((run.row for run in decoding), tokens.tolist(), strict=False))
        pieces += [(row, runs[row].push(token, model.config.end_tokens)) for row, token in drawn.items()]
        yield from (piece for _, piece in pieces)
        if done := [row for row, piece in pieces if piece.finish_reason]:
            table = stages.release(table, done)
            batch = None
            for row in done:
                del runs[row]


@INFERENCE
def _encode_all(model: Model, runs: Sequence[_Run], features: dict[int, VisionTokens]) -> list[tuple[int, Piece]]:
    """Put the features of every run's images into `features`; a picture that cannot be decoded ends its run."""
    failed = []
    for run in runs:
        try:
            if run.request.prompt.images:
                features[run.request.index] = _encode(model, run.request)
        except ImageError as error:
            failed.append((run.row, run.fail(str(error))))
    return failed


def _encode(model: Model, request: Request) -> VisionTokens:
    """The features of the images of one request."""
    if model.config.vision is None or model.weights.vision is None:
        raise ImageError("a model that reads only text was given an image")
    patches = requests.patch_batch(model, request)
    return stages.vit(model.weights.vision, patches, config=model.config.vision, ops=model.ops)


def _prefill(
    model: Model,
    pool: KVPool,
    table: RequestTable,
    segments: Sequence[Segment],
    features: dict[int, VisionTokens],
    *,
    every: bool = False,
) -> tuple[KVPool, RequestTable, Tensor]:
    """Run one batch of prompt segments; logits after the last token of each, or after every token."""
    batch = pack(table, [segment.chunk() for segment in segments], device=model.device, every=every)
    vision = requests.crop(features, segments)
    pool, logits = stages.prefill(model.weights, pool, batch, vision, config=model.config, ops=model.ops)
    table = stages.commit(table, [s.row for s in segments], [s.stop - s.start for s in segments])
    return pool, table, logits


@INFERENCE
def _prefill_and_draw(
    model: Model, pool: KVPool, table: RequestTable, segments: Sequence[Segment], features: dict[int, VisionTokens]
) -> tuple[KVPool, RequestTable, dict[int, int]]:
    """Run one batch of prompt segments; the first new token of each row whose prompt ends in it."""
    pool, table, logits = _prefill(model, pool, table, segments, features)
    settings = sampling_batch([s.request.sampling for s in segments], size=len(segments), device=model.device)
    lengths = torch.tensor([s.stop for s in segments], dtype=torch.int32, device=model.device)
    tokens = stages.sample(logits, settings, lengths, ops=model.ops).tolist()
    through = [(s, token) for s, token in zip(segments, tokens, strict=True) if s.completes]
    for segment, _ in through:
        features.pop(segment.request.index, None)
    return pool, table, {segment.row: token for segment, token in through}


def _step(
    model: Model, pool: KVPool, batch: ForwardBatch, sampling: SamplingBatch
) -> tuple[KVPool, ForwardBatch, Tensor]:
    """One decode step, with the ops that are fastest for as many rows as the batch has."""
    ops = model.step_ops(len(batch.lengths))
    return stages.step(model.weights, pool, batch, sampling, config=model.config, ops=ops)


def _decode_batch(
    model: Model, table: RequestTable, runs: Sequence[_Run], longest: int
) -> tuple[ForwardBatch, SamplingBatch]:
    """The carry of decode for these rows, with room for contexts of `longest` tokens, and their settings."""
    size, listed = memory.decode_shape(model.device, len(runs), table.pages_for(longest))
    batch = decode_batch(
        table,
        [run.row for run in runs],
        [run.tokens[-1] for run in runs],
        [run.request.layout.delta for run in runs],
        size=size,
        listed=min(listed, table.pages.shape[1]),
        device=model.device,
    )
    return batch, sampling_batch([run.request.sampling for run in runs], size=size, device=model.device)


def _completion(request: Request, pieces: Sequence[Piece]) -> Completion:
    last = pieces[-1]
    return Completion(
        text="".join(piece.text for piece in pieces),
        tokens=tuple(piece.token for piece in pieces if piece.token >= 0),
        finish_reason=last.finish_reason or "",
        prompt_tokens=request.length,
        error=last.error,
    )
