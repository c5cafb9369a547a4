"""The drawn pictures: the same from the same seed, true to their answers, and within their limits."""

import subprocess
import sys
import zlib

import numpy as np
import pytest
from attrs import evolve

from mllm.signs import pictures, scenes, tokens, words
from mllm.signs.compose import shape_scene
from mllm.signs.pictures import HELD_OUT, KINDS, example, examples, held_out, messages
from mllm.signs.scenes import Scene, Shape, Sign, render

GREY = ((128, 128, 128), (128, 128, 128))


def fingerprint(item):
    return (item.kind, item.question, item.answer, *(image.tobytes() for image in item.images))


@pytest.mark.parametrize("kind", KINDS)
def test_example_is_a_function_of_its_seed(kind):
    assert [fingerprint(example(kind, s)) for s in range(4)] == [fingerprint(example(kind, s)) for s in range(4)]
    assert len({fingerprint(example(kind, s)) for s in range(8)}) > 4


def test_further_examples_leave_the_first_one_as_it_is():
    for kind in KINDS:
        first, *others = examples(kind, 3, more=2)
        assert fingerprint(first) == fingerprint(example(kind, 3))
        assert len(others) <= 2


def test_what_is_alike_is_only_for_training():
    """Its questions are of the other kinds, about shapes that share their colours; all of them are different."""
    assert "alike" not in KINDS
    for seed in range(20):
        asked, *others = examples("alike", seed, more=4)
        assert asked.kind == "place"
        assert asked.answer == "nothing" or asked.answer.split()[1] in scenes.COLOURS
        assert {item.kind for item in others} <= {"place", "where", "count"}
        assert asked.question not in {item.question for item in others}
        shapes = shape_scene(np.random.default_rng(seed), 4, 8, alike=True).shapes
        assert len({shape.words for shape in shapes}) == len(shapes)
        assert len({shape.colour for shape in shapes}) <= 4


def test_another_process_draws_the_same():
    code = (
        "import zlib; from mllm.signs.pictures import *\n"
        "print([(i.question, i.answer, *(zlib.crc32(p.tobytes()) for p in i.images)) "
        "for k in KINDS for i in [held_out(k, 5)]])"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)  # noqa: S603
    here = [
        (i.question, i.answer, *(zlib.crc32(p.tobytes()) for p in i.images)) for k in KINDS for i in [held_out(k, 5)]
    ]
    assert run.stdout == f"{here}\n"


def test_held_out_seeds_begin_where_training_seeds_end():
    data = pytest.importorskip("mllm.signs.data")
    assert fingerprint(held_out("text", 0)) == fingerprint(example("text", HELD_OUT))
    assert max(data.Stream.seeds(63, number=10**7, size=512)) < HELD_OUT
    with pytest.raises(ValueError, match="seed"):
        data.Stream(64, 256, 0, 1)


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "chat"])
def test_sizes_and_shapes_of_pictures(kind):
    sizes = []
    for index in range(60):
        item = held_out(kind, index)
        assert len(item.images) == (2 if kind == "change" else 1)
        for image in item.images:
            assert image.mode == "RGB"
            assert 64 <= min(image.size) <= max(image.size) <= 512
            assert max(image.size) <= 4 * min(image.size) + 4
            sizes.append(image.size)
    assert len(set(sizes)) > 30


def test_text_is_short_and_reads_one_way():
    answers = [held_out("text", index).answer for index in range(150)]
    assert all(1 <= len(answer) <= 12 and not words.ambiguous(answer) for answer in answers)
    assert {len(answer) for answer in answers} >= set(range(2, 13))
    assert words.ambiguous("O0")
    assert words.ambiguous("zoo")
    assert not words.ambiguous("zoos 7")


def scene(*shapes, size=(300, 300)):
    return Scene(size=size, ground=GREY, shapes=shapes)


def test_description_is_in_reading_order():
    drawn = scene(Shape("star", "orange", (2, 0)), Shape("ring", "red", (0, 2)), Shape("cross", "blue", (1, 1)))
    assert pictures.describe(drawn) == (
        "a red ring at the top right, a blue cross in the centre, an orange star at the bottom left"
    )


def test_neighbour_is_the_nearest_straight_on():
    middle, far, near = Shape("ring", "red", (1, 2)), Shape("star", "blue", (1, 0)), Shape("cross", "pink", (1, 1))
    drawn = scene(middle, far, near)
    assert pictures.neighbour(drawn, middle, "left of") == "a pink cross"
    assert pictures.neighbour(drawn, middle, "right of") == "nothing"
    askew = scene(middle, Shape("star", "blue", (0, 0)))
    assert pictures.neighbour(askew, middle, "left of") is None, "a person could call that left of it, or not"


@pytest.mark.parametrize(
    ("before", "after", "answer"),
    [
        ([("ring", "red", (0, 0))], [("ring", "blue", (0, 0))], "the red ring turned blue"),
        ([("ring", "red", (0, 0))], [("star", "red", (0, 0))], "the red ring became a star"),
        ([("ring", "red", (0, 0))], [("ring", "red", (1, 1))], "the red ring moved from the top left to the centre"),
        ([("ring", "red", (0, 0))], [], "the red ring at the top left disappeared"),
        ([], [("star", "orange", (1, 2))], "an orange star appeared on the right"),
        ([("ring", "red", (0, 0))], [("ring", "red", (0, 0))], "nothing changed"),
    ],
)
def test_change(before, after, answer):
    first, second = (scene(*(Shape(*shape) for shape in shapes)) for shapes in (before, after))
    assert pictures.change(first, second) == answer


def test_shapes_are_drawn_where_the_answer_says():
    for row in range(3):
        for column in range(3):
            pixels = np.asarray(render(scene(Shape("circle", "red", (row, column)))))
            ys, xs = np.nonzero((pixels[..., 0] > 190) & (pixels[..., 1] < 70))
            assert (ys.mean() // 100, xs.mean() // 100) == (row, column)


def test_sign_is_drawn_within_the_picture():
    for index in range(40):
        item = held_out("text", index)
        width, height = item.images[0].size
        assert width >= 7 * len(item.answer)
        assert height >= 22


def test_noise_and_colour_come_from_the_scene():
    flat = render(Scene((64, 64), GREY))
    noisy = Scene((64, 64), GREY, noise=20, seed=1)
    assert np.asarray(flat).std() == 0
    assert np.asarray(render(noisy)).std() > 5
    assert render(noisy).tobytes() != render(evolve(noisy, seed=2)).tobytes()
    sign = Sign("HELLO", 30, ink=(0, 0, 0), plate=(255, 255, 255), angle=5.0)
    assert np.asarray(render(Scene((200, 100), GREY, sign=sign))).min() < 30


def test_unknown_kind_and_shape_are_refused():
    with pytest.raises(ValueError, match="kind"):
        example("poem", 0)
    with pytest.raises(ValueError, match="no shape"):
        scenes._corners("heptagon")


def test_messages_put_the_pictures_first():
    (message,) = messages(held_out("change", 0))
    assert [part["type"] for part in message["content"]] == ["image", "image", "text"]


def test_tokenizer_spells_signs_and_gives_back_every_text():
    tokenizer = tokens.build()
    for text in ("STOP", "coffee", "B-12", "1234", "Zürich"):
        spelled = tokenizer.encode(text).ids
        assert len(spelled) == len(text.encode())
        assert tokenizer.decode(spelled) == text
    assert len(tokenizer.encode(" the red circle").ids) == 3
    assert tokenizer.get_vocab_size() == tokens.build().get_vocab_size() <= 704
    for kind in KINDS:
        for index in range(20):
            answer = held_out(kind, index).answer
            assert tokenizer.decode(tokenizer.encode(answer).ids) == answer
