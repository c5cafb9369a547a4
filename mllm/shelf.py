"""What a model keeps between calls, and lends to one of them at a time: captured stages and the pool they belong to."""

from __future__ import annotations

from collections.abc import Callable

import torch
from attrs import define, field, frozen
from torch import Tensor

from mllm.batch import ForwardBatch, VisionTokens
from mllm.cache import KVPool
from mllm.state import is_donated, leaves


@frozen(eq=False)
class Programs:
    """The captured stages, and the stream on which tokens go to the host (None on a CPU)."""

    step: Callable[..., tuple[KVPool, ForwardBatch, Tensor]]
    prefill: Callable[..., tuple[KVPool, Tensor]]
    vit: Callable[..., VisionTokens]
    reads: torch.cuda.Stream | None


@define(eq=False)
class Lease:
    """What one call has of a model: its programs, and the pool that they belong to, which every stage replaces."""

    programs: Programs
    pool: KVPool


@define(eq=False)
class Shelf:
    """Where programs and pool lie between calls."""

    kept: Lease | None = field(default=None, init=False)

    @property
    def nbytes(self) -> int:
        """Bytes of the pool that is kept."""
        return sum(t.nbytes for t in leaves(self.kept.pool)) if self.kept else 0

    def clear(self) -> None:
        """Let go of what is kept."""
        self.kept = None

    def take(self, pages: int, make: Callable[[], Lease]) -> Lease:
        """What is kept, if its pool has `pages` usable pages or more; or what `make` makes."""
        kept, self.kept = self.kept, None
        if kept is not None and kept.pool.keys.shape[1] > pages:
            return kept
        del kept  # the memory of a pool that is too small is free before there is a new one
        return make()

    def put(self, lease: Lease, *, keep: bool) -> None:
        """Take it back, and `keep` it for the next call where recordings are dear; not a pool that a stage lost."""
        if keep and not is_donated(lease.pool):
            self.kept = lease
