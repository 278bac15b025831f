"""Conversations as tokens, against prompts written out by hand, tokens taken byte by byte, and LLaVA's own masking."""

import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import CanineTokenizer, PreTrainedTokenizerFast

from llava_integration.models.chat import (
    IGNORED,
    TEMPLATES,
    VICUNA,
    Encoded,
    NothingToLearn,
    chat_template,
    encode,
    multimodal_template,
)

TEXTS = [
    "What is in the picture? A cat on a mat, and two dogs.",
    "system user assistant You are a helpful assistant. USER: ASSISTANT: How many are there?  There are two.",
    "A chat between a curious user and an artificial intelligence assistant. The assistant gives helpful, detailed, "
    "and polite answers to the user's questions.",
    "Yes. No.\nOne\n\ntwo  three   four\n",
] * 3

SMOLLM2 = (
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}{{ '<|im_start|>system\nYou "
    "are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n' }}{% endif %}{{'<|im_start|>' + "
    "message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}{% endfor %}{% if add_generation_prompt %}{{ "
    "'<|im_start|>assistant\n' }}{% endif %}"
)
QWEN = """\
{%- if messages[0]['role'] == 'system' %}
    {{- '<|im_start|>system\\n' + messages[0]['content'] + '<|im_end|>\\n' }}
{%- else %}
    {{- '<|im_start|>system\\nYou are a helpful assistant.<|im_end|>\\n' }}
{%- endif %}
{%- for message in messages %}
    {%- if (message.role == "user") or (message.role == "system" and not loop.first) or (message.role == "assistant" \
and not message.tool_calls) %}
        {{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>' + '\\n' }}
    {%- elif message.role == "assistant" %}
        {{- '<|im_start|>' + message.role }}
        {%- if message.content %}
            {{- '\\n' + message.content }}
        {%- endif %}
        {%- for tool_call in message.tool_calls %}
            {{- '\\n<tool_call>\\n{"name": "' }}
            {{- tool_call.name }}
            {{- '"}\\n</tool_call>' }}
        {%- endfor %}
        {{- '<|im_end|>\\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
{%- endif %}
"""
VICUNA_V11 = (
    "{% if messages[0]['role'] == 'system' %}{% set loop_messages = messages[1:] %}{% set system_message = "
    "messages[0]['content'] %}{% else %}{% set loop_messages = messages %}{% set system_message = 'A chat.' %}"
    "{% endif %}{{ system_message }}{% for message in loop_messages %}"
    "{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}{% endif %}{% if "
    "message['role'] == 'user' %}{{ ' USER: ' + message['content'].strip() }}{% elif message['role'] == 'assistant' %}"
    "{{ ' ASSISTANT: ' + message['content'].strip() + eos_token }}{% endif %}{% endfor %}{% if add_generation_prompt %}"
    "{{ ' ASSISTANT:' }}{% endif %}"
)
LLAMA3 = (
    "{% set loop_messages = messages %}{% for message in loop_messages %}{% set content = '<|start_header_id|>' + "
    "message['role'] + '<|end_header_id|>\n\n'+ message['content'] | trim + '<|eot_id|>' %}{% if loop.index0 == 0 %}"
    "{% set content = bos_token + content %}{% endif %}{{ content }}{% endfor %}{% if add_generation_prompt %}{{ "
    "'<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)
# White space that Jinja treats by where it stands: a newline first, an indented block first, text before a block.
ODD = [
    "\n{% for m in messages %}{{ m.content }}{% endfor %}",
    "\n\n  {% for m in messages %}\n {{ m.content }}\n  {% endfor %}\n",
    "   {% for m in messages %}{{ m.content }}{% endfor %}",
    "   {{ messages[0].content }}",
    "{# a comment #}\n  {%- for m in messages %} {{ m.content }}{% endfor %}\n\n",
    "start\n{% macro all() %}{% for m in messages %}{{ m.content }};{% endfor %}{% endmacro %}{{ all() }}",
    "{% if messages[0].role == 'system' %}{% set messages = messages[1:] %}{% endif %}{{ messages | length }}",
]


def byte_level(special, bos=None, trim=True, chat_template=None, **roles):
    """A byte-level BPE tokenizer, as GPT-2, Qwen, SmolLM2 and Llama 3 have."""
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    core.train_from_iterator(TEXTS, trainers.BpeTrainer(vocab_size=420, initial_alphabet=alphabet, show_progress=False))
    core.add_special_tokens([AddedToken(token, special=True) for token in special])
    steps = [processors.ByteLevel(trim_offsets=trim)]
    if bos:
        steps.append(processors.TemplateProcessing(f"{bos} $A", None, [(bos, core.token_to_id(bos))]))
        roles["bos_token"] = bos
    core.post_processor = processors.Sequence(steps)
    return PreTrainedTokenizerFast(tokenizer_object=core, chat_template=chat_template, **roles)


def chatml_tokenizer(chat_template=SMOLLM2, trim=True):
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<image>"]
    roles = {"bos_token": "<|im_start|>", "eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"}
    return byte_level(special, trim=trim, chat_template=chat_template, **roles)


def llama3_tokenizer():
    special = ["<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "<image>"]
    return byte_level(special, "<|begin_of_text|>", chat_template=LLAMA3, eos_token="<|eot_id|>")


def vicuna_tokenizer(prepend="first", chat_template=VICUNA):
    """A BPE tokenizer with byte fallback that puts <s> in front, as Llama and Vicuna have."""
    special = ["<unk>", "<s>", "</s>"]
    core = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True))
    core.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=prepend)
    core.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Metaspace(prepend_scheme=prepend)])
    every_byte = [f"<0x{i:02X}>" for i in range(256)]
    trainer = trainers.BpeTrainer(vocab_size=520, special_tokens=special + every_byte, show_progress=False)
    core.train_from_iterator(TEXTS, trainer)
    core.add_special_tokens([AddedToken("<image>", special=True, normalized=False)])
    core.post_processor = processors.TemplateProcessing("<s> $A", None, [("<s>", core.token_to_id("<s>"))])
    return PreTrainedTokenizerFast(
        tokenizer_object=core, bos_token="<s>", eos_token="</s>", unk_token="<unk>", chat_template=chat_template
    )


def talk(*texts, system=None):
    """Turns of user and assistant, by turns."""
    head = [] if system is None else [{"role": "system", "content": system}]
    return head + [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(texts)]


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


# --- templates


@pytest.mark.parametrize("template", [SMOLLM2, QWEN, VICUNA_V11, LLAMA3, VICUNA, *ODD])
@pytest.mark.parametrize("generate", [False, True])
def test_text_renders_as_before(template, generate):
    tokenizer = chatml_tokenizer()
    for messages in (talk("How many?"), talk(" Hi ", "Two. ", "Why?\n", system="Be brief."), talk("a", "b", "c")):
        options = {"tokenize": False, "add_generation_prompt": generate}
        before = tokenizer.apply_chat_template(messages, chat_template=template, **options)
        after = tokenizer.apply_chat_template(messages, chat_template=multimodal_template(template), **options)
        assert after == before


@pytest.mark.parametrize("template", [SMOLLM2, QWEN, VICUNA_V11, LLAMA3, VICUNA, *ODD])
def test_lists_render_as_their_text(template):
    tokenizer = chatml_tokenizer()
    as_text = talk("<image>\nWhat?", "A cat.", "<image>\n<image>\nAnd <image>\nhere?", "Two.", system="Be brief.")
    as_lists = [
        {"role": "system", "content": [{"type": "text", "text": "Be brief."}]},
        {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What?"}]},
        {"role": "assistant", "content": [{"type": "text", "text": "A "}, {"type": "text", "text": "cat."}]},
        {
            "role": "user",
            "content": [
                {"type": "image", "url": "a.jpg"},
                {"type": "image"},
                {"type": "text", "text": "And "},
                {"type": "image"},
                {"type": "text", "text": "here?"},
            ],
        },
        {"role": "assistant", "content": "Two."},
    ]
    wrapped = multimodal_template(template)
    assert multimodal_template(wrapped) == wrapped
    options = {"tokenize": False, "add_generation_prompt": True}
    expected = tokenizer.apply_chat_template(as_text, chat_template=template, **options)
    assert tokenizer.apply_chat_template(as_lists, chat_template=wrapped, **options) == expected
    both = tokenizer.apply_chat_template([as_lists, as_text], chat_template=wrapped, **options)
    assert both == [expected, expected]


def test_a_wrapped_template_keeps_other_keys_of_a_message():
    calls = [{"name": "look"}, {"name": "zoom"}]
    for content in (None, "", "Wait."):
        messages = [*talk("Q"), {"role": "assistant", "content": content, "tool_calls": calls}]
        plain, wrapped = (
            chatml_tokenizer(template).apply_chat_template(messages, tokenize=False)
            for template in (QWEN, multimodal_template(QWEN))
        )
        assert wrapped == plain
        assert '"look"' in wrapped
        assert '"zoom"' in wrapped
    as_list = [{**message, "content": [{"type": "text", "text": message["content"]}]} for message in messages]
    assert chatml_tokenizer(multimodal_template(QWEN)).apply_chat_template(as_list, tokenize=False) == plain
    del messages[1]["content"]
    shown = "{% for m in messages %}{{ m.content is defined }} {{ m.keys() | list }} {% endfor %}"
    tokenizer = chatml_tokenizer(multimodal_template(shown))
    assert tokenizer.apply_chat_template(messages, tokenize=False) == (
        "True ['role', 'content'] False ['role', 'tool_calls'] "
    )


def test_a_wrapped_template_survives_being_saved_and_refuses_what_it_cannot_write(tmp_path):
    tokenizer = chatml_tokenizer(multimodal_template(QWEN))
    tokenizer.save_pretrained(tmp_path)
    loaded = PreTrainedTokenizerFast.from_pretrained(tmp_path)
    assert multimodal_template(loaded.chat_template) == loaded.chat_template
    content = [{"type": "image"}, {"type": "text", "text": "What?"}]
    text = loaded.apply_chat_template([{"role": "user", "content": content}], tokenize=False)
    assert text.endswith("<|im_start|>user\n<image>\nWhat?<|im_end|>\n")
    with pytest.raises(Exception, match="type video, but must be image or text"):
        loaded.apply_chat_template([{"role": "user", "content": [{"type": "video"}]}], tokenize=False)


def llava_prompt(turns):
    """LLaVA's ``get_prompt`` of conv_vicuna_v1; a turn of None is the one to be answered."""
    out, ends = TEXTS[2] + " ", [" ", "</s>"]
    for i, text in enumerate(turns):
        role = ("USER", "ASSISTANT")[i % 2]
        out += f"{role}: {text}{ends[i % 2]}" if text else f"{role}:"
    return out


@pytest.mark.parametrize("turns", [["Q?"], ["<image>\nQ?", "An answer.", "R\n?"], ["a", "b", "c", "d", " e "]])
def test_vicuna_is_llavas_prompt(turns):
    tokenizer = vicuna_tokenizer()
    prompt = tokenizer.apply_chat_template(talk(*turns), tokenize=False, add_generation_prompt=True)
    assert prompt == llava_prompt([*turns, None])
    whole = tokenizer.apply_chat_template(talk(*turns, "Fine."), tokenize=False)
    assert whole == llava_prompt([*turns, "Fine."])
    system = tokenizer.apply_chat_template(talk(*turns, system="Be brief."), tokenize=False)
    assert system == llava_prompt(turns).replace(TEXTS[2], "Be brief.")


def test_vicuna_ends_answers_with_the_tokenizers_own_end():
    text = chatml_tokenizer(VICUNA).apply_chat_template(talk("Q", "A"), tokenize=False)
    assert text.endswith("USER: Q ASSISTANT: A<|im_end|>")


def test_chat_template_by_name_by_file_or_the_tokenizers_own(tmp_path):
    own, none = chatml_tokenizer(), chatml_tokenizer(None)
    assert chat_template(own) == SMOLLM2
    assert chat_template(own, None) == SMOLLM2
    assert chat_template(none, "vicuna") == chat_template(own, "vicuna") == VICUNA == TEMPLATES["vicuna"]
    (tmp_path / "my.jinja").write_text("{{ 'é' }}\n", encoding="utf-8")
    assert chat_template(own, str(tmp_path / "my.jinja")) == "{{ 'é' }}\n"
    several = chatml_tokenizer({"default": LLAMA3, "tool_use": QWEN})
    assert chat_template(several) == LLAMA3
    none.name_or_path = "lmsys/vicuna-7b"
    with pytest.raises(ValueError, match=r"7b has no chat template; give a name \(chatml, vicuna\) or the path of a"):
        chat_template(none)
    with pytest.raises(ValueError, match=r"'chatgpt', but must be a name \(chatml, vicuna\) or the path"):
        chat_template(own, "chatgpt")
    with pytest.raises(FileNotFoundError, match=r"nothing\.jinja"):
        chat_template(own, str(tmp_path / "nothing.jinja"))


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
