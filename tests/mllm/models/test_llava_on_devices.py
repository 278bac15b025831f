"""A language model on a tree, on a CPU and on a GPU: logits, generation, a step of training."""

import pytest
import torch

pytest.importorskip("transformers")

from speaking_kit import speaking


def asked(tree_of, lm, pictures):
    """A model whose answers differ by picture, and a batch of prompts of unequal length."""
    model, processor = speaking(tree_of, lm)
    content = [{"type": "image"}, {"type": "text", "text": "what is it?"}]
    text = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
    batch = processor(
        images=pictures[:2], text=[text, text.replace("what", "what red cat")], return_tensors="pt",
        padding=True, padding_side="left",
    )  # fmt: skip
    return model.eval(), batch


@torch.no_grad()
@pytest.mark.parametrize("split", [1, 3])
def test_logits_and_generation(tree_of, lm, pictures, device, split):
    model, batch = asked(tree_of, lm, pictures)
    model.model.vision_tower.split = split
    said = model.generate(**batch, max_new_tokens=6, do_sample=False)
    given = {**batch, "input_ids": said, "attention_mask": torch.ones_like(said)}
    given["attention_mask"][:, : batch["attention_mask"].shape[1]] = batch["attention_mask"]
    given.pop("token_type_ids", None)
    expected = model(**given).logits
    model.to(device)
    there = {name: x.to(device) for name, x in given.items()}
    found = model(**there).logits.cpu()
    real = given["attention_mask"].bool()  # what padding gives is nobody's
    scale = float(expected[real].abs().max())
    torch.testing.assert_close(found[real], expected[real], rtol=1e-3, atol=1e-3 * scale)
    # A token whose rival is closer than that could be said otherwise, and all after it.
    first, second = expected.topk(2).values.unbind(-1)
    asked_to = batch["input_ids"].shape[1]
    sure = ((first - second)[:, asked_to - 1 : -1] > 4e-3 * scale).int().cumprod(1).bool()
    again = model.generate(**{name: x.to(device) for name, x in batch.items()}, max_new_tokens=6, do_sample=False)
    assert again.device.type == device
    assert sure.any()
    assert torch.equal(again.cpu()[:, asked_to:][sure], said[:, asked_to:][sure])


@torch.no_grad()
def test_generation_in_bf16(tree_of, lm, pictures, device):
    model, batch = asked(tree_of, lm, pictures)
    expected = model(**batch).logits[:, -1]
    model.to(device, torch.bfloat16)
    there = {name: x.to(device, torch.bfloat16 if x.is_floating_point() else x.dtype) for name, x in batch.items()}
    found = model(**there).logits[:, -1]
    assert torch.nn.functional.cosine_similarity(found.cpu().float(), expected, dim=-1).min() > 0.98
    said = model.generate(**there, max_new_tokens=6, do_sample=False)
    assert said.shape == (2, batch["input_ids"].shape[1] + 6)


def test_a_step_of_training_lowers_the_loss(tree_of, lm, pictures, device):
    model, batch = asked(tree_of, lm, pictures)
    model.to(device).train()
    there = {name: x.to(device) for name, x in batch.items()}
    labels = there["input_ids"].masked_fill(there["attention_mask"] == 0, -100)
    labels[labels == model.config.image_token_id] = -100
    trained = [*model.model.multi_modal_projector.parameters(), *model.model.language_model.parameters()]
    optimizer, losses = torch.optim.AdamW(trained, lr=1e-3), []
    for _ in range(4):
        with torch.autocast(device, torch.bfloat16):
            loss = model(**there, labels=labels).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss))
    assert losses[-1] < losses[0]
    assert all(p.device.type == device for p in model.parameters())
