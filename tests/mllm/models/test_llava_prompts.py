"""Chat templates made to take pictures, against the templates as they were and LLaVA's own prompt."""

import pytest
from chat_kit import LLAMA3, QWEN, SMOLLM2, TEXTS, VICUNA_V11, chatml_tokenizer, llava_prompt, talk, vicuna_tokenizer
from transformers import PreTrainedTokenizerFast

from llava_integration.models.chat import TEMPLATES, VICUNA, chat_template, multimodal_template

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
