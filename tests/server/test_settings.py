"""Settings: where they come from, and what is said of those that cannot be served."""

from pathlib import Path

import pytest
from pydantic import ValidationError

from server.commands.terminal import Refusal, settings_from
from server.settings import Settings

KEY = "0123456789abcdef"


def complaint(**flags):
    with pytest.raises(Refusal) as caught:
        settings_from(**flags)
    message = str(caught.value)
    assert "\n" not in message
    return message


def test_the_defaults_serve_loopback_from_an_embedded_store():
    settings = Settings()

    assert (settings.host, settings.port) == ("127.0.0.1", 8000)
    assert settings.store == "embedded"
    assert settings.api_keys == ()
    assert settings.learning


def test_every_setting_says_what_it_is():
    assert [name for name, field in Settings.model_fields.items() if not field.description] == []


def test_the_environment_is_read(monkeypatch):
    monkeypatch.setenv("HOPE_PORT", "9001")
    monkeypatch.setenv("HOPE_LEARNING", "false")
    monkeypatch.setenv("HOPE_DATA_DIR", "/srv/hope")
    monkeypatch.setenv("HOPE_API_KEYS", f" acme:{KEY}, other:{KEY}x ,")
    monkeypatch.setenv("HOPE_ORIGINS", "https://a.example,https://b.example")
    monkeypatch.setenv("HOPE_SESSION_HEADERS", "x-one,x-two")

    settings = Settings()

    assert (settings.port, settings.learning) == (9001, False)
    assert settings.data_dir == Path("/srv/hope")
    assert settings.api_keys == (f"acme:{KEY}", f"other:{KEY}x")
    assert settings.origins == ("https://a.example", "https://b.example")
    assert settings.session_headers == ("x-one", "x-two")


def test_a_flag_goes_before_the_environment(monkeypatch):
    monkeypatch.setenv("HOPE_PORT", "9001")

    assert settings_from(port=9002).port == 9002


def test_variables_of_other_programs_are_left_alone(monkeypatch):
    monkeypatch.setenv("PORT", "1")
    monkeypatch.setenv("HOPE_NO_SUCH_THING", "1")

    assert Settings().port == 8000


def test_the_data_directory_follows_xdg(monkeypatch):
    monkeypatch.setenv("XDG_DATA_HOME", "/data")

    assert Settings().data_dir == Path("/data/hope")


@pytest.mark.parametrize("host", ["127.0.0.1", "127.8.8.8", "::1", "localhost"])
def test_loopback_needs_no_key(host):
    assert Settings(host=host).api_keys == ()


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "10.0.0.5", "example.org", "localhost.evil.org"])
def test_any_other_address_needs_one(host):
    message = complaint(host=host)

    assert f"--host {host}" in message
    assert "HOPE_API_KEYS" in message
    assert Settings(host=host, api_keys=(f"acme:{KEY}",)).host == host


def test_an_address_of_a_redis_chooses_it():
    assert Settings(redis_url="redis://127.0.0.1:6379/0").store == "redis"
    assert Settings(redis_url="redis://127.0.0.1:6379/0", store="memory").store == "memory"


def test_redis_without_an_address_is_refused():
    assert "--redis-url" in complaint(store="redis")


@pytest.mark.parametrize(
    ("entry", "says"),
    [
        pytest.param(f"acme:{KEY[:-1]}", "'acme' has 15 characters", id="too short"),
        pytest.param("acme:", "'acme' has 0 characters", id="empty"),
        pytest.param(f"my team:{KEY}", "'my team'", id="a tenant that cannot be one"),
        pytest.param(f":{KEY}", "''", id="no tenant"),
        pytest.param(KEY, "names no tenant", id="no colon"),
    ],
)
def test_a_bad_key_is_refused_without_being_repeated(entry, says):
    message = complaint(api_keys=(entry,))

    assert says in message
    assert KEY[:-1] not in message


def test_a_key_may_hold_colons():
    assert Settings(api_keys=(f"acme:{KEY}:more",)).api_keys == (f"acme:{KEY}:more",)


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        ({"port": 70000}, "--port 70000"),
        ({"port": "many"}, "--port 'many'"),
        ({"lanes": 0}, "--lanes 0"),
        ({"window": 3}, "--window 3"),
        ({"device": "tpu"}, "--device 'tpu'"),
        ({"dtype": "int4"}, "--dtype 'int4'"),
        ({"store": "disk"}, "--store 'disk'"),
    ],
)
def test_a_flag_that_cannot_be_is_named_with_its_value(flags, says):
    assert says in complaint(**flags)


@pytest.mark.parametrize(
    ("name", "value", "says"),
    [
        ("HOPE_PORT", "many", "HOPE_PORT 'many'"),
        ("HOPE_SHUTDOWN_TIMEOUT", "-1", "HOPE_SHUTDOWN_TIMEOUT '-1'"),
        ("HOPE_TEMPERATURE", "9", "HOPE_TEMPERATURE '9'"),
        ("HOPE_MAX_BODY_BYTES", "1", "HOPE_MAX_BODY_BYTES '1'"),
    ],
)
def test_a_variable_that_cannot_be_is_named_with_its_value(monkeypatch, name, value, says):
    monkeypatch.setenv(name, value)

    assert says in complaint()


def test_settings_are_checked_however_they_are_made():
    with pytest.raises(ValidationError, match="not loopback"):
        Settings(host="0.0.0.0")
