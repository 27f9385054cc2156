"""The `hope` command, as a person types it."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
from pathlib import Path

import httpx2
import pytest
import torch
from typer.testing import CliRunner

from server.cli import app
from server.settings import Settings

WIDE = {"COLUMNS": "200", "TERM": "dumb"}
FLAGS = (
    "--model --host --port --device --dtype --window --sinks --learning --no-learning --lanes "
    "--threads --store --redis-url --data-dir --allow-eviction --storage --keyring --wait --verbose"
)


@pytest.fixture
def typed(monkeypatch):
    """Run a command in this process: most of what it says needs no process of its own."""
    for name in os.environ:
        if name.startswith("HOPE_"):
            monkeypatch.delenv(name)
    kept = signal.getsignal(signal.SIGTERM)
    yield lambda *args, **env: CliRunner().invoke(app, args, env=env)
    signal.signal(signal.SIGTERM, kept)


def sentence(done, *parts):
    """Check that a command was refused with one sentence that holds these parts."""
    assert done.stdout == ""
    lines = [line for line in done.stderr.splitlines() if "nothing will last" not in line]
    assert len(lines) == 1, done.stderr
    assert lines[0].startswith("hope: ")
    for part in parts:
        assert part in lines[0]


@pytest.mark.parametrize(
    ("args", "parts"),
    [
        ((), ("serve", "keys", "models", "keyring")),
        (("serve",), (*FLAGS.split(), "HOPE_*")),
        (("keys",), ("HOPE_API_KEYS", "[tenant]", "who the key is for")),
        (("models",), ("[model]", "smollm2")),
        (("keyring",), ("new", "show", "forget", "reseal")),
        (("keyring", "new"), ("[tenant]", "--keyring")),
        (("keyring", "forget"), ("tenant", "--key", "--yes")),
        (("keyring", "reseal"), ("--redis-url", "--data-dir", "Redis meanwhile")),
    ],
    ids=["hope", "serve", "keys", "models", "keyring", "new", "forget", "reseal"],
)
def test_every_command_explains_itself(typed, args, parts):
    done = typed(*args, "--help", **WIDE)

    assert (done.exit_code, done.stderr) == (0, "")
    for part in parts:
        assert part in done.stdout


def test_help_says_of_each_flag_what_the_setting_says(typed):
    text = re.sub(r"[\s│|]+", " ", typed("serve", "--help", **WIDE).stdout)

    for flag in FLAGS.split():
        name = flag.removeprefix("--").replace("-", "_")
        if name in Settings.model_fields:
            description = Settings.model_fields[name].description
            assert re.sub(r"\s+", " ", description)[:40] in text, flag


def test_hope_alone_shows_what_there_is(hope):
    done = hope(**WIDE)

    assert done.returncode == 2
    assert "serve" in done.stdout + done.stderr


def test_help_does_not_wait_for_torch():
    code = "import sys, server.cli; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)

    assert done.stdout == "False\n"


def test_the_module_is_the_same_command():
    done = subprocess.run(
        [sys.executable, "-m", "server", "keys", "acme"], capture_output=True, text=True
    )

    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("acme:")


def test_a_key_is_made_that_the_server_takes_and_never_twice(typed):
    first, second = (typed("keys", "acme").stdout.strip() for _ in range(2))

    assert first != second
    assert Settings(host="0.0.0.0", api_keys=(first, second)).api_keys == (first, second)
    assert len(first.removeprefix("acme:")) >= 40


def test_a_key_is_for_default_unless_somebody_is_named(typed):
    assert typed("keys").stdout.startswith("default:")


@pytest.mark.parametrize("tenant", ["my team", "a:b", ""])
def test_a_tenant_that_the_server_would_not_take_gets_no_key(typed, tenant):
    done = typed("keys", tenant)

    assert done.exit_code == 1
    sentence(done, f"tenant {tenant!r}")


def test_a_model_is_shown_as_it_would_be_served(typed):
    done = typed("models", "random")

    assert (done.exit_code, done.stderr) == (0, "")
    first, shape, window, *levels = done.stdout.splitlines()
    assert re.fullmatch(r"random  \S+", first)
    assert shape == "4 blocks of width 32, vocabulary 259"
    assert window.startswith("window 1024 tokens, 4 sinks; ")
    assert levels == [
        "level fast: every 8 tokens, MLPs 3 to 3",
        "level slow: every 16 tokens, MLPs 2 to 2",
    ]


def test_a_model_that_remembers_is_shown_without_a_window(typed):
    done = typed("models", "random-native")

    assert (done.exit_code, done.stderr) == (0, "")
    first, shape, mixers, *levels = done.stdout.splitlines()
    assert re.fullmatch(r"random-native  \S+", first)
    assert shape == "2 blocks of width 32, vocabulary 259"
    assert mixers.startswith("memory of 2 heads of 16 x 16 in 2 blocks, chunk 4; ")
    assert levels == [
        "level fast: every 8 tokens, MLP 1 of blocks 0 to 1",
        "level slow: every 16 tokens, MLP 2 of blocks 0 to 1",
    ]


def test_a_model_that_is_not_there_is_told_in_one_sentence(typed):
    done = typed("models", "/no/such/model")

    assert done.exit_code == 1
    sentence(done, "/no/such/model")


# --- servers that cannot start ------------------------------------------------------------------


def test_a_process_that_cannot_serve_says_one_sentence_and_ends_with_one(hope):
    redis = "redis://:secret@127.0.0.1:1/0"
    done = hope("serve", "--model", "random", "--port", "0", "--redis-url", redis)

    assert done.returncode == 1
    sentence(done, "127.0.0.1:1")
    assert "secret" not in done.stderr


def test_a_port_that_is_taken_is_told_at_once(typed):
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        port = str(listener.getsockname()[1])

        done = typed("serve", "--model", "random", "--store", "memory", "--port", port)

    assert done.exit_code == 1
    sentence(done, f"127.0.0.1:{port}", "already in use", "--port")


def test_a_data_directory_has_one_server(typed, serve, tmp_path):
    data = str(tmp_path / "data")
    server = serve("--data-dir", data).greeted()

    done = typed("serve", "--model", "random", "--data-dir", data, "--port", "0")

    assert done.exit_code == 1
    sentence(done, data, f"process {server.pid}", "--data-dir")


@pytest.mark.parametrize(
    ("args", "env", "parts"),
    [
        pytest.param(
            ("--redis-url", "http://:secret@x"), {}, ("--redis-url", "redis://"), id="no redis url"
        ),
        pytest.param(
            ("--redis-url", "redis://:secret@127.0.0.1:1/0"),
            {},
            ("127.0.0.1:1", "start it", "--redis-url"),
            id="no redis there",
        ),
        pytest.param(("--store", "redis"), {}, ("--redis-url",), id="redis without an address"),
        pytest.param(
            ("--data-dir", "/dev/null/here"), {}, ("/dev/null/here",), id="no place for data"
        ),
        pytest.param(
            ("--store", "memory", "--host", "0.0.0.0"),
            {},
            ("--host 0.0.0.0", "HOPE_API_KEYS"),
            id="open to the world",
        ),
        pytest.param(
            ("--store", "memory", "--host", "no.such.invalid"),
            {"HOPE_API_KEYS": "acme:0123456789abcdef"},
            ("no.such.invalid", "--host"),
            id="no such host",
        ),
        pytest.param(
            ("--store", "memory", "--host", "192.0.2.1"),
            {"HOPE_API_KEYS": "acme:0123456789abcdef"},
            ("192.0.2.1", "--host"),
            id="not an address of ours",
        ),
        pytest.param(
            ("--store", "memory"),
            {"HOPE_API_KEYS": "acme:short"},
            ("'acme'", "16"),
            id="a short key",
        ),
        pytest.param(
            ("--store", "memory", "--model", "/no/such/model"),
            {},
            ("/no/such/model",),
            id="no such model",
        ),
        pytest.param(
            ("--store", "memory"),
            {"HOPE_WAIT": "durable"},
            ("--wait durable", "durability memory", "WAITAOF"),
            id="durable on a store that cannot be",
        ),
        pytest.param(
            ("--store", "memory", "--storage", "slow=int7"), {}, ("--storage", "int7"), id="storage"
        ),
        pytest.param(
            ("--keyring", "/no/such/ring"), {}, ("/no/such/ring", "cannot be read"), id="no keyring"
        ),
        pytest.param(("--store", "memory", "--port", "99999"), {}, ("--port 99999",), id="port"),
        pytest.param(
            ("--store", "memory"),
            {"HOPE_LOG_LEVEL": "loud"},
            ("HOPE_LOG_LEVEL 'LOUD'", "INFO"),
            id="no such level",
        ),
    ],
)
def test_what_cannot_be_served_is_told_in_one_sentence(typed, args, env, parts):
    done = typed("serve", "--model", "random", "--port", "0", *args, **env)

    assert done.exit_code == 1
    sentence(done, *parts)
    assert "secret" not in done.stderr


# --- keys that seal -----------------------------------------------------------------------------


def sealed_by(typed, ring):
    """Return the current key of each tenant, as it is shown."""
    lines = typed("keyring", "show", "--keyring", ring).stdout.splitlines()
    return dict(line.split(": current ") for line in lines)


def test_a_key_is_made_shown_rotated_and_forgotten(typed, tmp_path):
    ring = str(tmp_path / "kept" / "ring.json")

    made = typed("keyring", "new", "--keyring", ring)
    first = sealed_by(typed, ring)["local"]
    typed("keyring", "new", "acme", HOPE_KEYRING=ring)
    typed("keyring", "new", "local", "--keyring", ring)

    assert (made.exit_code, made.stderr) == (0, "")
    assert f"key {first} of {ring}" in made.stdout
    assert os.stat(ring).st_mode & 0o777 == 0o600
    second = sealed_by(typed, ring)
    assert second.keys() == {"acme", "local"}
    assert second["local"] != first
    content = json.loads(Path(ring).read_text())
    for key in content["local"]["keys"].values():
        assert key not in made.stdout + str(second)
    forget = ("keyring", "forget", "local", "--yes", "--key")
    current = typed(*forget, second["local"], HOPE_KEYRING=ring)
    assert current.exit_code == 1
    sentence(current, second["local"])
    gone = typed(*forget, first, "--keyring", ring)
    assert (gone.exit_code, gone.stderr) == (0, "")
    assert list(json.loads(Path(ring).read_text())["local"]["keys"]) == [second["local"]]
    typed("keyring", "forget", "acme", "--yes", "--keyring", ring)
    assert sealed_by(typed, ring).keys() == {"local"}


def test_keys_are_not_forgotten_by_mistake(typed, tmp_path):
    ring = str(tmp_path / "ring.json")
    typed("keyring", "new", "--keyring", ring)
    before = Path(ring).read_bytes()

    asked = typed("keyring", "forget", "local", "--keyring", ring)
    unknown = typed("keyring", "forget", "nobody", "--yes", "--keyring", ring)

    assert (asked.exit_code, unknown.exit_code) == (1, 1)
    sentence(unknown, "nobody")
    assert Path(ring).read_bytes() == before


@pytest.mark.parametrize(
    ("args", "parts"),
    [
        pytest.param(("show",), ("which keyring", "--keyring", "HOPE_KEYRING"), id="no file named"),
        pytest.param(("show", "--keyring", "/no/ring"), ("/no/ring",), id="no such file"),
        pytest.param(
            ("forget", "local", "--yes", "--keyring", "/no/ring"), ("/no/ring",), id="nothing there"
        ),
        pytest.param(
            ("new", "--keyring", "/dev/null/ring"), ("/dev/null/ring", "written"), id="no place"
        ),
        pytest.param(("new", "my team", "--keyring", "/tmp/none"), ("'my team'",), id="no tenant"),
        pytest.param(
            ("reseal", "--redis-url", "http://:secret@x"), ("--redis-url", "redis://"), id="no url"
        ),
        pytest.param(
            ("reseal", "--redis-url", "redis://:secret@127.0.0.1:1/0"), ("127.0.0.1:1",), id="gone"
        ),
        pytest.param(("reseal", "nobody"), ("'nobody'", "no key"), id="a stranger"),
    ],
)
def test_what_cannot_be_done_with_keys_is_told_in_one_sentence(typed, tmp_path, args, parts):
    ring = str(tmp_path / "ring.json")
    typed("keyring", "new", "--keyring", ring)
    named = "reseal" in args

    done = typed("keyring", *args, **({"HOPE_KEYRING": ring} if named else {}))

    assert done.exit_code == 1
    sentence(done, *parts)
    assert "secret" not in done.stderr


def test_a_tenant_without_a_key_is_refused_at_the_start(typed, tmp_path):
    ring = str(tmp_path / "ring.json")
    typed("keyring", "new", "acme", "--keyring", ring)

    done = typed(
        *("serve", "--model", "random", "--port", "0", "--data-dir", str(tmp_path / "data")),
        HOPE_KEYRING=ring,
        HOPE_API_KEYS="acme:0123456789abcdef,eve:0123456789abcdeg",
    )

    assert done.exit_code == 1
    sentence(done, "'eve'", "hope keyring new eve")


def talk(server, text, session="ada", **memory):
    body = {"input": text, "conversation": session, "max_output_tokens": 8, "memory": memory}
    return httpx2.post(f"{server.url}/v1/responses", json=body, timeout=30)


def probe(server, session="ada"):
    answer = talk(server, "who am I?", session, mode="read_only")
    return answer.json()["output"][0]["content"][0]["text"]


def at_rest(data):
    """Return all the bytes that a data directory holds."""
    return b"".join(file.read_bytes() for file in data.rglob("*") if file.is_file())


def test_sealed_sessions_are_opened_by_their_keys_and_by_nothing_else(typed, serve, tmp_path):
    data, ring = tmp_path / "data", str(tmp_path / "ring.json")
    words = "the password is hunter2 hunter2"
    typed("keyring", "new", "--keyring", ring)
    first = sealed_by(typed, ring)["local"]
    options = ("--data-dir", str(data), "--keyring", ring)
    server = serve(*options, HOPE_TEMPERATURE="0").greeted()
    assert "sealed" in server.output
    for session in ("ada", "eve"):
        talk(server, words, session)
    known = {session: probe(server, session) for session in ("ada", "eve")}
    server.stop()
    assert b"hunter2" not in at_rest(data)
    assert b"hope:{local:ada}" in at_rest(data), "ids of sessions are no secret of the store"

    typed("keyring", "new", "--keyring", ring)
    second = sealed_by(typed, ring)["local"]
    done = typed("keyring", "reseal", "--keyring", ring, "--data-dir", str(data))
    again = typed("keyring", "reseal", "--keyring", ring, "--data-dir", str(data))
    forgotten = typed("keyring", "forget", "local", "--key", first, "--yes", "--keyring", ring)

    assert (done.exit_code, done.stderr.strip()) == (0, "")
    assert re.search(rf"local: 2 sessions, [1-9]\d* values sealed with {second}", done.stdout)
    assert re.search(r"local: 2 sessions, 0 values", again.stdout)
    assert forgotten.exit_code == 0
    server = serve(*options, HOPE_TEMPERATURE="0").greeted()
    for session in ("ada", "eve"):
        assert probe(server, session) == known[session]
        assert talk(server, "it rains", session).json()["memory"]["base_version"] > 0
    server.stop()

    typed("keyring", "forget", "local", "--yes", "--keyring", ring)
    typed("keyring", "new", "--keyring", ring)
    server = serve(*options).greeted()
    for mode in ("read_write", "read_only"):
        answer = talk(server, "who am I?", mode=mode)
        assert answer.status_code == 500
        assert answer.json()["error"]["code"] == "memory_sealed"
    assert talk(server, "hello", "new").json()["memory"]["outcome"] == "committed"
    assert server.stop() in (0, 130)
    assert "Traceback" not in server.errors


@pytest.mark.skipif(torch.cuda.is_available(), reason="here it could be served")
def test_a_device_that_is_not_there_is_told_with_one_that_is(typed):
    done = typed("serve", "--model", "random", "--store", "memory", "--device", "cuda")

    assert done.exit_code == 1
    sentence(done, "--device cuda", "--device cpu")


@pytest.mark.parametrize(
    "content",
    [b"", b"GGUF", b"GGUF\x03\x00\x00\x00" + b"\xff" * 64, b"not a model at all"],
    ids=["empty", "four bytes", "endless tables", "text"],
)
def test_a_broken_model_file_is_told_by_name(typed, tmp_path, content):
    file = tmp_path / "broken.gguf"
    file.write_bytes(content)

    done = typed("serve", "--model", str(file), "--store", "memory", "--port", "0")

    assert done.exit_code == 1
    sentence(done, "broken.gguf")
