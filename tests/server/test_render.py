"""Rows and prompts -> ids: above all, that a row's prompt is what `/generate` sends for it."""

import datetime
import json
import shutil
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from server.errors import MixloomError
from server.render import Renderer, render_rows
from server.tokens import TokenRow
from tests.tiny import CHAT_TEMPLATE, tiny_tokenizer, write_tiny_tokenizer

END, EOS = 2, 0  # <|im_end|>, <|endoftext|>
CONVERSATION: list[dict[str, Any]] = [
    {"role": "system", "content": "Be kind."},
    {"role": "user", "content": "the user?"},
    {"role": "assistant", "content": "\n\nthe answer"},
    {"role": "user", "content": "then?"},
    {"role": "assistant", "content": "nothing "},
]
ROWS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "prompt and completion": (
        {"prompt": "Where is the user?\n", "completion": "\n\nthere", "answer": "there"},
        {"prompt": "Where is the user?\n", "messages": None},
    ),
    "raw": (
        {"prompt": "Where is the user?\n", "completion": "\nthere", "raw": True},
        {"prompt": "Where is the user?\n", "messages": None, "raw": True},
    ),
    "instruction, input and output": (
        {"instruction": "Translate.", "input": "thé", "output": "tea"},
        {"prompt": "Translate.\n\nthé", "messages": None},
    ),
    "instruction without input": (
        {"instruction": "Sing.", "input": "", "output": "la"},
        {"prompt": "Sing.", "messages": None},
    ),
    "messages": ({"messages": CONVERSATION[:3]}, {"prompt": None, "messages": CONVERSATION[:2]}),
    "messages without a system turn": (
        {"messages": CONVERSATION[1:3]},
        {"prompt": None, "messages": CONVERSATION[1:2]},
    ),
}


def prefix_of(row: TokenRow) -> list[int]:
    """The ids up to the first supervised one."""
    return row.tokens[: row.supervised.index(True)]


def renderer(folder: Path, template: bool | str = True, **options: Any) -> Renderer:
    write_tiny_tokenizer(folder, template, **options)
    return Renderer(folder)


def text_of(ids: list[int]) -> str:
    return tiny_tokenizer().decode(ids, skip_special_tokens=False)


def supervised_text(row: TokenRow) -> str:
    return text_of([token for token, flag in zip(row.tokens, row.supervised, strict=True) if flag])


@pytest.mark.parametrize("add_bos", [False, True])
@pytest.mark.parametrize("template", [True, False])
@pytest.mark.parametrize("shape", ROWS)
def test_the_ids_before_the_first_supervised_one_are_those_that_generate_sends(
    tmp_path: Path, shape: str, template: bool, add_bos: bool
) -> None:
    row, asked = ROWS[shape]
    tiny = renderer(tmp_path, template, add_bos=add_bos)
    if "messages" in row and not template:
        for call in (
            lambda: tiny.training(row, supervise="completion"),
            lambda: tiny.prompt(raw=False, **asked),
        ):
            with pytest.raises(MixloomError) as caught:
                call()
            assert caught.value.code == "no_chat_template"
        return
    rendered = tiny.training(row, supervise="completion")
    assert prefix_of(rendered) == tiny.prompt(**{"raw": False, **asked})
    assert rendered.tokens[-1] == (END if template else EOS)
    assert rendered.supervised[-1]
    assert rendered.tokens.count(EOS) == add_bos * (row.get("raw", False) or not template) + (not template)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Renderer:
    return renderer(tmp_path_factory.mktemp("base"))


@given(prompt=st.text(min_size=1), completion=st.text(min_size=1), raw=st.booleans())
def test_the_prompt_of_a_row_is_the_prompt_of_generate_for_any_texts(
    tiny: Renderer, prompt: str, completion: str, raw: bool
) -> None:
    row = tiny.training({"prompt": prompt, "completion": completion, "raw": raw}, supervise="completion")
    assert prefix_of(row) == tiny.prompt(prompt=prompt, messages=None, raw=raw)


@given(st.lists(st.text(min_size=1), min_size=2, max_size=6))
def test_every_turn_of_a_conversation_follows_what_generate_would_send_there(tiny: Renderer, texts: list[str]) -> None:
    roles = ("user", "assistant")
    messages = [{"role": roles[i % 2], "content": text} for i, text in enumerate(texts[: len(texts) // 2 * 2])]
    row = tiny.training({"messages": messages}, supervise="completion")
    starts = [i for i, (before, now) in enumerate(pairwise(row.supervised), 1) if now and not before]
    for turn, start in enumerate(starts):
        asked = messages[: 2 * turn + 1]
        assert row.tokens[:start] == tiny.prompt(prompt=None, messages=asked, raw=False)


def test_a_token_that_would_join_prompt_and_answer_is_not_used(tiny: Renderer) -> None:
    row = tiny.training({"prompt": "a", "completion": "\n\nb"}, supervise="completion")
    whole = "".join(piece.text for piece in tiny.pieces({"prompt": "a", "completion": "\n\nb"}))
    assert text_of(row.tokens) == whole
    assert row.tokens != tiny_tokenizer().encode(whole).ids, "the texts do not provoke a merge"


def test_only_the_answers_and_their_end_tokens_are_supervised(tiny: Renderer) -> None:
    row = tiny.training({"messages": CONVERSATION}, supervise="completion")
    assert supervised_text(row) == "\n\nthe answer<|im_end|>nothing <|im_end|>"
    assert text_of(row.tokens).endswith("nothing <|im_end|>")


def test_an_answer_of_weight_0_is_read_but_not_learned(tiny: Renderer) -> None:
    messages = [dict(message) for message in CONVERSATION]
    messages[2]["weight"] = 0
    row = tiny.training({"messages": messages}, supervise="completion")
    assert supervised_text(row) == "nothing <|im_end|>"
    assert row.tokens == tiny.training({"messages": CONVERSATION}, supervise="completion").tokens


def test_supervise_all_asks_for_every_token_but_the_first(tiny: Renderer) -> None:
    row = tiny.training({"prompt": "a", "completion": "b"}, supervise="all")
    assert row.supervised == [False] + [True] * (len(row.tokens) - 1)


def test_what_follows_the_last_answer_is_left_out(tiny: Renderer) -> None:
    thanks = [*CONVERSATION, {"role": "user", "content": "thanks"}]
    assert tiny.training({"messages": thanks}, supervise="all") == tiny.training(
        {"messages": CONVERSATION}, supervise="all"
    )


@pytest.mark.parametrize("template", [True, False])
def test_a_text_stays_as_it_is_and_is_learned_whole(tmp_path: Path, template: bool) -> None:
    row = renderer(tmp_path, template).training({"text": "the text"}, supervise="completion")
    assert text_of(row.tokens) == "the text" + ("<|im_end|>" if template else "<|endoftext|>")
    assert row.supervised == [False] + [True] * (len(row.tokens) - 1)


def test_raw_leaves_text_untouched_and_ends_it_once(tiny: Renderer) -> None:
    own = {"prompt": "<|im_start|>me\n", "completion": "you<|im_end|>"}
    assert text_of(tiny.training(own, supervise="completion", raw=True).tokens) == "<|im_start|>me\nyou<|im_end|>"
    ended = tiny.training({"prompt": "a", "completion": "b", "raw": True}, supervise="completion")
    assert text_of(ended.tokens) == "ab<|im_end|>"


def test_a_begin_token_is_written_once_whoever_writes_it(tmp_path: Path) -> None:
    own = renderer(tmp_path, "{{ bos_token }}" + CHAT_TEMPLATE, add_bos=True)
    row = own.training({"prompt": "a", "completion": "b"}, supervise="completion")
    assert row.tokens.count(EOS) == 1  # <|endoftext|> is its begin token, too
    assert row.tokens[0] == EOS
    for raw in ("a", "<|endoftext|>a"):
        assert own.prompt(prompt=raw, messages=None, raw=True)[:2].count(EOS) == 1


def test_rows_rendered_together_are_as_rendered_alone(tiny: Renderer) -> None:
    rows = [row for row, _ in ROWS.values()]
    assert render_rows(tiny, rows, "completion") == [tiny.training(row, supervise="completion") for row in rows]


def test_an_answer_ends_at_end_of_text_or_at_the_end_of_a_turn(tmp_path: Path) -> None:
    write_tiny_tokenizer(tmp_path)
    special = json.loads((tmp_path / "special.json").read_text())
    (tmp_path / "special.json").write_text(json.dumps(special | {"eos_token": "<|endoftext|>", "eos_id": EOS}))
    chat = Renderer(tmp_path)
    assert chat.stop_tokens == [EOS, END]
    row = chat.training({"prompt": "a", "completion": "b"}, supervise="completion")
    assert row.tokens[-1] == END, "a template's own end token is enough"


def test_decode_leaves_special_tokens_out(tiny: Renderer) -> None:
    assert tiny.decode(tiny.prompt(prompt="thé <|im_end|>", messages=None, raw=True)) == "thé "


PLAIN = (
    "{% for m in messages %}{{ m.role }}: {{ m.content }}\n\n{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)
FORGETFUL = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{% if m.role == 'assistant' and loop.last %}(thought){% endif %}{{ m.content }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def test_a_template_without_end_tokens_gets_them(tmp_path: Path) -> None:
    plain = renderer(tmp_path, PLAIN)
    row = plain.training({"messages": CONVERSATION}, supervise="completion")
    assert supervised_text(row) == "\n\nthe answer<|im_end|>nothing<|im_end|>"
    assert row.tokens.count(END) == 2
    prompt = plain.prompt(prompt=None, messages=CONVERSATION[:4], raw=False)
    assert row.tokens[: len(prompt)] == prompt


def test_a_template_that_ends_the_text_behind_the_turn_can_be_learned_turn_by_turn(tmp_path: Path) -> None:
    ending = CHAT_TEMPLATE + "{% if not add_generation_prompt %}<|endoftext|>{% endif %}"
    row = renderer(tmp_path, ending).training({"messages": CONVERSATION}, supervise="completion")
    assert supervised_text(row) == "\n\nthe answer<|im_end|>nothing <|im_end|>"
    assert EOS not in row.tokens


def test_a_template_that_rewrites_history_can_teach_the_last_answer_alone(tmp_path: Path) -> None:
    forgetful = renderer(tmp_path, FORGETFUL)
    with pytest.raises(MixloomError, match="'weight' to 0") as caught:
        forgetful.training({"messages": CONVERSATION}, supervise="completion")
    assert caught.value.code == "template_rewrites_history"
    messages = [dict(message) for message in CONVERSATION]
    messages[2]["weight"] = 0
    row = forgetful.training({"messages": messages}, supervise="completion")
    assert supervised_text(row) == "(thought)nothing <|im_end|>"
    assert prefix_of(row) == forgetful.prompt(prompt=None, messages=CONVERSATION[:4], raw=False)


def test_a_template_whose_generation_prompt_is_not_its_turn_is_refused(tmp_path: Path) -> None:
    other = CHAT_TEMPLATE.replace("<|im_start|>assistant\n", "<|im_start|>model\n")
    with pytest.raises(MixloomError) as caught:
        renderer(tmp_path, other).training({"prompt": "a", "completion": "b"}, supervise="completion")
    assert caught.value.code == "template_not_trainable"


@pytest.mark.parametrize(
    "template",
    ["{{ raise_exception('Roles must alternate') }}", "{{ ''.__class__.__mro__ }}{{ nothing.at.all }}"],
)
def test_what_a_template_refuses_or_may_not_do_is_an_error_of_the_caller(tmp_path: Path, template: str) -> None:
    with pytest.raises(MixloomError) as caught:
        renderer(tmp_path, template).prompt(prompt="a", messages=None, raw=False)
    assert (caught.value.code, caught.value.status) == ("template_refused", 422)


def test_templates_find_what_they_expect_of_their_environment(tmp_path: Path) -> None:
    template = (
        "{% for m in messages %}{% if m.role == 'system' %}{% continue %}{% endif %}"
        "{% generation %}{{ m.content | tojson }}{% endgeneration %}{% endfor %}"
        "{{ strftime_now('%Y-%m-%d') }}{{ tools is none }}{{ eos_token }}"
    )
    ids = renderer(tmp_path, template).prompt(prompt="<é>", messages=None, raw=False)
    assert text_of(ids) == '"<é>"2024-07-26True<|im_end|>'
    assert datetime.date.today() != datetime.date(2024, 7, 26), "a row's ids must not depend on the day"


@pytest.mark.parametrize(
    ("asked", "param"),
    [
        ({"prompt": None, "messages": None}, "prompt"),
        ({"prompt": "a", "messages": CONVERSATION}, "prompt"),
        ({"prompt": []}, "prompt"),
        ({"prompt": [1, 10**6]}, "prompt"),
        ({"prompt": [-1]}, "prompt"),
        ({"prompt": "", "raw": True}, "prompt"),
        ({"prompt": None, "messages": CONVERSATION[:2], "raw": True}, "raw"),
    ],
)
def test_a_prompt_that_is_none_is_refused(tiny: Renderer, asked: dict[str, Any], param: str) -> None:
    with pytest.raises(MixloomError) as caught:
        tiny.prompt(**{"messages": None, "raw": False, **asked})
    assert (caught.value.code, caught.value.param) == ("invalid_prompt", param)


def test_token_ids_are_sent_as_they_are(tiny: Renderer) -> None:
    assert tiny.prompt(prompt=[7, 2, 7], messages=None, raw=False) == [7, 2, 7]


@pytest.mark.smollm2
def test_smollm2_rows_are_what_transformers_makes_of_them(tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    from tests.models import smollm2_folder

    reference = AutoTokenizer.from_pretrained(smollm2_folder())
    for name in ("tokenizer.json", "chat_template.jinja"):
        shutil.copy(smollm2_folder() / name, tmp_path)
    special = {"eos_token": reference.eos_token, "eos_id": reference.eos_token_id, "add_bos": False}
    special |= {"bos_token": reference.bos_token, "bos_id": reference.bos_token_id}
    (tmp_path / "special.json").write_text(json.dumps(special))
    smollm2 = Renderer(tmp_path)
    for row, asked in ROWS.values():
        rendered = smollm2.training(row, supervise="completion")
        assert prefix_of(rendered) == smollm2.prompt(**{"raw": False, **asked})
        if not row.get("raw"):
            messages = asked["messages"] or [{"role": "user", "content": asked["prompt"]}]
            assert prefix_of(rendered) == _ids_of(reference, messages, add_generation_prompt=True)
    whole = [*CONVERSATION[:2], {"role": "assistant", "content": "Yes."}]
    ids = smollm2.training({"messages": whole}, supervise="all").tokens
    assert ids + reference.encode("\n") == _ids_of(reference, whole, add_generation_prompt=False)
    assert smollm2.stop_tokens == [reference.convert_tokens_to_ids("<|im_end|>")]


def _ids_of(reference: Any, messages: list[dict[str, Any]], *, add_generation_prompt: bool) -> list[int]:
    return reference.apply_chat_template(messages, add_generation_prompt=add_generation_prompt, return_dict=False)
