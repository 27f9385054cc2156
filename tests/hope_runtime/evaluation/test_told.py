"""What `hope eval memory` asks with: words that training did not have."""

import re

import pytest

from hope_runtime.evaluation.told import BLIND, Part, blind_kinds
from hope_runtime.training.told import kinds


def plain(text):
    """Return a text without case and marks."""
    return re.sub(r"[^a-z0-9{}]+", " ", text.lower().replace("'", "")).strip()


@pytest.mark.parametrize("part", BLIND)
def test_no_blind_phrasing_stands_in_training(part):
    trained = {plain(text) for kind in kinds() for text in (*kind.tells, *kind.updates, *kind.asks)}
    blind = [
        text for kind in blind_kinds(part) for text in (*kind.tells, *kind.updates, *kind.asks)
    ]
    assert len(blind) > 400
    assert not trained & {plain(text) for text in blind}


@pytest.mark.parametrize(("part", "count"), [(Part.FRESH, 116), (Part.ROUNDABOUT, 90)])
def test_every_blind_kind_can_be_told_and_asked_for(part, count):
    every = blind_kinds(part)
    assert len(every) == count
    for kind in every:
        assert min(len(kind.tells), len(kind.asks), len(kind.values) - 1) > 0, kind.name
        assert all(text.count("{}") == 1 for text in (*kind.tells, *kind.updates)), kind.name
        assert not any("{" in text for text in kind.asks), kind.name
