"""The `hope` command, as a person types it."""

import os
import re
import signal
import socket
import subprocess
import sys

import pytest
import torch
from typer.testing import CliRunner

from server.cli import app
from server.settings import Settings

WIDE = {"COLUMNS": "200", "TERM": "dumb"}
FLAGS = (
    "--model --host --port --device --dtype --window --sinks --learning --no-learning --lanes "
    "--threads --store --redis-url --data-dir --allow-eviction --verbose"
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
        ((), ("serve", "keys", "models")),
        (("serve",), (*FLAGS.split(), "HOPE_*")),
        (("keys",), ("HOPE_API_KEYS", "[tenant]", "who the key is for")),
        (("models",), ("[model]", "smollm2")),
    ],
    ids=["hope", "serve", "keys", "models"],
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
