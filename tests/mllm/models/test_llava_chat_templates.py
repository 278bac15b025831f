"""Chat templates that write the last answer otherwise: labels against transformers' mask of ``{% generation %}``."""

import json
import re

import pytest
from chat_kit import chatml_tokenizer, talk, vicuna_tokenizer

from llava_integration.models.chat import CHATML, IGNORED, TEMPLATES, chat_template, encode, multimodal_template
from llava_integration.train.config import TuneConfig
from llava_integration.train.data import Collate
from llava_integration.train.training import train

pytest_plugins = ("training_kit",)

# As reasoning models have it: the last answer alone has a block of thoughts, an empty one where it brings none.
THINKS = """\
{%- set last = namespace(user=-1) -%}
{%- for m in messages -%}{%- if m.role == 'user' -%}{%- set last.user = loop.index0 -%}{%- endif -%}{%- endfor -%}
{%- for m in messages -%}
{%- if m.role == 'assistant' -%}
{%- set said = m.content.split('</think>')[-1].lstrip('\\n') -%}
{%- set thought = '' if said == m.content else m.content.split('</think>')[0].split('<think>')[-1].strip('\\n') -%}
{{- '<|im_start|>assistant\\n' -}}
{%- generation -%}
{%- if loop.index0 > last.user -%}{{- '<think>\\n' + thought + '\\n</think>\\n\\n' -}}{%- endif -%}
{{- said + '<|im_end|>' -}}
{%- endgeneration -%}
{{- '\\n' -}}
{%- else -%}
{{- '<|im_start|>' + m.role + '\\n' + m.content + '<|im_end|>\\n' -}}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\\n' -}}{%- endif -%}
"""
# A model that is asked with its thoughts begun, or ended already, where no earlier turn has any.
NEVER = THINKS.replace("loop.index0 > last.user", "false")
BEGUN = NEVER.removesuffix("' -}}{%- endif -%}\n") + "<think>\\n' -}}{%- endif -%}\n"
ENDED = NEVER.removesuffix("' -}}{%- endif -%}\n") + "<think>\\n\\n</think>\\n\\n' -}}{%- endif -%}\n"
# The end of sequence after the last turn alone, and another one after the earlier turns.
LAST_END = (
    "{%- for m in messages -%}{%- if m.role == 'assistant' -%}{{- 'ASSISTANT:' -}}"
    "{%- generation -%}{{- ' ' + m.content | trim -}}{%- if loop.last -%}{{- eos_token -}}{%- endif -%}"
    "{%- endgeneration -%}{{- '\\n' -}}"
    "{%- else -%}{{- m.role | upper + ': ' + m.content + '\\n' -}}{%- endif -%}{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{- 'ASSISTANT:' -}}{%- endif -%}"
)
OTHER_END = (
    "{%- for m in messages -%}{%- if m.role == 'assistant' -%}{{- '<|im_start|>assistant\\n' -}}{%- generation -%}"
    "{{- m.content + ('<|endoftext|>' if loop.last else '<|im_end|>') -}}{%- endgeneration -%}{{- '\\n' -}}"
    "{%- else -%}{{- '<|im_start|>' + m.role + '\\n' + m.content + '<|im_end|>\\n' -}}{%- endif -%}{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\\n' -}}{%- endif -%}"
)
TEMPLATES_OF = {"thinks": THINKS, "begun": BEGUN, "ended": ENDED, "last end": LAST_END}
TALKS = {
    "one": talk("Q", "A cat."),
    "two": talk("Two?", "Two.", "Where?", "On the mat."),
    "three": talk("Q", "A", "A", "Q", "A", "A", system="Be brief."),
    "unanswered": talk("Q", "Two dogs.", "R?"),
    "white space": talk("Q", " Two \n dogs \n", "R", "\n\n yes"),
    "unicode": talk("画像?", "猫 🐈‍⬛.", "🙂?", "ß…"),
    "like the format": talk("ASSISTANT: no", "assistant\nuser: <|", "<think>", "USER: a", "Q", "A"),
    "thoughts": talk("Q", "<think>\nIt is red.\n</think>\n\nA cat.", "R", "<think>\nHm.\n</think>\n\nYes."),
}


def masked_by_transformers(messages, template, tokenizer):
    """Tokens, and those that lie in the template's own blocks of what is generated."""
    out = tokenizer.apply_chat_template(
        messages, chat_template=template, tokenize=True, return_dict=True, return_assistant_tokens_mask=True
    )
    ids = out["input_ids"]
    return ids, [token if kept else IGNORED for token, kept in zip(ids, out["assistant_masks"], strict=True)]


def without_blocks(template):
    return re.sub(r"\{%-\s*(end)?generation\s*-%\}", "{#- -#}", template)


@pytest.mark.parametrize("messages", TALKS.values(), ids=TALKS.keys())
@pytest.mark.parametrize("kind", TEMPLATES_OF)
def test_labels_are_the_templates_own(kind, messages):
    template = TEMPLATES_OF[kind]
    # Its mask finds no token for a space that a tokenizer counts out of its words, hence one that does not.
    tokenizer = chatml_tokenizer(multimodal_template(without_blocks(template)), trim=False)
    encoded = encode(messages, tokenizer, image_tokens=3)
    assert any(label != IGNORED for label in encoded.labels)
    expected = masked_by_transformers(messages, template, tokenizer)
    assert (encoded.input_ids, encoded.labels) == expected


def test_answers_are_learned_with_the_end_that_they_have():
    """An earlier answer's own end is known only from the template, so it is left out where the last one has another."""
    tokenizer = chatml_tokenizer(without_blocks(OTHER_END))
    encoded = encode(talk("Q", "two", "R", "yes"), tokenizer, image_tokens=3)
    assert tokenizer.decode([label for label in encoded.labels if label != IGNORED]) == "twoyes<|endoftext|>"


def test_pictures_and_a_cut_with_a_template_that_thinks():
    tokenizer = chatml_tokenizer(multimodal_template(without_blocks(THINKS)))
    messages = talk("<image>\nQ", "two", "<image> R", "yes")
    encoded = encode(messages, tokenizer, image_tokens=3)
    assert encoded.images == 2
    assert encoded.input_ids.count(tokenizer.convert_tokens_to_ids("<image>")) == 6
    kept = tokenizer.decode([label for label in encoded.labels if label != IGNORED])
    assert kept == "two<|im_end|><think>\n\n</think>\n\nyes<|im_end|>"
    cut = encode(messages, tokenizer, image_tokens=3, max_length=len(encoded.input_ids) - 2)
    assert cut.labels == encoded.labels[:-2]


@pytest.mark.parametrize("messages", [TALKS["one"], TALKS["three"], TALKS["unanswered"], TALKS["white space"]])
def test_chatml_by_name(messages):
    assert TEMPLATES["chatml"] == CHATML
    blocks = (
        "{%- for m in messages -%}{{- '<|im_start|>' + m.role + '\\n' -}}"
        "{%- if m.role == 'assistant' -%}{%- generation -%}{{- m.content + '<|im_end|>' -}}{%- endgeneration -%}"
        "{%- else -%}{{- m.content + '<|im_end|>' -}}{%- endif -%}{{- '\\n' -}}{%- endfor -%}"
    )
    tokenizer = chatml_tokenizer(multimodal_template(CHATML), trim=False)
    encoded = encode(messages, tokenizer, image_tokens=3)
    assert (encoded.input_ids, encoded.labels) == masked_by_transformers(messages, blocks, tokenizer)
    # another tokenizer ends an answer as its model does
    other = vicuna_tokenizer(chat_template=CHATML)
    encoded = encode(talk("Q", "Two.", "R", "Yes."), other, image_tokens=3)
    assert other.decode([label for label in encoded.labels if label != IGNORED]) == "Two.</s>Yes.</s>"


ANY = "{% for m in messages %}{{ m.role + ': ' + m.content + ' ' }}{% endfor %}"
UNCLEAR = {
    "it is written 2 times": ANY.replace("m.content", "m.content + m.content") + "{{ messages | length }}",
    "it is written 0 times": ANY.replace("m.content", "(m.content if m.role == 'user' or loop.last else '')"),
    "what follows depends on it": ANY + "{% if messages | length > 1 %}{{ messages[1].content | length }}{% endif %}",
    "it asks for no answer there": "{% if not add_generation_prompt %}" + ANY + "{% endif %}",
}


@pytest.mark.parametrize("why", UNCLEAR)
def test_what_cannot_be_served_names_a_template_that_can(why):
    tokenizer = chatml_tokenizer(UNCLEAR[why])
    with pytest.raises(ValueError, match=rf"rewrites earlier turns .* message 2 .*{why}\); .* such as chatml"):
        encode(talk("Q?", "A cat.", "R?", "Two."), tokenizer, image_tokens=3)
    tokenizer.chat_template = CHATML
    assert encode(talk("Q?", "A cat.", "R?", "Two."), tokenizer, image_tokens=3)


# --- runs


def rewritten(kit, **facts):
    path = kit.folder / "llm" / "tokenizer_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **facts}))


def test_a_run_with_a_template_that_thinks_last(kit, tmp_path):
    """Every other conversation of the kit has two turns."""
    for path in (kit.folder / "llm").glob("*.jinja"):
        path.unlink()
    rewritten(kit, chat_template=without_blocks(THINKS))
    train(kit.model, kit.data, str(tmp_path / "run"), TuneConfig(), **kit.options(steps=1))
    assert (tmp_path / "run" / "results.json").is_file()


def test_neither_pad_nor_eos_is_one_sentence(kit, tmp_path):
    rewritten(kit, pad_token=None, eos_token=None)
    with pytest.raises(ValueError, match=r"neither .*pad_token.*eos_token.*set .* and save the tokenizer"):
        train(kit.model, kit.data, str(tmp_path / "run"), TuneConfig(), **kit.options(steps=1))


# --- what is given


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        ([{"role": "human", "content": "<image> Q"}, *talk("", "A")[1:]], "Message 1 has the role 'human'"),
        (talk("Q", None), "Message 2 has the role 'assistant' and content of type NoneType"),
        (talk([{"type": "image"}], "A"), "content of type list; expected one of system, user, assistant, and text"),
        ([{"role": "user"}, {"role": "assistant", "content": "A"}], "content of type NoneType"),
        ([{"from": "human", "value": "Q"}], "Message 1 has the role None"),
    ],
)
def test_messages_are_checked(messages, message):
    for style in ("chat", "plain"):
        with pytest.raises(ValueError, match=message):
            encode(messages, chatml_tokenizer(), image_tokens=3, style=style)


def test_a_template_in_another_encoding_or_that_cannot_be_rendered(tmp_path):
    (tmp_path / "a.jinja").write_bytes("{{ 'é' }}".encode("latin-1"))
    with pytest.raises(ValueError, match=r"a\.jinja is not in UTF-8"):
        chat_template(chatml_tokenizer(), str(tmp_path / "a.jinja"))
    for odd in ("{{ messages[0].content + none }}", "{{ bad_name.x }}", "{% for %}"):
        with pytest.raises(ValueError, match="cannot write a conversation of user, assistant"):
            encode(talk("Q", "A"), chatml_tokenizer(odd), image_tokens=3)


def test_batches_want_a_padding_token():
    with pytest.raises(ValueError, match="no padding token, but batches are padded"):
        Collate(None, 9, 4, 28)
