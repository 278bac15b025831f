import copy

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import (
    CLIPImageProcessor,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
)

from llava_integration.answer.ask import Question, ask
from llava_integration.models.chat import encode
from vst.data.images import UnreadableImage

CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
QUESTIONS = [
    "What colour is the block in this picture, seen from the left side of the room?",
    "Is it red?",
    "Which shape do you see above the other one?",
    "Is there a block?",
    "How many?",
    "What is in the picture, and what is it next to?",
    "Is it red?",
]


def make_processor(template=CHATML, bos=False):
    """A LlavaProcessor on a byte-level tokenizer; ``bos``: whether that tokenizer adds <s> by itself."""
    special = ["<pad>", "<s>", "<|im_start|>", "<|im_end|>", "<image>"]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([*QUESTIONS, "user assistant yes no red blue"] * 4, trainer)
    if bos:
        tokenizer.post_processor = processors.TemplateProcessing(
            single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", tokenizer.token_to_id("<s>"))]
        )
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="<|im_end|>", padding_side="right",
        additional_special_tokens=["<|im_start|>", "<image>"], chat_template=template,
    )  # fmt: skip
    size = {"height": 28, "width": 28}
    return LlavaProcessor(
        image_processor=CLIPImageProcessor(size=size, crop_size=size),
        tokenizer=fast, patch_size=14, vision_feature_select_strategy="default", num_additional_image_tokens=1,
        chat_template=template,
    )  # fmt: skip


def make_model(processor):
    """Tiny and random, in float64 so that greedy choices have no ties that padding could turn."""
    torch.manual_seed(3)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    vocabulary = len(processor.tokenizer)
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(**sizes, image_size=28, patch_size=14),
        text_config=LlamaConfig(**sizes, vocab_size=vocabulary, pad_token_id=0, bos_token_id=1, eos_token_id=None),
        image_token_id=processor.image_token_id, vision_feature_layer=-2, vision_feature_select_strategy="default",
    )  # fmt: skip
    model = LlavaForConditionalGeneration(config).double()
    with torch.no_grad():
        for p in model.parameters():
            if p.ndim > 1:
                p.normal_(0, 0.4)
        model.lm_head.weight[:5] = 0  # special tokens are hardly ever said: an answer is text
    return model.eval()


@pytest.fixture(scope="module")
def processor():
    return make_processor()


@pytest.fixture(scope="module")
def shared_model(processor):
    return make_model(processor)


@pytest.fixture
def model(shared_model):
    own = shared_model.generation_config
    shared_model.generation_config = copy.deepcopy(own)
    yield shared_model
    shared_model.generation_config = own
    shared_model.eval()


@pytest.fixture
def questions(picture_folder):
    return [Question(picture_folder / f"{i % 3:03d}.png", q, "yes", "any") for i, q in enumerate(QUESTIONS)]


def greedy(model, processor, question, picture, *, zeros=False, ends=(), steps=8):
    """One question by itself: the prompt spelled out, no padding, no cache, the likeliest token again and again."""
    prompt = f"<|im_start|>user\n<image>\n{question.question}<|im_end|>\n<|im_start|>assistant\n"
    inputs = processor(text=prompt, images=picture, return_tensors="pt")
    ids, pixels = inputs["input_ids"], inputs["pixel_values"].double()
    said = []
    while len(said) < steps and (not said or said[-1] not in ends):
        with torch.no_grad():
            logits = model(input_ids=ids, pixel_values=pixels * (not zeros)).logits
        said.append(int(logits[0, -1].argmax()))
        ids = torch.cat([ids, torch.tensor([said[-1:]])], 1)
    return processor.tokenizer.decode(said, skip_special_tokens=True).strip(), said


def one_by_one(model, processor, questions, pictures, **options):
    return [greedy(model, processor, q, pictures[int(q.image.stem)], **options)[0] for q in questions]


@pytest.mark.parametrize("batch_size", [1, 3, 16])
def test_batches_answer_as_one_by_one(model, processor, questions, pictures, batch_size):
    expected = one_by_one(model, processor, questions, pictures)
    assert len(set(expected)) > 4  # the random model tells questions apart
    assert ask(model, processor, questions, batch_size=batch_size, show=False) == expected


def test_the_picture_matters_and_blanking_takes_all_of_it(model, processor, questions, pictures):
    seen = ask(model, processor, questions, show=False)
    blank = ask(model, processor, questions, blank=True, batch_size=3, show=False)
    assert blank == one_by_one(model, processor, questions, pictures, zeros=True)
    assert blank != seen
    assert seen[1] != seen[6]  # one question about two pictures ...
    assert blank[1] == blank[6]  # ... is the same once they are blanked


def test_blanking_leaves_the_prompts(model, processor, questions, monkeypatch):
    calls = []
    generate = model.generate
    monkeypatch.setattr(model, "generate", lambda **inputs: calls.append(inputs) or generate(**inputs))
    ask(model, processor, questions, show=False)
    ask(model, processor, questions, blank=True, show=False)
    seen, blank = calls
    assert torch.equal(seen["input_ids"], blank["input_ids"])
    assert torch.equal(seen["attention_mask"], blank["attention_mask"])
    assert seen["pixel_values"].shape == blank["pixel_values"].shape
    assert (seen["pixel_values"].abs().sum(dim=(1, 2, 3)) > 0).all()
    assert not blank["pixel_values"].any()


@pytest.mark.parametrize("holder", ["model", "tokenizer"])
def test_answers_end_where_model_or_tokenizer_says(model, questions, pictures, holder):
    processor = make_processor()
    end = next(
        said[2]
        for said in (greedy(model, processor, q, pictures[int(q.image.stem)])[1] for q in questions)
        if said[2] not in said[:2]
    )
    uncut = one_by_one(model, processor, questions, pictures)
    if holder == "model":
        model.generation_config.eos_token_id = [end]
    else:
        processor.tokenizer.eos_token = processor.tokenizer.convert_ids_to_tokens(end)
    expected = one_by_one(model, processor, questions, pictures, ends=[end])
    assert expected != uncut
    assert ask(model, processor, questions, show=False) == expected


@pytest.mark.parametrize(("written", "added"), [(True, True), (True, False), (False, True)])
def test_a_prompt_begins_once_and_as_in_training(model, questions, monkeypatch, written, added):
    processor = make_processor(("<s>" if written else "") + CHATML, bos=added)
    calls = []
    generate = model.generate
    monkeypatch.setattr(model, "generate", lambda **inputs: calls.append(inputs["input_ids"]) or generate(**inputs))
    ask(model, processor, questions[:1], show=False)
    (prompt,) = calls[0].tolist()
    assert prompt.count(processor.tokenizer.bos_token_id) == 1
    assert prompt.count(processor.image_token_id) == 4
    turns = [("user", f"<image>\n{questions[0].question}"), ("assistant", "yes")]
    messages = [{"role": role, "content": content} for role, content in turns]
    trained = encode(messages, processor.tokenizer, image_tokens=4)
    assert prompt == [i for i, label in zip(trained.input_ids, trained.labels, strict=True) if label < 0][: len(prompt)]
    assert trained.labels[len(prompt)] == trained.input_ids[len(prompt)]


def test_greedy_whatever_the_generation_config_says(model, processor, questions, pictures):
    expected = one_by_one(model, processor, questions, pictures)
    own = model.generation_config
    own.update(do_sample=True, temperature=5.0, repetition_penalty=3.0, num_beams=2, max_length=4, bad_words_ids=[[9]])
    assert ask(model, processor, questions, show=False) == expected
    assert model.generation_config is own
    assert own.repetition_penalty == 3


def test_leaves_model_and_tokenizer_as_they_were(model, processor, questions):
    model.train()
    model.model.vision_tower.eval()
    modes = [m.training for m in model.modules()]
    missing = Question(questions[0].image.with_name("none.png"), "Is it red? Or blue? Or is it of any colour?", "", "")
    within = []
    handle = model.model.language_model.register_forward_pre_hook(lambda m, _: within.append(m.training))
    ask(model, processor, questions[:2], show=False)
    with pytest.raises(UnreadableImage, match=r"none\.png: is missing"):
        ask(model, processor, [*questions, missing], show=False)
    handle.remove()
    assert not any(within)
    assert [m.training for m in model.modules()] == modes
    assert processor.tokenizer.padding_side == "right"


def test_autocast_only_where_asked(processor, questions):
    model = make_model(processor).float()
    seen = []
    model.model.language_model.layers[0].mlp.register_forward_hook(lambda m, i, out: seen.append(out.dtype))
    ask(model, processor, questions[:1], show=False)
    assert set(seen) == {torch.float32}
    seen.clear()
    ask(model, processor, questions[:1], dtype=torch.bfloat16, device="cpu", show=False)
    assert set(seen) == {torch.bfloat16}


def test_refuses_what_cannot_be_asked(model, processor, questions):
    assert ask(model, processor, [], show=False) == []
    with pytest.raises(ValueError, match="batch_size is 0"):
        ask(model, processor, questions, batch_size=0)
    with pytest.raises(ValueError, match="max_new_tokens is 0"):
        ask(model, processor, questions, max_new_tokens=0)
    with pytest.raises(ValueError, match="holds <image>"):
        ask(model, processor, [Question(questions[0].image, "<image>\nIs it red?", "", "")])
    unpadded = make_processor()
    unpadded.tokenizer.pad_token = None
    with pytest.raises(ValueError, match="no padding token"):
        ask(model, unpadded, questions)
