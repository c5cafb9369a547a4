"""What the package promises about itself: what it imports, ships and names, and what its source never does."""

from __future__ import annotations

import ast
import configparser
import importlib
import inspect
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

import mllm
import mllm.signs

PACKAGE = Path(mllm.__file__).parent
ROOT = Path(__file__).parents[1]
SOURCES = sorted(PACKAGE.rglob("*.py"))
TREES = {path.relative_to(PACKAGE).as_posix(): ast.parse(path.read_text(encoding="utf-8")) for path in SOURCES}

LONGEST = 330
ASSERTS = {"signs/pictures.py": "a scene made with a sign has one; for the type checker"}
ALLOWED = {
    "chat_template.py": {"an except that catches everything": "a template is a program and can raise anything"},
    "tokenizer.py": {"an except that catches everything": "the library raises nothing more specific"},
    "signs/train.py": {"torch.load": "of the run's own state; torch 2.6 and later unpickles no objects"},
}
ENVIRONMENT = {"environment.py": "reports the variables that change results"}


def python(*args: str, **kwargs: object) -> subprocess.CompletedProcess[str]:
    """Run another interpreter in the checkout's root, where `mllm` can be imported from installed or not."""
    done = subprocess.run([sys.executable, *args], cwd=ROOT, capture_output=True, text=True, timeout=120, check=False)  # noqa: S603
    assert done.returncode == 0, done.stderr
    return done


def test_importing_it_imports_no_optional_or_heavy_package() -> None:
    code = "import sys, mllm; print(*{name.partition('.')[0] for name in sys.modules})"
    loaded = set(python("-c", code).stdout.split())
    assert "torch" in loaded
    assert not loaded & {"transformers", "triton", "numba", "flashinfer", "matplotlib", "pytest", "torchvision"}


def test_importing_it_opens_no_gpu() -> None:
    assert python("-c", "import mllm, torch; print(torch.cuda.is_initialized())").stdout.strip() == "False"


def test_it_is_typed_and_brings_its_data() -> None:
    assert (PACKAGE / "py.typed").is_file()
    assert {path.stem for path in (PACKAGE / "presets").glob("*.json")} == set(mllm.families.PRESETS)


def test_there_is_one_version() -> None:
    import mllm_cli

    assert re.fullmatch(r"\d+\.\d+\.\d+", mllm.__version__)
    assert mllm_cli.version() == mllm.__version__
    project = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    assert 'dynamic = ["version"]' in project
    assert mllm.__version__ not in [line.split("=")[-1].strip(' "') for line in project.splitlines()]


def test_the_command_is_the_function_that_the_project_names() -> None:
    import mllm_cli

    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    module, _, name = project["scripts"]["mllm"].partition(":")
    assert getattr(importlib.import_module(module), name) is mllm_cli.main


SIGNATURES = {
    "load": "path, *, device, dtype, mem_fraction_static, ignore_config, progress",
    "dummy": "config, *, device, dtype, mem_fraction_static, seed",
    "prompt": "model, messages",
    "Prompt": "tokens, images",
    "Sampling": "*, temperature, top_k, top_p, min_p, seed",
    "generate": "model, prompts, *, max_new_tokens, sampling, max_running_requests, max_total_tokens, progress",
    "stream": "model, prompts, *, max_new_tokens, sampling, max_running_requests, max_total_tokens",
    "score": "model, prompts",
    "Completion": "*, text, tokens, finish_reason, prompt_tokens, error",
    "Piece": "*, index, token, text, finish_reason, error",
    "capture": "fn, *, donate, carry, limit, evict, recorder",
    "stages.admit": "table, tokens",
    "stages.vit": "weights, patches, *, config, ops",
    "stages.prefill": "weights, pool, batch, vision, *, config, ops",
    "stages.decode": "weights, pool, batch, *, config, ops",
    "stages.sample": "logits, sampling, lengths, *, ops",
    "stages.advance": "batch, tokens, *, page_size, ops",
    "stages.step": "weights, pool, batch, sampling, *, config, ops",
    "stages.extend": "table, rows, tokens",
    "stages.commit": "table, rows, tokens",
    "stages.release": "table, rows",
}


def test_every_stage_is_documented() -> None:
    assert {f"stages.{name}" for name in mllm.stages.__all__} <= SIGNATURES.keys()


@pytest.mark.parametrize("name", SIGNATURES)
def test_a_public_name_takes_what_is_documented(name: str) -> None:
    found: object = mllm
    for part in name.split("."):
        found = getattr(found, part)
    shown: list[str] = []
    for parameter in inspect.signature(found).parameters.values():  # type: ignore[arg-type]
        if parameter.kind is parameter.KEYWORD_ONLY and "*" not in shown:
            shown.append("*")
        shown.append(parameter.name)
    assert ", ".join(shown) == SIGNATURES[name]


@pytest.mark.parametrize("name", [*mllm.__all__, *(f"stages.{name}" for name in mllm.stages.__all__)])
def test_a_public_name_has_a_docstring(name: str) -> None:
    found: object = mllm
    for part in name.split("."):
        found = getattr(found, part)
    assert inspect.getdoc(found)


def test_an_error_is_one_of_ours_and_of_pythons() -> None:
    classes = [value for value in vars(mllm.errors).values() if isinstance(value, type)]
    assert len(classes) > 5
    for cls in classes:
        assert issubclass(cls, mllm.errors.MllmError)
        assert cls is mllm.errors.MllmError or issubclass(cls, (ValueError, RuntimeError, ImportError))


# What the source never does ------------------------------------------------------------------------------------------


def forbidden(tree: ast.AST) -> Iterator[str]:
    """Each thing in a module that the project does not allow itself anywhere."""
    for node in ast.walk(tree):
        line = getattr(node, "lineno", 0)
        if isinstance(node, (ast.Global, ast.Nonlocal)):
            yield f"{line}: global or nonlocal"
        elif isinstance(node, ast.ExceptHandler):
            caught = node.type.elts if isinstance(node.type, ast.Tuple) else [node.type]
            if any(kind is None or ast.unparse(kind) in ("Exception", "BaseException") for kind in caught):
                yield f"{line}: an except that catches everything"
        elif isinstance(node, ast.Call):
            called = ast.unparse(node.func)
            if called in ("eval", "exec", "compile", "__import__", "torch.load", "os.system", "input"):
                yield f"{line}: {called}"
            if called in UNBOUNDED or (called.endswith("lru_cache") and not _is_bounded(node)):
                yield f"{line}: a cache without bound"
            if any(keyword.arg == "trust_remote_code" and not _is_false(keyword.value) for keyword in node.keywords):
                yield f"{line}: trust_remote_code"
        elif isinstance(node, (ast.Import, ast.ImportFrom)):
            names = [alias.name for alias in node.names] + [getattr(node, "module", None) or ""]
            roots = {name.partition(".")[0] for name in names}
            if {"pickle", "marshal", "shelve", "dill"} & roots:
                yield f"{line}: pickle or its like"
            modules = {node.module} if isinstance(node, ast.ImportFrom) else {alias.name for alias in node.names}
            if NETWORK & {(name or "").partition(".")[0] for name in modules}:  # `from mllm import requests` is ours
                yield f"{line}: the network"
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            bare = {ast.unparse(decorator) for decorator in node.decorator_list}
            if bare & {*UNBOUNDED, "lru_cache", "functools.lru_cache"}:
                yield f"{line}: a cache without bound"


UNBOUNDED = ("cache", "functools.cache")  # keyed by what a request chose, each would grow for ever
NETWORK = {"socket", "ssl", "urllib", "http", "ftplib", "requests", "httpx", "aiohttp", "huggingface_hub"}


def _is_bounded(call: ast.Call) -> bool:
    sizes = [keyword.value for keyword in call.keywords if keyword.arg == "maxsize"] + call.args
    return any(isinstance(size, ast.Constant) and isinstance(size.value, int) for size in sizes)


def _is_false(node: ast.expr) -> bool:
    return isinstance(node, ast.Constant) and node.value is False


@pytest.mark.parametrize("source", [
    "global x", "try: pass\nexcept: pass", "try: pass\nexcept (OSError, Exception): pass", "eval('1')",
    "torch.load(f)", "f(trust_remote_code=True)", "import pickle", "from pickle import loads",
    "input()", "import socket", "from urllib.request import urlopen", "import huggingface_hub as h",
    "@functools.cache\ndef f(): 0", "@lru_cache\ndef f(): 0", "@lru_cache(maxsize=None)\ndef f(): 0", "g = cache(f)",
])  # fmt: skip
def test_the_check_of_the_source_sees(source: str) -> None:
    assert list(forbidden(ast.parse(source)))


@pytest.mark.parametrize("name", TREES)
def test_a_module_does_nothing_forbidden(name: str) -> None:
    found = [what for what in forbidden(TREES[name]) if what.partition(" ")[2] not in ALLOWED.get(name, {})]
    assert not found


@pytest.mark.parametrize("name", sorted(TREES.keys() - ASSERTS.keys()))
def test_a_module_checks_without_assert(name: str) -> None:
    """`python -O` drops asserts."""
    assert not [node.lineno for node in ast.walk(TREES[name]) if isinstance(node, ast.Assert)]


@pytest.mark.parametrize("name", sorted(TREES.keys() - ENVIRONMENT.keys()))
def test_a_module_reads_no_environment_variable(name: str) -> None:
    found = [node for node in ast.walk(TREES[name]) if isinstance(node, ast.Attribute)]
    assert not [node.lineno for node in found if ast.unparse(node) in ("os.environ", "os.getenv", "os.putenv")]


@pytest.mark.parametrize("name", sorted(TREES.keys() - {"kernels/__init__.py"}))
def test_a_module_says_what_it_is(name: str) -> None:
    assert ast.get_docstring(TREES[name])


@pytest.mark.parametrize("name", sorted(TREES))
def test_a_module_can_be_read_in_one_sitting(name: str) -> None:
    assert len((PACKAGE / name).read_text(encoding="utf-8").splitlines()) <= LONGEST


LINES = 50
LONG_FUNCTIONS = {
    "kernels/flash_hopper.py:flash_hopper_kernel": "a launch list for each number of groups, which cannot be made in a loop",
    "kernels/flash_group.py:_attend": "a loop whose order the registers depend on",
    "kernels/attend.py:attend_kernel": "one kernel, from queries to the merged result",
    "kernels/draw.py:search_kernel": "one kernel, a level of the search",
    "kernels/persistent.py:_consume": "one kernel, all of a layer in order",
}


def test_a_function_fits_a_screen_or_has_a_reason() -> None:
    """Without its docstring; of what has a reason, all is still too long."""
    long = set()
    for name, tree in TREES.items():
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef):
                words = len((ast.get_docstring(node, clean=False) or "").splitlines())
                if int(node.end_lineno or 0) - node.lineno + 1 - words > LINES:
                    long.add(f"{name}:{node.name}")
    assert long == LONG_FUNCTIONS.keys()


# What the pages promise ---------------------------------------------------------------------------------------------


def blocks(page: str, language: str) -> list[str]:
    """The code blocks of a page in the root."""
    return re.findall(
        rf"^```{language}\n(.*?)^```", (ROOT / page).read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL
    )


@pytest.mark.parametrize("page", ["README.md", "CONTRIBUTING.md"])
def test_the_python_on_a_page_runs(page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One after the other, as a reader would type them, in an empty folder."""
    monkeypatch.chdir(tmp_path)
    found = blocks(page, "python")
    assert found
    script = tmp_path / "page.py"
    script.write_text("\n".join(found), encoding="utf-8")
    done = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, timeout=300, check=False)  # noqa: S603
    assert done.returncode == 0, done.stderr


def test_ci_runs_the_command_that_the_readme_shows() -> None:
    commands = [line for block in blocks("README.md", "sh") for line in block.splitlines()]
    tests = next(line for line in commands if line.endswith("tox run -e cpu"))
    assert tests in (ROOT / ".ci" / "run").read_text(encoding="utf-8")
    assert any(line.endswith("tox run -e demo") for line in commands)


@pytest.mark.parametrize("page", ["README.md", "CONTRIBUTING.md", "SECURITY.md"])
def test_a_file_that_a_page_names_exists(page: str) -> None:
    text = (ROOT / page).read_text(encoding="utf-8")
    links = [link for link in re.findall(r"\]\(([^)#]+)\)", text) if "://" not in link]
    named = re.findall(r"`((?:mllm|tests|benchmarks|docs)/[\w/.-]+)`", text)
    assert links or named
    assert not [name for name in [*links, *named] if not (ROOT / name).exists()]


def test_the_front_page_says_where_every_module_is() -> None:
    """Those of the folders that it names whole need no line of their own."""
    table = (ROOT / "README.md").read_text(encoding="utf-8").partition("## Finding your way")[2]
    named = {name.rpartition("/")[2] for name in re.findall(r"`([\w/]+\.py)`", table)}
    modules = [name for name in TREES if not name.startswith(("signs/", "stages/")) and "__" not in name]
    assert named == {Path(name).name for name in modules} | {"mllm_cli.py"}


def test_a_system_s_own_pytorch_gets_all_other_packages() -> None:
    """tox's jetson environment lists them, since the package itself would bring a PyTorch along."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    wanted = {name.partition(";")[0].strip() for name in project["dependencies"]} - {"torch>=2.11"}
    tox = configparser.ConfigParser(interpolation=None)
    tox.read(ROOT / "tox.ini", encoding="utf-8")
    listed = set(tox["testenv:jetson"]["deps"].split())
    assert listed == wanted | set(project["optional-dependencies"]["test"])


def test_a_file_imports_only_those_above_it_on_the_front_page_or_beside_it() -> None:
    table = (ROOT / "README.md").read_text(encoding="utf-8").partition("## Finding your way")[2]
    rows = [
        re.findall(r"`[\w/]*?(\w+(?:\.py|/))`", line.split("|")[1])
        for line in table.splitlines()
        if line.startswith("| `")
    ]
    places = {name: place for place, row in enumerate(rows) for name in row}

    def place(name: str) -> int | None:
        """Of a module of TREES; stages/ and signs/ have one each."""
        return places.get(f"{Path(name).parts[0]}/", places.get(Path(name).name))

    seen = 0
    for name, tree in TREES.items():
        for other in imported(tree):
            above, own = place(other), place(name)
            if above is not None and own is not None:
                seen += 1
                assert above <= own, f"{name} imports {other}"
    assert seen > 300


def imported(tree: ast.AST) -> Iterator[str]:
    """The modules of this package that a module imports, as TREES has them."""
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and str(node.module).startswith("mllm"):
            folder = str(node.module).replace(".", "/").removeprefix("mllm").removeprefix("/")
            for alias in node.names:
                wanted = (f"{folder}/{alias.name}.py".removeprefix("/"), f"{folder}.py", f"{folder}/__init__.py")
                yield from [name for name in wanted if name in TREES][:1]


def test_every_size_letter_of_a_declaration_is_in_the_legend() -> None:
    used = {
        mllm.state.letter_of(dim)
        for tree in TREES.values()
        for node in ast.walk(tree)
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "tensor" and isinstance(node.args[0], ast.Constant)
        for dim in str(node.args[0].value).split()
    }
    assert len(used) > 15
    assert used - {""} <= mllm.state.LEGEND.keys()
