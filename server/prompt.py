"""From what is asked to what the engine reads: which messages are new, as tokens with weights."""

from __future__ import annotations

from hope_runtime.config import HopeConfig
from hope_runtime.engine import Turn
from hope_runtime.state import State
from hope_runtime.tokenizer import Message, Role, Span, Tokenizer
from server.book import digest, known_prefix
from server.errors import ApiError
from server.residency import NOBODY, Resident
from server.turn import Ask
from server.wire import Mode

RATES = {Role.USER: 1.0, Role.DOCUMENT: 1.0}  # who is learned from; everyone else: 0


class Prompter:
    """Knows the tokenizer, the longest input, and whether this server learns at all."""

    def __init__(
        self, tokenizer: Tokenizer, config: HopeConfig, *, most: int, learning: bool
    ) -> None:
        self._tokenizer = tokenizer
        self._config = config
        self._most = most
        self._learning = learning

    def unread(self, ask: Ask, base: Resident) -> tuple[tuple[Message, ...], int]:
        """Return the messages the session has not read, and the tokens that are skipped."""
        known = known_prefix(base.book, ask.messages) if ask.history else 0
        if known is None:
            raise ApiError(
                409,
                "history_diverged",
                f"the messages begin like session {base.key.session!r} but do not go on from all "
                "that it has read; send only new messages, or use another session",
                param="messages",
            )
        new = ask.messages[known:]
        if ask.instructions and (ask.fresh or base.book.instructions != digest(ask.instructions)):
            new = (Message(Role.SYSTEM, ask.instructions), *new)
        skipped = sum(len(self._tokenizer.encode(m.text)) for m in ask.messages[:known])
        return new, skipped

    def job(self, id: str, ask: Ask, base: Resident, messages: tuple[Message, ...]) -> Turn:
        """Return what the engine is asked to do (ApiError 413: the input is too long)."""
        state = base.state.cleared(self._config) if ask.fresh else base.state
        spans = self._spans(state, messages)
        tokens = sum(len(span.ids) for span in spans)
        if tokens > self._most:
            raise ApiError(
                413,
                "message_too_large",
                f"the input has {tokens} tokens, more than {self._most}; "
                "send it in several turns, or raise HOPE_MAX_INPUT_TOKENS",
                param="input",
            )
        learn = self._learning and ask.mode is Mode.READ_WRITE and base.key is not NOBODY
        learn = learn and not base.book.frozen
        rates = RATES | dict(ask.rates) if learn else {}
        closing = self._tokenizer.closing() if ask.most else Span(Role.MARKUP, ())
        return Turn(
            id=id,
            state=state,
            given=tuple((token, rates.get(span.role, 0.0)) for span in spans for token in span.ids),
            closing=tuple((token, 0.0) for token in closing.ids),
            most=ask.most,
            said_weight=rates.get(Role.ASSISTANT, 0.0),
            sampling=ask.sampling,
            stops=ask.stops,
            learn=learn,
            told=tuple(
                span.role is Role.USER and rates.get(Role.USER, 0.0) > 0
                for span in spans
                for _ in span.ids
            ),
            recalls=ask.mode is not Mode.OFF and base.key is not NOBODY,
        )

    def _spans(self, state: State, messages: tuple[Message, ...]) -> list[Span]:
        if state.position or state.carry:
            return self._tokenizer.following(messages)
        return self._tokenizer.opening(messages)
