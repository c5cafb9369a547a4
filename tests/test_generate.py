"""generate, stream and score: how requests end, what is refused before anything runs, and that pages are conserved."""

from __future__ import annotations

import itertools
import subprocess
import sys
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from attrs import evolve
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from tiny import END, IMAGE, START, VIDEO, Broken, Tiny, examples, four_prompts, make_tiny, picture, words
from tokenizer_files import write_tokenizer

import mllm
from mllm import families, stages, weights
from mllm.cache import KVPool
from mllm.errors import CheckpointError, ConfigError, ImageError, PromptError
from mllm.kernels.tables import tables_for
from mllm.sampling import Sampling
from mllm.state import leaves, map_leaves
from mllm.table import RequestTable


@pytest.fixture
def tables(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[RequestTable]]:
    """The tables that the loop makes, newest last; every one is checked after each stage and when all is over."""
    seen: list[RequestTable] = []

    def watch(name: str) -> None:
        stage: Callable[..., Any] = getattr(stages, name)

        def call(table: RequestTable, *args: Any, **kwargs: Any) -> Any:
            out = stage(table, *args, **kwargs)
            new = out[0] if isinstance(out, tuple) else out
            free = new.free[: new.n_free].tolist()
            owned = new.pages[new.pages > 0].tolist()
            assert sorted(free + owned) == list(range(1, len(new.free) + 1))
            seen.append(new)
            return out

        monkeypatch.setattr(stages, name, call)

    for name in ("admit", "commit", "release"):
        watch(name)
    yield seen
    if seen:
        assert int(seen[-1].held.sum()) == 0, "pages were not given back"
        assert seen[-1].n_free == len(seen[-1].free)
        assert not bool(seen[-1].live.any())


@pytest.fixture(scope="module")
def speaking(tmp_path_factory: pytest.TempPathFactory) -> mllm.Model:
    """A text model with a tokenizer of Qwen's kind."""
    folder = write_tokenizer(tmp_path_factory.mktemp("speaking"))
    make_tiny(folder, vocab_size=500)
    return mllm.load(folder, progress=False)


def with_ops(model: mllm.Model, **ops: Any) -> mllm.Model:
    """The model with other ops, in decode steps too."""
    return evolve(model, ops=evolve(model.ops, **ops), decode_ops=None)


def ending(model: mllm.Model, *tokens: int) -> mllm.Model:
    return evolve(model, config=evolve(model.config, end_tokens=tokens))


def test_a_request_ends_after_its_tokens_and_says_length(text_model: Tiny, tables: list[RequestTable]) -> None:
    outs = mllm.generate(text_model.ours, four_prompts(text_model), max_new_tokens=[1, 2, 7, 3])
    assert [(len(out.tokens), out.finish_reason, out.error) for out in outs] == [
        (n, "length", None) for n in (1, 2, 7, 3)
    ]
    assert [out.prompt_tokens for out in outs] == [11, 3, 1, 17]
    assert [out.text for out in outs] == [""] * 4  # there is no tokenizer


def test_a_request_ends_at_an_end_token_which_is_its_last(text_model: Tiny, tables: list[RequestTable]) -> None:
    prompts = four_prompts(text_model)
    free = mllm.generate(text_model.ours, prompts, max_new_tokens=20)
    ends = free[0].tokens[4], free[1].tokens[0]
    outs = mllm.generate(ending(text_model.ours, *ends), prompts, max_new_tokens=20)
    for out, whole in zip(outs, free, strict=True):
        stop = next((i for i, token in enumerate(whole.tokens) if token in ends), None)
        if stop is None:
            assert (out.tokens, out.finish_reason) == (whole.tokens, "length")
        else:
            assert (out.tokens, out.finish_reason) == (whole.tokens[: stop + 1], "stop")
    assert len(outs[1].tokens) == 1


def test_an_end_token_that_comes_with_the_last_allowed_one_is_a_stop(text_model: Tiny) -> None:
    prompt = four_prompts(text_model)[:1]
    token = mllm.generate(text_model.ours, prompt, max_new_tokens=1)[0].tokens[0]
    assert mllm.generate(ending(text_model.ours, token), prompt, max_new_tokens=1)[0].finish_reason == "stop"


def test_a_pool_that_is_full_ends_a_request_with_capacity(text_model: Tiny, tables: list[RequestTable]) -> None:
    prompt = mllm.Prompt(words(20))
    whole = mllm.generate(text_model.ours, [prompt], max_new_tokens=40)[0]
    out = mllm.generate(text_model.ours, [prompt], max_new_tokens=40, max_total_tokens=32)[0]
    # 32 slots: 20 of the prompt, 12 of new tokens, and the 13th is made of them but never run itself
    assert (out.tokens, out.finish_reason) == (whole.tokens[:13], "capacity")
    exact = mllm.generate(text_model.ours, [prompt], max_new_tokens=13, max_total_tokens=32)[0]
    assert (exact.tokens, exact.finish_reason) == (out.tokens, "length")


def test_requests_wait_for_pages_and_all_get_through(text_model: Tiny, tables: list[RequestTable]) -> None:
    prompts = [mllm.Prompt(words(n, n)) for n in (30, 5, 17, 1, 40, 8, 8)]
    alone = [mllm.generate(text_model.ours, [p], max_new_tokens=9)[0].tokens for p in prompts]
    outs = mllm.generate(text_model.ours, prompts, max_new_tokens=9, max_total_tokens=64, max_running_requests=3)
    assert [out.tokens for out in outs] == alone


def test_nothing_in_is_nothing_out(text_model: Tiny) -> None:
    assert mllm.generate(text_model.ours, []) == []
    assert list(mllm.stream(text_model.ours, [])) == []
    assert mllm.score(text_model.ours, []) == []


# errors of one request


def test_a_picture_that_breaks_fails_its_own_request(vision_model: Tiny, tables: list[RequestTable]) -> None:
    prompts = four_prompts(vision_model)
    want = mllm.generate(vision_model.ours, prompts, max_new_tokens=5)
    for at in (0, 2, 4):
        some = [*prompts[:at], mllm.Prompt([1, IMAGE, 2], [Broken()]), *prompts[at:]]
        for rows in (1, 2, None):
            outs = mllm.generate(vision_model.ours, some, max_new_tokens=5, max_running_requests=rows)
            failed = outs.pop(at)
            assert (failed.finish_reason, failed.tokens, failed.text) == ("error", (), "")
            assert "truncated" in (failed.error or "")
            assert [out.tokens for out in outs] == [out.tokens for out in want]


def test_broken_pictures_alone_fail_each_and_release_their_rows(vision_model: Tiny, tables: list[RequestTable]) -> None:
    outs = mllm.generate(vision_model.ours, [mllm.Prompt([IMAGE], [Broken()])] * 3, max_running_requests=2)
    assert [out.finish_reason for out in outs] == ["error"] * 3


def test_score_holds_one_pool_at_a_time(text_model: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[weakref.ref[torch.Tensor]] = []

    def empty(*args: Any, make: Any = KVPool.empty, **kwargs: Any) -> KVPool:
        assert not [keys for keys in made if keys() is not None]
        pool: KVPool = make(*args, **kwargs)
        made.append(weakref.ref(pool.keys))
        return pool

    monkeypatch.setattr(KVPool, "empty", empty)
    mllm.score(text_model.ours, [mllm.Prompt([1, 2, 3])] * 3)
    assert len(made) == 3


def test_score_of_a_broken_picture_is_an_image_error(vision_model: Tiny) -> None:
    with pytest.raises(ImageError, match="truncated"):
        mllm.score(vision_model.ours, [mllm.Prompt([IMAGE], [Broken()])])


@pytest.mark.parametrize("turn", [0, 3])
def test_logits_that_are_not_finite_fail_their_own_request(
    text_model: Tiny, tables: list[RequestTable], turn: int
) -> None:
    """The row of one prompt is poisoned in the prefill, or in a decode step."""
    prompts, calls = four_prompts(text_model), itertools.count()
    want = mllm.generate(text_model.ours, prompts, max_new_tokens=8)
    ops = text_model.ours.ops

    def head(*args: Any, **kwargs: Any) -> torch.Tensor:
        logits = ops.head(*args, **kwargs)
        if next(calls) == turn:
            logits[1, 7] = float("nan")
        return logits

    outs = mllm.generate(with_ops(text_model.ours, head=head), prompts, max_new_tokens=8)
    assert (outs[1].finish_reason, outs[1].tokens) == ("error", want[1].tokens[:turn])
    assert f"after {3 + turn} tokens are not finite" in (outs[1].error or "")
    for index in (0, 2, 3):
        assert (outs[index].tokens, outs[index].finish_reason) == (want[index].tokens, "length")


def test_a_model_of_nan_fails_every_request_with_a_reason(text_model: Tiny, tables: list[RequestTable]) -> None:
    nan = map_leaves(lambda t: torch.full_like(t, float("nan")), text_model.ours.weights)
    outs = mllm.generate(evolve(text_model.ours, weights=nan), four_prompts(text_model))
    assert [(out.finish_reason, out.tokens) for out in outs] == [("error", ())] * 4


# what is refused before anything runs

GOOD = mllm.Prompt([1, 2, 3])
REFUSED: list[Any] = [
    ([mllm.Prompt([])], {}, PromptError, r"prompts\[0\]: .*at least one token"),
    ([GOOD, mllm.Prompt([96])], {}, PromptError, r"prompts\[1\]: .*outside the vocabulary of 96"),
    ((GOOD for _ in range(2)), {}, TypeError, "prompts: expected a sequence of prompts, got generator"),
    (None, {}, TypeError, "prompts: expected a sequence of prompts, got NoneType"),
    ([GOOD, GOOD], {"max_new_tokens": [1, 0]}, ValueError, r"max_new_tokens\[1\]: expected 1 or more"),
    ([mllm.Prompt([1, IMAGE])], {}, PromptError, "1 image placeholders for 0 images"),
    ([mllm.Prompt([1], [picture(8, 8)])], {}, PromptError, "0 image placeholders for 1 images"),
    ([mllm.Prompt([IMAGE, IMAGE], [picture(8, 8)])], {}, PromptError, "2 image placeholders for 1 images"),
    ([mllm.Prompt([VIDEO])], {}, PromptError, "video"),
    ([GOOD, mllm.Prompt([IMAGE], [Image.new("RGB", (201, 1))])], {}, ImageError, "200:1"),
    ([mllm.Prompt(words(513))], {}, PromptError, r"prompts\[0\]: 513 tokens exceed the model's context of 512 tokens"),
    ([GOOD, mllm.Prompt([IMAGE, *words(511)], [picture(16, 8)])], {}, PromptError,
     r"prompts\[1\]: 513 tokens \(2 of them image tokens\) exceed the model's context of 512"),
    ([GOOD, mllm.Prompt(words(40))], {"max_total_tokens": 39}, PromptError,
     r"prompts\[1\]: 40 tokens exceed the KV pool of 32 tokens"),
    ([GOOD, mllm.Prompt([IMAGE, *words(30)], [picture(24, 16)])], {"max_total_tokens": 32}, PromptError,
     r"36 tokens \(6 of them image tokens\) exceed the KV pool of 32"),
    (["text"], {}, TypeError, r"prompts\[0\]: expected a mllm.Prompt, got str"),
    ([GOOD, [1, 2]], {}, TypeError, r"prompts\[1\]"),
    ([GOOD], {"max_new_tokens": 0}, ValueError, "max_new_tokens: expected 1 or more, got 0"),
    ([GOOD], {"max_new_tokens": -3}, ValueError, "max_new_tokens"),
    ([GOOD], {"max_new_tokens": 1.5}, TypeError, "max_new_tokens"),
    ([GOOD], {"max_new_tokens": True}, TypeError, "max_new_tokens"),
    ([GOOD], {"max_new_tokens": None}, TypeError, "max_new_tokens"),
    ([GOOD], {"max_new_tokens": "8"}, TypeError, "max_new_tokens"),
    ([GOOD], {"max_new_tokens": [4, 4]}, ValueError, "max_new_tokens: got 2 values for 1 prompts"),
    ([GOOD, GOOD], {"max_new_tokens": [4, 0]}, ValueError, "max_new_tokens"),
    ([GOOD], {"sampling": None}, TypeError, "sampling"),
    ([GOOD], {"sampling": [Sampling()] * 2}, ValueError, "sampling: got 2 values for 1 prompts"),
    ([GOOD], {"sampling": [{"temperature": 1}]}, TypeError, "sampling"),
    ([GOOD], {"max_running_requests": 0}, ValueError, "max_running_requests: expected 1 or more, got 0"),
    ([GOOD], {"max_running_requests": -1}, ValueError, "max_running_requests"),
    ([GOOD], {"max_total_tokens": 0}, ValueError, "max_total_tokens"),
    ([GOOD], {"max_total_tokens": -64}, ValueError, "max_total_tokens"),
    *(([GOOD], {name: value}, TypeError, name)
      for name in ("max_running_requests", "max_total_tokens") for value in (64.5, "64", float("nan"), True)),
]  # fmt: skip


@pytest.mark.parametrize("function", ["generate", "stream"])
@pytest.mark.parametrize(("prompts", "options", "error", "text"), REFUSED)
def test_bad_input_raises_at_the_call_before_anything_ran(
    vision_model: Tiny, monkeypatch: pytest.MonkeyPatch, function: str, prompts: list[Any], options: dict[str, Any],
    error: type[Exception], text: str,
) -> None:  # fmt: skip
    for stage in ("vit", "prefill", "decode", "step", "admit"):
        monkeypatch.setattr(stages, stage, lambda *a, **k: pytest.fail("a stage ran"))
    with pytest.raises(error, match=text) as caught:
        getattr(mllm, function)(vision_model.ours, prompts, **options)  # a stream is not even asked for a piece
    assert "0x" not in str(caught.value)


def test_one_prompt_instead_of_a_list_is_a_type_error(text_model: Tiny) -> None:
    for function in (mllm.generate, mllm.stream, mllm.score):
        with pytest.raises(TypeError, match=r"pass \[prompt\]"):
            function(text_model.ours, GOOD)  # type: ignore[arg-type]


def test_images_for_a_text_model_are_a_prompt_error(text_model: Tiny) -> None:
    with pytest.raises(PromptError, match="reads only text"):
        mllm.generate(text_model.ours, [mllm.Prompt([1, IMAGE], [picture(8, 8)])])


def test_what_needs_text_says_that_there_is_no_tokenizer(text_model: Tiny) -> None:
    with pytest.raises(CheckpointError, match="no tokenizer"):
        mllm.prompt(text_model.ours, [{"role": "user", "content": "hello"}])


# streams


@examples(25)
@given(
    data=st.data(), temperature=st.sampled_from([0.0, 2.0]), count=st.integers(1, 5), rows=st.none() | st.integers(1, 3)
)
def test_the_pieces_of_a_stream_join_to_what_generate_returns(
    speaking: mllm.Model, data: st.DataObject, temperature: float, count: int, rows: int | None
) -> None:
    prompts = [mllm.Prompt(data.draw(st.lists(st.integers(0, 499), min_size=1, max_size=20))) for _ in range(count)]
    options: dict[str, Any] = {
        "max_new_tokens": data.draw(st.lists(st.integers(1, 12), min_size=count, max_size=count)),
        "sampling": [Sampling(temperature=temperature, seed=i) for i in range(count)],
        "max_running_requests": rows,
    }
    outs = mllm.generate(speaking, prompts, **options)
    pieces = list(mllm.stream(speaking, prompts, **options))
    for index, out in enumerate(outs):
        own = [piece for piece in pieces if piece.index == index]
        assert "".join(piece.text for piece in own) == out.text
        assert tuple(piece.token for piece in own) == out.tokens
        assert [piece.finish_reason for piece in own] == [None] * (len(own) - 1) + [out.finish_reason]
        assert speaking.tokenizer is not None
        assert out.text == speaking.tokenizer.decode(out.tokens)


def test_a_chat_goes_in_and_text_comes_out(speaking: mllm.Model) -> None:
    prompt = mllm.prompt(speaking, [{"role": "user", "content": "The quick brown fox?"}])
    assert speaking.tokenizer is not None
    assert speaking.tokenizer.decode(prompt.tokens) == "user\nThe quick brown fox?\nassistant\n"
    (out,) = mllm.generate(speaking, [prompt], max_new_tokens=6)
    assert (len(out.tokens), out.prompt_tokens) == (6, len(prompt.tokens))


@pytest.mark.parametrize("after", [0, 1, 2, 5, 9, 14])
def test_an_abandoned_stream_harms_nobody(vision_model: Tiny, after: int) -> None:
    prompts = four_prompts(vision_model)
    want = mllm.generate(vision_model.ours, prompts, max_new_tokens=5)
    pieces = mllm.stream(vision_model.ours, prompts, max_new_tokens=5)
    begun = list(itertools.islice(pieces, after))
    assert len(begun) == after
    pieces.close()  # type: ignore[attr-defined]
    assert list(pieces) == []
    assert [o.tokens for o in mllm.generate(vision_model.ours, prompts, max_new_tokens=5)] == [o.tokens for o in want]


def test_two_streams_of_one_model_do_not_meet(vision_model: Tiny) -> None:
    prompts = four_prompts(vision_model)
    want = [o.tokens for o in mllm.generate(vision_model.ours, prompts, max_new_tokens=6)]
    both = [mllm.stream(vision_model.ours, prompts, max_new_tokens=6) for _ in range(2)]
    got: list[list[list[int]]] = [[[] for _ in prompts] for _ in both]
    for pair in itertools.zip_longest(*both):
        for mine, piece in zip(got, pair, strict=True):
            mine[piece.index].append(piece.token)
    assert [[tuple(tokens) for tokens in mine] for mine in got] == [want, want]


def test_a_process_without_standard_error_can_load(vision_model: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stderr", None)  # a service's, or a window's
    assert mllm.load(vision_model.folder).name == vision_model.folder.name


def test_progress_is_silent_unless_asked_for(text_model: Tiny, capfd: pytest.CaptureFixture[str]) -> None:
    mllm.generate(text_model.ours, [GOOD], max_new_tokens=2)
    assert capfd.readouterr() == ("", "")


# failures from below


@pytest.mark.parametrize(
    "op", ["embed", "attend_", "norm_gate", "head", "sample", "advance_", "attend_images", "merge"]
)
@pytest.mark.parametrize(("at", "kind"), [(0, "GPU"), (2, "GPU"), (2, "CPU")])
def test_memory_that_runs_out_in_any_op_fails_the_requests_of_its_batch_and_no_other(
    vision_model: Tiny, tables: list[RequestTable], op: str, at: int, kind: str
) -> None:
    prompts, calls = four_prompts(vision_model), itertools.count()
    want = mllm.generate(vision_model.ours, prompts, max_new_tokens=4)
    real: Callable[..., Any] = getattr(vision_model.ours.ops, op)

    def fails(*args: Any, **kwargs: Any) -> Any:
        if next(calls) == at:
            if kind == "CPU":
                torch.empty(2**60, dtype=torch.uint8)
            raise torch.OutOfMemoryError("can't allocate memory")
        return real(*args, **kwargs)

    model = with_ops(vision_model.ours, **{op: fails})
    outs = mllm.generate(model, prompts, max_new_tokens=4, max_running_requests=2)
    failed = [out for out in outs if out.finish_reason == "error"]
    assert 1 <= len(failed) <= 2
    assert all("out of memory in" in (out.error or "") and "can't allocate" in (out.error or "") for out in failed)
    for out, whole in zip(outs, want, strict=True):
        assert out in failed or (out.tokens, out.finish_reason) == (whole.tokens, "length")
        assert out.tokens == whole.tokens[: len(out.tokens)]
    assert [o.tokens for o in mllm.generate(model, prompts, max_new_tokens=4)] == [o.tokens for o in want]


# dummies


@pytest.mark.parametrize("name", families.PRESETS)
def test_every_preset_has_weights_of_the_public_shapes(name: str) -> None:
    config = families.preset(name)
    made = weights.build(config, lambda path, shape: torch.empty(shape, dtype=torch.bfloat16, device="meta"))
    assert len(made.text.layers) == config.text.num_hidden_layers
    assert made.text.embed.shape == (151936, config.text.hidden_size)
    assert (made.text.head is made.text.embed) == config.text.tie_word_embeddings
    unique = {id(t): t.numel() for t in leaves(made)}
    billions = sum(unique.values()) / 1e9
    published = {"qwen3-0.6b": 0.596, "qwen3-1.7b": 1.721, "qwen3-4b": 4.022, "qwen3-8b": 8.191,
                 "qwen3-vl-2b": 2.127, "qwen3-vl-4b": 4.438, "qwen3-vl-8b": 8.767}  # fmt: skip
    assert billions == pytest.approx(published[name], rel=0.01)


def test_a_dummy_of_a_config_runs(vision_model: Tiny) -> None:
    config = vision_model.ours.config
    config = evolve(config, text=evolve(config.text, max_position_embeddings=4096))
    model = mllm.dummy(config, dtype="float32", seed=3)
    assert (model.tokenizer, model.dtype, model.device.type) == (None, torch.float32, "cpu")
    out = mllm.generate(model, [mllm.Prompt([START, IMAGE, END], [picture(60, 40)]), GOOD], max_new_tokens=3)
    assert [len(o.tokens) for o in out] == [3, 3]
    assert mllm.dummy(config).dtype == torch.bfloat16


def test_a_dummy_or_device_or_dtype_that_is_not_there_is_refused(vision_model: Tiny, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="qwen3-vl-2b"):
        mllm.dummy("qwen9")
    config = vision_model.ours.config
    for call in (lambda **k: mllm.dummy(config, **k), lambda **k: mllm.load(vision_model.folder, **k)):
        with pytest.raises(ValueError, match="int8"):
            call(dtype="int8")
        with pytest.raises(ValueError, match="int32"):
            call(dtype=torch.int32)
        with pytest.raises(ValueError, match="'mps': there are kernels for cpu and cuda"):
            call(device="mps")
        if not torch.cuda.is_available():
            with pytest.raises(ValueError, match="sees no GPU"):
                call(device="cuda")


def test_the_model_says_what_it_is(vision_model: Tiny) -> None:
    assert "torch.float32 on cpu" in repr(vision_model.ours)
    assert tables_for("cpu", torch.float32).ops is vision_model.ours.ops


def test_importing_mllm_imports_neither_transformers_nor_triton() -> None:
    code = "import sys, mllm; print([m for m in ('transformers', 'triton', 'flashinfer') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)  # noqa: S603
    assert done.stdout.strip() == "[]"


def test_the_ops_of_a_model_run_prefill_and_decode(text_model: Tiny) -> None:
    calls: list[int] = []

    def head(*args: Any, **kwargs: Any) -> torch.Tensor:
        calls.append(1)
        return text_model.ours.ops.head(*args, **kwargs)

    model = with_ops(text_model.ours, head=head)
    mllm.generate(model, [GOOD], max_new_tokens=4)
    assert len(calls) == 4
