"""Conversations as tokens, against prompts written out by hand, tokens taken byte by byte, and LLaVA's own masking."""

import pytest
from chat_kit import (
    SMOLLM2,
    TEXTS,
    VICUNA_V11,
    byte_level,
    chatml_tokenizer,
    llama3_tokenizer,
    llava_prompt,
    talk,
    vicuna_tokenizer,
)
from transformers import CanineTokenizer

from llava_integration.models.chat import IGNORED, Encoded, NothingToLearn, encode

# What the prompt looks like, as (text, learned), written out for each format.


def chatml(messages):
    out = []
    if messages[0]["role"] != "system":
        out.append(("<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face", False))
        out.append(("<|im_end|>\n", False))
    for m in messages:
        learned = m["role"] == "assistant"
        out += [(f"<|im_start|>{m['role']}\n", False), (f"{m['content']}<|im_end|>", learned), ("\n", False)]
    return out


def llama3(messages):
    out = [("<|begin_of_text|>", False)]
    for m in messages:
        out.append((f"<|start_header_id|>{m['role']}<|end_header_id|>\n\n", False))
        out.append((f"{m['content'].strip()}<|eot_id|>", m["role"] == "assistant"))
    return out


def vicuna(messages):
    system = TEXTS[2]
    if messages[0]["role"] == "system":
        system, messages = messages[0]["content"], messages[1:]
    out = [(f"<s>{system} ", False)]
    for m in messages:
        if m["role"] == "user":
            out.append((f"USER: {m['content']} ", False))
        else:
            out += [("ASSISTANT:", False), (f" {m['content']}</s>", True)]
    return out


def byte_of():
    """GPT-2's printable stand-ins for bytes."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [b for b in range(256) if b not in printable]
    return {chr(b): b for b in printable} | {chr(256 + i): b for i, b in enumerate(others)}


def bytes_of(token, tokenizer):
    if token in tokenizer.all_special_tokens or token == "<image>":
        return token.encode()
    if tokenizer.unk_token is None:
        return bytes(byte_of()[c] for c in token)
    if token.startswith("<0x"):
        return bytes([int(token[3:5], 16)])
    return token.replace("▁", " ").encode()


def check_byte_by_byte(encoded, parts, tokenizer):
    """Lay the tokens end to end: they must give the text, and be learned where it is."""
    text = b"".join(text.encode() for text, _ in parts)
    learned = [flag for text, flag in parts for _ in text.encode()]
    tokens = [bytes_of(token, tokenizer) for token in tokenizer.convert_ids_to_tokens(encoded.input_ids)]
    if tokenizer.unk_token and tokens[1].startswith(b" "):
        tokens[1] = tokens[1][1:]  # a space that the tokenizer puts before the first word
    assert b"".join(tokens) == text
    at = 0
    for token, token_id, label in zip(tokens, encoded.input_ids, encoded.labels, strict=True):
        assert label == (token_id if any(learned[at : at + len(token)]) else IGNORED), (at, token)
        at += len(token)


FORMATS = {
    "chatml": (chatml_tokenizer, chatml),
    "chatml, spaces kept in offsets": (lambda: chatml_tokenizer(trim=False), chatml),
    "llama 3": (llama3_tokenizer, llama3),
    "vicuna": (vicuna_tokenizer, vicuna),
}
TALKS = {
    "one turn": talk("<image>\nWhat is in the picture?", "A cat on a mat."),
    "turns": talk("How many?", "Two.", "Where?", "On the mat,\nand there.", "Who?", "No one."),
    "system": talk("How many?", "Two.", "Where?", "There.", system="You answer."),
    "pictures": talk("<image>\n<image>\nWhat is in them?", "Dogs", "<image> And here?", "Two cats."),
    "empty answers": talk("<image>\nQ", "", "Q?", "A", "Q", ""),
    "unicode": talk("<image>\n画像には何が？", "猫 🐈‍⬛ i̇ und ein ß\u00a0…", "🙂?", "🙃"),
    "spaces": talk("Count.", "one  two   three \n\n  four", "And?", "  five  six"),
    "the same words": talk("Two.", "Two.", "Two.", "Two."),
    "unanswered": talk("How many?", "Two.", "Where?"),
}


# --- chat


@pytest.mark.parametrize("messages", TALKS.values(), ids=TALKS.keys())
@pytest.mark.parametrize("kind", FORMATS)
def test_answers_alone_are_learned(kind, messages):
    make, parts_of = FORMATS[kind]
    tokenizer = make()
    encoded = encode(messages, tokenizer, image_tokens=3)
    parts = [(text.replace("<image>", "<image>" * 3), learned) for text, learned in parts_of(messages)]
    check_byte_by_byte(encoded, parts, tokenizer)

    kept = tokenizer.decode([label for label in encoded.labels if label != IGNORED], clean_up_tokenization_spaces=False)
    expected = "".join(text for text, learned in parts if learned)
    # the decoder leaves out the first space of Metaspace, which stands before the answer here
    assert kept == expected or (kind == "vicuna" and " " + kept == expected)

    images = sum(message["content"].count("<image>") for message in messages)
    assert encoded.images == images
    assert encoded.input_ids.count(tokenizer.convert_tokens_to_ids("<image>")) == 3 * images
    assert not encoded.truncated


@pytest.mark.parametrize("kind", FORMATS)
def test_the_model_is_taught_from_where_it_will_be_asked(kind):
    make, _ = FORMATS[kind]
    tokenizer = make()
    question = talk("<image>\nWhat is in the picture?")
    prompt = tokenizer.apply_chat_template(question, tokenize=False, add_generation_prompt=True)
    has_bos = prompt.startswith(tokenizer.bos_token)
    asked = tokenizer(prompt.replace("<image>", "<image>" * 3), add_special_tokens=not has_bos).input_ids
    encoded = encode([*question, {"role": "assistant", "content": "A cat."}], tokenizer, image_tokens=3)
    assert encoded.input_ids[: len(asked)] == asked
    assert set(encoded.labels[: len(asked)]) == {IGNORED}
    assert encoded.labels[len(asked)] == encoded.input_ids[len(asked)]


def test_one_beginning_of_text():
    for tokenizer, bos in ((llama3_tokenizer(), 1), (vicuna_tokenizer(), 1)):
        assert tokenizer("a").input_ids[0] == tokenizer.bos_token_id
        ids = encode(talk("Q", "A", "Q", "A"), tokenizer, image_tokens=3).input_ids
        assert ids[0] == tokenizer.bos_token_id
        assert ids.count(tokenizer.bos_token_id) == bos
    # a tokenizer that adds none gets none, also where it names one
    tokenizer = chatml_tokenizer("{% for m in messages %}{{ m.role + ':' + m.content + eos_token }}{% endfor %}")
    ids = encode(talk("Q", "A"), tokenizer, image_tokens=3).input_ids
    assert tokenizer.decode(ids) == "user:Q<|im_end|>assistant:A<|im_end|>"
    # a user who writes it does not take it from the front
    ids = encode(talk("what is <s>?", "A"), vicuna_tokenizer(), image_tokens=3).input_ids
    assert ids[0] == vicuna_tokenizer().bos_token_id
    assert ids.count(ids[0]) == 2


def llava_tokens(prompt, tokenizer):
    """LLaVA's ``tokenizer_image_token``: the text around pictures is tokenised piece by piece."""
    pieces = [tokenizer(piece).input_ids[1:] for piece in prompt.split("<image>")]
    out = [tokenizer.bos_token_id, *pieces[0]]
    for piece in pieces[1:]:
        out += [tokenizer.convert_tokens_to_ids("<image>"), *piece]
    return out


def llava_labels(prompt, tokenizer):
    """LLaVA's ``preprocess_v1``: labels by counting the tokens of each round."""
    ids = llava_tokens(prompt, tokenizer)
    labels, at = [IGNORED, *ids[1:]], 1
    for part in prompt.split("</s>"):
        if part == "":
            break
        instruction = part.split(" ASSISTANT: ")[0] + " ASSISTANT: "
        length = len(llava_tokens(instruction, tokenizer)) - 2
        labels[at : at + length] = [IGNORED] * length
        at += len(llava_tokens(part, tokenizer))
    assert at == len(ids)  # else LLaVA warns of a tokenization mismatch and learns nothing
    return ids, labels


@pytest.mark.parametrize(
    "turns", [["<image>\nWhat?", "A cat."], ["<image>\nQ", "Yes. No.", "R", "Two 🙂.", "S", "c\nd"]]
)
def test_vicuna_is_masked_as_llava_masks_it(turns):
    tokenizer = vicuna_tokenizer(prepend="always")  # as the tokenizer that LLaVA was trained with
    encoded = encode(talk(*turns), tokenizer, image_tokens=1)
    assert (encoded.input_ids, encoded.labels) == llava_labels(llava_prompt(turns), tokenizer)


def test_an_image_tag_in_an_answer_is_no_picture():
    tokenizer = chatml_tokenizer()
    messages = talk("<image>\nQ", "The <image>tag.", "R", "<image>\nYes.", system="<image> Be brief.")
    clean = talk("<image>\nQ", "The tag.", "R", "Yes.", system="Be brief.")
    assert encode(messages, tokenizer, image_tokens=4) == encode(clean, tokenizer, image_tokens=4)
    assert encode(messages, tokenizer, image_tokens=4).images == 1
    assert messages == talk("<image>\nQ", "The <image>tag.", "R", "<image>\nYes.", system="<image> Be brief.")


def test_without_an_end_of_turn_token_the_newline_ends_the_answer():
    template = (
        "{% for m in messages %}{{ m.role + ': ' + m.content + '\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ 'assistant:' }}{% endif %}"
    )
    tokenizer = chatml_tokenizer(template)
    encoded = encode(talk("Q", "Two.", "R", "Yes."), tokenizer, image_tokens=1)
    assert tokenizer.decode([label for label in encoded.labels if label != IGNORED]) == " Two.\n Yes.\n"


def test_a_token_that_begins_before_the_answer_is_learned():
    """Else a one-word answer would be lost where the prompt ends in a space."""
    template = SMOLLM2.replace("role'] + '\n'", "role'] + ': '").replace("assistant\n", "assistant: ")
    for trim in (True, False):
        tokenizer = chatml_tokenizer(template, trim)
        encoded = encode(talk("Q", "two"), tokenizer, image_tokens=1)
        answer = tokenizer(" two").input_ids
        assert len(answer) == 1
        end = tokenizer.convert_tokens_to_ids("<|im_end|>")
        assert [label for label in encoded.labels if label != IGNORED] == [*answer, end]


# --- length


@pytest.mark.parametrize("messages", [TALKS["pictures"], TALKS["unicode"], TALKS["system"]])
def test_every_length(messages):
    tokenizer = chatml_tokenizer()
    whole = encode(messages, tokenizer, image_tokens=5)
    image = tokenizer.convert_tokens_to_ids("<image>")
    outcomes = set()
    for length in range(1, len(whole.input_ids) + 2):
        ids, labels = whole.input_ids[:length], whole.labels[:length]
        pictures_cut = ids.count(image) < 5 * whole.images
        if pictures_cut or all(label == IGNORED for label in labels):
            with pytest.raises(NothingToLearn, match=f"max_length {length} " + ("cuts into" if pictures_cut else "")):
                encode(messages, tokenizer, image_tokens=5, max_length=length)
            outcomes.add("cut" if pictures_cut else "no answer")
        else:
            truncated = length < len(whole.input_ids)
            got = encode(messages, tokenizer, image_tokens=5, max_length=length)
            assert got == Encoded(ids, labels, whole.images, truncated)
            outcomes.add(truncated)
    assert outcomes >= {"no answer", True, False} if not whole.images else outcomes >= {"cut", True, False}


def test_nothing_to_learn_without_a_cut():
    with pytest.raises(NothingToLearn, match=r"no token of an answer is left in \d+ tokens"):
        encode(talk("How many?"), chatml_tokenizer(), image_tokens=5)


# --- plain


@pytest.mark.parametrize(("make", "bos"), [(chatml_tokenizer, ""), (vicuna_tokenizer, "<s>")])
def test_plain_is_the_picture_and_its_caption(make, bos):
    tokenizer = make()
    messages = talk("Describe <image> briefly.", "two cats on a mat", system="You answer.")
    encoded = encode(messages, tokenizer, image_tokens=3, style="plain")
    check_byte_by_byte(encoded, [(bos + "<image>" * 3, False), ("two cats on a mat\n", True)], tokenizer)
    assert encoded.images == 1
    masked = [label == IGNORED for label in encoded.labels]
    assert masked == [True] * (3 + len(bos[:1])) + [False] * (len(masked) - 3 - len(bos[:1]))
    empty = encode(talk("<image>\n", ""), tokenizer, image_tokens=3, style="plain")
    assert tokenizer.decode([label for label in empty.labels if label != IGNORED]).endswith("\n")
    two = encode(talk("<image>\n<image>", "cats"), tokenizer, image_tokens=3, style="plain")
    assert two.images == 2
    with pytest.raises(NothingToLearn, match="cuts into"):
        encode(messages, tokenizer, image_tokens=3, style="plain", max_length=2)
    with pytest.raises(NothingToLearn, match="no token of an answer"):
        encode(messages, tokenizer, image_tokens=3, style="plain", max_length=3 + len(bos[:1]))


def test_plain_needs_no_template_and_takes_only_captions():
    tokenizer = chatml_tokenizer(None)
    assert encode(talk("<image>", "A cat"), tokenizer, image_tokens=2, style="plain").images == 1
    for messages in (talk("Q", "A"), talk("<image>", "A", "Q", "A"), talk("<image>"), []):
        with pytest.raises(ValueError, match="style is 'plain', which takes pictures and a caption"):
            encode(messages, tokenizer, image_tokens=2, style="plain")


# --- what does not suit


def test_errors_in_one_sentence():
    messages = talk("<image>\nQ", "A")
    with pytest.raises(ValueError, match=r"slow one \(CanineTokenizer\)"):
        encode(messages, CanineTokenizer(), image_tokens=2)
    with pytest.raises(ValueError, match="style is 'chatty'; expected one of chat, plain"):
        encode(messages, chatml_tokenizer(), image_tokens=2, style="chatty")
    with pytest.raises(ValueError, match="must begin with what the user says"):
        encode(talk("Q", "A")[1:], chatml_tokenizer(), image_tokens=2)
    with pytest.raises(ValueError, match="must begin with what the user says"):
        encode([], chatml_tokenizer(), image_tokens=2)
    refusing = chatml_tokenizer(VICUNA_V11)
    with pytest.raises(
        ValueError, match=r"cannot write a conversation of user, user \(Conversation roles must alternate"
    ):
        encode(talk("Q", "A", "Q")[::2], refusing, image_tokens=2)
    unknown = byte_level(["<|im_start|>", "<|im_end|>"], chat_template=SMOLLM2)
    with pytest.raises(ValueError, match="2 picture tokens, but 0 after tokenising; <image> must be a special token"):
        encode(messages, unknown, image_tokens=2)
    twice = chatml_tokenizer(SMOLLM2.replace("message['content']", "message['content'] + message['content']"))
    with pytest.raises(ValueError, match="2 picture tokens, but 4 after tokenising"):
        encode(messages, twice, image_tokens=2)


def test_a_template_that_rewrites_earlier_turns():
    """As reasoning models' do: the last answer is written otherwise than those before it."""
    last = SMOLLM2.replace(
        "message['content']", "('<think>' if loop.last and message.role == 'assistant' else '') + message['content']"
    )
    tokenizer = chatml_tokenizer(last)
    assert encode(talk("Q", "A"), tokenizer, image_tokens=2).images == 0
    encoded = encode(talk("Q", "A", "R", "B"), tokenizer, image_tokens=2)
    assert tokenizer.decode([label for label in encoded.labels if label != IGNORED]) == "A<|im_end|><think>B<|im_end|>"
    # what is asked for an answer must not end before the answers that were there already
    backwards = chatml_tokenizer("{% if not add_generation_prompt %}" + SMOLLM2 + "{% endif %}")
    with pytest.raises(ValueError, match="rewrites earlier turns"):
        encode(talk("Q", "A", "R", "B"), backwards, image_tokens=2)
