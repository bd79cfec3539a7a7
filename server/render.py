"""Rows and prompts -> token ids, by the tokenizer and the chat template that the daemon published.

Training, validation, `/generate` and token counts all go through `Renderer`, so that the ids of a row's
prompt are the ids that `/generate` sends for it. This holds by construction: a text is cut into *pieces*
where a model takes over from its prompt, and each piece is tokenised alone, so that no merge of tokens
crosses the border.

Special tokens written out in a text (`<|im_end|>`) are read as such. Knows no file, no database and no torch.
"""

import datetime
import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import jinja2
from jinja2.ext import Extension
from jinja2.sandbox import ImmutableSandboxedEnvironment
from tokenizers import Tokenizer

from server.errors import MixloomError
from server.shapes import prompt_and_completion, shape_of
from server.tokens import TokenRow

Supervise = Literal["completion", "all"]
Message = Mapping[str, Any]

TODAY = datetime.date(2024, 7, 26)
"""What templates are told when they ask for the date: a row's ids must not depend on the day."""


@dataclass(frozen=True)
class Piece:
    """A text that is tokenised alone. `supervised`: a model is to learn to write it."""

    text: str
    supervised: bool


class Renderer:
    """The one way from texts to token ids for one base."""

    def __init__(self, folder: Path):
        """`folder` holds `tokenizer.json`, `special.json` and, for a chat model, `chat_template.jinja`."""
        self._tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
        self._tokenizer.no_padding()
        self._tokenizer.no_truncation()
        special = json.loads((folder / "special.json").read_text())
        self._eos: str = special["eos_token"] or ""
        self._eos_id: int | None = special["eos_id"]
        self._bos: str = special["bos_token"] or ""
        self._add_bos: bool = special["add_bos"]
        added = self._tokenizer.get_added_tokens_decoder().values()
        ends = {token.content for token in added if token.special} | ({self._eos} if self._eos else set())
        self._end_token = re.compile("|".join(map(re.escape, sorted(ends, key=len, reverse=True))) or "(?!)")
        template = folder / "chat_template.jinja"
        self._template = _template(template.read_text()) if template.exists() else None
        self.template_sha256 = hashlib.sha256(template.read_bytes()).hexdigest() if template.exists() else "none"

    @property
    def has_template(self) -> bool:
        """Whether the base has a chat template; without one `messages` are refused."""
        return self._template is not None

    @cached_property
    def stop_tokens(self) -> list[int]:
        """Ids at which an answer ends: end-of-text, and the end token of the template's assistant turns."""
        ends = set() if self._eos_id is None else {self._eos_id}
        if self.has_template:
            ends.add(self.training({"prompt": "?", "completion": "!"}, supervise="completion").tokens[-1])
        return sorted(ends)

    def training(self, row: Mapping[str, Any], *, supervise: Supervise, raw: bool = False) -> TokenRow:
        """One row of a data set as token ids, and which of them the loss asks for.

        `raw` (or `"raw": true` in the row) leaves the template out. Raises MixloomError `no_chat_template`,
        `template_refused`, `template_rewrites_history`, `template_not_trainable`.
        """
        return self.tokenise([self.pieces(row, raw=raw)], supervise)[0]

    def prompt(self, *, prompt: str | list[int] | None, messages: Sequence[Message] | None, raw: bool) -> list[int]:
        """The ids that a model is given to go on from. Exactly one of `prompt` and `messages` is not None.

        Raises MixloomError `invalid_prompt`, and those of `training`.
        """
        if (prompt is None) == (messages is None):
            raise MixloomError("invalid_prompt", "Give either 'prompt' or 'messages', and not both.", param="prompt")
        if isinstance(prompt, list):
            return self._checked_ids(prompt)
        if messages is not None:
            if raw:
                raise MixloomError("invalid_prompt", "'raw' goes with 'prompt', not with 'messages'.", param="raw")
            pieces = self._chat(messages, open_ended=True)
        elif raw or not self.has_template:
            pieces = [Piece(self._opened(prompt or ""), False)]
        else:
            pieces = self._chat([{"role": "user", "content": prompt}], open_ended=True)
        ids = self.tokenise([pieces], "completion")[0].tokens
        if not ids:
            raise MixloomError("invalid_prompt", "The prompt is empty. Give one token or more.", param="prompt")
        return ids

    def decode(self, ids: Sequence[int]) -> str:
        """The text of token ids, special tokens left out."""
        return self._tokenizer.decode(list(ids), skip_special_tokens=True)

    def pieces(self, row: Mapping[str, Any], *, raw: bool = False) -> list[Piece]:
        """A row as texts: what leads to an answer, and the answer, in turn. Raises as `training`."""
        shape = shape_of(row)
        if shape == "messages":
            return self._chat(row["messages"], open_ended=False)
        if shape == "text":
            return [Piece(self._opened(self._closed(row["text"])), True)]
        prompt, completion = prompt_and_completion(row)
        if raw or row.get("raw") or not self.has_template:
            return [Piece(self._opened(prompt), False), Piece(self._closed(completion), True)]
        messages = [{"role": "user", "content": prompt}, {"role": "assistant", "content": completion}]
        return self._chat(messages, open_ended=False)

    def tokenise(self, rows: Sequence[Sequence[Piece]], supervise: Supervise) -> list[TokenRow]:
        """Rows of pieces as token rows. The first token of a row is never supervised: nothing precedes it."""
        texts = [piece.text for pieces in rows for piece in pieces]
        encodings = iter(self._tokenizer.encode_batch_fast(texts, add_special_tokens=False))
        token_rows = []
        for pieces in rows:
            tokens: list[int] = []
            supervised: list[bool] = []
            for piece in pieces:
                ids = next(encodings).ids
                tokens += ids
                supervised += [piece.supervised or supervise == "all"] * len(ids)
            supervised[:1] = [False] * len(supervised[:1])
            token_rows.append(TokenRow(tokens, supervised))
        return token_rows

    def _opened(self, text: str) -> str:
        return self._bos + text if self._add_bos and not text.startswith(self._bos) else text

    def _closed(self, text: str) -> str:
        return text if text.endswith(self._eos) else text + self._eos

    def _chat(self, messages: Sequence[Message], *, open_ended: bool) -> list[Piece]:
        """The pieces of a conversation: each assistant turn is one, and so is what leads to it.

        `open_ended`: the last piece leads to a turn that is still to be written. Otherwise the last assistant
        turn ends it; what follows is left out, for nothing would learn from it. A template that rewrites
        earlier turns once others follow has no pieces in common with what came before: there the conversation
        starts anew.
        """
        pieces: list[Piece] = []
        written = ""
        turns = [index for index, message in enumerate(messages) if message["role"] == "assistant"]
        for index in [*turns, len(messages)] if open_ended else turns:
            before = self._text(messages[:index], add_generation_prompt=True)
            if not before.startswith(written):
                if not open_ended and any(piece.supervised for piece in pieces):
                    raise _template_error(
                        "template_rewrites_history",
                        "writes an assistant turn differently once others follow, so that only the last one "
                        "can be learned. Set 'weight' to 0 on the earlier assistant turns, or give each its "
                        "own row.",
                    )
                pieces, written = [], ""
            pieces.append(Piece(before[len(written) :], False))
            if index < len(messages):
                turn, end = self._turn(before, messages[: index + 1])
                pieces.append(Piece(turn + end, messages[index].get("weight") != 0))
                written = before + turn
        return pieces

    def _turn(self, before: str, messages: Sequence[Message]) -> tuple[str, str]:
        """(the last turn as the template writes it after `before`, the end token that it leaves out).

        The turn goes up to the first special token behind its content; what the template writes behind that
        one (a line break, often) belongs to the next piece.
        """
        after = self._text(messages, add_generation_prompt=False)
        if not after.startswith(before):
            raise _template_error(
                "template_not_trainable",
                "does not begin an assistant turn with its own generation prompt, so that what is learned "
                "would not be what is asked. The operator may give another one with --chat-template.",
            )
        turn = after[len(before) :]
        content = messages[-1]["content"].strip()
        start = turn.find(content)
        end = self._end_token.search(turn, start + len(content) if start >= 0 else 0)
        return (turn[: end.end()], "") if end else (turn.rstrip(), self._eos)

    def _text(self, messages: Sequence[Message], *, add_generation_prompt: bool) -> str:
        """What the chat template makes of messages. Raises `no_chat_template`, `template_refused`."""
        if self._template is None:
            raise no_chat_template()
        try:
            return self._template.render(
                messages=[{"role": message["role"], "content": message["content"]} for message in messages],
                add_generation_prompt=add_generation_prompt,
                bos_token=self._bos,
                eos_token=self._eos,
                tools=None,
                documents=None,
            )
        except jinja2.TemplateError as error:
            raise _template_error("template_refused", f"refuses this conversation: {error}") from error

    def _checked_ids(self, ids: list[int]) -> list[int]:
        size = self._tokenizer.get_vocab_size(with_added_tokens=True)
        wrong = next((token for token in ids if not 0 <= token < size), None)
        if not ids or wrong is not None:
            said = "it is empty" if wrong is None else f"it holds {wrong}"
            raise MixloomError(
                "invalid_prompt",
                f"A prompt of token ids needs one or more, each from 0 to {size - 1}; {said}.",
                param="prompt",
            )
        return list(ids)


def render_rows(renderer: Renderer, rows: Sequence[Mapping[str, Any]], supervise: Supervise) -> list[TokenRow]:
    """All rows of a data set as token rows, tokenised together. Raises as `Renderer.training`."""
    return renderer.tokenise([renderer.pieces(row) for row in rows], supervise)


def no_chat_template() -> MixloomError:
    """What `messages` get from a base that has no template for them."""
    return MixloomError(
        "no_chat_template",
        "The base model has no chat template, so it cannot take 'messages'. Use 'prompt' and 'completion', "
        "or ask the operator for a template (--chat-template).",
        param="messages",
    )


def _template_error(code: str, said: str) -> MixloomError:
    return MixloomError(code, f"The base's chat template {said}", param="messages")


class _Generation(Extension):
    """`{% generation %}…{% endgeneration %}`, a mark of some templates: what stands between them."""

    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser: jinja2.parser.Parser) -> list[jinja2.nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _template(text: str) -> jinja2.Template:
    """A chat template, with Jinja as those on the hub expect it."""

    def raise_exception(message: str) -> str:
        raise jinja2.TemplateError(message)

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, "jinja2.ext.loopcontrols"]
    )
    environment.filters["tojson"] = lambda value, indent=None: json.dumps(value, ensure_ascii=False, indent=indent)
    environment.globals["raise_exception"] = raise_exception
    environment.globals["strftime_now"] = TODAY.strftime
    template = environment.from_string(text)
    template.globals = dict(template.globals)  # Jinja copies them at each rendering, and a ChainMap is slow to copy
    return template
