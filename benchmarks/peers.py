"""transformers on the same weights: its decode as plainly as it can be driven, and as people call it."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import torch
from attrs import define
from torch import Tensor

from benchmarks import models
from mllm.model import Model


def load(name: str, model: Model, into: Path) -> Any:
    """The transformers model with the weights of `model`; attention by SDPA, its quickest on every device."""
    import transformers  # here: it takes seconds, and only the peer cases need it

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    folder = models.folder(name, model, into)
    kind = transformers.AutoModelForImageTextToText if model.config.vision else transformers.AutoModelForCausalLM
    found = kind.from_pretrained(
        folder, dtype=model.dtype, attn_implementation="sdpa", trust_remote_code=False, local_files_only=True
    )
    return found.to(model.device).eval()


@define(eq=False)
class Peer:
    """One batch of equally long prompts: `prefill`, then `step` again and again, greedily."""

    hf: Any
    ids: Tensor  # [B n]
    past: Any = None
    token: Tensor | None = None

    def prefill(self) -> Tensor:
        out = self.hf(input_ids=self.ids, use_cache=True, logits_to_keep=1)
        self.past, self.token = out.past_key_values, out.logits[:, -1].argmax(-1)
        return out.logits[:, -1]

    def step(self) -> Tensor:
        """The next token of each row, [B]."""
        assert self.token is not None
        out = self.hf(input_ids=self.token[:, None], past_key_values=self.past, use_cache=True, logits_to_keep=1)
        self.token = out.logits[:, -1].argmax(-1)
        return self.token

    def generate_seconds(self, new_tokens: int) -> float:
        """Seconds of `model.generate` for exactly that many new tokens."""
        start = time.perf_counter()
        self.hf.generate(
            input_ids=self.ids, attention_mask=torch.ones_like(self.ids), max_new_tokens=new_tokens,
            min_new_tokens=new_tokens, do_sample=False, pad_token_id=0,
        )  # fmt: skip
        if self.ids.is_cuda:
            torch.cuda.synchronize()
        return time.perf_counter() - start
