"""What every test shares: the devices to test on, how thorough to be, tiny checkpoints, and how numbers compare.

    pytest                       the CPU
    pytest --device cuda         what takes a `device` or is marked `cuda` runs on the GPU; `all` runs it on both
    pytest --thorough            ten times the drawn examples, with a fresh seed each time

Tests assert with plain `assert`. Under `python -O` they still do: pytest rewrites the asserts of test modules, of
conftest and of the modules registered below into explicit raises before Python could strip them.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

# Nothing may be fetched by a test, and the tokenizers' own threads only fight over the cores.
os.environ.update({"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"})

import pytest
import torch
from hypothesis import HealthCheck, settings

pytest.register_assert_rewrite("tiny", "running", "tokenizer_files", "faults", "graphs")

from faults import faults  # noqa: E402, F401  (a fixture)
from tiny import Tiny, make_tiny  # noqa: E402  (after its asserts are set to be rewritten)

# Tensors here are tiny: handing work to a second thread takes longer than doing it, and with one thread the order of
# every sum, and so every last bit, is the same on any number of cores.
torch.set_num_threads(1)

COMMON: Any = {"deadline": None, "suppress_health_check": [HealthCheck.too_slow, HealthCheck.data_too_large]}
settings.register_profile("same", max_examples=100, derandomize=True, database=None, **COMMON)
settings.register_profile("thorough", max_examples=1000, print_blob=True, **COMMON)


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("mllm", "mllm")  # also of benchmarks/, which has a --device too: the first one counts
    with contextlib.suppress(ValueError):
        group.addoption("--device", default="cpu", help="where to run: cpu (default), cuda, or, for tests, all of them")
    group.addoption("--thorough", action="store_true", help="ten times the drawn examples, at random")


def pytest_configure(config: pytest.Config) -> None:
    if config.getoption("--device").partition(":")[0] not in ("cpu", "cuda", "all"):
        raise pytest.UsageError(f"--device: expected cpu, cuda or all, got {config.getoption('--device')!r}")
    config.addinivalue_line("markers", "cuda: needs an NVIDIA GPU; runs with --device cuda or all")
    settings.load_profile("thorough" if config.getoption("--thorough") else "same")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "device" in metafunc.fixturenames:
        chosen = metafunc.config.getoption("--device")
        metafunc.parametrize("device", ("cpu", "cuda") if chosen == "all" else (chosen,), scope="session")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    chosen = config.getoption("--device")
    for item in items:
        wants = item.get_closest_marker("cuda") is not None
        on = getattr(item, "callspec", None)
        wants |= on is not None and on.params.get("device") == "cuda"
        if wants and chosen == "cpu":
            item.add_marker(pytest.mark.skip(reason="needs a GPU: run with --device cuda"))
        elif wants and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason=f"PyTorch {torch.__version__} sees no GPU"))


@pytest.fixture(scope="session")
def triton_device(device: str) -> str:
    """The device of a test of Triton's kernels: a GPU, or a CPU where Triton interprets them."""
    if device == "cpu" and os.environ.get("TRITON_INTERPRET") != "1":
        pytest.skip("without a GPU the kernels run in Triton's interpreter: set TRITON_INTERPRET=1")
    return device


@pytest.fixture(scope="session")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[..., Tiny]]:
    """Tiny models that transformers itself wrote, one for each set of keywords: see `tiny.make_tiny`."""
    made: dict[str, Tiny] = {}

    def get(**options: Any) -> Tiny:
        key = repr(sorted(options.items()))
        if key not in made:
            made[key] = make_tiny(tmp_path_factory.mktemp("checkpoint"), **options)
        return made[key]

    yield get
    made.clear()


@pytest.fixture(scope="session")
def text_model(checkpoints: Callable[..., Tiny]) -> Tiny:
    """A Qwen3 of two layers."""
    return checkpoints()


@pytest.fixture(scope="session")
def vision_model(checkpoints: Callable[..., Tiny]) -> Tiny:
    """A Qwen3-VL of three layers and as many in the encoder, with two deepstack taps."""
    return checkpoints(vision=True)


@pytest.fixture(scope="session")
def hopper(device: str) -> None:
    """For kernels in Gluon, which has no interpreter: the tensor cores that they are for are those of capability 9.0."""
    if torch.cuda.get_device_capability()[0] != 9:
        pytest.skip("needs a GPU of capability 9.0")


@pytest.fixture
def folder(tmp_path: Path, vision_model: Tiny) -> Path:
    """A copy of the small Qwen3-VL folder, to be broken."""
    copy = tmp_path / "model"
    copy.mkdir()
    for file in vision_model.folder.iterdir():
        (copy / file.name).write_bytes(file.read_bytes())
    return copy
