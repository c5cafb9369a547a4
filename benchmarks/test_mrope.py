"""M-RoPE in place in a fused projection: by its kernel, and by PyTorch as the definition says."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from benchmarks import points
from benchmarks.figures import Work
from benchmarks.session import Case
from mllm.kernels import rotary


@pytest.mark.parametrize("by", ["kernel", "torch"])
@pytest.mark.benchmark(group="kernels")
def test_mrope(case: Case, batch: int, input_len: int, by: str) -> None:
    model, config = case.session.model, case.session.model.config.text
    if by == "kernel" and not case.session.settings.on_gpu:
        pytest.skip("a Triton kernel: run with --device cuda")
    heads, kv_heads, size = config.num_attention_heads, config.num_key_value_heads, config.head_dim
    tokens, generator = batch * input_len, torch.Generator(model.device).manual_seed(batch)
    shape = (tokens, heads + 2 * kv_heads, size)
    start = torch.randn(shape, generator=generator, device=model.device).to(model.dtype)
    positions = torch.arange(tokens, dtype=torch.int32, device=model.device).expand(3, -1)
    tables = rotary.mrope(positions, head_dim=size, theta=config.rope_theta, sections=config.mrope_section)
    cos, sin = (table.squeeze(1).contiguous() for table in tables)
    box: dict[str, Any] = {}

    def setup() -> tuple[tuple[Any, ...], dict[str, Any]]:
        """A projection of its own for each round, as every layer has one."""
        box["qkv"] = start.clone()
        return box["qkv"].split((heads, kv_heads, kv_heads), 1)[:2], {}

    def kernel(q: torch.Tensor, k: torch.Tensor) -> None:
        from mllm.kernels import mrope  # where Triton is, which a CPU may lack

        mrope.rotate_(q, k, cos, sin)

    def plain(q: torch.Tensor, k: torch.Tensor) -> None:
        for x in (q, k):
            x.copy_(rotary.rotate(x, *tables))

    turned = start[:, : heads + kv_heads]
    work = Work(2 * turned.numel() * start.itemsize + cos.nbytes + sin.nbytes, 3 * turned.numel())
    case.time(kernel if by == "kernel" else plain, setup, work=work)
    case.note(batch_size=batch, input_len=input_len, op=f"mrope {by}")
    z = torch.view_as_complex(torch.stack(turned.double().chunk(2, -1), -1))
    z = z * torch.view_as_complex(torch.stack(tables, -1).double())
    error = points.relative(box["qkv"][:, : heads + kv_heads], torch.cat((z.real, z.imag), -1))
    assert error <= torch.finfo(model.dtype).eps
    assert torch.equal(box["qkv"][:, heads + kv_heads :], start[:, heads + kv_heads :])
