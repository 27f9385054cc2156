"""A reply from memory: how it begins, where a space belongs, and where it ends."""

from dataclasses import replace

import pytest

from hope_runtime.config import RecallConfig
from hope_runtime.draft import LONGEST, Draft

CONFIG = replace(RecallConfig((0, 1)), ends=4.0, digits=8.0, knows=0.3)


def encode(text):
    return [ord(letter) for letter in text]


@pytest.fixture
def draft():
    known = Draft(CONFIG, 0.9, encode)
    known.fixed.clear()  # the opening was said
    return known


def test_a_number_gets_the_space_that_its_digits_do_not_have(draft):
    draft.see(9.0, "It's", "4")
    assert list(draft.fixed) == encode(" ")
    draft.fixed.clear()
    draft.see(9.0, "", "4")  # some tokenizers say a space alone as nothing
    draft.see(9.0, "4", "2")  # clearly so
    assert not draft.fixed
    assert not draft.over


def test_a_word_that_brings_its_space_gets_no_other(draft):
    draft.see(9.0, "It's", " Rex")
    assert not draft.fixed


def test_a_reply_ends_where_a_stop_is_as_likely_but_says_something_first(draft):
    draft.see(1.0, "It's", " Rex")
    assert not draft.fixed
    draft.see(1.0, " Rex", " Bella")
    assert list(draft.fixed) == encode(".")
    assert not draft.over
    draft.fixed.clear()
    assert draft.over


def test_a_number_goes_on_only_where_that_is_clear(draft):
    """Any digit looks a little like the next one of a number that has ended."""
    draft.see(9.0, "It's", "4")
    draft.fixed.clear()
    draft.see(9.0, "", "4")
    draft.see(6.0, "4", "2")
    assert list(draft.fixed) == encode(".")


def test_what_ends_with_a_stop_gets_no_other(draft):
    draft.see(9.0, "It's", " Dr")
    draft.see(1.0, " Dr.", " Who")
    assert draft.over


def test_what_goes_round_in_a_circle_ends(draft):
    for _ in range(LONGEST):
        draft.see(9.0, " Rex", " Rex")
        assert not draft.fixed
    draft.see(9.0, " Rex", " Rex")
    assert list(draft.fixed) == encode(".")
