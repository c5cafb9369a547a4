"""Sampling: logits to tokens, greedy and with top-k, top-p and noise."""

from __future__ import annotations

import pytest
import torch

from benchmarks.figures import Work
from benchmarks.session import Case
from mllm import stages
from mllm.kernels.reference import REFERENCE
from mllm.sampling import Sampling, sampling_batch

HOW = {"greedy": Sampling(), "top_p": Sampling(temperature=0.8, top_k=50, top_p=0.9, min_p=0.01, seed=1)}


@pytest.mark.benchmark(group="sample")
def test_sample(case: Case, batch: int, how: str) -> None:
    model = case.session.model
    vocabulary = model.config.text.vocab_size
    generator = torch.Generator().manual_seed(batch)
    logits = torch.randn(batch, vocabulary, generator=generator).mul_(4).to(model.device)
    settings = sampling_batch([HOW[how]] * batch, size=batch, device=model.device)
    lengths = torch.arange(1, batch + 1, dtype=torch.int32, device=model.device)
    work = Work(logits.nbytes, logits.numel())
    tokens = case.time(lambda: stages.sample(logits, settings, lengths, ops=model.ops), work=work)
    if how == "greedy":
        assert torch.equal(tokens, logits.argmax(-1).int())
    else:
        assert torch.equal(tokens, stages.sample(logits, settings, lengths, ops=REFERENCE))
        kept = logits >= logits.topk(50).values[:, -1:]
        assert kept.gather(1, tokens.long().unsqueeze(1)).all()
    case.note(batch_size=batch)
