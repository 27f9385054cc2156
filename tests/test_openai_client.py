"""The unmodified `openai` client, over real sockets, against a real server."""

import uuid

import openai
import pytest
from openai import OpenAI
from websockets.exceptions import InvalidStatus

# the client opens its socket in a way that newer releases of websockets advise against
pytestmark = pytest.mark.filterwarnings("ignore:connect.. must be used:DeprecationWarning")

KEY = "acme-key-0123456789"
HELLO = [{"role": "user", "content": "hello"}]


def client_of(server, key="any"):
    return OpenAI(base_url=f"{server.url}/v1", api_key=key, max_retries=0)


@pytest.fixture
def client(server):
    with client_of(server) as client:
        yield client


@pytest.fixture
def name():
    return f"session-{uuid.uuid4().hex}"


# --- chat completions ---------------------------------------------------------------------------


def test_a_chat_completion_is_answered(client):
    completion = client.chat.completions.create(model="random", messages=HELLO, max_tokens=8)

    assert completion.choices[0].message.role == "assistant"
    assert completion.choices[0].finish_reason in ("length", "stop")
    assert completion.usage.completion_tokens <= 8
    assert completion.usage.total_tokens > completion.usage.prompt_tokens > 5


def test_the_same_seed_gives_the_same_completion(client):
    texts = [
        client.chat.completions.create(
            model="random", messages=HELLO, max_tokens=16, seed=seed, temperature=1.0
        )
        .choices[0]
        .message.content
        for seed in (1, 1, 2)
    ]

    assert texts[0] == texts[1] != texts[2]


def test_a_streamed_completion_adds_up_to_the_whole_one(client):
    asked = {"model": "random", "messages": HELLO, "max_tokens": 12, "temperature": 0}
    whole = client.chat.completions.create(**asked)

    with client.chat.completions.create(
        **asked, stream=True, stream_options={"include_usage": True}
    ) as stream:
        chunks = list(stream)

    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert text == whole.choices[0].message.content
    assert chunks[-1].usage == whole.usage
    assert chunks[-2].choices[0].finish_reason == whole.choices[0].finish_reason


def test_a_chat_with_a_session_header_is_remembered_turn_by_turn(client, server, name):
    header = {"x-session-id": name}
    messages = []
    for text in ("hello", "how are you?", "and now?"):
        messages.append({"role": "user", "content": text})
        reply = client.chat.completions.create(
            model="random", messages=messages, max_tokens=6, extra_headers=header
        )
        messages.append({"role": "assistant", "content": reply.choices[0].message.content})

    session = client.get(f"/sessions/{name}", cast_to=object)
    assert session["turns"] == 3
    items = client.conversations.items.list(name).data
    assert [item.content[0].text for item in items] == [m["content"] for m in messages]


# --- responses ----------------------------------------------------------------------------------


def test_a_response_is_answered_and_kept(client, name):
    response = client.responses.create(
        model="random", input="hello", max_output_tokens=8, conversation=name
    )

    assert response.status in ("completed", "incomplete")
    assert response.output_text == response.output[0].content[0].text
    assert response.conversation.id == name
    assert response.usage.output_tokens <= 8
    assert response.memory["outcome"] == "committed"


def test_a_streamed_response_is_typed_event_by_event(client, name):
    with client.responses.create(
        model="random", input="hello", max_output_tokens=8, conversation=name, stream=True
    ) as stream:
        events = list(stream)

    deltas = [event.delta for event in events if event.type == "response.output_text.delta"]
    assert events[0].type == "response.created"
    assert events[-1].type in ("response.completed", "response.incomplete")
    assert events[-1].response.output_text == "".join(deltas)
    assert [event.sequence_number for event in events] == list(range(len(events)))


def test_the_stream_helper_of_the_client_puts_the_response_together(client):
    asked = {"model": "random", "input": "hello", "max_output_tokens": 4000, "temperature": 1.0}
    with client.responses.stream(**asked, extra_body={"seed": 1}) as stream:
        text = "".join(e.delta for e in stream if e.type == "response.output_text.delta")
        final = stream.get_final_response()

    assert final.status == "completed"
    assert final.output_text == text != ""


def test_responses_over_a_socket_go_on_in_their_conversation(client, name):
    with client.responses.connect() as connection:
        versions = []
        for text in ("hello", "how are you?"):
            connection.response.create(
                model="random", input=text, max_output_tokens=6, conversation=name
            )
            for event in connection:
                if event.type in ("response.completed", "response.incomplete"):
                    versions.append(event.response.memory["committed_version"])
                    break
                assert event.type != "error"

    assert versions == sorted(set(versions))
    assert client.get(f"/sessions/{name}", cast_to=object)["turns"] == 2


def test_an_error_on_the_socket_leaves_it_usable(client):
    with client.responses.connect() as connection:
        connection.response.create(model="gpt-9", input="hello")
        error = connection.recv()
        connection.response.create(model="random", input="hello", max_output_tokens=2)
        after = connection.recv()

    assert (error.type, error.error.code) == ("error", "model_not_found")
    assert after.type == "response.created"


# --- conversations and models -------------------------------------------------------------------


def test_a_conversation_is_created_used_and_deleted(client):
    made = client.conversations.create(metadata={"name": "Ada"})
    client.responses.create(
        model="random", input="hello", max_output_tokens=4, conversation=made.id
    )

    assert client.conversations.retrieve(made.id).metadata == {"name": "Ada"}
    roles = [item.role for item in client.conversations.items.list(made.id)]
    assert roles == ["user", "assistant"]
    assert client.conversations.delete(made.id).deleted
    with pytest.raises(openai.APIStatusError) as gone:
        client.conversations.retrieve(made.id)
    assert gone.value.status_code == 410


def test_models_are_listed(client):
    [model] = client.models.list().data

    assert model.id == "random"
    assert client.models.retrieve("random").id == "random"


# --- errors -------------------------------------------------------------------------------------


def test_an_unknown_model_is_not_found(client):
    with pytest.raises(openai.NotFoundError) as error:
        client.chat.completions.create(model="gpt-9", messages=HELLO)

    assert (error.value.code, error.value.param) == ("model_not_found", "model")


def test_an_unknown_conversation_is_not_found(client):
    with pytest.raises(openai.NotFoundError, match="there is no session"):
        client.conversations.retrieve("never-seen")


def test_a_request_that_cannot_be_is_a_bad_request(client):
    with pytest.raises(openai.BadRequestError) as error:
        client.responses.create(model="random", input=" ")

    assert error.value.code == "invalid_request"


def test_an_edited_history_is_a_conflict(client, name):
    header = {"x-session-id": name}
    client.chat.completions.create(
        model="random", messages=HELLO, max_tokens=2, extra_headers=header
    )
    edited = [*HELLO, {"role": "assistant", "content": "never said"}, *HELLO]

    with pytest.raises(openai.ConflictError) as error:
        client.chat.completions.create(model="random", messages=edited, extra_headers=header)
    assert error.value.code == "history_diverged"


def test_a_stream_that_fails_raises_in_the_client(client, name):
    stream = client.chat.completions.create(
        model="random",
        messages=HELLO,
        stream=True,
        extra_headers={"x-session-id": name},
        extra_body={"memory": {"if_version": 7}},
    )

    with stream, pytest.raises(openai.APIError, match="version 0, not 7"):
        list(stream)


def test_a_server_with_keys_lets_in_only_those_who_have_one(serve):
    server = serve("--store", "memory", HOPE_API_KEYS=f"acme:{KEY}").greeted()

    with client_of(server, "wrong-key-0123456789") as stranger:
        with pytest.raises(openai.AuthenticationError):
            stranger.models.list()
        with pytest.raises(InvalidStatus, match="401"), stranger.responses.connect():
            pass
    with client_of(server, KEY) as acme:
        assert acme.models.list().data[0].id == "random"
        with acme.responses.connect() as connection:
            connection.response.create(model="random", input="hello", max_output_tokens=2)
            assert connection.recv().type == "response.created"
