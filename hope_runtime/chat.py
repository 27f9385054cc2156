"""How a conversation becomes text: the checkpoint's chat template, in a sandbox, without a clock.

Sessions live on the server, so only new messages are ever rendered. A template sees a mark in
place of each content; what stands around the marks is markup, and what a person wrote can
therefore never be mistaken for it, nor steer the template.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from enum import StrEnum
from itertools import groupby
from typing import Any, NamedTuple

from jinja2 import TemplateError
from jinja2.sandbox import ImmutableSandboxedEnvironment

PLAIN = (
    "{% for message in messages %}"
    "{{ message['role'] | capitalize }}: {{ message['content'] | trim }}\n"
    "{% endfor %}"
    "{% if add_generation_prompt %}Assistant:{% endif %}"
)


class ChatError(ValueError):
    """A template that is broken, or messages that it refuses."""


class Role(StrEnum):
    """Who speaks. `developer`, as some clients say, is the system."""

    SYSTEM = "system"
    USER = "user"
    ASSISTANT = "assistant"
    TOOL = "tool"
    DOCUMENT = "document"
    MARKUP = "markup"

    @classmethod
    def _missing_(cls, value: object) -> Role | None:
        return cls.SYSTEM if value == "developer" else None


@dataclass(frozen=True, slots=True)
class Message:
    role: Role
    text: str


class Piece(NamedTuple):
    """A stretch of rendered text and whose it is."""

    role: Role
    text: str


class Entry(NamedTuple):
    """A message as the template sees it."""

    role: str
    content: str


class ChatTemplate:
    """A checkpoint's chat template; without one, plain `User: ...` and `Assistant: ...` lines."""

    def __init__(self, source: str | None, *, bos: str = "", eos: str = "") -> None:
        source = source or PLAIN
        try:
            self._template = _environment().from_string(source)
        except TemplateError as error:
            raise ChatError(f"the chat template cannot be parsed: {error}") from error
        self._specials = {"bos_token": bos, "eos_token": eos}
        self._quoted = frozenset(re.findall(r"""['"](\w+)['"]""", source))
        self.closing = self._closing()

    def opening(self, messages: Sequence[Message]) -> list[Piece]:
        """Render the first messages of a session, up to where the reply starts."""
        rendered = self._render([], messages, generation=True)
        return _pieces(rendered, messages)

    def following(self, messages: Sequence[Message]) -> list[Piece]:
        """Render what comes after a closed reply, up to where the next one starts."""
        rendered = self._render(_EARLIER, messages, generation=True)
        return _pieces(self._after_reply(rendered), messages)

    def _closing(self) -> str:
        last = _tail(self._call(_EARLIER, generation=False))
        amid = _tail(self._call([*_EARLIER, Entry("user", _mark(0))], generation=False))
        return last if amid.startswith(last) else ""

    def _after_reply(self, rendered: str) -> str:
        tail = _tail(rendered)
        if not tail.startswith(self.closing):
            raise ChatError(
                f"the chat template closes a reply with {self.closing!r}, but not before these "
                "messages; send a user message first"
            )
        return tail[len(self.closing) :]

    def _render(self, earlier: list[Entry], new: Sequence[Message], *, generation: bool) -> str:
        """Try the messages as they are, then in the shapes that strict templates accept."""
        refusals: list[ChatError] = []
        for entries in _shapes([self._entry(i, message) for i, message in enumerate(new)]):
            try:
                rendered = self._call([*earlier, *entries], generation=generation)
                _require_contents(rendered, new)
            except ChatError as error:
                refusals.append(error)
            else:
                return rendered
        raise refusals[0]

    def _entry(self, index: int, message: Message) -> Entry:
        if message.role is Role.MARKUP:
            raise ChatError("markup is what the template adds; no message can have that role")
        optional = message.role in {Role.TOOL, Role.DOCUMENT}
        role = Role.USER if optional and message.role not in self._quoted else message.role
        return Entry(str(role), _mark(index) if message.text.strip() else message.text)

    def _call(self, entries: Sequence[Entry], *, generation: bool) -> str:
        try:
            return self._template.render(
                messages=[entry._asdict() for entry in entries],
                add_generation_prompt=generation,
                tools=None,
                documents=None,
                **self._specials,
            )
        except (TemplateError, ArithmeticError, AttributeError, LookupError, TypeError) as error:
            raise ChatError(f"the model's chat template refuses these messages: {error}") from error


# A mark wears padding on both sides: where the template strips a content, the padding is gone.
# U+2003 is a space to `str.strip`, and no template writes it; the others are for private use.
def _mark(index: int) -> str:
    return f"\u2003\ue000{index}\ue001\u2003"


_MARK = re.compile("(\u2003?)\ue000(\\d+)\ue001(\u2003?)")
_DUMMY_REPLY = "\ue002\ue003"
_EARLIER = [Entry("user", "\ue002"), Entry("assistant", _DUMMY_REPLY)]


def _tail(rendered: str) -> str:
    _, found, tail = rendered.rpartition(_DUMMY_REPLY)
    if not found:
        raise ChatError("the chat template leaves out what the assistant said")
    return tail


def _shapes(entries: list[Entry]) -> Iterator[list[Entry]]:
    yield entries
    users = [Entry("assistant" if e.role == "assistant" else "user", e.content) for e in entries]
    yield users
    yield [
        Entry(role, "\n\n".join(entry.content for entry in same))
        for role, same in groupby(users, key=lambda entry: entry.role)
    ]


def _require_contents(rendered: str, messages: Sequence[Message]) -> None:
    found = {int(match[2]) for match in _MARK.finditer(rendered)}
    for index, message in enumerate(messages):
        if message.text.strip() and index not in found:
            raise ChatError(f"the model's chat template leaves out a {message.role} message here")


def _pieces(rendered: str, messages: Sequence[Message]) -> list[Piece]:
    pieces: list[Piece] = []
    end = 0
    for match in _MARK.finditer(rendered):
        pieces.append(Piece(Role.MARKUP, rendered[end : match.start()]))
        message = messages[int(match[2])]
        text = message.text if match[1] else message.text.lstrip()
        pieces.append(Piece(message.role, text if match[3] else text.rstrip()))
        end = match.end()
    pieces.append(Piece(Role.MARKUP, rendered[end:]))
    return [piece for piece in pieces if piece.text]


def _environment() -> ImmutableSandboxedEnvironment:
    """Make the environment that chat templates are written for."""
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
    )
    environment.filters["tojson"] = _tojson
    environment.globals["raise_exception"] = _raise
    return environment


def _tojson(value: Any, indent: int | None = None) -> str:
    return json.dumps(value, ensure_ascii=False, indent=indent)


def _raise(message: str) -> None:
    raise TemplateError(message)
