"""Conversations in a model's own words, by the template that its tokenizer brings.

A template is a Jinja program from a checkpoint: it runs in Jinja's immutable sandbox, where it sees
the conversation and reaches nothing else. What people write can forge no special token: text that
spells one is refused.
"""

import datetime
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import jinja2
import numpy as np
import tokenizers
from jinja2.sandbox import ImmutableSandboxedEnvironment

from fw.data.tokenizer import Tokenizer
from fw.errors import FwError

Message = Mapping[str, Any]
"""{"role": "user", "content": "text"}; the roles are the template's."""

ANSWER = "assistant"
"""The role that is learnt."""

LONGEST = 4_000_000
"""Characters of a conversation at most, so that no template fills the memory."""


@dataclass(frozen=True)
class Chat:
    """The template of a tokenizer.

    >>> fast = tokenizers.Tokenizer(tokenizers.models.WordLevel({"hi": 0, "?": 1}, "?"))
    >>> fast.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    >>> text = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\\n{% endfor %}"
    >>> chat = Chat(Tokenizer(fast, (), (), 0, None, settings={"chat_template": text}))
    >>> chat.render([{"role": "user", "content": "hi"}])
    'user: hi\\n'
    """

    tokenizer: Tokenizer

    @cached_property
    def template(self) -> jinja2.Template:
        """Compiled.

        Raises:
          FwError: there is none, or it is broken.
        """
        source = self.tokenizer.settings.get("chat_template")
        if isinstance(source, list):  # several by name
            named = {t.get("name"): t.get("template") for t in source if isinstance(t, dict)}
            source = named.get("default")
        if not isinstance(source, str):
            raise FwError(
                "the tokenizer has no chat_template; use a model that was tuned to converse"
            )
        world = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
        )
        world.filters["tojson"] = _to_json
        world.globals["raise_exception"] = _refuse
        world.globals["strftime_now"] = lambda form: datetime.datetime.now().strftime(form)
        try:
            return world.from_string(source)
        except jinja2.TemplateError as error:
            raise FwError(
                f"chat_template: line {getattr(error, 'lineno', '?')}: {error}"
            ) from error

    def render(self, messages: Sequence[Message], *, answer: bool = False) -> str:
        """A conversation as text.

        Args:
          messages: in order.
          answer: whether the model is to speak next.

        Raises:
          FwError: a message without role or content, one that spells a special token, or one that
            the template refuses.
        """
        for number, message in enumerate(messages):
            self._check(number, message)
        spelled = {
            f"{name}_token": _text(self.tokenizer.settings.get(f"{name}_token"))
            for name in ("bos", "eos", "unk", "pad")
        }
        found, size = [], 0
        try:
            for part in self.template.generate(
                messages=[dict(m) for m in messages], add_generation_prompt=answer, **spelled
            ):
                size += len(part)
                if size > LONGEST:
                    raise FwError(f"chat_template: makes more than {LONGEST} characters")
                found.append(part)
        except FwError:
            raise
        except Exception as error:  # a program of somebody's: anything may go wrong in it
            raise FwError(f"chat_template: {type(error).__name__}: {error}") from error
        return "".join(found)

    def prompt(self, messages: Sequence[Message]) -> list[int]:
        """The ids after which the model answers."""
        return self._fast.encode(self.render(messages, answer=True), add_special_tokens=False).ids

    def example(self, messages: Sequence[Message]) -> tuple[np.ndarray, np.ndarray]:
        """A conversation to learn from.

        Returns:
          ids, int32 [T]; and bool [T], whether a token is of an answer, what ends it included.

        Raises:
          FwError: as `render`; no answer, or a template that says a message in another way once
            others follow it.
        """
        text = self.render(messages)
        spans = []
        for i, message in enumerate(messages):
            if message["role"] != ANSWER:
                continue
            before = self.render(messages[:i], answer=True)
            through = self.render(messages[: i + 1])
            if not (text.startswith(through) and through.startswith(before)):
                raise FwError(
                    f"chat_template: message {i} reads otherwise before the next one; cut the "
                    "conversation there"
                )
            spans.append((len(before), len(through)))
        if not spans:
            raise FwError(f"a conversation without an {ANSWER!r} has nothing to learn")
        encoding = self._fast.encode(text, add_special_tokens=False)
        first = np.array([start for start, _ in encoding.offsets], np.int64)
        learnt = np.zeros(len(encoding.ids), bool)
        for start, stop in spans:
            learnt |= (first >= start) & (first < stop)
        return np.array(encoding.ids, np.int32), learnt

    @cached_property
    def _fast(self) -> tokenizers.Tokenizer:
        fast = tokenizers.Tokenizer.from_str(self.tokenizer.fast.to_str())
        fast.encode_special_tokens = False  # the template's are meant
        return fast

    @cached_property
    def _special(self) -> tuple[str, ...]:
        added = self.tokenizer.fast.get_added_tokens_decoder().values()
        return tuple(token.content for token in added if token.special)

    def _check(self, number: int, message: Message) -> None:
        if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
            raise FwError(f"message {number}: expected an object with a 'role'")
        content = message.get("content")
        if not isinstance(content, str):
            raise FwError(f"message {number}: expected 'content', a text")
        for token in self._special:
            if token in content or token in message["role"]:
                raise FwError(f"message {number}: spells the special token {token!r}; take it out")


def _text(token: Any) -> str:
    token = token.get("content") if isinstance(token, dict) else token
    return token if isinstance(token, str) else ""


def _to_json(value: Any, indent: int | None = None) -> str:
    return json.dumps(value, ensure_ascii=False, indent=indent)


def _refuse(message: str) -> None:
    raise FwError(f"chat_template: {message}")
