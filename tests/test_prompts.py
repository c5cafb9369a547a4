"""Prompts: positions equal transformers' rope index, and every malformed prompt is refused before anything runs."""

import inspect
import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from tokenizer_files import TEMPLATE, write_tokenizer
from transformers.models.qwen3_vl.configuration_qwen3_vl import Qwen3VLConfig
from transformers.models.qwen3_vl.modeling_qwen3_vl import Qwen3VLModel

from mllm.errors import ImageError, PromptError
from mllm.images import ImageConfig, grid, tokens
from mllm.positions import positions
from mllm.prompts import Prompt, expand, from_messages
from mllm.tokenizer import Tokenizer

IMAGE, VIDEO, VOCAB = 90, 91, 100
CONFIG = ImageConfig(min_pixels=32 * 32, max_pixels=64 * 32 * 32)


def picture(cols: int, rows: int) -> Image.Image:
    """A picture that becomes rows x cols tokens under CONFIG."""
    return Image.new("RGB", (cols * 32, rows * 32))


@pytest.fixture(scope="module")
def rope_index() -> Any:
    """transformers' positions of expanded ids: (ids, grids) -> (positions [3, n], delta)."""
    small = {"hidden_size": 16, "num_attention_heads": 1, "num_key_value_heads": 1, "head_dim": 16}
    text = {**small, "num_hidden_layers": 1, "intermediate_size": 16, "vocab_size": VOCAB}
    vision = {"depth": 1, "hidden_size": 16, "num_heads": 1, "intermediate_size": 16, "out_hidden_size": 16}
    config = Qwen3VLConfig(
        text_config=text, vision_config={**vision, "deepstack_visual_indexes": [0]}, image_token_id=IMAGE
    )
    model = Qwen3VLModel(config)

    def call(ids: np.ndarray, grids: tuple[tuple[int, int], ...]) -> tuple[np.ndarray, int]:
        given: dict[str, Any] = {"input_ids": torch.from_numpy(ids).long()[None]}
        given["image_grid_thw"] = torch.tensor([(1, *grid) for grid in grids]) if grids else None
        if "mm_token_type_ids" in inspect.signature(model.get_rope_index).parameters:
            given["mm_token_type_ids"] = (given["input_ids"] == IMAGE).int()
        where, delta = model.get_rope_index(**given)
        return where[:, 0].numpy(), int(delta)

    return call


pieces = st.lists(
    st.tuples(st.lists(st.integers(0, 89), min_size=1, max_size=9), st.tuples(st.integers(1, 8), st.integers(1, 8))),
    max_size=4,
)


@settings(max_examples=100, deadline=None)
@given(pieces=pieces, before=st.integers(0, 1), after=st.lists(st.integers(0, 89), max_size=5))
def test_expanded_prompts_stand_where_transformers_puts_them(
    rope_index: Any, pieces: list[Any], before: int, after: list[int]
) -> None:
    ids: list[int] = []
    pictures: list[Any] = []
    for index, (text, size) in enumerate(pieces):
        ids += [] if index == 0 and before == 0 else text  # the first image may open the prompt
        ids.append(IMAGE)
        pictures.append(picture(*size))
    ids += after or [1] * (not pieces)
    got = expand(Prompt(ids, pictures), CONFIG, IMAGE, VOCAB)
    want, delta = rope_index(got.tokens, got.grids)
    np.testing.assert_array_equal(got.positions, want)
    assert got.delta == delta == got.positions.max() + 1 - len(got.tokens)
    assert (got.tokens.dtype, got.positions.dtype, got.positions.flags.c_contiguous) == (np.int32, np.int32, True)
    assert got.grids == tuple(grid(p.size, CONFIG) for p in pictures)
    again = expand(Prompt(got.tokens, pictures), CONFIG, IMAGE, VOCAB)
    np.testing.assert_array_equal(again.tokens, got.tokens)
    np.testing.assert_array_equal(again.positions, got.positions)
    assert again.starts == got.starts
    for start, shape in zip(got.starts, got.grids, strict=True):
        count = tokens(shape, CONFIG)
        assert (got.tokens[start : start + count] == IMAGE).all()


def test_the_table_in_the_docstring_is_true() -> None:
    where, delta = positions(9, [2], [(2, 3)])
    assert where.tolist() == [
        [0, 1, 2, 2, 2, 2, 2, 2, 5],
        [0, 1, 2, 2, 2, 3, 3, 3, 5],
        [0, 1, 2, 3, 4, 2, 3, 4, 5],
    ]
    assert delta == -3


@settings(max_examples=50, deadline=None)
@given(sizes=st.lists(st.tuples(st.integers(1, 4), st.integers(1, 4)), min_size=1, max_size=5))
def test_adjacent_images_are_told_apart_by_their_counts(sizes: list[tuple[int, int]]) -> None:
    pictures = [picture(*size) for size in sizes]
    short = expand(Prompt([5, *[IMAGE] * len(sizes), 6], pictures), CONFIG, IMAGE, VOCAB)
    full = expand(Prompt(short.tokens, pictures), CONFIG, IMAGE, VOCAB)
    counts = [cols * rows for cols, rows in sizes]
    assert short.starts == full.starts == tuple(1 + sum(counts[:i]) for i in range(len(sizes)))
    np.testing.assert_array_equal(short.positions, full.positions)
    # Each image starts where the one before it ends, as if there were text of length 0 between them.
    assert [int(short.positions[0, s]) for s in short.starts] == [
        1 + sum(max(size) for size in sizes[:i]) for i in range(len(sizes))
    ]


def test_text_has_three_equal_rows_and_no_delta() -> None:
    got = expand(Prompt([3, 1, 2]), None, None, VOCAB)
    assert got.tokens.tolist() == [3, 1, 2]
    assert got.positions.tolist() == [[0, 1, 2]] * 3
    assert (got.delta, got.grids, got.starts) == (0, (), ())


def test_expanding_decodes_nothing() -> None:
    buffer = io.BytesIO()
    picture(3, 2).save(buffer, "PNG")
    broken = Image.open(io.BytesIO(buffer.getvalue()[:60]))  # the header is there, the pixels are not
    assert expand(Prompt([IMAGE, 1], [broken]), CONFIG, IMAGE, VOCAB).tokens.tolist() == [IMAGE] * 6 + [1]


@pytest.mark.parametrize(
    ("ids", "count", "text"),
    [
        ([], 0, "at least one token"),
        ([VOCAB], 0, "token id 100 at index 0 is outside the vocabulary of 100"),
        ([1, VIDEO], 0, "videos are not supported"),
        ([1, IMAGE], 0, "1 image placeholders for 0 images: expected none"),
        ([1], 1, "0 image placeholders for 1 images"),
        ([IMAGE, 1, IMAGE], 1, r"2 image placeholders for 1 images: expected 1 \(one per image\) or 6 \(6\)"),
        ([IMAGE], 2, r"1 image placeholders for 2 images: expected 2 \(one per image\) or 12 \(6 \+ 6\)"),
        ([IMAGE] * 5, 1, "5 image placeholders"),
        ([IMAGE] * 7, 1, "7 image placeholders"),
        ([IMAGE] * 3 + [1] + [IMAGE] * 3, 1, "image 0 needs 6 placeholders in a row from index 0 on"),
        ([IMAGE] * 7 + [1] + [IMAGE] * 5, 2, "image 1 needs 6 placeholders in a row from index 6 on"),
    ],
)
def test_a_prompt_that_cannot_run_is_a_prompt_error(ids: list[int], count: int, text: str) -> None:
    with pytest.raises(PromptError, match=text):
        expand(Prompt(ids, [picture(3, 2)] * count), CONFIG, IMAGE, VOCAB, video_token_id=VIDEO)


def test_images_for_a_text_model_and_images_outside_the_limits_are_refused() -> None:
    with pytest.raises(PromptError, match="2 images for a model that reads only text"):
        expand(Prompt([1], [picture(1, 1)] * 2), None, None, VOCAB)
    with pytest.raises(ImageError, match="201 x 1 is longer than 200:1"):
        expand(Prompt([IMAGE], [Image.new("L", (201, 1))]), CONFIG, IMAGE, VOCAB)


# --- Prompt ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "ids",
    [
        [1, 2, 3],
        (1, 2, 3),
        range(1, 4),
        np.array([1, 2, 3]),
        np.array([1, 2, 3], np.uint16),
        torch.tensor([1, 2, 3]),
        list(np.array([1, 2, 3], np.int32)),
        list(torch.tensor([1, 2, 3])),
        [1, np.int64(2), torch.tensor(3)],
    ],
)
def test_any_sequence_of_integers_is_a_prompt(ids: Any) -> None:
    prompt = Prompt(tokens=ids)
    assert prompt.tokens == (1, 2, 3)
    assert {type(token) for token in prompt.tokens} == {int}
    assert prompt.images == ()


@pytest.mark.parametrize(
    "ids",
    [
        "123",
        b"123",
        5,
        None,
        np.array(5),
        [1.0],
        [True],
        [None],
        ["1"],
        [[1, 2]],
        np.array([1.0]),
        np.array([True]),
        np.array([[1]]),
        torch.tensor([1.5]),
        [torch.tensor(True)],
        [np.bool_(True)],
        [torch.tensor([1, 2])],
    ],
)
def test_what_is_not_a_sequence_of_integers_is_a_type_error(ids: Any) -> None:
    with pytest.raises(TypeError, match="integer"):
        Prompt(tokens=ids)


@pytest.mark.parametrize("token", [-1, 2**31, 2**63, 10**30])
def test_ids_outside_int32_are_prompt_errors(token: int) -> None:
    with pytest.raises(PromptError, match=r"token ids must lie in \[0, 2147483648\)"):
        Prompt(tokens=[1, token])


@pytest.mark.parametrize(
    "images", ["a.png", ["a.png"], [Path("a.png")], picture(1, 1), 3, [np.zeros((2, 2, 3))], [None]]
)
def test_images_that_are_not_pil_images_are_type_errors(images: Any) -> None:
    with pytest.raises(TypeError, match="PIL image"):
        Prompt(tokens=[1], images=images)


def test_a_prompt_cannot_be_changed() -> None:
    prompt = Prompt([1], [picture(1, 1)])
    with pytest.raises(AttributeError):
        prompt.tokens = (2,)  # type: ignore[misc]


# --- messages ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    loaded = Tokenizer.load(write_tokenizer(tmp_path_factory.mktemp("tokenizer")))
    assert loaded is not None
    return loaded


def build(tokenizer: Tokenizer, messages: object) -> Prompt:
    image, video = (tokenizer.fast.token_to_id(f"<|{kind}_pad|>") for kind in ("image", "video"))
    return from_messages(messages, tokenizer, image, video)


def user(*parts: object) -> list[dict[str, object]]:
    return [{"role": "user", "content": list(parts)}]


def text(value: object) -> dict[str, object]:
    return {"type": "text", "text": value}


def test_messages_with_images_anywhere_become_one_prompt(tokenizer: Tokenizer) -> None:
    first, second, third = picture(1, 1), picture(2, 1), picture(1, 2)
    prompt = build(
        tokenizer,
        [
            {"role": "system", "content": "Look."},
            {
                "role": "user",
                "content": [{"type": "image", "image": first}, text("and "), {"type": "image", "image": second}],
            },
            {"role": "assistant", "content": "Two."},
            {"role": "user", "content": [text("now"), {"type": "image", "image": third}, text("?")]},
        ],
    )
    seen = "<|vision_start|><|image_pad|><|vision_end|>"
    assert prompt.images == (first, second, third)
    assert prompt.tokens == tuple(
        tokenizer.encode(
            "<|im_start|>system\nLook.<|im_end|>\n"
            f"<|im_start|>user\n{seen}and {seen}<|im_end|>\n"
            "<|im_start|>assistant\nTwo.<|im_end|>\n"
            f"<|im_start|>user\nnow{seen}?<|im_end|>\n<|im_start|>assistant\n"
        )
    )


def test_text_parts_and_a_string_say_the_same(tokenizer: Tokenizer) -> None:
    assert build(tokenizer, user(text("a "), text("b"))).tokens == build(tokenizer, user(text("a b"))).tokens
    whole = from_messages([{"role": "user", "content": "a b"}], tokenizer, None)
    assert whole.tokens == build(tokenizer, user(text("a b"))).tokens


@pytest.mark.parametrize(
    ("messages", "error", "match"),
    [
        ("hello", TypeError, "messages must be a list, got str"),
        (None, TypeError, "messages must be a list, got NoneType"),
        ({"role": "user", "content": "x"}, TypeError, "messages must be a list, got dict"),
        ([], PromptError, "messages is empty"),
        (["hello"], TypeError, r"messages\[0\] must be a dict, got str"),
        ([{}], PromptError, r"messages\[0\] has no 'role'"),
        ([{"content": "x"}], PromptError, r"messages\[0\] has no 'role'"),
        ([{"role": "user"}], PromptError, r"messages\[0\] has no 'content'"),
        ([{"role": "tool", "content": "x"}], PromptError, "role must be one of"),
        ([{"role": ["user"], "content": "x"}], PromptError, "role must be one of"),
        ([{"role": "user", "content": "x", "tool_calls": []}], PromptError, r"unknown keys \['tool_calls'\]"),
        ([{"role": "user", "content": None}], TypeError, "content must be a string or a list of parts, got NoneType"),
        ([{"role": "user", "content": text("x")}], TypeError, "list of parts, got dict"),
        (user("x"), TypeError, r"messages\[0\]\.content\[0\] must be a dict, got str"),
        (user({}), PromptError, r"content\[0\] has no 'type'"),
        (user({"image": picture(1, 1)}), PromptError, "has no 'type'"),
        (user(text(3)), TypeError, "text must be a string, got int"),
        (user({"type": "text"}), TypeError, "text must be a string, got NoneType"),
        (user({"type": "audio"}), PromptError, "type must be 'text' or 'image', got 'audio'"),
        (user({"type": "video", "video": "x.mp4"}), PromptError, "unknown keys"),
        (user({"type": "video"}), PromptError, "got 'video'"),
        (user({"type": "image_url", "image_url": {"url": "http://x"}}), PromptError, "unknown keys"),
        (user({"type": "image"}), PromptError, "needs one picture under 'image', got 0"),
        (user({"type": "image", "image": None}), TypeError, "must be a PIL image, got builtins.NoneType"),
        (user({"type": "image", "image": "/etc/passwd"}), TypeError, "got the str '/etc/passwd'; nothing is opened"),
        (user({"type": "image", "url": "http://x/y.png"}), TypeError, "nothing is opened or fetched"),
        (user({"type": "image", "path": Path("y.png")}), TypeError, "nothing is opened or fetched"),
        (user({"type": "image", "image": np.zeros((2, 2, 3))}), TypeError, "PIL.Image.fromarray"),
        (user(text("a\ud800")), PromptError, "not valid Unicode"),
    ],
)
def test_malformed_messages_are_typed_errors(
    tokenizer: Tokenizer, messages: object, error: type[Exception], match: str
) -> None:
    with pytest.raises(error, match=match):
        build(tokenizer, messages)


MARKERS = ["<|image_pad|>", "<|video_pad|>", "<|vision_start|>", "<|vision_end|>", "<|vision_pad|>"]


@pytest.mark.parametrize("role", ["system", "user", "assistant"])
@pytest.mark.parametrize("marker", MARKERS)
def test_text_must_not_spell_a_placeholder(tokenizer: Tokenizer, marker: str, role: str) -> None:
    for content in (f"see {marker}", [text(f"see {marker}")], [text(marker[:6]), text(marker[6:])]):
        with pytest.raises(PromptError, match=r"messages\[0\] spells <\|") as caught:
            build(tokenizer, [{"role": role, "content": content}])
        assert marker in str(caught.value)


def test_a_placeholder_in_pieces_beside_an_image_is_refused(tokenizer: Tokenizer) -> None:
    with pytest.raises(PromptError, match=r"spells <\|image_pad\|>"):
        build(tokenizer, user(text("<|image"), {"type": "image", "image": picture(1, 1)}, text("_pad|>")))


def test_images_for_a_text_model_are_refused(tokenizer: Tokenizer) -> None:
    with pytest.raises(PromptError, match="1 images in messages for a model that reads only text"):
        from_messages(user({"type": "image", "image": picture(1, 1)}), tokenizer, None)


@pytest.mark.parametrize(
    ("template", "count"), [("no images", 0), (TEMPLATE + "<|image_pad|>", 2), (TEMPLATE + TEMPLATE, 2)]
)
def test_a_template_that_drops_or_adds_images_is_refused(tmp_path: Path, template: str, count: int) -> None:
    other = Tokenizer.load(write_tokenizer(tmp_path, template=template))
    assert other is not None
    with pytest.raises(PromptError, match=f"{count} image placeholders for 1 images"):
        build(other, user({"type": "image", "image": picture(1, 1)}))


def test_a_template_never_gets_hold_of_a_picture(tmp_path: Path) -> None:
    target = tmp_path / "written.png"
    steal = "{{ messages[0].content[0].image.save('" + str(target) + "') }}"
    other = Tokenizer.load(write_tokenizer(tmp_path, template=steal))
    assert other is not None
    with pytest.raises(PromptError, match="the chat template failed: UndefinedError"):
        build(other, user({"type": "image", "image": picture(1, 1)}))
    assert not target.exists()
