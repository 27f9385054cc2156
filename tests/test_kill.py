"""What was acknowledged survives every end of the server, and every end is a quiet one."""

import json
import random
import signal
import time
import uuid
from contextlib import contextmanager, suppress
from pathlib import Path

import httpx2
import pytest
from redis import Redis
from websockets.exceptions import ConnectionClosed
from websockets.sync.client import connect

from memory_store import EmbeddedValkey
from server.settings import Settings

TERMINAL = ("response.completed", "response.incomplete", "response.failed")
QUIET_ENDS = (0, 130)
TURNS = ("my name is Ada", "it rains in the hills")


class Talk:
    """One session on one server, greedy, learning from both sides."""

    def __init__(self, server, name="ada"):
        self.server, self.name = server, name

    def body(self, text, most):
        return {
            "input": text,
            "conversation": self.name,
            "max_output_tokens": most,
            "temperature": 0,
            "memory": {"rates": {"user": 1, "assistant": 1}},
            "stream": True,
        }

    @contextmanager
    def stream(self, text, most=24):
        """Yield the events of a turn as they come."""
        with (
            httpx2.Client(base_url=self.server.url, timeout=30) as http,
            http.stream("POST", "/v1/responses", json=self.body(text, most)) as answer,
        ):
            assert answer.status_code == 200
            yield (
                json.loads(line.removeprefix("data: "))
                for line in answer.iter_lines()
                if line.startswith("data: ")
            )

    def turn(self, text, most=24):
        """Have a whole turn; return its terminal response."""
        with self.stream(text, most) as events:
            return next(e["response"] for e in events if e["type"] in TERMINAL)

    def settled(self):
        """Return the session once nothing of it is due."""
        deadline = time.monotonic() + 10
        while True:
            session = httpx2.get(f"{self.server.url}/v1/sessions/{self.name}").json()
            if not any(level["due"] for level in session["levels"]):
                return session
            assert time.monotonic() < deadline, "it stays due"
            time.sleep(0.02)

    def version(self):
        return httpx2.get(f"{self.server.url}/v1/sessions/{self.name}").json()["version"]

    def transcript(self):
        answer = httpx2.get(f"{self.server.url}/v1/conversations/{self.name}/items").json()
        return [(item["role"], item["content"][0]["text"]) for item in answer["data"]]


def said(response):
    return response["output"][0]["content"][0]["text"]


def children(pid):
    """Return the processes that a process has started and that still run."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            state, parent = stat.read_text().rpartition(")")[2].split()[:2]
        except OSError:
            continue
        if int(parent) == pid and state != "Z":
            found.append(int(stat.parent.name))
    return found


def is_gone(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except OSError:
        return True


def wait_until(true, seconds=10):
    deadline = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < deadline, "it never came"
        time.sleep(0.02)


@pytest.fixture
def twin(server):
    """The same talk on a server that nothing ever happens to."""
    return Talk(server, f"twin-{uuid.uuid4().hex}")


# --- kill -9 ------------------------------------------------------------------------------------


def test_a_session_goes_on_after_kill_9_as_if_nothing_had_happened(serve, tmp_path, twin):
    store = ("--data-dir", str(tmp_path / "data"))
    server = serve(*store).greeted()
    for text in TURNS:
        talk = Talk(server)
        with talk.stream(text) as events:
            last = next(e["response"] for e in events if e["type"] in TERMINAL)
            [valkey] = children(server.pid)
            server.kill()  # with its consolidation still to come
        wait_until(lambda valkey=valkey: is_gone(valkey))
        acknowledged = last["memory"]["committed_version"]
        assert last["memory"]["due_levels"]
        assert said(last) == said(twin.turn(text))

        server = serve(*store).greeted()

        assert Talk(server).version() in (acknowledged, acknowledged + 1)
        assert Talk(server).transcript() == twin.transcript()
    assert said(Talk(server).turn("who am I?")) == said(twin.turn("who am I?"))
    assert Talk(server).settled()["levels"][0]["updates"] > 0


def test_a_turn_that_was_cut_by_kill_9_is_kept_whole_or_not_at_all(serve, tmp_path, twin):
    store = ("--data-dir", str(tmp_path / "data"))
    chance = random.Random(20)
    server = serve(*store).greeted()
    Talk(server).turn(TURNS[0])
    twin.turn(TURNS[0])
    for round in range(2):
        before = twin.transcript()
        with Talk(server).stream(f"tell me more {round}", most=40) as events:
            for _ in range(chance.randrange(2, 40)):
                next(events)
            server.kill()

        server = serve(*store).greeted()

        found = Talk(server).transcript()
        if found != before:
            twin.turn(f"tell me more {round}", most=40)
        assert found == twin.transcript()
    assert said(Talk(server).turn("who am I?")) == said(twin.turn("who am I?"))


# --- being told to stop -------------------------------------------------------------------------


def last_words(line):
    """Return what a socket says before the server hangs up, and the code it hangs up with."""
    said = []
    with suppress(ConnectionClosed):
        while True:
            said.append(json.loads(line.recv()))
    return said, line.close_code


def endless_turn(words):
    """Ask for a reply that only the server's end will end."""
    return {
        "input": words,
        "max_output_tokens": 4000,
        "temperature": 0,
        "memory": {"mode": "off"},
        "stream": True,
    }


def test_a_server_that_is_told_to_stop_ends_quietly_whatever_is_open(serve, tmp_path, endless):
    server = serve("--data-dir", str(tmp_path / "data"), HOPE_SHUTDOWN_TIMEOUT="0.3").greeted()
    [valkey] = children(server.pid)
    asked = endless_turn(endless)
    with (
        connect(f"ws{server.url[4:]}/v1/responses") as idle,
        connect(f"ws{server.url[4:]}/v1/responses") as busy,
        httpx2.Client(base_url=server.url, timeout=30) as http,
        http.stream("POST", "/v1/responses", json=asked) as stream,
    ):
        busy.send(json.dumps({"type": "response.create", **asked}))
        lines = stream.iter_lines()
        while "output_text.delta" not in next(lines):
            pass
        began = time.monotonic()
        server.process.send_signal(signal.SIGINT)

        last = [line for line in lines if line.startswith("data: ")][-1]
        assert json.loads(last[6:])["response"]["error"]["code"] == "draining"
        assert last_words(idle) == ([], 1012)
        told, code = last_words(busy)
        assert code == 1012
        assert told[-1]["response"]["error"]["code"] == "draining"

    assert server.ended() in QUIET_ENDS
    assert time.monotonic() - began < 5
    assert server.errors == ""
    assert is_gone(valkey)


def lease_of(redis, name):
    return redis.get(f"hope:{{local:{name}}}:l")


def test_a_server_that_is_told_to_stop_mid_turn_lets_go_of_the_session(serve, tmp_path):
    with EmbeddedValkey(tmp_path / "store") as valkey, Redis.from_url(valkey.url) as redis:
        store = ("--redis-url", valkey.url)
        ours = {"HOPE_SERVER_ID": "a", "HOPE_SHUTDOWN_TIMEOUT": "0.2"}
        server = serve(*store, **ours).greeted()
        Talk(server).turn(TURNS[0])
        version = Talk(server).settled()["version"]
        other = serve(*store, HOPE_SERVER_ID="b").greeted()
        for round in range(64):  # the tiny model ends some replies by itself
            with Talk(server).stream(f"tell me more {round}", most=4000) as events:
                for _ in range(6):
                    kind = next(events)["type"]
                if kind in TERMINAL:
                    continue
                assert lease_of(redis, "ada") == b"a"
                server.process.send_signal(signal.SIGTERM)
                last = next(e["response"] for e in events if e["type"] in TERMINAL)
            assert server.ended() in QUIET_ENDS
            if last["error"] is not None:
                break
            server = serve(*store, **ours).greeted()  # it had said all before it heard

        assert last["error"]["code"] == "draining"
        assert lease_of(redis, "ada") is None
        # what earlier turns are learned into may have come after, and is a version, too
        kept = Talk(other).version()
        assert kept >= last["memory"]["base_version"] >= version
        assert f"tell me more {round}" not in str(Talk(other).transcript())
        began = time.monotonic()
        taken = Talk(other).turn("who am I?")
        assert taken["memory"]["outcome"] == "committed"
        assert taken["memory"]["base_version"] == kept
        assert time.monotonic() - began < 5, "nobody waits for the lease of who let go"
        assert "Traceback" not in server.errors + other.errors


def test_a_server_waits_half_a_minute_for_its_turns_unless_told_otherwise():
    assert Settings.model_fields["shutdown_timeout"].default == 30


def test_turns_that_end_in_time_are_kept_at_shutdown(serve):
    server = serve("--store", "memory", HOPE_SHUTDOWN_TIMEOUT="20").greeted()
    with Talk(server).stream("hello", most=60) as events:
        next(events)
        server.process.send_signal(signal.SIGTERM)
        last = next(e["response"] for e in events if e["type"] in TERMINAL)

    assert last["memory"]["outcome"] == "committed"
    assert server.ended() in QUIET_ENDS
    assert "Traceback" not in server.errors


def test_asking_twice_ends_a_server_that_waits_for_its_turns(serve, endless):
    server = serve("--store", "memory", "--host", "::1", HOPE_SHUTDOWN_TIMEOUT="60").greeted()
    assert server.url.startswith("http://[::1]:")
    with (
        httpx2.Client(base_url=server.url, timeout=30) as http,
        http.stream("POST", "/v1/responses", json=endless_turn(endless)) as stream,
    ):
        lines = stream.iter_lines()
        next(lines)
        server.process.send_signal(signal.SIGINT)
        wait_until(lambda: http.get("/health/ready").status_code == 503)
        assert http.get("/health/ready").json()["status"] == "draining"
        server.process.send_signal(signal.SIGINT)
        assert "draining" in [line for line in lines if line][-1]

    assert server.ended(5) in QUIET_ENDS
    assert "Traceback" not in server.errors
