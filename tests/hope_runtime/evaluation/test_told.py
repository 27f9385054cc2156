"""What `hope eval memory` asks with: words that training did not have."""

import re

from hope_runtime.evaluation.told import fresh_kinds
from hope_runtime.training.told import kinds


def plain(text):
    """Return a text without case and marks."""
    return re.sub(r"[^a-z0-9{}]+", " ", text.lower().replace("'", "")).strip()


def test_no_fresh_phrasing_stands_in_training():
    trained = {plain(text) for kind in kinds() for text in (*kind.tells, *kind.updates, *kind.asks)}
    fresh = [text for kind in fresh_kinds() for text in (*kind.tells, *kind.updates, *kind.asks)]
    assert len(fresh) > 480
    assert not trained & {plain(text) for text in fresh}


def test_every_fresh_kind_can_be_told_and_asked_for():
    every = fresh_kinds()
    assert len(every) == 119
    for kind in every:
        assert min(len(kind.tells), len(kind.asks), len(kind.values) - 1) > 0, kind.name
        assert all(text.count("{}") == 1 for text in (*kind.tells, *kind.updates)), kind.name
        assert not any("{" in text for text in kind.asks), kind.name
