"""What one response says on the wire, from what happens in its turn."""

import math

import pytest

from hope_runtime.consolidation import Consolidated
from hope_runtime.consolidation import Outcome as Applied
from server.errors import ApiError
from server.events import MEMORY, Narrator
from server.turn import Began, Ended, Grown, Kept, Words
from server.wire import MemoryResult, Outcome, ResponseRequest

OPENING = [
    "response.created",
    "response.in_progress",
    "response.output_item.added",
    "response.content_part.added",
]
CLOSING = [
    "response.output_text.done",
    "response.content_part.done",
    "response.output_item.done",
]
DELTA = "response.output_text.delta"


def narrator(**fields):
    request = ResponseRequest(input="hello", **fields)
    return Narrator(request, id="resp_1", model="random", created=1.0, conversation="s")


def result(outcome=Outcome.COMMITTED):
    return MemoryResult(
        conversation="s",
        base_version=1,
        committed_version=2 if outcome is Outcome.COMMITTED else None,
        outcome=outcome,
        durability="memory",
        updates=0,
        consolidated_levels=[],
        due_levels=[],
        surprise=None,
    )


def ended(status="completed", reason=None, error=None, outcome=Outcome.COMMITTED):
    return Ended(status, reason, 5, 3, 2, result(outcome), error)


def grown(outcome=Applied.APPLIED, loss=2.5):
    return Grown(Consolidated("fast", 0, 8, outcome, loss, 3, 0.01, 0.02), 0.25)


def tell(narrator, *happenings):
    told = narrator.begin()
    for happening in happenings:
        told += narrator.tell(happening)
    return told


def types(told):
    return [message.type for message in told]


def test_a_reply_is_told_in_the_order_of_the_responses_api():
    told = tell(narrator(), Began(1, "new"), Words("Good "), Words("day."), ended())

    assert types(told) == [*OPENING, DELTA, DELTA, *CLOSING, "response.completed"]


def test_sequence_numbers_count_up_from_zero_without_a_gap():
    told = tell(narrator(), Words("Good "), Words("day."), ended())

    assert [message.sequence_number for message in told] == list(range(len(told)))


def test_the_deltas_add_up_to_the_text_and_to_the_output():
    told = tell(narrator(), Words("Good "), Words("day."), ended())

    last = told[-1].response
    assert "".join(m.delta for m in told if m.type == DELTA) == "Good day."
    assert next(m for m in told if m.type == "response.output_text.done").text == "Good day."
    assert last.output[0].content[0].text == "Good day."
    assert last.output[0].status == last.status == "completed"


def test_every_part_belongs_to_the_same_item():
    told = tell(narrator(), Words("Good day."), ended())

    items = {m.item_id for m in told if hasattr(m, "item_id")}
    items |= {m.item.id for m in told if hasattr(m, "item")}
    assert items == {"msg_1"}


def test_the_terminal_event_counts_what_was_read_skipped_and_said():
    usage = tell(narrator(), Words("Good day."), ended())[-1].response.usage

    assert (usage.input_tokens, usage.output_tokens, usage.total_tokens) == (8, 2, 10)
    assert usage.input_tokens_details.cached_tokens == 3


def test_every_event_names_the_stream_it_was_asked_for_on():
    told = tell(narrator(stream_id="left"), Words("Good day."), ended())

    assert {message.stream_id for message in told} == {"left"}


def test_an_empty_reply_still_opens_and_closes_its_item():
    told = tell(narrator(), ended())

    assert types(told) == [*OPENING, *CLOSING, "response.completed"]
    assert told[-1].response.output[0].content[0].text == ""


@pytest.mark.parametrize("reason", ["cancelled", "max_output_tokens"])
def test_a_reply_that_was_cut_is_incomplete_and_says_why(reason):
    told = tell(narrator(), Words("Good"), ended("incomplete", reason))

    assert types(told) == [*OPENING, DELTA, *CLOSING, "response.incomplete"]
    assert told[-1].response.incomplete_details.reason == reason
    assert told[-1].response.output[0].status == "incomplete"


def test_a_failure_ends_the_response_without_an_output():
    error = ApiError(503, "store_full", "no room")
    failure = ended("failed", None, error, Outcome.ROLLED_BACK)

    told = tell(narrator(), Words("Good"), failure)

    assert types(told) == [*OPENING, DELTA, "response.failed"]
    assert told[-1].response.error.code == "store_full"
    assert told[-1].response.output == []
    assert told[-1].response.memory.outcome == "rolled_back"


def test_a_failure_before_the_first_word_opens_no_item():
    told = tell(narrator(), ended("failed", None, ApiError(409, "session_busy", "wait")))

    assert types(told) == ["response.created", "response.in_progress", "response.failed"]


def test_news_of_the_memory_is_told_only_to_those_who_asked():
    happenings = [grown(), Words("Good day."), Kept(2), ended(), grown(), Kept(3)]

    plain = types(tell(narrator(), *happenings))
    asked = types(tell(narrator(include=[MEMORY]), *happenings))

    assert not [kind for kind in plain if kind.startswith("hope:")]
    assert [kind for kind in asked if kind.startswith("hope:")] == [
        "hope:consolidation.completed",
        "hope:memory.committed",
        "hope:consolidation.completed",
        "hope:memory.committed",
    ]
    assert [kind for kind in asked if not kind.startswith("hope:")] == plain


def test_a_consolidation_is_told_with_its_level_place_and_time():
    [event] = narrator(include=[MEMORY]).tell(grown())

    assert (event.conversation, event.level, event.position) == ("s", "fast", 8)
    assert (event.loss, event.duration_ms, event.outcome) == (2.5, 250.0, "applied")


def test_a_rejected_consolidation_is_told_as_failed_without_an_unprintable_loss():
    [event] = narrator(include=[MEMORY]).tell(grown(Applied.REJECTED, math.nan))

    assert event.type == "hope:consolidation.failed"
    assert event.loss is None
    event.model_dump_json()


def test_without_a_session_there_is_no_news_of_a_memory():
    request = ResponseRequest(input="hello", include=[MEMORY])
    alone = Narrator(request, id="resp_1", model="random", created=1.0, conversation=None)

    assert alone.tell(Kept(1)) == []
    assert alone.begin()[0].response.conversation is None


def test_the_request_is_echoed_in_the_response():
    told = tell(
        narrator(instructions="Be brief.", metadata={"a": "b"}, temperature=0.5, top_p=0.9), ended()
    )

    for message in (told[0], told[-1]):
        response = message.response
        assert response.instructions == "Be brief."
        assert response.metadata == {"a": "b"}
        assert (response.temperature, response.top_p) == (0.5, 0.9)
