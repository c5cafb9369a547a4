"""The decode loop of a case: its steps one at a time, and back to its start without prefilling again."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from attrs import define, field
from torch import Tensor

from benchmarks import points
from mllm import stages, state
from mllm.batch import ForwardBatch, pack, slots_of
from mllm.cache import KVPool
from mllm.kernels.reference import REFERENCE
from mllm.model import Model
from mllm.prompts import Expanded
from mllm.segments import chunk
from mllm.table import RequestTable
from mllm.transform import capture


@define(eq=False)
class Loop:
    """Rows that decode greedily after their prompts. `step` takes and returns (pool, batch) as the stages do."""

    model: Model
    layouts: list[Expanded]
    first: Tensor  # i32 [B], the tokens that prefill chose
    pool: KVPool
    table: RequestTable
    start: ForwardBatch  # copied into `batch` at every `rewind`, never run itself
    batch: ForwardBatch
    run: Any
    tokens: list[Tensor] = field(factory=list)  # of the steps since `rewind`

    @classmethod
    def make(cls, model: Model, *, rows: int, input_len: int, output_len: int, mode: str, prompt: str | None) -> Loop:
        """Prefill `rows` prompts; `mode` "graph" captures the step (on a CPU: its stand-in)."""
        layouts = [points.lay_out(model, t) for t in points.text_tokens(model, rows, input_len, prompt)]
        total = input_len + output_len
        pool, table, admitted = points.memory(model, rows, total)
        pool, table, first = points.fill(model, pool, table, admitted, layouts)
        start = points.carry(model, table, admitted, first.tolist(), [lay.delta for lay in layouts], total)
        eager = partial(stages.step, model.weights, config=model.config, ops=model.step_ops(rows))
        step = capture(eager, donate=("pool",), carry=("batch",)) if mode == "graph" else eager
        sampling = points.greedy(model, rows)
        run = lambda pool, batch: step(pool, batch, sampling)  # noqa: E731
        return cls(model, layouts, first, pool, table, start, state.clone(start), run)

    def rewind(self) -> None:
        self.batch = state.clone(self.start)
        self.tokens = []

    def arguments(self) -> tuple[tuple[KVPool, ForwardBatch], dict[str, Any]]:
        return (self.pool, self.batch), {}

    def step(self, pool: KVPool, batch: ForwardBatch) -> Tensor:
        """One step; keeps what comes back for the next one."""
        self.pool, self.batch, tokens = self.run(pool, batch)
        self.tokens.append(tokens)
        return tokens

    def steps(self, count: int) -> None:
        for _ in range(count):
            self.step(self.pool, self.batch)

    def prefill_again(self) -> None:
        """Prefill all prompts into a pool of their own; for who needs the time of it."""
        pool, table, rows = points.memory(self.model, len(self.layouts), len(self.layouts[0].tokens))
        points.fill(self.model, pool, table, rows, self.layouts)

    def check(self, row: int) -> tuple[float, float]:
        """How wrong a row went: (slack of its tokens, error of its keys and values), 0 where all is right.

        slack: how far a token lies below the best one, at most, in standard deviations of the logits.
        error: of the keys and values that the steps left in the pool, relative to the largest. They tell more than the
        tokens: a model of random weights with tied embeddings repeats its last token, whatever it attends to.
        The judge is one prefill of the whole text by the reference ops, which shares neither steps nor pool.
        """
        model, layout = self.model, self.layouts[row]
        made = [int(self.first[row]), *(int(tokens[row]) for tokens in self.tokens)]
        text = [*layout.tokens.tolist(), *made[:-1]]
        pool, table, rows = points.memory(model, 1, len(text))
        batch = pack(table, [chunk(points.lay_out(model, text), rows[0])], device=model.device)
        wanted = torch.arange(len(layout.tokens) - 1, len(text), device=model.device)
        batch = state.replace(batch, last=wanted)
        pool, logits = stages.prefill(model.weights, pool, batch, config=model.config, ops=REFERENCE)
        chosen = logits.gather(1, torch.tensor(made, device=logits.device).unsqueeze(1)).squeeze(1)
        slack = float(((logits.amax(-1) - chosen) / logits.std(-1)).max())
        mine = slots_of(self.table, row, len(layout.tokens), len(text)).to(model.device)
        theirs = slots_of(table, rows[0], len(layout.tokens), len(text)).to(model.device)
        if not len(mine):
            return slack, 0.0
        pairs = ((self.pool.keys, pool.keys), (self.pool.values, pool.values))
        return slack, max(points.relative(a.flatten(1, 2)[:, mine], b.flatten(1, 2)[:, theirs]) for a, b in pairs)
