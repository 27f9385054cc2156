"""Replies: text as soon as it is certain, and never a stop string."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hope_runtime.reply import Reply
from hope_runtime.weights.random import byte_tokenizer

TOKENIZER = byte_tokenizer()  # one token is one byte: every border there can be


def say(text, *stops):
    """Push a text byte by byte until it stops; return what was shown at each, and at the end."""
    reply = Reply(TOKENIZER, stops)
    shown = []
    for token in text.encode():
        shown.append(reply.push(token))
        if reply.stopped:
            return shown, "", True
    return shown, reply.flush(), reply.stopped


def test_without_stop_strings_text_is_shown_at_once():
    assert say("hello") == (["h", "e", "l", "l", "o"], "", False)


def test_a_character_is_shown_with_its_last_byte():
    shown, rest, _ = say("é東🚀.")

    assert shown == ["", "é", "", "", "東", "", "", "", "🚀", "."]
    assert rest == ""


def test_half_a_character_at_the_end_is_given_as_a_replacement():
    reply = Reply(TOKENIZER, ())

    assert [reply.push(token) for token in "é".encode()[:1]] == [""]
    assert reply.flush() == "\ufffd"


def test_a_stop_string_across_tokens_ends_the_reply_and_is_not_shown():
    shown, rest, stopped = say("one END two", "END")

    assert stopped
    assert "".join(shown) + rest == "one "


def test_what_may_become_a_stop_string_is_held_back_until_it_cannot():
    shown, rest, stopped = say("a ENd b", "END")

    assert shown == ["a", " ", "", "", "ENd", " ", "b"]
    assert not stopped
    assert rest == ""


def test_what_is_held_back_at_the_end_is_released():
    shown, rest, stopped = say("the EN", "END")

    assert "".join(shown) == "the "
    assert rest == "EN"
    assert not stopped


def test_a_repeated_beginning_does_not_hide_the_stop_string():
    shown, _, stopped = say("aaab!", "aab")

    assert stopped
    assert "".join(shown) == "a"


def test_the_first_of_several_stop_strings_wins():
    shown, _, stopped = say("xbcd", "bcd", "bc")

    assert stopped
    assert "".join(shown) == "x"


def test_a_stop_string_of_many_bytes_is_found():
    shown, _, stopped = say("naïve 東京!", "東京")

    assert stopped
    assert "".join(shown) == "naïve "


def test_an_empty_stop_string_stops_nothing():
    assert say("ab", "") == (["a", "b"], "", False)


def test_markup_is_never_shown():
    reply = Reply(TOKENIZER, ())

    shown = [reply.push(token) for token in (104, 257, 105)]

    assert shown == ["h", "", "i"]


@given(st.text("abé東", max_size=30), st.lists(st.text("abé東", max_size=4), max_size=3))
def test_what_is_shown_is_the_text_before_its_first_stop_string(text, stops):
    """Found where it is complete first, and of those complete at once, where it begins first."""
    shown, rest, stopped = say(text, *stops)

    ends = [
        (at + len(stop), at)
        for stop in stops
        for at in range(len(text))
        if stop and text.startswith(stop, at)
    ]
    cut = min(ends)[1] if ends else len(text)
    assert "".join(shown) + rest == text[:cut]
    assert stopped == bool(ends)


@pytest.mark.parametrize("stop", ["END", "é", "aab"])
def test_nothing_is_held_back_longer_than_a_stop_string(stop):
    reply = Reply(TOKENIZER, (stop,))
    text, shown = "a" * 7 + "EN" * 5 + "x", 0
    for count, token in enumerate(text.encode(), 1):
        shown += len(reply.push(token))
        assert count - shown < len(stop)
