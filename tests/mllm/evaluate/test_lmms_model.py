"""The model under lmms-eval: batches, stops, pictures, likelihoods, options."""

import pytest
import torch

pytest.importorskip("lmms_eval")

from lmms_kit import asked, folder  # noqa: F401 (fixtures)

from llava_integration.answer.ask import Question, ask
from llava_integration.evaluate.lmms.prompts import Prompter
from llava_integration.models.assemble import load


def prompt_of(doc):
    pictures = "<image>\n" * len(doc["images"])
    return f"<|im_start|>user\n{pictures}{doc['question']}<|im_end|>\n<|im_start|>assistant\n"


def inputs_of(processor, text, images):
    """By transformers' own processor, one prompt at a time and without padding."""
    if not images:
        return processor.tokenizer(text, return_tensors="pt")
    return processor(text=text, images=images, return_tensors="pt")


def greedy(model, processor, doc, steps=6):
    """The likeliest token again and again, without a cache."""
    inputs = dict(inputs_of(processor, prompt_of(doc), doc["images"]))
    inputs.pop("attention_mask")
    inputs.pop("token_type_ids", None)
    said, logits = [], []
    while len(said) < steps and (not said or said[-1] != 2):
        with torch.no_grad():
            logits.append(model(**inputs).logits[0, -1])
        said.append(int(logits[-1].argmax()))
        inputs["input_ids"] = torch.cat([inputs["input_ids"], torch.tensor([said[-1:]])], 1)
    return processor.tokenizer.decode(said, skip_special_tokens=True), logits


def first_logits(lm, requests):
    """Of the first new token of each request, in the order in which they are computed."""
    seen = []
    handle = lm._model.lm_head.register_forward_hook(lambda m, i, out: seen.append(out[:, -1].clone()))
    lm.generate_until(requests)
    handle.remove()
    return torch.cat(seen)


def test_logits_do_not_depend_on_the_batch(folder, asked):  # noqa: F811
    requests = asked.generate(max_new_tokens=1)
    one = first_logits(asked.model(folder), requests)
    four = first_logits(asked.model(folder, batch_size=4), requests)
    assert one.dtype == torch.float32
    assert one.shape == four.shape == (100, one.shape[1])
    assert (one - four).abs().max() < 1e-4
    model, processor = load(folder)
    order = sorted(range(100), key=lambda i: -len(asked.docs[i]["question"]))
    alone = torch.stack([greedy(model, processor, asked.docs[i], 1)[1][0] for i in order])
    assert (alone - four).abs().max() < 1e-4
    assert len({tuple(row.tolist()) for row in alone}) == 100  # no two prompts look alike to the model


def test_answers_are_those_of_one_prompt_alone(folder, asked):  # noqa: F811
    model, processor = load(folder)
    expected = [greedy(model, processor, doc)[0].strip() for doc in asked.docs]
    assert len(set(expected)) > 40
    assert asked.model(folder, batch_size=7).generate_until(asked.generate(max_new_tokens=6)) == expected


def test_answers_are_those_of_the_library(folder, asked, tmp_path):  # noqa: F811
    docs = [doc for doc in asked.docs if len(doc["images"]) == 1][:20]
    questions = []
    for i, doc in enumerate(docs):
        doc["images"][0].save(tmp_path / f"{i}.png")
        questions.append(Question(tmp_path / f"{i}.png", doc["question"], "", ""))
    for blank in (False, True):
        expected = ask(*load(folder), questions, blank=blank, max_new_tokens=6, show=False)
        lm = type(asked)(docs).model(folder, batch_size=5, blank=blank)
        assert lm.generate_until(type(asked)(docs).generate(max_new_tokens=6)) == expected
        assert lm.record["blank"] is blank


def test_pictures_reach_the_prompt_in_order(folder, asked, pictures):  # noqa: F811
    first, second = pictures[:2]
    text = "<image> is left of <image>, is it not?"
    docs = [{"question": text, "images": images} for images in ([first, second], [second, first])]
    kit = type(asked)(docs)
    here, there = first_logits(kit.model(folder, batch_size=2), kit.generate(max_new_tokens=1))
    model, processor = load(folder)
    prompt = f"<|im_start|>user\n{text}<|im_end|>\n<|im_start|>assistant\n"
    with torch.no_grad():
        alone = [model(**inputs_of(processor, prompt, doc["images"])).logits[0, -1] for doc in docs]
    assert torch.allclose(here, alone[0], atol=1e-4)
    assert torch.allclose(there, alone[1], atol=1e-4)
    assert not torch.allclose(here, there, atol=1e-2)


def test_blank_pictures_are_zeros_and_prompts_stay(folder, asked, pictures):  # noqa: F811
    _, processor = load(folder)
    seen, blind = (Prompter(processor, 16, blank).question("Is it red?", pictures[:2]) for blank in (False, True))
    assert seen.ids == blind.ids
    assert seen.pixels.shape == blind.pixels.shape == (2, 3, 56, 56)
    assert seen.pixels.abs().sum() > 0
    assert not blind.pixels.any()


def test_stop_strings_end_and_are_cut(folder, asked):  # noqa: F811
    lm = asked.model(folder, batch_size=4)
    whole = lm.generate_until(asked.generate(max_new_tokens=12))
    stop = next(a[2:4] for a in whole if len(a) > 6 and a[2:4].isascii() and a[2:4].strip() == a[2:4])
    cut = lm.generate_until(asked.generate(max_new_tokens=12, until=[stop, "never said"]))
    assert cut == [answer.partition(stop)[0].strip() for answer in whole]
    assert cut != whole
    assert lm.generate_until(asked.generate(max_new_tokens=12, until="never said")) == whole


def test_a_stop_string_saves_steps(folder, asked):  # noqa: F811
    kit = type(asked)(asked.docs[:1])
    lm = kit.model(folder)
    steps = []
    lm._model.lm_head.register_forward_hook(lambda m, i, out: steps.append(1))
    (whole,) = lm.generate_until(kit.generate(max_new_tokens=30))
    used = len(steps)
    lm.generate_until(kit.generate(max_new_tokens=30, until=[whole[:1]]))
    assert len(steps) - used < used


def test_groups_keep_their_own_options(folder, asked):  # noqa: F811
    short, long = asked.generate(max_new_tokens=1), asked.generate(max_new_tokens=6)
    mixed = [(short if i % 3 else long)[i] for i in range(100)]
    lm = asked.model(folder, batch_size=4)
    alone = lm.generate_until(short), lm.generate_until(long)
    assert lm.generate_until(mixed) == [alone[0 if i % 3 else 1][i] for i in range(100)]


def test_sampling_follows_the_seed(folder, asked):  # noqa: F811
    lm = asked.model(folder, batch_size=10)
    requests = asked.generate(max_new_tokens=6, temperature=1.5)

    def drawn(seed):
        torch.manual_seed(seed)
        return lm.generate_until(requests)

    assert drawn(1) == drawn(1)
    assert drawn(1) != drawn(2)
    assert lm.record["seed"] == 2
    greedy_ = lm.generate_until(asked.generate(max_new_tokens=6, temperature=0, do_sample=True, top_p=0.5))
    assert greedy_ == lm.generate_until(asked.generate(max_new_tokens=6))


@pytest.mark.parametrize("batch_size", [1, 4])
def test_likelihoods(folder, asked, batch_size):  # noqa: F811
    """Against logits of the whole text, one at a time: the answer's tokens and the end of its turn."""
    answers = ["red", " a cat at the left"]
    kit = type(asked)(asked.docs[:12])
    lm = kit.model(folder, batch_size=batch_size)
    model, processor = load(folder)
    found = [result.text for result in lm.loglikelihood(kit.likelihood(answers))]
    expected = []
    for doc in kit.docs:
        for answer in answers:
            start = inputs_of(processor, prompt_of(doc), doc["images"])["input_ids"].shape[1]
            inputs = inputs_of(processor, prompt_of(doc) + f"{answer.strip()}<|im_end|>", doc["images"])
            with torch.no_grad():
                logits = model(**inputs).logits[0].log_softmax(-1)
            wanted = inputs["input_ids"][0, start:]
            rows = logits[start - 1 : -1]
            likeliest = bool((rows.argmax(-1) == wanted).all())
            expected.append((-rows[range(len(wanted)), wanted].mean().item(), likeliest))
    assert [a for a, _ in found] == pytest.approx([a for a, _ in expected], abs=1e-4)
    assert [b for _, b in found] == [b for _, b in expected]


def test_an_answer_may_come_from_the_document(folder, asked):  # noqa: F811
    kit = type(asked)(asked.docs[:3])
    lm = kit.model(folder)
    named = lm.loglikelihood(kit.likelihood(["red"]))
    assert lm.loglikelihood(kit.likelihood([lambda doc: "red"])) == named


def test_a_greedy_answer_is_told(folder, asked):  # noqa: F811
    """An answer that the model would give, ended where it ends it, and one that it would not."""
    kit = type(asked)(asked.docs[:4])
    lm = kit.model(folder, batch_size=2)
    end = lm.tokenizer.convert_tokens_to_ids("<|im_end|>")
    with torch.no_grad():  # always the end of the turn: an empty answer
        lm._model.lm_head.weight.zero_()
    lm._model.lm_head.register_forward_hook(lambda m, i, out: out + 9.0 * (torch.arange(out.shape[-1]) == end))
    found = [result.text for result in lm.loglikelihood(kit.likelihood(["", "red"]))]
    assert [greedy for _, greedy in found] == [True, False] * 4
    assert all(loss < 0.1 for loss, _ in found[::2])
    assert all(loss > 1 for loss, _ in found[1::2])


def test_the_split_is_a_knob(folder, asked):  # noqa: F811
    requests = asked.generate(max_new_tokens=1)
    own = first_logits(asked.model(folder, batch_size=10), requests)
    deep = first_logits(asked.model(folder, batch_size=10, split=3), requests)
    shallow = asked.model(folder, batch_size=10, split=1)
    assert torch.equal(own, deep)
    assert not torch.allclose(own, first_logits(shallow, requests), atol=1e-3)
    assert shallow.record["split"] == 1


@pytest.mark.parametrize("words", ["split='clip=1'", 'split={"clip": 1}', "split=clip=1"])
def test_a_split_by_branch_as_lmms_eval_hands_it_over(folder, asked, words):  # noqa: F811
    from lmms_eval.utils import simple_parse_args_string

    requests = asked.generate(max_new_tokens=1)
    lm = asked.model(folder, batch_size=10, **simple_parse_args_string(words))
    assert lm.record["split"] == {"clip": 1}
    assert torch.equal(first_logits(lm, requests), first_logits(asked.model(folder, batch_size=10, split=1), requests))


def test_the_record_tells_what_was_run(folder, asked):  # noqa: F811
    lm = asked.model(folder, split=1, batch_size=10)
    lm.generate_until(asked.generate(max_new_tokens=1))
    record = lm.record
    longest = max(asked.docs, key=lambda doc: len(doc["question"]))
    assert record["prompts"] == {"asked": prompt_of(longest)}
    expected = {"split": 1, "splits": [1, 3], "fusion": "channel", "batch_size": 10, "dtype": "float32", "full": False}
    assert {name: record[name] for name in expected} == expected
    assert record["seed"] == torch.initial_seed()
    assert {"torch", "transformers", "lmms_eval", "vst"} <= set(record["versions"])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"pretraind": "x"}, "pretraind is no option .* did you mean pretrained"),
        ({"splits": 3}, "did you mean split"),
        ({"pretrained": None}, "No model is named"),
        ({"split": 2}, "holds no stitch at split 2"),
        ({"split": "deep"}, "'deep' is no split: expected a depth"),
        ({"batch_size": "auto"}, "batch_size is 'auto'"),
        ({"batch_size": 0}, "batch_size is 0"),
        ({"dtype": "int3"}, "dtype is 'int3'"),
        ({"device": "tpu"}, "device is 'tpu'"),
        ({"device": "cuda:9999"}, "device is 'cuda:9999'"),
        ({"blank": "maybe"}, "blank is 'maybe'"),
        ({"max_new_tokens": 0}, "max_new_tokens is 0"),
    ],
)
def test_options_are_checked(folder, asked, options, message):  # noqa: F811
    from llava_integration.evaluate.lmms.model import VSTLlava

    with pytest.raises(ValueError, match=message):
        VSTLlava(**{"pretrained": str(folder), **options})


def test_a_missing_model_is_named(asked, tmp_path):  # noqa: F811
    with pytest.raises(FileNotFoundError, match="holds no saved model"):
        asked.model(tmp_path)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_new_token": 3}, "generation_kwargs has max_new_token;"),
        ({"until": [3]}, "until has 3"),
        ({"max_new_tokens": 0}, "max_new_tokens is 0"),
    ],
)
def test_wishes_are_checked(folder, asked, options, message):  # noqa: F811
    with pytest.raises(ValueError, match=message):
        asked.model(folder).generate_until(asked.generate(**options))


def test_the_template_is_not_written_twice(folder, asked):  # noqa: F811
    with pytest.raises(ValueError, match="leave out --apply_chat_template"):
        _ = asked.model(folder).chat_template


def test_what_is_no_picture_is_refused(folder, asked, pictures):  # noqa: F811
    for doc, message in (
        ({"question": "Is it <image>?", "images": pictures[:2]}, "2 pictures and 1 times <image>"),
        ({"question": "What is said?", "images": ["video.mp4"]}, "brings a str to look at"),
    ):
        kit = type(asked)([doc])
        with pytest.raises(ValueError, match=message):
            kit.model(folder).generate_until(kit.generate())


def test_dtype_is_that_of_the_weights(folder, asked):  # noqa: F811
    kit = type(asked)(asked.docs[:8])
    lm = kit.model(folder, dtype="bfloat16", batch_size=4)
    assert {p.dtype for p in lm._model.parameters()} == {torch.bfloat16}
    assert len(lm.generate_until(kit.generate(max_new_tokens=2))) == 8
    assert lm.record["dtype"] == "bfloat16"
