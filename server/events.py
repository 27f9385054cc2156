"""From what happens in a turn to what the wire says about it: the events of one response.

Pure: no socket, no clock, no ids of its own making. The order is that of OpenAI Responses.
"""

from __future__ import annotations

from typing import Literal

from server.turn import Ended, Grown, Happening, Kept, Words
from server.wire import (
    ConsolidationEvent,
    ConversationRef,
    Event,
    IncompleteDetails,
    ItemEvent,
    MemoryCommitted,
    OutputMessage,
    OutputText,
    PartEvent,
    Response,
    ResponseEvent,
    ResponseRequest,
    TextDelta,
    TextDone,
    TokensDetails,
    Usage,
    Wire,
)

MEMORY = "hope:memory"  # the `include` that turns our own events on


class Narrator:
    """Tells one response; feed it what happens, send what it returns."""

    def __init__(
        self,
        request: ResponseRequest,
        *,
        id: str,
        model: str,
        created: float,
        conversation: str | None,
    ) -> None:
        self._id = id
        self._item_id = f"msg_{id.removeprefix('resp_')}"
        self._stream_id = request.stream_id
        self._opt_in = MEMORY in (request.include or [])
        self._sequence = -1
        self._text = ""
        self._opened = False
        self._conversation = conversation
        self.response = Response(
            id=id,
            created_at=created,
            status="in_progress",
            model=model,
            output=[],
            conversation=ConversationRef(id=conversation) if conversation else None,
            instructions=request.instructions,
            metadata=request.metadata or {},
            temperature=request.temperature,
            top_p=request.top_p,
            max_output_tokens=request.max_output_tokens,
        )

    def begin(self) -> list[Event]:
        """Return what is said before anything has happened."""
        return [
            self._whole("response.created"),
            self._whole("response.in_progress"),
        ]

    def tell(self, happening: Happening) -> list[Wire]:
        """Return the events for one happening, in order; none for some."""
        match happening:
            case Words(text=text):
                self._text += text
                return [*self._open(), self._delta(text)]
            case Ended():
                return [*self._close(happening), self._end(happening)]
            case Grown(consolidated=c, seconds=seconds) if self._opt_in and self._conversation:
                rejected = c.outcome == "rejected"
                return [
                    ConsolidationEvent(
                        type="hope:consolidation.failed"
                        if rejected
                        else "hope:consolidation.completed",
                        conversation=self._conversation,
                        level=c.level,
                        outcome=c.outcome,
                        position=c.end,
                        loss=c.loss if c.loss == c.loss else None,
                        duration_ms=1000 * seconds,
                        stream_id=self._stream_id,
                    )
                ]
            case Kept(version=version) if self._opt_in and self._conversation:
                return [
                    MemoryCommitted(
                        conversation=self._conversation, version=version, stream_id=self._stream_id
                    )
                ]
            case _:
                return []

    # --- parts --------------------------------------------------------------------------------

    def _next(self) -> int:
        self._sequence += 1
        return self._sequence

    def _message(self, status: Literal["in_progress", "completed", "incomplete"]) -> OutputMessage:
        content = [] if status == "in_progress" else [OutputText(text=self._text)]
        return OutputMessage(id=self._item_id, status=status, content=content)

    def _whole(
        self,
        type: Literal[
            "response.created",
            "response.in_progress",
            "response.completed",
            "response.incomplete",
            "response.failed",
        ],
    ) -> ResponseEvent:
        return ResponseEvent(
            type=type,
            sequence_number=self._next(),
            stream_id=self._stream_id,
            response=self.response,
        )

    def _item(self, done: bool, message: OutputMessage) -> ItemEvent:
        return ItemEvent(
            type="response.output_item.done" if done else "response.output_item.added",
            sequence_number=self._next(),
            stream_id=self._stream_id,
            item=message,
        )

    def _part(self, done: bool, text: str) -> PartEvent:
        return PartEvent(
            type="response.content_part.done" if done else "response.content_part.added",
            sequence_number=self._next(),
            stream_id=self._stream_id,
            item_id=self._item_id,
            part=OutputText(text=text),
        )

    def _open(self) -> list[Event]:
        if self._opened:
            return []
        self._opened = True
        return [self._item(False, self._message("in_progress")), self._part(False, "")]

    def _delta(self, text: str) -> Event:
        return TextDelta(
            sequence_number=self._next(),
            stream_id=self._stream_id,
            item_id=self._item_id,
            delta=text,
        )

    def _done(self) -> Event:
        return TextDone(
            sequence_number=self._next(),
            stream_id=self._stream_id,
            item_id=self._item_id,
            text=self._text,
        )

    def _close(self, ended: Ended) -> list[Event]:
        if ended.status == "failed":
            return []
        message = self._message(ended.status)
        self.response = self.response.model_copy(update={"output": [message]})
        return [
            *self._open(),
            self._done(),
            self._part(True, self._text),
            self._item(True, message),
        ]

    def _end(self, ended: Ended) -> Event:
        read = ended.read + ended.skipped
        self.response = self.response.model_copy(
            update={
                "status": ended.status,
                "usage": Usage(
                    input_tokens=read,
                    output_tokens=ended.said,
                    total_tokens=read + ended.said,
                    input_tokens_details=TokensDetails(cached_tokens=ended.skipped),
                ),
                "memory": ended.memory,
                "error": ended.error.detail if ended.error else None,
                "incomplete_details": (
                    IncompleteDetails(reason=ended.reason) if ended.reason else None
                ),
            }
        )
        match ended.status:
            case "completed":
                return self._whole("response.completed")
            case "incomplete":
                return self._whole("response.incomplete")
            case _:
                return self._whole("response.failed")
