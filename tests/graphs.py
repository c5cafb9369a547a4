"""Recorders for a machine without a GPU, which overwrite what CUDA graphs overwrite, and fail as they fail."""

from __future__ import annotations

import contextlib
import itertools
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any
from weakref import WeakSet

import pytest
import torch
from attrs import define, field
from torch import Tensor

from mllm.state import State, leaves, map_leaves
from mllm.transform import Recorder, Run, cuda_recorder

GARBAGE = -77


def buffers_of(run: Run) -> dict[int, Tensor]:
    """The tensors that the run of a recording works on, which are those that it closes over, by identity."""
    return {id(t): t for cell in run.__closure__ or () for t in leaves(_values(cell.cell_contents))}


def _values(thing: Any) -> Any:
    """The trees in what a closure holds: dicts of them, and the attributes of an object."""
    if isinstance(thing, dict):
        return tuple(map(_values, thing.values()))
    if isinstance(thing, (State, Tensor, tuple, list)):
        return thing
    return tuple(map(_values, vars(thing).values())) if hasattr(thing, "__dict__") else ()


def static_recorder(run: Run) -> tuple[Any, Run]:
    """What a CUDA graph does: the recording has outputs of its own, and every replay overwrites them.

    Tensors that the function handed through are those of the recording's buffers; others live in static memory,
    which each replay fills with garbage first, so that a result that was not copied out shows.
    """
    first, buffers = run(), buffers_of(run)
    static = _static(first, buffers)
    return first, lambda: _rerun(run, static, buffers)


def _static(out: Any, buffers: dict[int, Tensor]) -> Any:
    return map_leaves(lambda t: t if id(t) in buffers else torch.full_like(t, GARBAGE), out)


def _rerun(run: Run, static: Any, buffers: dict[int, Tensor]) -> Any:
    """Run again, in the place of a replay, and put the results where the recording has them."""
    for t in leaves(static):
        if id(t) not in buffers:
            t.fill_(GARBAGE)
    for to, new in zip(leaves(static), leaves(run()), strict=True):
        if id(to) not in buffers:
            to.copy_(new)
        else:
            assert to is new
    return static


@define(eq=False)
class Gpu:
    """PyTorch's streams, graphs, and memory pools of graphs, as far as a failure shows in them; its `record` is that of
    `cuda_recorder`. After torch/cuda/graphs.py, CUDAGraph.cpp and CUDACachingAllocator.cpp.

    `full`: the next recording has no memory to be made executable. `stream` is the current one, `waits` says which
    waited for which. `underway`: pools that are recorded to, `users`: graphs that hold a pool, `pools`: that recordings
    were made in, `graphs`: those that are there, whole or not.
    """

    full: bool = False
    stream: Stream = field(init=False)
    waits: list[tuple[str, str]] = field(factory=list, init=False)
    underway: set[int] = field(factory=set, init=False)
    users: Counter[int] = field(factory=Counter, init=False)
    pools: list[int] = field(factory=list, init=False)
    graphs: WeakSet[Graph] = field(factory=WeakSet, init=False)
    recording: Graph | None = field(default=None, init=False)
    buffers: dict[int, Tensor] = field(factory=dict, init=False)
    recorder: Recorder = field(factory=cuda_recorder, init=False)
    handles: Iterator[int] = field(factory=lambda: itertools.count(1), init=False)

    def __attrs_post_init__(self) -> None:
        self.stream = Stream(self, "home")

    def record(self, run: Run) -> tuple[Any, Run]:
        self.buffers = buffers_of(run)

        def watched() -> Any:
            out = run()
            if self.recording is not None:
                self.recording.ran = True
                self.recording.run, self.recording.out = run, (out := _static(out, self.buffers))
            return out

        with pytest.MonkeyPatch.context() as patch:
            for name, value in self._names().items():
                patch.setattr(torch.cuda, name, value)
            try:
                return self.recorder(watched)
            finally:
                self.buffers = {}

    def _names(self) -> dict[str, Callable[..., Any]]:
        return {
            "CUDAGraph": lambda: Graph(self), "graph": lambda graph, pool: Recording(self, graph, pool),
            "graph_pool_handle": lambda: next(self.handles), "current_stream": lambda: self.stream, "stream": self.on,
        }  # fmt: skip

    @contextlib.contextmanager
    def on(self, stream: Stream) -> Iterator[None]:
        before, self.stream = self.stream, stream
        try:
            yield
        finally:
            self.stream = before

    def begin(self, pool: int) -> None:
        if pool in self.underway:
            raise RuntimeError("beginAllocateToPool: already recording to mempool_id")
        if pool in self.users and not self.users[pool]:  # as where a tensor in it outlived its graphs
            raise RuntimeError("it->second->use_count > 0 INTERNAL ASSERT FAILED")
        self.underway.add(pool)
        self.users[pool] += 1
        self.pools.append(pool)

    def end(self, pool: int) -> None:
        if pool not in self.underway:
            raise RuntimeError("endAllocatePool: not currently recording to mempool_id")
        self.underway.remove(pool)

    def release(self, pool: int) -> None:
        self.users[pool] -= 1
        if self.users[pool] < 0:
            raise SystemError("uc >= 0 INTERNAL ASSERT FAILED, in a destructor, which ends the process")


@define(eq=False)
class Stream:
    gpu: Gpu
    name: str

    def wait_stream(self, other: Stream) -> None:
        self.gpu.waits.append((self.name, other.name))


@define(eq=False)
class Graph:
    """`torch.cuda.CUDAGraph`. What runs while it is recorded leaves the buffers as they were. `ran`: all of its run was
    recorded; `whole`: and it can be replayed."""

    gpu: Gpu
    held: int | None = None
    ran: bool = False
    whole: bool = False
    ended: bool = False
    saved: list[tuple[Tensor, Tensor]] = field(factory=list)
    run: Run = field(default=lambda: None)
    out: Any = None

    def __attrs_post_init__(self) -> None:
        self.gpu.graphs.add(self)

    def capture_begin(self, pool: int) -> None:
        self.gpu.begin(pool)
        self.held, self.gpu.recording = pool, self
        self.saved = [(t, t.clone()) for t in self.gpu.buffers.values()]

    def capture_end(self) -> None:
        gpu, self.gpu.recording, pool = self.gpu, None, self.held or 0
        for t, before in self.saved:
            t.copy_(before)
        self.saved.clear()
        gpu.end(pool)
        self.ended = True
        if gpu.full:
            gpu.full = False
            raise RuntimeError("CUDA error: out of memory")
        self.whole = self.ran

    def replay(self) -> None:
        _rerun(self.run, self.out, buffers_of(self.run))

    def reset(self) -> None:
        if self.held is not None and self.ended:
            self.gpu.release(self.held)
        self.ended = False

    def __del__(self) -> None:
        self.reset()


class Recording:
    """`torch.cuda.graph`."""

    def __init__(self, gpu: Gpu, graph: Graph, pool: int) -> None:
        self.gpu, self.cuda_graph, self.pool = gpu, graph, pool
        self.capture_stream = Stream(gpu, "side")

    def __enter__(self) -> None:
        if self.gpu.underway:  # it empties the cache of the allocator
            raise RuntimeError("captures_underway.empty() INTERNAL ASSERT FAILED")
        self.before, self.gpu.stream = self.gpu.stream, self.capture_stream
        self.cuda_graph.capture_begin(self.pool)

    def __exit__(self, *args: object) -> None:
        self.cuda_graph.capture_end()
        self.gpu.stream = self.before
