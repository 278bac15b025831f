"""Questions asked together are answered as they are one by one, by whatever way transformers is asked."""

import pytest
import torch
import transformers as t

from llava_integration.models.assemble import assemble, load
from llava_integration.train.data import Collate, Conversations

pytest_plugins = ("training_kit",)
QUESTIONS = ("what?", "what is at the top left of this picture, in all of its detail?", "red?")


def chats(pictures):
    return [
        [{"role": "user", "content": [{"type": "image", "image": p}, {"type": "text", "text": q}]}]
        for p, q in zip(pictures, QUESTIONS, strict=False)
    ]


def talkative(tree_of, lm, kind="llama", **options):
    """A model whose answers depend on every token."""
    model, processor = assemble(tree_of("dinov2", "clip", splits=(1, 3), split=3), *lm(kind, **options))
    with torch.no_grad():
        for p in [*model.model.language_model.parameters(), *model.model.multi_modal_projector.parameters()]:
            if p.ndim > 1:
                p.normal_(0, 0.3)
    return model, processor


@pytest.fixture
def folder(tree_of, lm, tmp_path):
    for part in talkative(tree_of, lm):
        part.save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def test_a_pipelines_batch_equals_its_singles(folder, pictures):
    pipe = t.pipeline("image-text-to-text", model=str(folder))
    asked, options = chats(pictures), {"max_new_tokens": 6, "return_full_text": False}
    together = [r[0]["generated_text"] for r in pipe(text=asked, batch_size=3, **options)]
    assert together == [pipe(text=chat, **options)[0]["generated_text"] for chat in asked]
    assert len(set(together)) == 3


@pytest.mark.parametrize("read", ["made", "saved", "loaded", "old"])
def test_a_processors_padding_is_for_generation(folder, pictures, read, tree_of, lm):
    if read == "made":
        model, processor = talkative(tree_of, lm)
    else:
        model, processor = (
            t.AutoModelForImageTextToText.from_pretrained(folder),
            t.AutoProcessor.from_pretrained(folder),
        )
    if read == "old":
        processor.tokenizer.padding_side = processor.tokenizer.init_kwargs["padding_side"] = "right"
        processor.save_pretrained(folder)
    if read in ("loaded", "old"):
        model, processor = load(folder)
    texts = [processor.apply_chat_template(chat, add_generation_prompt=True) for chat in chats(pictures)]
    batch = processor(images=pictures[:3], text=texts, padding=True, return_tensors="pt")
    assert batch["attention_mask"][:, -1].all()
    assert not batch["attention_mask"].all()
    together = model.generate(**batch, max_new_tokens=6)[:, batch["input_ids"].shape[1] :]
    for picture, text, answer in zip(pictures, texts, together, strict=False):
        one = processor(images=picture, text=text, return_tensors="pt")
        alone = model.generate(**one, max_new_tokens=6)[0, one["input_ids"].shape[1] :]
        assert answer[: len(alone)].tolist() == alone.tolist()
    in_chat = processor.apply_chat_template(
        chats(pictures), add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt",
        processor_kwargs={"padding": True},
    )  # fmt: skip
    assert torch.equal(in_chat["input_ids"], batch["input_ids"])


def test_training_pads_at_the_right(kit):
    """The padding side of the processor has no say in it."""
    model, processor = kit.model.build(torch.float32, 42)[0:2]
    token, side, tokens = model.config.image_token_id, processor.image_processor.size["height"], 16
    for padding_side in ("left", "right"):
        processor.tokenizer.padding_side = padding_side
        data = Conversations(kit.data, processor.tokenizer, processor.image_processor.transform(), tokens)
        batch = Collate(processor.tokenizer.pad_token_id, token, tokens, side)([data[i] for i in range(6)])
        assert batch["attention_mask"][:, 0].all()
        assert (batch["attention_mask"].diff(dim=1) <= 0).all()
        if padding_side == "left":
            first = batch
        for key in ("input_ids", "attention_mask", "labels"):
            assert torch.equal(batch[key], first[key])
