"""What a hostile model folder, picture or prompt can reach: nothing but an error. The process watches itself do it."""

from __future__ import annotations

import contextlib
import io
import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from test_checkpoint import BROKEN, INDEX, SINGLE
from tiny import Tiny, picture
from tokenizer_files import write_tokenizer

import mllm
from mllm.errors import CheckpointError, MllmError

ROOT = Path(__file__).parents[1]

WATCH = """
import io, os, sys
import mllm, PIL.Image
from mllm import images, environment
import mllm.tokenizer, tokenizers, safetensors, jinja2.sandbox

# what the process compiles for itself, and keeps in caches that belong to the package or the user, comes first
mllm.generate(mllm.load(dtype="float32"), [mllm.Prompt([1, 2, 3])], max_new_tokens=3)

folder = os.path.realpath(sys.argv[1])
readable = (*map(os.path.realpath, [folder, sys.prefix, sys.base_prefix, *sys.path]), "/proc", "/sys", "/usr", "/lib",
            "/etc/ld", "/dev/null")
forbidden = ("socket.", "subprocess.", "os.system", "os.exec", "os.spawn", "os.posix_spawn", "os.fork", "pickle.",
             "urllib.", "http.", "ftplib.", "smtplib.", "shutil.", "builtins.input", "webbrowser.")
seen = []

def watch(event, args):
    if event.startswith(forbidden) or (event == "import" and str(args[0]).startswith("modeling_")):
        seen.append((event, str(args)[:200]))
    if event == "open" and isinstance(args[0], (str, bytes)):
        path = os.path.realpath(os.fsdecode(args[0]))
        writes = isinstance(args[1], str) and set(args[1]) & set("wax+")
        if not path.startswith(readable) or (writes and path.startswith(folder)):
            seen.append((event, path))

sys.addaudithook(watch)
"""


def watched(folder: Path, code: str) -> Any:
    """What `code` prints as JSON, run in a process that cannot ask anybody and notes what it touches in `seen`."""
    environment = {k: v for k, v in os.environ.items() if k not in ("HF_HUB_OFFLINE", "PYTHONPATH")}
    done = subprocess.run(  # noqa: S603
        [sys.executable, "-B", "-c", WATCH + code, str(folder)], cwd=ROOT, stdin=subprocess.DEVNULL, capture_output=True,
        text=True, timeout=120, env=environment, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.fixture
def hostile(folder: Path) -> Path:
    """A small Qwen3-VL whose every file asks for code of its own to run, with a tokenizer."""
    write_tokenizer(folder)
    code = f"open({str(folder / 'ran')!r}, 'w')\n"
    (folder / "modeling_own.py").write_text(code)
    (folder / "pytorch_model.bin").write_bytes(b"cos\nsystem\n(S'touch ran'\ntR.")
    auto = {"AutoModelForCausalLM": "modeling_own.Model", "AutoConfig": "modeling_own.Config",
            "AutoTokenizer": ["modeling_own.Tokenizer", None], "AutoProcessor": "modeling_own.Processor",
            "AutoImageProcessor": "modeling_own.Processor"}  # fmt: skip
    path = folder / "tokenizer_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "auto_map": auto, "trust_remote_code": True}))
    return folder


def test_a_model_with_code_of_its_own_loads_and_answers_without_running_it(hostile: Path) -> None:
    """No socket, no process, no pickle, no prompt, no file outside the folder and the packages, nothing written."""
    found = watched(
        hostile,
        """
import json
model = mllm.load(folder, progress=False)
prompt = mllm.prompt(model, [{"role": "user", "content": "The quick brown fox"}])
tokens = [t if t < 90 else 7 for t in prompt.tokens]
out = mllm.generate(model, [mllm.Prompt(tokens)], max_new_tokens=3)[0]
print(json.dumps({"made": len(out.tokens), "seen": seen}))
""",
    )
    assert found == {"made": 3, "seen": []}
    assert not (hostile / "ran").exists()


NAMES = ("config.json", "generation_config.json", "preprocessor_config.json", "processor_config.json", "tokenizer.json",
         "tokenizer_config.json", "chat_template.json", "chat_template.jinja", INDEX, SINGLE)  # fmt: skip


@pytest.mark.parametrize("name", NAMES)
def test_no_file_of_a_folder_may_be_a_link_out_of_it(hostile: Path, tmp_path: Path, name: str) -> None:
    """A template that is a link to somebody's secret would put it into every prompt."""
    outside = tmp_path / "outside"
    if name in (INDEX, "chat_template.json"):  # which are read where the other of their kind is not there
        (hostile / {INDEX: SINGLE}.get(name, "chat_template.jinja")).unlink()
    outside.write_bytes((hostile / name).read_bytes() if (hostile / name).is_file() else b'{"image_processor": {}}')
    (hostile / name).unlink(missing_ok=True)
    (hostile / name).symlink_to(outside)
    with pytest.raises(MllmError, match=f"{re.escape(name)}: a link out of the model folder"):
        mllm.load(hostile, progress=False)


def test_a_config_that_names_code_is_refused_by_name_or_known_to_change_nothing(hostile: Path) -> None:
    found = watched(
        hostile,
        """
import json, pathlib
path = pathlib.Path(folder, "config.json")
good, said = json.loads(path.read_text()), {}
for key in ("trust_remote_code", "code_revision", "custom_pipelines", "auto_map"):
    path.write_text(json.dumps({**good, key: {"AutoConfig": "modeling_own.Config"}}))
    seen.clear()
    try:
        mllm.load(folder, progress=False)
    except mllm.errors.ConfigError as error:
        said[key] = str(error)
print(json.dumps({"said": said, "seen": seen}))
""",
    )
    assert found["seen"] == []
    assert {"trust_remote_code", "code_revision", "custom_pipelines"} <= set(found["said"])
    assert all(f"{key}" in text for key, text in found["said"].items())
    assert not (hostile / "ran").exists()


def test_pictures_given_as_text_are_neither_opened_nor_fetched(hostile: Path) -> None:
    """Whatever the text is: a path, a URL of the network inside, one with a backslash, data, bytes."""
    found = watched(
        hostile,
        r"""
import json, pathlib
model = mllm.load(folder, progress=False)
seen.clear()
texts = ["/etc/passwd", "file:///etc/passwd", "http://169.254.169.254/latest", "http://[::1]/", "http://127.0.0.1\\@x/y.png",
         "data:image/png;base64,AAAA", "picture.png", pathlib.Path("/etc/passwd"), b"/etc/passwd", open]
refused = 0
for text in texts:
    for call in (lambda: mllm.Prompt([1, 95], [text]),
                 lambda: mllm.prompt(model, [{"role": "user", "content": [{"type": "image", "image": text}]}]),
                 lambda: images.patches(text, model.images)):
        try: call()
        except TypeError as error: refused += "0x" not in str(error)
print(json.dumps({"refused": refused, "seen": seen}))
""",
    )
    assert found == {"refused": 30, "seen": []}


def test_the_watch_sees_what_it_is_there_for(hostile: Path) -> None:
    found = watched(
        hostile,
        """
import json, pickle, socket, subprocess
for bad in ("pickle.loads(pickle.dumps(json.loads))", "socket.socket().close()", "subprocess.run(['true'])",
            "open('/etc/hostname')", "open(folder + '/x', 'w')"):
    eval(bad)
print(json.dumps([event for event, _ in seen]))
""",
    )
    assert {"pickle.find_class", "subprocess.Popen", "open"} <= set(found)
    assert any(event.startswith("socket.") for event in found)
    assert found.count("open") == 2


def test_every_broken_folder_is_refused_in_under_a_second(folder: Path, tmp_path: Path) -> None:
    assert len(BROKEN) >= 19
    slowest = 0.0
    for index, (break_it, _) in enumerate(BROKEN.values()):
        copy = tmp_path / str(index)
        copy.mkdir()
        for file in folder.iterdir():
            (copy / file.name).write_bytes(file.read_bytes())
        break_it(copy)
        began = time.perf_counter()
        with pytest.raises(CheckpointError):
            mllm.load(copy, progress=False)
        slowest = max(slowest, time.perf_counter() - began)
    assert slowest < 1


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "tokenizer.json", "preprocessor_config.json"])
def test_a_pipe_or_a_device_in_the_place_of_a_file_is_not_read(folder: Path, name: str) -> None:
    """Either could be read for ever."""
    write_tokenizer(folder)
    (folder / name).unlink()
    (folder / name).symlink_to("/dev/zero")
    with contextlib.suppress(MllmError):
        mllm.load(folder, progress=False)
    (folder / name).unlink()
    os.mkfifo(folder / name)
    with contextlib.suppress(MllmError):
        mllm.load(folder, progress=False)


def test_an_animation_is_its_first_frame(vision_model: Tiny) -> None:
    """Thousands of frames in one small file are not decoded."""
    frames = [picture(64, 48, i) for i in range(60)]
    for kind in ("WEBP", "PNG"):
        file = io.BytesIO()
        frames[0].save(file, kind, save_all=True, append_images=frames[1:], lossless=True)
        opened = mllm.images.open_image(file.getvalue())
        assert (opened.size, opened.convert("RGB").tobytes()) == (frames[0].size, frames[0].tobytes())


def test_the_figures_of_the_security_page_are_those_of_the_tests() -> None:
    page = " ".join((ROOT / "SECURITY.md").read_text(encoding="utf-8").split())
    source = {
        name: (ROOT / "tests" / f"test_{name}.py").read_text(encoding="utf-8") for name in ("reliability", "runtime")
    }
    assert f"{len(BROKEN)} kinds of broken folder" in page
    assert f"{mllm.images.MAX_BYTES // 2**20} MiB as a file and {mllm.images.MAX_PIXELS:,} pixels" in page
    assert f"{mllm.images.MAX_RATIO}:1" in page
    assert "460 streams" in page
    assert '"aborts", [460]' in source["reliability"]
    assert "200 runs of up to 50 steps" in page
    assert "examples(200, stateful_step_count=50)" in source["runtime"]
