"""The training code of "signs": its packed forward pass is transformers', and the script runs from end to end."""

import argparse
import io

import pytest
import torch
from attrs import evolve

from mllm.signs import FOLDER, data, packed, train
from mllm.signs.evaluate import Reference, break_deepstack, break_mrope
from mllm.signs.pictures import KINDS, Example, held_out


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    out = tmp_path_factory.mktemp("signs")
    train.save(train.fresh_model(0), out)
    return out


def packed_logits(model, item, **ablation):
    batch = data.pack([item])
    with torch.no_grad():
        return packed.decode(model, batch, packed.encode(model, batch), **ablation), batch


def reference_logits(reference, item, batch):
    """transformers' logits where the answer's tokens are predicted."""
    inputs = reference.inputs(item)
    answer = batch["ids"][inputs["input_ids"].shape[1] :]
    inputs["input_ids"] = torch.cat([inputs["input_ids"], answer[None]], 1)
    assert inputs["input_ids"][0].tolist() == batch["ids"].tolist()
    inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
    if item.images:
        inputs["mm_token_type_ids"] = (inputs["input_ids"] == reference.model.config.image_token_id).long()
    with torch.no_grad():
        return reference.model(**inputs).logits[0, batch["at"]]


@pytest.mark.parametrize("kind", KINDS)
def test_packed_forward_is_the_one_of_transformers(folder, kind):
    reference = Reference(folder)
    item = held_out(kind, 1)
    logits, batch = packed_logits(reference.model, item)
    torch.testing.assert_close(logits, reference_logits(reference, item, batch), atol=2e-5, rtol=1e-5)


def test_ablations_are_the_same_in_both(folder):
    item = held_out("change", 0)
    for broken, switch in ((break_deepstack, {"taps": False}), (break_mrope, {"flat": True})):
        reference = Reference(folder)
        whole, _ = packed_logits(reference.model, item)
        logits, batch = packed_logits(reference.model, item, **switch)
        broken(reference)
        torch.testing.assert_close(logits, reference_logits(reference, item, batch), atol=2e-5, rtol=1e-5)
        assert not torch.allclose(logits, whole, atol=1e-3)


def test_a_packed_batch_is_its_examples_one_by_one(folder):
    model = Reference(folder).model
    pair = held_out("change", 2)
    items = [held_out("text", 0), pair, evolve(pair, images=pair.images[::-1]), held_out("chat", 0)]
    batch = data.pack(items)
    assert len(batch["vision_starts"]) - 1 == 3, "pictures that two prompts share are encoded once"
    with torch.no_grad():
        together = packed.decode(model, batch, packed.encode(model, batch))
    alone = torch.cat([packed_logits(model, item)[0] for item in items])
    torch.testing.assert_close(together, alone, atol=2e-5, rtol=1e-5)


def test_training_batches_are_seeded():
    one, two = (data.Stream(3, 4, 0, 2).batch(1) for _ in range(2))
    assert all(torch.equal(one[key], two[key]) for key in one)
    assert not torch.equal(one["labels"], data.Stream(4, 4, 0, 2).batch(1)["labels"])


def test_a_batch_that_cannot_be_drawn_ends_the_training(monkeypatch):
    def batch(stream, number, draw=data.Stream.batch):
        if number == 2:
            raise MemoryError("no room to draw in")
        return draw(stream, number)

    monkeypatch.setattr(data.Stream, "batch", batch)
    args = argparse.Namespace(batch=2, replay=1, keep=4, seed=1, steps=4, workers=0)
    batches = train.batches(args, 0, "cpu")
    assert len([next(batches), next(batches)]) == 2
    with pytest.raises(MemoryError, match="no room to draw in"):
        next(batches)


@pytest.mark.slow
def test_script_trains_saves_and_goes_on(tmp_path):
    said = io.StringIO()
    args = argparse.Namespace(
        out=tmp_path, start=None, steps=3, minutes=0, since=0, compile=False, batch=3, replay=2, keep=4, rate=1e-3, warmup=1,
        seed=1, workers=0, report=1, check=2, each=2, resume=False,
    )  # fmt: skip
    train.train(args, lambda line: print(line, file=said))
    assert "final, no deepstack" in said.getvalue()
    assert (tmp_path / "scores.json").exists()
    Reference(tmp_path / "model")
    args.resume, args.steps = True, 4
    train.train(args, lambda line: print(line, file=said))
    assert "from step 2 to 4" in said.getvalue()


@pytest.mark.slow
@pytest.mark.skipif(not (FOLDER / "model.safetensors").exists(), reason="the model is not there")
def test_the_shipped_model_answers_through_transformers():
    reference = Reference(FOLDER)
    items: list[Example] = [held_out(kind, index) for kind in KINDS for index in range(5)]
    right = sum(reference.answer(item) == item.answer for item in items)
    assert right >= 30, f"{right} of {len(items)}"


def test_the_shipped_folder_is_small_and_complete():
    names = {path.name for path in FOLDER.iterdir()}
    assert names >= {
        "config.json", "model.safetensors", "generation_config.json", "preprocessor_config.json", "tokenizer.json",
        "tokenizer_config.json", "chat_template.jinja", "README.md",
    }  # fmt: skip
    assert (FOLDER / "model.safetensors").stat().st_size <= 16_000_000
