"""Every message and error on the wire, and nothing else.

The shapes follow OpenAI Responses (HTTP, SSE, WebSocket), Conversations and Chat Completions;
what only we have is prefixed `hope:` or lives in the extra object `memory`.
Unknown fields are ignored on the way in, for clients of other servers send many; but not in what
only we have, where they are slips.
"""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator
from pydantic_core import PydanticCustomError


class Wire(BaseModel):
    # any bound makes pydantic look at the characters: half a surrogate pair is refused on its
    # way in, since no JSON could carry it out again
    model_config = ConfigDict(extra="ignore", frozen=True, str_max_length=1 << 30)


class Ours(Wire):
    """What no other server is sent: a field that we do not know is refused, not ignored."""

    @model_validator(mode="before")
    @classmethod
    def _known(cls, given: Any) -> Any:
        if isinstance(given, dict) and (slips := given.keys() - cls.model_fields.keys()):
            shown = {"slip": repr(min(slips, key=str)), "known": ", ".join(cls.model_fields)}
            raise PydanticCustomError("unknown_field", "no field {slip}; known: {known}", shown)
        return given


# --- client to server -------------------------------------------------------------------------


class Mode(StrEnum):
    READ_WRITE = "read_write"
    READ_ONLY = "read_only"
    OFF = "off"


class TextPart(Wire):
    type: Literal["input_text", "output_text", "text"] = "input_text"
    text: str


Role = Literal["system", "developer", "user", "assistant", "tool", "document"]


class InputMessage(Wire):
    """One message. `document` is ours: text given to be read and learned."""

    type: Literal["message"] = "message"
    role: Role
    content: str | list[TextPart]

    @property
    def text(self) -> str:
        if isinstance(self.content, str):
            return self.content
        return "".join(part.text for part in self.content)


class ConversationRef(Wire):
    id: str


class MemoryOptions(Ours):
    """How this turn uses the session's memory.

    `read_write`: the turn is learned and committed. `read_only`: the memory is read, nothing is
    learned or committed. `off`: the base model, nothing of the session is read or written.
    `wait`: `durable` holds the terminal event back until the store has the turn on disk.
    `window`: `fresh` begins a new conversation, which what was said before can reach by way of
    memory only.
    """

    mode: Mode = Mode.READ_WRITE
    if_version: int | None = None
    on_cancel: Literal["keep", "rollback"] = "keep"
    wait: Literal["committed", "durable"] | None = None
    rates: dict[Role, Annotated[float, Field(ge=0.0, le=10.0)]] | None = None
    window: Literal["kept", "fresh"] = "kept"


METADATA_KEYS = 16
# as much as OpenAI takes: it is kept with every version of a session
Metadata = Annotated[
    dict[Annotated[str, Field(max_length=64)], Annotated[str, Field(max_length=512)]],
    Field(max_length=METADATA_KEYS),
]
# each is looked for at every token, on the thread that answers everybody
Stop = Annotated[str, Field(max_length=256)]


# the person whose session it is; and the name of a turn, by which it is learned only once
User = Annotated[str, Field(min_length=1, max_length=128)]
TURN_ID = 256  # characters
TurnId = Annotated[str, Field(min_length=1, max_length=TURN_ID)]


class Sampling(Wire):
    """Shared by every endpoint; an unset field takes the server's default."""

    temperature: Annotated[float, Field(ge=0.0, le=2.0)] | None = None
    top_p: Annotated[float, Field(gt=0.0, le=1.0)] | None = None
    top_k: Annotated[int, Field(ge=0)] | None = None
    min_p: Annotated[float, Field(ge=0.0, le=1.0)] | None = None
    repetition_penalty: Annotated[float, Field(gt=0.0, le=10.0)] | None = None
    seed: int | None = None
    stop: Stop | Annotated[list[Stop], Field(max_length=16)] | None = None


class ResponseRequest(Sampling):
    """The body of `POST /v1/responses`."""

    model: str | None = None
    input: str | list[InputMessage]
    instructions: str | None = None
    max_output_tokens: Annotated[int, Field(ge=1)] | None = None
    conversation: str | ConversationRef | None = None
    previous_response_id: str | None = None
    stream: bool = False
    stream_id: str | None = None
    metadata: Metadata | None = None
    include: list[str] | None = None
    memory: MemoryOptions = MemoryOptions()
    turn_id: TurnId | None = None
    user: User | None = None


class ResponseCreate(ResponseRequest):
    """The same over the socket."""

    type: Literal["response.create"]
    event_id: TurnId | None = None


class ResponseCancel(Wire):
    type: Literal["response.cancel"]
    event_id: str | None = None
    response_id: str | None = None
    stream_id: str | None = None


class ChatMessage(Wire):
    role: Role
    content: str | list[TextPart] | None = None

    @property
    def text(self) -> str:
        if self.content is None:
            return ""
        if isinstance(self.content, str):
            return self.content
        return "".join(part.text for part in self.content)


class StreamOptions(Wire):
    include_usage: bool = False


class ChatRequest(Sampling):
    """The body of `POST /v1/chat/completions`."""

    model: str | None = None
    messages: Annotated[list[ChatMessage], Field(min_length=1)]
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    n: Literal[1] = 1
    stream: bool = False
    stream_options: StreamOptions | None = None
    conversation: str | ConversationRef | None = None
    memory: MemoryOptions = MemoryOptions()
    turn_id: TurnId | None = None
    user: User | None = None


class ConversationRequest(Wire):
    """The body of `POST /v1/conversations`."""

    metadata: Metadata | None = None
    user: User | None = None
    items: Annotated[list[Any], Field(max_length=0)] | None = None  # a session begins by a turn


# --- server to client: responses --------------------------------------------------------------


class OutputText(Wire):
    type: Literal["output_text"] = "output_text"
    text: str
    annotations: list[Any] = []
    logprobs: list[Any] = []


class OutputMessage(Wire):
    type: Literal["message"] = "message"
    id: str
    role: Literal["assistant"] = "assistant"
    status: Literal["in_progress", "completed", "incomplete"]
    content: list[OutputText]


class TokensDetails(Wire):
    cached_tokens: int = 0  # input tokens that the session had read before and were skipped
    reasoning_tokens: int = 0


class Usage(Wire):
    input_tokens: int
    output_tokens: int
    total_tokens: int
    input_tokens_details: TokensDetails = TokensDetails()
    output_tokens_details: TokensDetails = TokensDetails()


class Outcome(StrEnum):
    """What became of a turn.

    `unknown`: the commit was under way when something failed; send the turn again under its
    `turn_id`: if it was committed, its stored result comes back.
    """

    COMMITTED = "committed"
    ROLLED_BACK = "rolled_back"
    UNKNOWN = "unknown"
    READ_ONLY = "read_only"
    OFF = "off"


class MemoryResult(Wire):
    """What became of the session: part of every terminal event."""

    conversation: str | None
    base_version: int
    committed_version: int | None
    outcome: Outcome
    durability: str
    updates: int  # consolidations applied during this turn
    consolidated_levels: list[str]
    due_levels: list[str]  # levels that will be consolidated now, after this event
    surprise: float | None  # mean nats per token of the reply under the session's own model
    durable: bool | None = None  # on disk, as the store confirmed; null where it was not asked for
    replayed: bool = False  # the stored result of a turn that was committed before under its id
    recovered: str | None = None  # what the store had lost or damaged, and what stands in for it


class ErrorDetail(Wire):
    type: str
    code: str
    message: str
    param: str | None = None
    retry_after_s: float | None = None


class IncompleteDetails(Wire):
    reason: Literal["max_output_tokens", "cancelled"]


class Response(Wire):
    id: str
    object: Literal["response"] = "response"
    created_at: float
    status: Literal["in_progress", "completed", "incomplete", "failed"]
    model: str
    output: list[OutputMessage]
    conversation: ConversationRef | None = None
    instructions: str | None = None
    metadata: dict[str, str] = {}
    usage: Usage | None = None
    error: ErrorDetail | None = None
    incomplete_details: IncompleteDetails | None = None
    memory: MemoryResult | None = None
    parallel_tool_calls: bool = False
    tool_choice: str = "none"
    tools: list[Any] = []
    temperature: float | None = None
    top_p: float | None = None
    max_output_tokens: int | None = None


class Event(Wire):
    """A server event; `sequence_number` strictly increases within a response."""

    type: str
    sequence_number: int
    stream_id: str | None = None


class ResponseEvent(Event):
    type: Literal[
        "response.created",
        "response.in_progress",
        "response.completed",
        "response.incomplete",
        "response.failed",
    ]
    response: Response


class ItemEvent(Event):
    type: Literal["response.output_item.added", "response.output_item.done"]
    output_index: int = 0
    item: OutputMessage


class PartEvent(Event):
    type: Literal["response.content_part.added", "response.content_part.done"]
    item_id: str
    output_index: int = 0
    content_index: int = 0
    part: OutputText


class TextDelta(Event):
    type: Literal["response.output_text.delta"] = "response.output_text.delta"
    item_id: str
    output_index: int = 0
    content_index: int = 0
    delta: str
    logprobs: list[Any] = []


class TextDone(Event):
    type: Literal["response.output_text.done"] = "response.output_text.done"
    item_id: str
    output_index: int = 0
    content_index: int = 0
    text: str
    logprobs: list[Any] = []


class ConsolidationEvent(Wire):
    """Opt-in by `include: ["hope:memory"]`; may arrive after the response's terminal event."""

    type: Literal["hope:consolidation.completed", "hope:consolidation.failed"]
    conversation: str
    level: str
    outcome: str
    position: int
    loss: float | None
    duration_ms: float
    stream_id: str | None = None


class MemoryCommitted(Wire):
    """Opt-in by `include: ["hope:memory"]`."""

    type: Literal["hope:memory.committed"] = "hope:memory.committed"
    conversation: str
    version: int
    stream_id: str | None = None


class ErrorEvent(Wire):
    type: Literal["error"] = "error"
    status: int
    error: ErrorDetail
    stream_id: str | None = None
    event_id: str | None = None
    retry_after_s: float | None = None


# --- server to client: sessions ---------------------------------------------------------------


class LevelStatus(Wire):
    """How one level of a session stands."""

    name: str
    chunk: int
    blocks: list[int]
    updates: int
    last_position: int | None  # end of the last consolidated chunk, in tokens
    last_at: float | None  # seconds since the epoch
    last_loss: float | None  # nats per learnable token, before the update
    last_outcome: str | None
    movement: float  # ||delta|| / ||base||
    due: int  # chunks waiting to be consolidated


class Session(Wire):
    """`GET /v1/sessions/{id}`."""

    id: str
    object: Literal["session"] = "session"
    version: int
    created_at: float
    updated_at: float
    tokens: int
    turns: int
    bytes: int
    stored_bytes: int
    learning: bool
    surprise: float | None  # of the last reply
    levels: list[LevelStatus]
    model: str
    fingerprint: str
    durability: str
    metadata: dict[str, str] = {}
    user: str | None = None
    frozen: bool = False  # turns read the memory, and nothing changes it


class SessionList(Wire):
    object: Literal["list"] = "list"
    data: list[Session]
    has_more: bool
    next_cursor: str | None = None


class Conversation(Wire):
    id: str
    object: Literal["conversation"] = "conversation"
    created_at: float
    metadata: dict[str, str] = {}


class SessionVersion(Wire):
    """One kept version of a session."""

    version: int
    parent: int
    object: Literal["session.version"] = "session.version"
    created_at: float
    tokens: int
    turns: int
    bytes: int
    stored_bytes: int
    frozen: bool
    levels: list[LevelStatus]


class VersionList(Wire):
    object: Literal["list"] = "list"
    data: list[SessionVersion]  # the newest first


class LevelDifference(Wire):
    """How far one level (or the fast `memory`) of two versions is apart."""

    name: str
    norm_from: float
    norm_to: float
    distance: float  # ||to - from||
    change: float | None  # distance / norm_from; null where the level was empty


class Difference(Wire):
    """`GET /v1/sessions/{id}/diff`."""

    object: Literal["session.diff"] = "session.diff"
    id: str
    from_version: int
    to_version: int
    tokens: int  # read between the two; negative where `to` is the older
    levels: list[LevelDifference]


class RollbackRequest(Ours):
    version: Annotated[int, Field(ge=1)]


class ForkRequest(Ours):
    id: str | None = None  # of the new session; one is made up where it is left out
    version: Annotated[int, Field(ge=1)] | None = None
    user: User | None = None  # of the new session; the same person's where it is left out


class DeletedSession(Wire):
    """A receipt. `left` keys of the session were found by a last scan, its tombstone aside."""

    id: str
    object: Literal["conversation.deleted"] = "conversation.deleted"
    deleted: Literal[True] = True
    keys: int
    bytes: int
    left: int = 0
    remains: str = ""  # where older copies may still be, and until when


class DeletedUser(Wire):
    """A receipt for everything of one person."""

    object: Literal["user.memory.deleted"] = "user.memory.deleted"
    user: str
    sessions: list[DeletedSession]
    keys: int
    bytes: int
    left: int
    remains: str


class TranscriptItem(Wire):
    type: Literal["message"] = "message"
    id: str
    role: Role
    status: Literal["completed", "incomplete"] = "completed"
    content: list[TextPart]


class Transcript(Wire):
    """`GET /v1/conversations/{id}/items`."""

    object: Literal["list"] = "list"
    data: list[TranscriptItem]
    first_id: str | None = None
    last_id: str | None = None
    has_more: bool = False


class ModelCard(Wire):
    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: str = "hope"
    fingerprint: str
    window: int | None  # tokens of attention; null where no block attends
    sinks: int | None
    memory: dict[str, Any] | None = None  # of the blocks that remember; null where none does
    dtype: str
    device: str
    levels: list[dict[str, Any]]


class ModelList(Wire):
    object: Literal["list"] = "list"
    data: list[ModelCard]


class Health(Wire):
    status: Literal["ok", "draining", "store_unavailable"]
    model: str
    durability: str | None = None
    store: str | None = None


# --- server to client: chat completions -------------------------------------------------------


class ChatUsage(Wire):
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int


class ChatReply(Wire):
    role: Literal["assistant"] = "assistant"
    content: str


class ChatChoice(Wire):
    index: int = 0
    message: ChatReply
    finish_reason: Literal["stop", "length"]


class ChatCompletion(Wire):
    id: str
    object: Literal["chat.completion"] = "chat.completion"
    created: int
    model: str
    choices: list[ChatChoice]
    usage: ChatUsage
    memory: MemoryResult | None = None


class ChatDelta(Wire):
    role: Literal["assistant"] | None = None
    content: str | None = None


class ChatChunkChoice(Wire):
    index: int = 0
    delta: ChatDelta
    finish_reason: Literal["stop", "length"] | None = None


class ChatChunk(Wire):
    id: str
    object: Literal["chat.completion.chunk"] = "chat.completion.chunk"
    created: int
    model: str
    choices: list[ChatChunkChoice]
    usage: ChatUsage | None = None
    memory: MemoryResult | None = None
