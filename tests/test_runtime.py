"""The whole runtime as a state machine: stages in any order against a dict, in which each prompt is alone in the world."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch
from attrs import define, evolve, field
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from tiny import IMAGE, Tiny, examples, picture, words

import mllm
from mllm import requests, segments, stages
from mllm.batch import VisionTokens, decode_batch, pack
from mllm.cache import KVPool
from mllm.requests import Request
from mllm.sampling import Sampling, sampling_batch
from mllm.segments import Segment
from mllm.state import alias, is_donated
from mllm.table import RequestTable

NEW = 6  # tokens at most for each prompt
PAGE = 4


@cache
def prompts() -> tuple[mllm.Prompt, ...]:
    """Short and long text, one picture, two that touch, one behind text."""
    a, b, c = picture(16, 8, 1), picture(24, 16, 2), picture(8, 8, 3)
    return (
        mllm.Prompt(words(1, 1)), mllm.Prompt(words(7, 2)), mllm.Prompt(words(19, 3)), mllm.Prompt([IMAGE, 5], [a]),
        mllm.Prompt([3, IMAGE, IMAGE, 4], [b, c]), mllm.Prompt([*words(5, 4), IMAGE, *words(3, 5)], [b]),
    )  # fmt: skip


def settings(index: int) -> Sampling:
    """Every other prompt draws its tokens."""
    return Sampling(temperature=index % 2 * 1.5, seed=index)


@define
class Expected:
    """What the dict knows of one live row: which prompt it is, how much of it ran, and the tokens that came of it."""

    prompt: int
    request: Request
    features: VisionTokens | None
    ran: int = 0
    tokens: list[int] = field(factory=list)


class RuntimeMachine(RuleBasedStateMachine):
    model: mllm.Model
    alone: tuple[tuple[int, ...], ...]  # the tokens of each prompt when it runs by itself

    @initialize(rows=st.integers(1, 4), pages=st.integers(6, 30))
    def start(self, rows: int, pages: int) -> None:
        text, model = self.model.config.text, self.model
        self.rows, self.pages = rows, pages
        self.table = RequestTable.empty(rows=rows, pages=pages, page_size=PAGE)
        self.pool = KVPool.empty(text, pages=pages, page_size=PAGE, device="cpu", dtype=model.dtype)
        self.live: dict[int, Expected] = {}
        self.steps = 0

    # the rules

    @precondition(lambda self: len(self.live) < self.rows)
    @rule(which=st.lists(st.integers(0, len(prompts()) - 1), min_size=1, max_size=3))
    def admit(self, which: list[int]) -> None:
        """As many as there are rows and pages for, in order."""
        made = [self.request(index) for index in which]
        made = [r for r in made if -(-r.slots // PAGE) <= self.pages]  # the others are refused, see test_table
        free, fitting = self.pages - self.held(), 0
        for r in made[: self.rows - len(self.live)]:
            free -= -(-r.slots // PAGE)
            if free < 0:
                break
            fitting += 1
        self.table, admitted = stages.admit(self.table, [r.slots for r in made])
        assert len(admitted) == fitting
        for row, r in zip(admitted, made, strict=False):
            self.live[row] = Expected(r.index, r, self.encode(r))

    @precondition(lambda self: self.unfinished())
    @rule(
        data=st.data(), whole=st.booleans(),
        fault=st.sampled_from([*[None] * 12, "embed", "attend_", "norm_gate", "head"]),
    )  # fmt: skip
    def prefill(self, data: st.DataObject, whole: bool, fault: str | None) -> None:
        """Any part of any prompts, in one batch; with a fault, nothing has happened."""
        parts = []
        for row in data.draw(st.lists(st.sampled_from(self.unfinished()), min_size=1, unique=True)):
            own = self.live[row]
            left = own.request.length - own.ran
            stop = own.ran + (left if whole else data.draw(st.integers(1, left)))
            parts.append(Segment(request=own.request, row=row, start=own.ran, stop=stop))
        features = {s.request.index: f for s in parts if (f := self.live[s.row].features)}
        model, kept = self.broken(fault), alias(self.pool)
        batch = pack(self.table, [s.chunk() for s in parts], device="cpu")
        vision = segments.crop(features, parts)
        try:
            self.pool, logits = stages.prefill(
                model.weights, self.pool, batch, vision, config=model.config, ops=model.ops
            )
        except torch.OutOfMemoryError:
            self.pool = kept
            return
        assert fault is None
        self.table = stages.commit(self.table, [s.row for s in parts], [s.stop - s.start for s in parts])
        drawn = self.sample(logits, parts)
        for segment, token in zip(parts, drawn, strict=True):
            self.live[segment.row].ran = segment.stop
            if segment.completes:
                self.push(segment.row, token)

    @precondition(lambda self: self.decoding())
    @rule(
        data=st.data(), pad=st.integers(0, 2), steps=st.integers(1, NEW),
        fault=st.sampled_from([*[None] * 12, "attend_", "head", "sample", "advance_"]),
    )  # fmt: skip
    def decode(self, data: st.DataObject, pad: int, steps: int, fault: str | None) -> None:
        """Some steps, each of any rows whose prompts are through; where one has a fault, it has not happened."""
        for _ in range(steps):
            if rows := self.decoding():
                self.step(data.draw(st.lists(st.sampled_from(rows), min_size=1, unique=True)), pad, fault)

    def step(self, rows: list[int], pad: int, fault: str | None) -> None:
        """One decode step."""
        runs = [self.live[row] for row in rows]
        batch = decode_batch(
            self.table, rows, [run.tokens[-1] for run in runs], [run.request.layout.delta for run in runs],
            size=len(rows) + pad, listed=self.table.pages.shape[1], device="cpu",
        )  # fmt: skip
        sampling = sampling_batch([settings(run.prompt) for run in runs], size=len(rows) + pad, device="cpu")
        model, kept = self.broken(fault), alias(self.pool)
        try:
            self.pool, batch, tokens = stages.step(
                model.weights, self.pool, batch, sampling, config=model.config, ops=model.ops
            )
        except torch.OutOfMemoryError:
            self.pool = kept
            return
        assert fault is None
        self.table = stages.commit(self.table, rows, [1] * len(rows))
        for row, token in zip(rows, tokens.tolist(), strict=False):
            self.push(row, token)

    @precondition(lambda self: self.through())
    @rule()
    def release_what_is_through(self) -> None:
        self.release(self.through())

    @precondition(lambda self: self.live)
    @rule(data=st.data())
    def abort(self, data: st.DataObject) -> None:
        """Rows in the midst of their prompt or their answer."""
        self.release(data.draw(st.lists(st.sampled_from(sorted(self.live)), min_size=1, max_size=2, unique=True)))

    def release(self, rows: list[int]) -> None:
        self.table = stages.release(self.table, rows)
        for row in rows:
            del self.live[row]

    # what holds after every step

    @invariant()
    def pages_are_conserved(self) -> None:
        owned = self.table.pages[self.table.pages > 0].tolist()
        assert sorted(owned + self.table.free[: self.table.n_free].tolist()) == list(range(1, self.pages + 1))
        assert len(owned) == self.held()

    @invariant()
    def the_table_is_what_the_dict_says(self) -> None:
        assert self.table.live.nonzero().flatten().tolist() == sorted(self.live)
        for row, own in self.live.items():
            assert int(self.table.length[row]) == own.ran + max(len(own.tokens) - 1, 0)
            assert tuple(own.tokens) == self.alone[own.prompt][: len(own.tokens)]
        assert not is_donated(self.pool)

    # helpers

    def held(self) -> int:
        return sum(-(-own.request.slots // PAGE) for own in self.live.values())

    def unfinished(self) -> list[int]:
        return [row for row, own in self.live.items() if own.ran < own.request.length]

    def decoding(self) -> list[int]:
        return [row for row, own in self.live.items() if 0 < len(own.tokens) < NEW]

    def through(self) -> list[int]:
        return [row for row, own in self.live.items() if len(own.tokens) == NEW]

    def request(self, index: int) -> Request:
        return requests.make(self.model, prompts()[index], index=index, new_tokens=NEW, sampling=settings(index))

    def encode(self, request: Request) -> VisionTokens | None:
        vision, weights = self.model.config.vision, self.model.weights.vision
        if not request.prompt.images or vision is None or weights is None:
            return None
        return stages.vit(weights, requests.patch_batch(self.model, request), config=vision, ops=self.model.ops)

    def sample(self, logits: torch.Tensor, parts: list[Segment]) -> list[int]:
        sampling = sampling_batch([s.request.sampling for s in parts], size=len(parts), device="cpu")
        lengths = torch.tensor([s.stop for s in parts], dtype=torch.int32)
        return stages.sample(logits, sampling, lengths, ops=self.model.ops).tolist()

    def push(self, row: int, token: int) -> None:
        self.live[row].tokens.append(token)

    def broken(self, op: str | None) -> mllm.Model:
        """The model, with an op that has no memory; it fails at its first call, or at its second if there is one."""
        if op is None:
            return self.model
        self.steps += 1
        real, left = getattr(self.model.ops, op), [self.steps % 2 if op in ("attend_", "norm_gate") else 0]

        def fails(*args: Any, **kwargs: Any) -> Any:
            if left[0] == 0:
                raise torch.OutOfMemoryError("no memory")
            left[0] -= 1
            return real(*args, **kwargs)

        return evolve(self.model, ops=evolve(self.model.ops, **{op: fails}), decode_ops=None)


@pytest.fixture
def machine(vision_model: Tiny) -> type[RuntimeMachine]:
    """The machine for the tiny Qwen3-VL."""
    model = vision_model.ours
    alone = tuple(
        mllm.generate(model, [p], max_new_tokens=NEW, sampling=settings(i))[0].tokens for i, p in enumerate(prompts())
    )
    return type("Machine", (RuntimeMachine,), {"model": model, "alone": alone})


def test_stages_in_any_order_with_faults_and_aborts_give_each_prompt_its_own_tokens(
    machine: type[RuntimeMachine],
) -> None:
    """200 runs of up to 50 steps; 2,000 with --thorough."""
    from hypothesis.stateful import run_state_machine_as_test

    with torch.inference_mode():
        run_state_machine_as_test(machine, settings=examples(200, stateful_step_count=50))
