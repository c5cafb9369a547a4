"""The options, what a case gets, and what goes into the results. `benchmarks/settings.py` declares the options."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

# Nothing may be fetched by a benchmark, and the tokenizers' own threads only fight over the cores.
os.environ.update({"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"})

import pytest
import torch

from benchmarks import machine, settings
from benchmarks.session import Case, Session

HERE = Path(__file__).resolve().parent
SETTINGS = pytest.StashKey[settings.Settings]()
SESSION = pytest.StashKey[Session]()
ORDER = ("load", "vit", "prefill", "multimodal", "decode")  # decode uses what prefill measured; the others follow
INPUT_LEN = (64, 256)  # where none was asked for: seconds on two cores
GREEDY, TOP_P = "greedy", "top_p"


def pytest_addoption(parser: pytest.Parser) -> None:
    settings.add_options(parser)


def pytest_configure(config: pytest.Config) -> None:
    """A run that times nothing takes one thread: on a busy machine the threads mostly wait for each other."""
    if config.getoption("benchmark_disable", default=False):
        torch.set_num_threads(1)


def _settings(config: pytest.Config) -> settings.Settings:
    """Read once. When pytest runs on a folder above, options that it never declared have their defaults."""
    if SETTINGS not in config.stash:
        try:
            config.stash[SETTINGS] = settings.read(lambda name: config.getoption(f"--{name}", default=None))
        except ValueError as error:
            raise pytest.UsageError(str(error)) from None
    return config.stash[SETTINGS]


def _session(config: pytest.Config) -> Session:
    if SESSION not in config.stash:
        config.stash[SESSION] = Session(_settings(config))
    return config.stash[SESSION]


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    s = _settings(metafunc.config)
    grids = [f"{rows}x{cols}" for rows, cols in s.grid]
    axes: dict[str, tuple[Any, Any]] = {
        "batch": (s.batch, "bs={}"),
        "input_len": (s.input_len or INPUT_LEN, "in={}"),
        "image_len": (s.input_len or (0,), "in={}"),  # 0: what the processor makes of the picture
        "output_len": (s.output_len, "out={}"),
        "mode": (("eager", "graph"), "{}"),
        "grid": (grids, "grid={}"),
        "padded": (("eager", "graph") if s.on_gpu else ("eager",), "{}"),  # batches that a CPU does not record
        "how": ((GREEDY, TOP_P), "{}"),
        "peer": (s.peer, "{}"),
    }
    for name, (values, form) in axes.items():
        if name in metafunc.fixturenames:
            metafunc.parametrize(name, values, ids=[form.format(v or "image") for v in values])


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Stages in the order of a request; the correctness cases alone with --correct, and only then."""
    mine = [item for item in items if HERE in item.path.parents]
    correct = _settings(config).correct
    wanted = [item for item in mine if (item.path.stem == "test_correct") == correct]
    stems = [f"test_{name}" for name in ORDER]
    wanted.sort(key=lambda item: stems.index(item.path.stem) if item.path.stem in stems else len(stems))
    if dropped := [item for item in mine if item not in wanted]:
        config.hook.pytest_deselected(items=dropped)
    items[:] = [item for item in items if HERE not in item.path.parents] + wanted


@pytest.fixture(scope="session")
def session(request: pytest.FixtureRequest) -> Session:
    return _session(request.config)


@pytest.fixture(autouse=True)
def _no_gradients() -> Iterator[None]:
    with torch.inference_mode():
        yield


@pytest.fixture
def case(session: Session, benchmark: Any) -> Case:
    return Case(session, benchmark)


@pytest.hookimpl(optionalhook=True)
def pytest_benchmark_update_machine_info(config: pytest.Config, machine_info: dict[str, Any]) -> None:
    machine_info.update(machine.info(_settings(config).device))


@pytest.hookimpl(optionalhook=True)
def pytest_benchmark_update_json(config: pytest.Config, output_json: dict[str, Any]) -> None:
    session = _session(config)
    output_json["schema"] = "mllm-bench/1"
    output_json["memory"] = session.memory.as_dict()
    output_json["limit"] = {
        "read_gb_s": session.limit.bytes_per_s / 1e9,
        "product_tflop_s": session.limit.flops_per_s / 1e12,
    }


@pytest.hookimpl(optionalhook=True)
def pytest_benchmark_compare_machine_info(
    config: pytest.Config, machine_info: dict[str, Any], compared_benchmark: dict[str, Any]
) -> None:
    """Figures of a CPU and a GPU must not be compared; pytest-benchmark itself only warns."""
    old, new = (_hardware(found) for found in (compared_benchmark["machine_info"], machine_info))
    if old != new:
        raise pytest.UsageError(f"the compared results are from {old}, these from {new}")


def _hardware(found: dict[str, Any]) -> str:
    return str(found.get("gpu", {}).get("name") or found.get("device"))


def pytest_sessionfinish(session: pytest.Session) -> None:
    if SESSION in session.config.stash:
        session.config.stash[SESSION].write_rows()


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    if SESSION in config.stash and (remarks := config.stash[SESSION].remarks):
        terminalreporter.section("mllm")
        for remark in remarks:
            terminalreporter.write_line(remark)
