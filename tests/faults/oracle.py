"""What must be true of a session after any fault, judged by what its user was told.

The user talks over HTTP, knows which turns were acknowledged and which one is in doubt, and has
an undisturbed twin to compare with. Nothing here knows how the server works; only the raw check
of the store knows how sessions lie there.
"""

from __future__ import annotations

import http.client
import json
import time
import uuid
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

import numpy as np
from redis import Redis

TERMINAL = ("response.completed", "response.incomplete", "response.failed")
PROBE = "who am I?"
GO_ON = "go on"  # said where a consolidation is due: the next turn begins with it
TOLERANCE = 1e-4  # strangers in the same step of the engine move the last digits

# A turn id that was committed before is answered from the store and not learned again, so a turn
# in doubt is sent again. When off, it is only looked for.
TURN_IDS_ARE_KEPT = True

# Codes after which nothing has happened, and asking again may help.
_AGAIN = {
    "session_busy",
    "session_moved",
    "version_conflict",
    "store_unavailable",
    "store_regressed",
    "overloaded",
    "draining",
}
_PATIENCE_S = 20.0


class Violation(AssertionError):
    """A promise was broken."""


class Fate(StrEnum):
    """What the user was told of a turn."""

    COMMITTED = "committed"
    READ_ONLY = "read_only"
    REFUSED = "refused"  # nothing of it may be kept
    UNKNOWN = "unknown"  # it is kept whole or not at all


@dataclass(frozen=True)
class Turn:
    text: str
    most: int = 16
    id: str = field(default_factory=lambda: f"turn_{uuid.uuid4().hex}", compare=False)


@dataclass(frozen=True)
class Answer:
    fate: Fate
    reply: str = ""
    memory: Mapping[str, Any] = field(default_factory=dict)
    code: str = ""


# --- as a user does -----------------------------------------------------------------------------


class Line:
    """Requests to one server, each on a connection of its own."""

    def __init__(self, url: str, seconds: float = 15.0) -> None:
        self.url, self._seconds = url, seconds

    def say(self, session: str, turn: Turn, *, mode: str = "read_write") -> Answer:
        """Have one turn, once, streamed."""
        body = {
            "input": turn.text,
            "conversation": session,
            "turn_id": turn.id,
            "max_output_tokens": turn.most,
            "temperature": 0,
            "memory": {"mode": mode, "rates": {"user": 1, "assistant": 1}},
            "stream": True,
        }
        line = self._connection()
        try:
            try:
                line.connect()
            except OSError:
                return Answer(Fate.REFUSED, code="unreachable")
            return self._hear(line, body)
        except (OSError, http.client.HTTPException):
            return Answer(Fate.UNKNOWN, code="cut")
        finally:
            line.close()

    def get(self, path: str) -> tuple[int, bytes]:
        """Return status and body; 0: nothing came back."""
        line = self._connection()
        try:
            line.request("GET", path)
            answer = line.getresponse()
            return answer.status, answer.read()
        except (OSError, http.client.HTTPException):
            return 0, b""
        finally:
            line.close()

    def found(self, path: str, seconds: float = _PATIENCE_S) -> bytes | None:
        """Return what is there, asking until the server can tell; None: there is nothing."""
        deadline = time.monotonic() + seconds
        while True:
            status, body = self.get(path)
            if status == 200:
                return body
            if status == 404:
                return None
            if status not in (0, 409, 503) or time.monotonic() > deadline:
                raise Violation(f"GET {path}: {status} {body[:500]!r}")
            time.sleep(0.05)

    def items(self, session: str) -> list[tuple[str, str]]:
        """Return the transcript as (role, text)."""
        page = self.found(f"/v1/conversations/{session}/items?limit=1000")
        items = json.loads(page)["data"] if page else []
        return [(item["role"], item["content"][0]["text"]) for item in items]

    def session(self, session: str) -> dict[str, Any] | None:
        found = self.found(f"/v1/sessions/{session}")
        return json.loads(found) if found else None

    def tensors(self, session: str) -> dict[str, np.ndarray]:
        """Return all that the session is to the model."""
        found = self.found(f"/v1/sessions/{session}/export")
        assert found is not None, f"session {session} cannot be exported"
        return tensors(found)

    def settled(self, session: str) -> dict[str, Any]:
        """Return the session once nothing of it is due."""
        deadline = time.monotonic() + _PATIENCE_S
        while True:
            found = self.session(session)
            if found and not any(level["due"] for level in found["levels"]):
                return found
            if time.monotonic() > deadline:
                raise Violation(f"session {session} stays due: {found}")
            time.sleep(0.01)

    def insist(
        self, session: str, turn: Turn, *, mode: str = "read_write", patience: float = _PATIENCE_S
    ) -> Answer:
        """Have one turn, asking again while the answer is that nothing has happened."""
        deadline = time.monotonic() + patience
        while True:
            answer = self.say(session, turn, mode=mode)
            if answer.fate is not Fate.REFUSED or answer.code not in _AGAIN:
                return answer
            if time.monotonic() > deadline:
                return answer
            time.sleep(0.05)

    def _connection(self) -> http.client.HTTPConnection:
        return http.client.HTTPConnection(self.url.removeprefix("http://"), timeout=self._seconds)

    def _hear(self, line: http.client.HTTPConnection, body: Mapping[str, Any]) -> Answer:
        headers = {"Content-Type": "application/json"}
        line.request("POST", "/v1/responses", json.dumps(body), headers)
        answer = line.getresponse()
        if answer.status != 200:
            error = json.loads(answer.read())["error"]
            return Answer(Fate.REFUSED, code=error["code"])
        for event in _events(answer):
            if event["type"] in TERMINAL:
                return _judged(event["response"])
        return Answer(Fate.UNKNOWN, code="cut")


def _events(answer: http.client.HTTPResponse) -> Iterator[dict[str, Any]]:
    while line := answer.readline():
        if line.startswith(b"data: ") and line.endswith(b"\n"):
            yield json.loads(line[6:])


def _judged(response: Mapping[str, Any]) -> Answer:
    memory = response["memory"]
    reply = "".join(part["text"] for item in response["output"] for part in item["content"])
    code = (response["error"] or {}).get("code", "")
    match memory["outcome"]:
        case "committed":
            return Answer(Fate.COMMITTED, reply, memory, code)
        case "read_only":
            return Answer(Fate.READ_ONLY, reply, memory, code)
        case "rolled_back":
            return Answer(Fate.REFUSED, reply, memory, code)
        case _:
            return Answer(Fate.UNKNOWN, reply, memory, code)


_DTYPES = {
    "BF16": "<u2",
    "F16": "<f2",
    "F32": "<f4",
    "F64": "<f8",
    "I64": "<i8",
    "I32": "<i4",
    "U8": "u1",
    "I8": "i1",
    "BOOL": "u1",
}


def tensors(data: bytes) -> dict[str, np.ndarray]:
    """Read a safetensors file, bfloat16 as float32 (which the package's numpy reader refuses)."""
    start = 8 + int.from_bytes(data[:8], "little")
    found: dict[str, np.ndarray] = {}
    for name, told in json.loads(data[8:start]).items():
        if name == "__metadata__":
            continue
        first, last = told["data_offsets"]
        array = np.frombuffer(data[start + first : start + last], _DTYPES[told["dtype"]])
        if told["dtype"] == "BF16":
            array = (array.astype("<u4") << 16).view("<f4")
        found[name] = array.reshape(told["shape"])
    return found


# --- what it must be ----------------------------------------------------------------------------


@dataclass(frozen=True)
class Replay:
    """What the same turns, said to nobody's harm, lead to."""

    replies: tuple[str, ...]
    probe: str
    surprise: float
    session: Mapping[str, Any]
    tensors: Mapping[str, np.ndarray]


class Twins:
    """Sessions on a server that nothing happens to, one for every session that is judged."""

    def __init__(self, url: str) -> None:
        self.line = Line(url, 60)
        self._known: dict[tuple[Turn, ...], Replay] = {}
        self._replies: dict[str, tuple[str, ...]] = {}  # by session

    def replay(self, name: str, history: Sequence[Turn]) -> Replay:
        """Say these turns to the twin of a session, unless the outcome is known."""
        turns = tuple(history)
        if turns not in self._known:
            self._known[turns] = self._replayed(f"twin-{name}", turns)
        return self._known[turns]

    def _replayed(self, name: str, turns: tuple[Turn, ...]) -> Replay:
        replies = self._replies.get(name, ())
        for turn in turns[len(replies) :]:
            answer = self.line.insist(name, turn)
            assert answer.fate is Fate.COMMITTED, f"the twin's turn failed: {answer}"
            replies = (*replies, answer.reply)
        self._replies[name] = replies
        self.line.settled(name)
        probe = self.line.insist(name, Turn(PROBE, 8), mode="read_only")
        surprise = probe.memory["surprise"]
        session, tensors = self.line.settled(name), self.line.tensors(name)
        return Replay(replies, probe.reply, surprise, session, tensors)


class Witness:
    """The user of one session: says turns, remembers what it was told, and finds out lies."""

    def __init__(self, name: str, twins: Twins, store_url: str | None) -> None:
        self.name = name
        self.history: list[tuple[Turn, str]] = []  # acknowledged, with the replies
        self.doubtful: Turn | None = None
        self.version = 0
        self._twins, self._store_url = twins, store_url

    def say(self, url: str, text: str, most: int = 16, *, patience: float = _PATIENCE_S) -> Answer:
        """Have a turn and note what became of it, as far as the user can know.

        After `patience` seconds the user hangs up, and does not ask again.
        """
        assert self.doubtful is None, "examine first: a turn is in doubt"
        turn = Turn(text, most)
        answer = Line(url, patience).insist(self.name, turn, patience=patience)
        if answer.code == "internal_error":
            raise self._violation(f"a fault that nobody had thought of: {answer}")
        if answer.fate is Fate.COMMITTED:
            self._acknowledged(turn, answer)
        elif answer.fate is Fate.UNKNOWN:
            self.doubtful = turn
        return answer

    def examine(self, url: str) -> None:
        """Check everything that was promised, on a server that is well.

        Raises:
            Violation: with what was expected and what was found.
        """
        line = Line(url, 30)
        self._transcript(line)
        self._state(line)
        self._leftovers()

    # --- its parts ----------------------------------------------------------------------------

    def _acknowledged(self, turn: Turn, answer: Answer) -> None:
        before, after = answer.memory["base_version"], answer.memory["committed_version"]
        if not self.version <= before < after:
            raise self._violation(
                f"versions: {self.version} was seen, and a turn led from {before} to {after}"
            )
        self.version = after
        self.history.append((turn, answer.reply))

    def _transcript(self, line: Line) -> None:
        found, known = line.items(self.name), self._items()
        rest = found[len(known) :]
        if found[: len(known)] != known or len(rest) > (2 if self.doubtful else 0):
            raise self._violation(f"transcript: expected {known}, found {found}")
        if not self.doubtful:
            return
        turn, self.doubtful = self.doubtful, None
        if rest and (len(rest) != 2 or rest[0] != ("user", turn.text)):
            raise self._violation(f"transcript: in doubt was {turn.text!r}, found {rest}")
        if TURN_IDS_ARE_KEPT:
            self._say_again(line, turn, rest)
        elif rest:
            self.history.append((turn, rest[1][1]))

    def _say_again(self, line: Line, turn: Turn, rest: list[tuple[str, str]]) -> None:
        """Send a turn in doubt again, under its old id: it must be had exactly once."""
        before = line.session(self.name)
        answer = line.insist(self.name, turn)
        if answer.fate is not Fate.COMMITTED:
            raise self._violation(f"retry of {turn.text!r}: {answer}")
        if rest and answer.reply != rest[1][1]:
            raise self._violation(f"retry: {answer.reply!r}, the transcript has {rest[1][1]!r}")
        if rest and not answer.memory["replayed"]:
            raise self._violation(f"retry: had before, and had again: {answer.memory}")
        if rest and before and answer.memory["committed_version"] > before["version"]:
            raise self._violation(f"retry: {answer.memory}, before it {before}")
        self.history.append((turn, answer.reply))
        if (found := line.items(self.name)) != self._items():
            raise self._violation(f"after the retry: expected {self._items()}, found {found}")

    def _state(self, line: Line) -> None:
        if not self.history:
            found = line.session(self.name)
            if found is not None:
                raise self._violation(f"a session nobody was told of: {found}")
            return
        self._wake(line)
        replay = self._twins.replay(self.name, [turn for turn, _ in self.history])
        replies = tuple(reply for _, reply in self.history)
        if replies != replay.replies:
            raise self._violation(f"replies: {replies}, a replay gives {replay.replies}")
        probe = line.insist(self.name, Turn(PROBE, 8), mode="read_only")
        if probe.fate is not Fate.READ_ONLY:
            raise self._violation(f"probe: {probe}")
        if probe.reply != replay.probe or not _near(probe.memory["surprise"], replay.surprise):
            raise self._violation(
                f"probe: {probe.reply!r} {probe.memory['surprise']}, "
                f"a replay gives {replay.probe!r} {replay.surprise}"
            )
        session = line.settled(self.name)
        if differing := list(_differing(figures(session), figures(replay.session))):
            raise self._violation(f"figures: {'; '.join(differing)}")
        if apart := list(_apart(line.tensors(self.name), replay.tensors)):
            raise self._violation(f"tensors that differ from a replay's: {'; '.join(apart[:5])}")
        if session["version"] < self.version:
            raise self._violation(f"version: {self.version} was seen, now {session['version']}")
        self.version = session["version"]

    def _wake(self, line: Line) -> None:
        """Have what is due consolidated, as it is before the session's next turn."""
        found = line.session(self.name)
        if found is None or any(level["due"] for level in found["levels"]):
            answer = self.say(line.url, f"{GO_ON} ({len(self.history)})")
            if answer.fate is not Fate.COMMITTED:
                raise self._violation(f"it does not go on: {answer}")
        line.settled(self.name)

    def _leftovers(self) -> None:
        if self._store_url and (wrong := leftovers(self._store_url, self.name)):
            raise self._violation(f"keys: {'; '.join(wrong[:5])}")

    def _items(self) -> list[tuple[str, str]]:
        return [
            item
            for turn, reply in self.history
            for item in (("user", turn.text), ("assistant", reply))
        ]

    def _violation(self, message: str) -> Violation:
        return Violation(f"session {self.name}: {message}")


def figures(session: Mapping[str, Any]) -> dict[str, Any]:
    """Return the numbers that two sessions with the same history share."""
    told = {name: session[name] for name in ("tokens", "turns", "surprise")}
    for level in session["levels"]:
        for name in ("updates", "last_position", "last_loss", "last_outcome", "movement"):
            told[f"{level['name']} {name}"] = level[name]
    return told


def _differing(found: Mapping[str, Any], expected: Mapping[str, Any]) -> Iterator[str]:
    for name, value in expected.items():
        if not _near(found[name], value):
            yield f"{name} is {found[name]}, a replay gives {value}"


def _apart(found: Mapping[str, np.ndarray], expected: Mapping[str, np.ndarray]) -> Iterator[str]:
    yield from (f"{name} is in one only" for name in found.keys() ^ expected.keys())
    for name in found.keys() & expected.keys():
        one, other = found[name], expected[name]
        if one.shape != other.shape or not np.allclose(one, other, rtol=TOLERANCE, atol=1e-5):
            yield f"{name} {one.shape} {other.shape}"


def _near(found: Any, expected: Any) -> bool:
    if isinstance(found, float) and isinstance(expected, float):
        return abs(found - expected) <= TOLERANCE * max(1.0, abs(expected))
    return bool(found == expected)


# --- as it lies in the store --------------------------------------------------------------------

_stores: dict[str, Redis] = {}


def connected(url: str) -> Redis:
    """Return a client for raw looks at a store."""
    if url not in _stores:
        _stores[url] = Redis.from_url(url, socket_timeout=20)
    return _stores[url]


def leftovers(url: str, session: str, tenant: str = "local") -> list[str]:
    """Return what is wrong with a session's keys: what lives must not expire, what is left must.

    Living are the head, items and references, the kept manifests, and the blobs they name.
    """
    store, prefix = connected(url), f"hope:{{{tenant}:{session}}}:"
    keys = [key.decode() for key in store.scan_iter(f"{prefix}*", count=1000)]
    limits = dict(zip(keys, _ask(store, [("TTL", key) for key in keys]), strict=True))
    limits = {key.removeprefix(prefix): limit for key, limit in limits.items() if limit != -2}
    head = store.hgetall(f"{prefix}h")
    if b"ver" not in head or b"tomb" in head:
        living = {"h"} if b"tomb" in head else set()
        missing: set[str] = set()
    else:
        living, missing = _living(store, prefix, head)
    wrong = [f"{key} is missing" for key in sorted(missing)]
    for key, limit in sorted(limits.items()):
        if key in living and limit != -1:
            wrong.append(f"{key} lives and expires in {limit} s")
        if key not in living and limit == -1:
            wrong.append(f"{key} is left for ever")
    return wrong


def _living(store: Redis, prefix: str, head: Mapping[bytes, bytes]) -> tuple[set[str], set[str]]:
    """Return the keys that may never expire, and those of them that are not there (whole)."""
    oldest, manifest = int(head.get(b"old", b"1")), _manifest(head[b"man"])
    older: set[str] = set()
    missing: set[str] = set()
    blobs: dict[str, int] = {}
    while True:
        blobs |= {f"b:{blob['id']}": blob["fields"] for blob in manifest["blobs"].values()}
        if (parent := manifest["parent"]) < max(1, oldest):
            break
        older.add(f"m:{parent}")
        if (data := store.get(f"{prefix}m:{parent}")) is None:
            missing.add(f"m:{parent}")
            break
        manifest = _manifest(data)
    sizes = _ask(store, [("HLEN", prefix + key) for key in blobs])
    missing |= {
        key for (key, fields), size in zip(blobs.items(), sizes, strict=True) if size != fields
    }
    return {"h", "i", "r", *older, *blobs}, missing


def _manifest(data: bytes) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(data.partition(b"\n")[2])
    return found


def _ask(store: Redis, commands: Sequence[tuple[str, str]]) -> list[Any]:
    with store.pipeline(transaction=False) as pipe:
        for command in commands:
            pipe.execute_command(*command)
        return list(pipe.execute())
