"""The protocol of one socket, without a socket."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from server.connection import MAX_STREAMS, Cancel, Connection, Send, Start


def create(**fields):
    return json.dumps({"type": "response.create", "input": "hello", **fields})


def cancel(**fields):
    return json.dumps({"type": "response.cancel", **fields})


def refusal(effects):
    [effect] = effects
    assert isinstance(effect, Send)
    assert effect.message.type == "error"
    return effect.message


@pytest.fixture
def connection():
    return Connection()


@pytest.fixture
def busy():
    """Two responses running, the second on a stream."""
    connection = Connection()
    connection.receive(create(), "r1")
    connection.receive(create(stream_id="left"), "r2")
    return connection


def test_a_create_starts_a_turn_under_the_id_it_is_given(connection):
    [effect] = connection.receive(create(input="how are you?"), "r1")

    assert isinstance(effect, Start)
    assert effect.response_id == "r1"
    assert effect.request.input == "how are you?"
    assert connection.running == ("r1",)


def test_responses_run_side_by_side_until_they_have_ended(busy):
    assert busy.running == ("r1", "r2")

    busy.ended("r1")

    assert busy.running == ("r2",)


def test_a_cancel_by_response_id_stops_that_response(busy):
    assert busy.receive(cancel(response_id="r2"), "r3") == [Cancel("r2")]


def test_a_cancel_by_stream_id_stops_what_runs_on_that_stream(busy):
    assert busy.receive(cancel(stream_id="left"), "r3") == [Cancel("r2")]


def test_a_cancel_that_names_nothing_stops_the_oldest_response(busy):
    assert busy.receive(cancel(), "r3") == [Cancel("r1")]

    busy.ended("r1")

    assert busy.receive(cancel(), "r3") == [Cancel("r2")]


@pytest.mark.parametrize(
    "fields",
    [
        pytest.param({"response_id": "r9"}, id="unknown response"),
        pytest.param({"stream_id": "right"}, id="unknown stream"),
        pytest.param({"response_id": "r1", "stream_id": "left"}, id="response of another stream"),
    ],
)
def test_cancelling_what_does_not_run_is_a_recoverable_error(busy, fields):
    error = refusal(busy.receive(cancel(event_id="e7", **fields), "r3"))

    assert (error.status, error.error.code, error.event_id) == (400, "invalid_request", "e7")
    assert busy.running == ("r1", "r2")


def test_cancelling_on_a_quiet_connection_is_a_recoverable_error(connection):
    assert refusal(connection.receive(cancel(), "r1")).error.code == "invalid_request"


@pytest.mark.parametrize(
    ("text", "code"),
    [
        pytest.param("{", "invalid_json", id="half an object"),
        pytest.param('"hello"', "invalid_json", id="a string"),
        pytest.param("[1]", "invalid_json", id="a list"),
        pytest.param("", "invalid_json", id="a binary frame, which has no text"),
        pytest.param('{"type": "response.create", "input": "\\ud800"}', "invalid_json", id="half"),
        pytest.param("{}", "unknown_event_type", id="no type"),
        pytest.param('{"type": 7}', "unknown_event_type", id="a number as type"),
        pytest.param('{"type": "session.update"}', "unknown_event_type", id="another protocol's"),
        pytest.param('{"type": "response.create"}', "invalid_request", id="no input"),
        pytest.param(create(temperature=9), "invalid_request", id="too hot"),
        pytest.param(create(memory={"mode": "sometimes"}), "invalid_request", id="unknown mode"),
        pytest.param(create(memory={"session": "s"}), "invalid_request", id="a slip of our own"),
        pytest.param(create(memory={"rates": {"user": -1}}), "invalid_request", id="negative rate"),
        pytest.param(create(stream_id="left"), "session_busy", id="a stream that is taken"),
    ],
)
def test_an_illegal_message_is_answered_and_changes_nothing(busy, text, code):
    assert refusal(busy.receive(text, "r3")).error.code == code

    assert busy.running == ("r1", "r2")
    assert busy.receive(cancel(stream_id="left"), "r4") == [Cancel("r2")]


def test_an_error_carries_the_ids_of_the_message_it_answers(connection):
    text = json.dumps({"type": "nonsense", "stream_id": "left", "event_id": "e1"})

    error = refusal(connection.receive(text, "r1"))

    assert (error.stream_id, error.event_id) == ("left", "e1")


def test_ids_that_are_not_strings_are_not_echoed(connection):
    error = refusal(connection.receive('{"type": "nonsense", "stream_id": 3}', "r1"))

    assert error.stream_id is None


def test_an_unknown_type_is_told_which_ones_are_known(connection):
    message = refusal(connection.receive('{"type": "ping"}', "r1")).error.message

    assert "'ping'" in message
    assert "response.cancel, response.create" in message


def test_a_complaint_names_the_field_and_what_was_sent(connection):
    error = refusal(connection.receive(create(temperature=9), "r1")).error

    assert error.param == "temperature"
    assert "got 9" in error.message


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"input": [{"role": "king", "content": "x"}]}, "input.0.role"),
        (
            {"input": [{"type": "function_call_output", "role": "user", "content": "x"}]},
            "input.0.type",
        ),
        (
            {"input": [{"role": "user", "content": [{"type": "input_image"}]}]},
            "input.0.content.0.type",
        ),
        ({"input": 7}, "input"),
        ({"conversation": {}}, "conversation.id"),
        ({"memory": {"rates": {"king": 1}}}, "memory.rates.king"),
    ],
)
def test_a_complaint_is_about_the_shape_that_was_meant(connection, fields, param):
    assert refusal(connection.receive(create(**fields), "r1")).error.param == param


@pytest.mark.parametrize(
    "fields",
    [
        {"stop": ["x"] * 17},
        {"stop": "x" * 257},
        {"metadata": {str(n): "x" for n in range(17)}},
        {"metadata": {"name": "x" * 513}},
        {"metadata": {"x" * 65: "name"}},
    ],
)
def test_what_is_looked_at_or_kept_again_and_again_has_a_limit(connection, fields):
    error = refusal(connection.receive(create(**fields), "r1")).error

    assert error.code == "invalid_request"
    assert "at most" in error.message


def test_a_stream_is_free_again_once_its_response_has_ended(busy):
    busy.ended("r2")

    assert isinstance(busy.receive(create(stream_id="left"), "r3")[0], Start)


def test_one_socket_carries_so_many_responses_and_no_more(connection):
    for number in range(MAX_STREAMS):
        connection.receive(create(stream_id=f"s{number}"), f"r{number}")

    error = refusal(connection.receive(create(stream_id="one more"), "r"))

    assert (error.status, error.error.code) == (429, "rate_limit_exceeded")
    assert len(connection.running) == MAX_STREAMS
    connection.ended("r0")
    assert isinstance(connection.receive(create(stream_id="one more"), "r")[0], Start)


def test_a_response_that_never_started_may_end_twice(connection):
    connection.ended("r1")
    connection.ended("r1")

    assert connection.running == ()


messages = st.one_of(
    st.builds(lambda stream: create(stream_id=stream), st.sampled_from([None, "a", "b"])),
    st.builds(
        lambda response, stream: cancel(response_id=response, stream_id=stream),
        st.sampled_from([None, "r0", "r1", "r2"]),
        st.sampled_from([None, "a", "b"]),
    ),
    st.text(max_size=5),
)


@given(st.lists(st.tuples(messages, st.booleans()), max_size=20))
def test_whatever_arrives_gets_one_answer_and_only_what_runs_is_cancelled(script):
    connection, running = Connection(), set()
    for number, (text, ends) in enumerate(script):
        match connection.receive(text, f"r{number}"):
            case [Start(response_id=started)]:
                running.add(started)
            case [Cancel(response_id=cancelled)]:
                assert cancelled in running
            case [Send(message=message)]:
                assert message.type == "error"
            case other:
                pytest.fail(f"{other} is not one answer")
        if ends and running:
            ended = min(running)
            running.discard(ended)
            connection.ended(ended)
        assert set(connection.running) == running


def test_a_slip_in_what_only_we_have_is_told_with_what_there_is(connection):
    error = refusal(connection.receive(create(memory={"session": "s"}), "r1")).error

    assert error.param == "memory"
    assert error.message.startswith("memory: no field 'session'; known: mode, if_version,")


def test_what_other_servers_are_sent_is_taken_and_ignored(connection):
    (effect,) = connection.receive(create(reasoning={"effort": "low"}), "r1")

    assert isinstance(effect, Start)
