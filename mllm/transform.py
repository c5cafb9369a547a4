"""`capture`: a CUDA graph as a function transformation, as `jax.jit` is one to compiled code.

    step = capture(partial(stages.step, weights, config=config, ops=ops), donate=("pool",), carry=("batch",))
    pool, batch, tokens = step(pool, batch, sampling)         # recorded at the first call, replayed after it

On a CPU the same rules hold, with the function run again in place of a replay, so every rule is tested without a GPU.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Sequence
from typing import Any, cast
from weakref import WeakSet, ref

import torch
from torch import Tensor

from mllm.errors import CaptureError
from mllm.state import State, Tree, alias, check_alive, clone, donate, is_donated, leaves, map_leaves, signature

Run = Callable[[], Tree]
Recorder = Callable[[Run], tuple[Tree, Run]]
"""Runs a function once, for its result, and records it: (that result, a replay that returns the outputs)."""

_donate = donate  # `capture` has a parameter of that name
_UNKNOWN = object()  # lies in the buffers of an argument: what may change, or some of one and some of another


def capture(
    fn: Callable[..., Tree],
    *,
    donate: Sequence[str] = (),
    carry: Sequence[str] = (),
    limit: int = 32,
    evict: bool = False,
    recorder: Recorder | None = None,
) -> Callable[..., Tree]:
    """Record `fn` once per signature (structure, shapes, dtypes, devices, plain values) and replay it after that.

    Arguments named in `donate` and `carry` are states that `fn` takes and hands back, updated in place:

    * a donated one (the KV pool) stays where it lies, and the recording works with no other;
    * a carried one (the decode batch) lives in the recording's buffers. The one that the last call returned is
      already there; any other is copied in, and the one that was there, if somebody still holds it, is dead.

    Every other argument is copied into the recording's buffers; a state object that comes again is not copied
    again, since nothing may have changed it. New results are copied out, so what a call returned is not touched
    by the next one.

    A signature beyond `limit` is refused, or with `evict` takes the place of the recording that was used the longest
    ago. Recordings of one function share the memory of their intermediate results; several functions do, too, when
    they are given one `recorder` (`cuda_recorder`).

    Raises `CaptureError`, before it takes anything: for a donated argument that lies elsewhere than at the
    recording, for a signature beyond `limit`, and when `fn` does not hand back what it takes. What `fn` raises goes on
    to the caller. At a first call nothing was taken then, nor recorded, and the bytes of a donated argument are what
    `fn` had written; at a replay the donated and the carried ones are dead.
    """
    parameters = inspect.signature(fn)
    name = getattr(fn, "func", fn).__name__
    if limit < 1:
        raise CaptureError(f"limit={limit}: {name} needs at least one recording")
    if unknown := sorted({*donate, *carry} - parameters.parameters.keys()):
        raise CaptureError(f"{name} has no argument {unknown}; it has {list(parameters.parameters)}")
    bind = _binder(parameters)
    recordings: dict[Any, _Recording] = {}
    recorders = [recorder] if recorder is not None else []

    def captured(*args: Any, **kwargs: Any) -> Tree:
        given = bind(args, kwargs)
        if recordings and (latest := next(reversed(recordings.values()))).holds(given):
            return latest.run(given)  # as in a loop, whose GPU waits: there is no need of a signature
        key = tuple((argument, signature(value)) for argument, value in given.items())
        recording = recordings.pop(key, None)
        if recording is not None:
            recordings[key] = recording  # the dict's order is that of their last use
            return recording.call(given)
        if len(recordings) >= limit:
            if not evict:
                raise CaptureError(_beyond_limit(name, limit, key, list(recordings)))
            recordings.pop(next(iter(recordings)))
        if not recorders:  # one for all recordings, so that they share memory; which kind, the first call shows
            recorders.append(_recorder_for(given))
        recording = _Recording(name, tuple(donate), tuple(carry))
        out = recording.record(fn, given, recorders[0])
        recordings[key] = recording
        return out

    functools.update_wrapper(captured, getattr(fn, "func", fn))
    captured.recordings = recordings  # type: ignore[attr-defined]
    return captured


def _binder(parameters: inspect.Signature) -> Callable[[tuple[Any, ...], dict[str, Any]], dict[str, Any]]:
    """Arguments by name, in order, with defaults, as `Signature.bind` has them, for a fifth of its time."""
    known = parameters.parameters
    plain = all(p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY) for p in known.values())
    placed = [name for name, p in known.items() if p.kind is p.POSITIONAL_OR_KEYWORD]
    defaults = {name: p.default for name, p in known.items() if p.default is not p.empty}

    def bind(args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
        named = dict(zip(placed, args, strict=False))
        found = defaults | named | kwargs
        if plain and len(args) == len(named) and len(found) == len(known) and named.keys().isdisjoint(kwargs):
            return {name: found[name] for name in known} if kwargs or defaults else named
        bound = parameters.bind(*args, **kwargs)  # which says what is wrong
        bound.apply_defaults()
        return bound.arguments

    return bind


class _Recording:
    """One signature of one captured function: its buffers, and what lies in them.

    `present`: of each argument, a plain value or a weak reference to the state; what a caller has done with is let go of.
    """

    def __init__(self, name: str, donated: tuple[str, ...], carried: tuple[str, ...]) -> None:
        self.name, self.donated, self.carried = name, donated, carried

    def record(self, fn: Callable[..., Tree], given: dict[str, Any], recorder: Recorder) -> Tree:
        """The first call: run for real, keep the recording, take the arguments."""
        own = {k: v if k in self.donated else clone(v) for k, v in given.items()}
        self.buffers = buffers = {k: alias(v) for k, v in own.items()}  # donating `given` must not empty them
        # not by way of `self`, which holds the replay: a cycle would keep the pool until the garbage collector comes
        first, self.replay = recorder(lambda: fn(**{k: alias(v) for k, v in buffers.items()}))
        self.held = {id(t): k for k in (*self.donated, *self.carried) for t in leaves(self.buffers[k])}
        came_back = {self.held[id(t)] for t in leaves(first) if id(t) in self.held}
        if lost := sorted({*self.donated, *self.carried} - came_back):
            raise CaptureError(
                f"{self.name} does not hand back {lost}, which capture was told that it takes; it hands back "
                f"{sorted(came_back) or 'none of its arguments'}"
            )
        self.present = {k: _known(v) for k, v in given.items()}
        self._take(given)
        lent = {id(t) for v in buffers.values() for t in leaves(v)} - self.held.keys()  # overwritten by the next call
        return self._note(map_leaves(lambda t: t.clone() if id(t) in lent else t, first))

    def holds(self, given: dict[str, Any]) -> bool:
        """Whether each argument is the object that lies there, and none may have changed since. Raises `DonatedError` for
        one that is dead."""
        for argument, value in given.items():
            if isinstance(value, State):
                if self._state(argument) is not value:
                    return False
                check_alive(value)
            elif value is not self.present[argument]:  # None is no state that is gone, which has left a reference
                return False
        return True

    def _state(self, argument: str) -> State | None:
        """The state whose numbers lie in the buffers, if there is one that somebody still holds."""
        known = self.present[argument]
        return known() if isinstance(known, ref) else None

    def call(self, given: dict[str, Any]) -> Tree:
        """A later call: bring the arguments into place, and run."""
        for argument in self.donated:
            self._check_in_place(argument, given[argument])
        for argument, value in given.items():
            if argument not in self.donated:
                self._bring(argument, value)
        return self.run(given)

    def run(self, given: dict[str, Any]) -> Tree:
        """With the arguments in place: take them, replay, copy the new results out."""
        self._take(given)
        return self._note(map_leaves(lambda t: t if id(t) in self.held else t.clone(), self.replay()))

    def _check_in_place(self, argument: str, value: Tree) -> None:
        for index, (old, new) in enumerate(zip(leaves(self.buffers[argument]), leaves(value), strict=True)):
            if old.data_ptr() != new.data_ptr():
                raise CaptureError(
                    f"{self.name} was captured with another {argument}: tensor {index} of this one lies elsewhere. "
                    f"A recording belongs to one {argument}; capture again for this one"
                )

    def _bring(self, argument: str, value: Tree) -> None:
        """Copy an argument into the recording's buffers, unless it lies there already."""
        present = self._state(argument)
        if present is not None and present is value:
            return
        if argument in self.carried and present is not None and not is_donated(present):
            _donate(present, to=f"a call of the captured {self.name} with another {argument}")
        self.present[argument] = _UNKNOWN  # what a copy that fails leaves
        for buffer, source in zip(leaves(self.buffers[argument]), leaves(value), strict=True):
            buffer.copy_(source, non_blocking=True)
        self.present[argument] = _known(value)

    def _take(self, given: dict[str, Any]) -> None:
        for argument in (*self.donated, *self.carried):
            _donate(given[argument], to=f"captured {self.name}")

    def _note(self, out: Tree) -> Tree:
        """Note which returned object lies in the buffers of each argument that was taken, so that it is known again."""
        for part in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(part, State) and (tensors := leaves(part)):
                argument = self.held.get(id(tensors[0]))
                if argument is not None:
                    self.present[argument] = ref(part)
        return out


def _known(value: Tree) -> Any:
    """By which an argument is known again that nothing may have changed since."""
    if isinstance(value, State):
        return ref(value)
    return _UNKNOWN if isinstance(value, Tensor | tuple | list) else value


def _beyond_limit(name: str, limit: int, key: tuple[Any, ...], recorded: list[tuple[Any, ...]]) -> str:
    closest = min(recorded, key=lambda other: sum(a != b for a, b in zip(key, other, strict=True)))
    changed = [a[0] for a, b in zip(key, closest, strict=True) if a != b]
    return (
        f"{name} has {limit} recordings, its limit, and this call would need another: {', '.join(changed)} differs "
        "from each. Pad to a recorded size, or raise the limit"
    )


def eager_recorder(run: Run) -> tuple[Tree, Run]:
    """For devices without graphs: a replay runs the function again."""
    return run(), run


class _Graphs:
    """For NVIDIA GPUs: CUDA graphs, whose intermediate results share one pool of memory.

    They may, because one graph at a time runs on a stream, and `capture` copies results out before the next one.
    `live`: the replays of the graphs that hold `memory`.
    """

    def __init__(self) -> None:
        self.live: WeakSet[Run] = WeakSet()

    def __call__(self, run: Run) -> tuple[Tree, Run]:
        """Raises what `run` raises; nothing is left then of what it launched or recorded."""
        if not self.live:  # PyTorch takes no pool again that no graph holds, but a tensor in it, as in a traceback
            self.memory = torch.cuda.graph_pool_handle()
        graph = torch.cuda.CUDAGraph()
        recording = torch.cuda.graph(graph, pool=self.memory)
        # the one stream of all recordings: on each stream that it sees cuBLAS keeps a workspace, 32 MiB on Hopper
        home, side = torch.cuda.current_stream(), cast(torch.cuda.Stream, recording.capture_stream)
        side.wait_stream(home)
        try:
            with torch.cuda.stream(side):
                first = run()  # kernels compile, workspaces are allocated
        finally:  # also what a run launched before it failed reads buffers that are free then, and writes to the pool
            home.wait_stream(side)
        out = self._record(recording, run)

        def replay() -> Tree:
            graph.replay()
            return out

        self.live.add(replay)
        return first, replay

    def _record(self, recording: torch.cuda.graph, run: Run) -> Tree:
        """What a run returns that is recorded. Raises what it raises, also where CUDA then cannot end the recording."""
        failed = True
        with torch.cuda.stream(torch.cuda.current_stream()):  # `recording` goes back there only if it ends
            recording.__enter__()
            try:
                out = run()
                failed = False
            finally:
                try:
                    recording.__exit__(None, None, None)
                except RuntimeError:  # what failed did what no recording may, and what it held is lost
                    self.live.clear()  # to record with another pool
                    if not failed:
                        raise
        return out


def cuda_recorder() -> Recorder:
    """For NVIDIA GPUs: CUDA graphs that share the memory of their intermediate results."""
    return _Graphs()


def recorder_for(device: torch.device) -> Recorder:
    return cuda_recorder() if device.type == "cuda" else eager_recorder


def _recorder_for(given: dict[str, Any]) -> Recorder:
    devices = {t.device.type for t in leaves(tuple(given.values()))}
    return recorder_for(torch.device("cuda" if "cuda" in devices else "cpu"))
