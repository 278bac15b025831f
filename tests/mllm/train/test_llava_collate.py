"""Batches of conversations, and their loss in transformers' own LLaVA."""

import pytest
import torch
from chat_kit import chatml_tokenizer
from conversations_kit import (
    SIDE,
    TOKENS,
    colour_folder,  # noqa: F401 (the fixture folder)
    data_of,
    record,
)
from torch.utils.data import DataLoader
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

from llava_integration.models.chat import IGNORED
from llava_integration.train.data import Collate

COLLATE = Collate(pad_token_id=0, image_token_id=9, image_tokens=TOKENS, image_size=SIDE)


def sample_of(length, pictures=0, seed=0, **skipped):
    g = torch.Generator().manual_seed(100 * seed + length)
    ids = torch.randint(10, 90, (length,), generator=g)
    ids[: pictures * TOKENS] = 9
    labels = ids.clone()
    labels[: length // 2 + pictures * TOKENS] = IGNORED
    pixels = torch.randn(pictures, 3, SIDE, SIDE, generator=g)
    return {"input_ids": ids, "labels": labels, "pixel_values": pixels, "skipped": skipped}


def test_a_batch_is_padded_on_the_right():
    samples = [sample_of(11, 1, a="x"), sample_of(7, 0), sample_of(14, 2, a="x", b="y")]
    batch = COLLATE(samples)
    assert batch["input_ids"].shape == batch["labels"].shape == batch["attention_mask"].shape == (3, 14)
    for i, sample in enumerate(samples):
        n = len(sample["input_ids"])
        assert torch.equal(batch["input_ids"][i, :n], sample["input_ids"])
        assert torch.equal(batch["labels"][i, :n], sample["labels"])
        assert batch["input_ids"][i, n:].eq(0).all()
        assert batch["labels"][i, n:].eq(IGNORED).all()
        assert batch["attention_mask"][i].tolist() == [1] * n + [0] * (14 - n)
    assert torch.equal(batch["pixel_values"], torch.cat([samples[0]["pixel_values"], samples[2]["pixel_values"]]))
    assert batch["skipped"] == {"a": "x", "b": "y"}
    assert batch["input_ids"].dtype == batch["labels"].dtype == batch["attention_mask"].dtype == torch.int64


def test_a_batch_without_pictures_gets_a_row_that_has_one():
    for lengths in ([7, 5], [3, 2]):  # rows longer and shorter than a picture
        batch = COLLATE([sample_of(n) for n in lengths])
        width = max(*lengths, TOKENS)
        assert batch["input_ids"].shape == (3, width)
        assert batch["input_ids"][2].tolist() == [9] * TOKENS + [0] * (width - TOKENS)
        assert batch["attention_mask"][2].tolist() == [1] * TOKENS + [0] * (width - TOKENS)
        assert batch["labels"][2].eq(IGNORED).all()
        assert torch.equal(batch["pixel_values"], torch.zeros(1, 3, SIDE, SIDE))


@pytest.mark.parametrize(("length", "width"), [(8, 8), (9, 16), (16, 16)])
def test_length_to_a_multiple(length, width):
    collate = Collate(0, 9, TOKENS, SIDE, pad_to_multiple_of=8)
    batch = collate([sample_of(length, 1)])
    assert batch["input_ids"].shape == batch["labels"].shape == batch["attention_mask"].shape == (1, width)
    assert batch["input_ids"][0, length:].eq(0).all()
    assert batch["labels"][0, length:].eq(IGNORED).all()
    assert batch["attention_mask"].sum() == length


def llava(pad=0, image=9, vocabulary=100):
    torch.manual_seed(0)
    common = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(**common, image_size=SIDE, patch_size=14),
        text_config=LlamaConfig(**common, vocab_size=vocabulary, pad_token_id=pad, max_position_embeddings=256),
        image_token_index=image,
    )
    return LlavaForConditionalGeneration(config).train()


def loss_of(model, batch):
    names = ("input_ids", "attention_mask", "labels", "pixel_values")
    model.zero_grad()
    loss = model(**{name: batch[name] for name in names if name in batch}).loss
    loss.backward()
    return loss.item()


def gradients(model, part):
    return {name: p.grad for name, p in model.named_parameters() if part in name}


@pytest.mark.parametrize("lengths", [[20, 12], [3, 2]])
def test_the_row_with_a_picture_changes_neither_loss_nor_gradients(lengths):
    model = llava()
    with_row = COLLATE([sample_of(n) for n in lengths])
    without = {
        name: value[:-1] for name, value in with_row.items() if name in ("input_ids", "attention_mask", "labels")
    }

    expected = loss_of(model, without)
    wanted = {name: grad.clone() for name, grad in gradients(model, "language_model").items()}
    assert all(grad is None for grad in gradients(model, "multi_modal_projector").values())

    assert loss_of(model, with_row) == pytest.approx(expected, abs=1e-6)
    assert expected > 1
    for part in ("multi_modal_projector", "vision_tower"):
        reached = [grad for grad in gradients(model, part).values() if grad is not None]
        assert reached
        assert all(grad.count_nonzero() == 0 for grad in reached)
    assert all(grad is not None for grad in gradients(model, "multi_modal_projector").values())
    for name, grad in gradients(model, "language_model").items():
        torch.testing.assert_close(grad, wanted[name], atol=1e-6, rtol=1e-4)


def test_padding_and_company_do_not_change_the_loss():
    """The mean over the answers of a batch is that over its samples alone, each weighted by its answer."""
    model = llava()
    samples = [sample_of(20, 1), sample_of(15, 0), sample_of(24, 2)]
    learned = [int(s["labels"][1:].ne(IGNORED).sum()) for s in samples]
    alone = [loss_of(model, COLLATE([s])) for s in samples]
    expected = sum(n * loss for n, loss in zip(learned, alone, strict=True)) / sum(learned)
    assert loss_of(model, COLLATE(samples)) == pytest.approx(expected, abs=1e-5)
    assert any(grad.count_nonzero() for grad in gradients(model, "multi_modal_projector").values())


def test_from_files_to_a_loss(folder):
    tokenizer = chatml_tokenizer()
    data = data_of(
        [
            record("<image>\nWhat is it?", "Red.", image="red.png"),
            record("How many?", "Two."),
            record("How many?", "Two.", "Sure?", "Yes."),
            record("<image>\n<image>\nSame?", "No.", image=["red.png", "blue.jpg"]),
            record("<image>\nWhat is it?", "Nothing.", image="missing.png"),
        ],
        folder,
        tokenizer,
    )
    image = tokenizer.convert_tokens_to_ids("<image>")
    collate = Collate(tokenizer.pad_token_id, image, TOKENS, SIDE, pad_to_multiple_of=8)
    model = llava(tokenizer.pad_token_id, image, len(tokenizer))
    batches = list(DataLoader(data, batch_size=2, collate_fn=collate))
    assert [len(batch["pixel_values"]) for batch in batches] == [1, 2, 1]
    assert [list(batch["skipped"].values()) for batch in batches] == [[], [], ["missing.png: is missing"]]
    losses = [loss_of(model, batch) for batch in batches]
    assert all(1 < loss < 20 for loss in losses)
    text_only = DataLoader(data, batch_size=2, sampler=[1, 2], collate_fn=collate)
    assert len(next(iter(text_only))["input_ids"]) == 3
