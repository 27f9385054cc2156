"""All contenders have one size, and are what their names say."""

from __future__ import annotations

import pytest

from hope_runtime.config import Form
from hope_runtime.evaluation import contenders
from hope_runtime.evaluation.contenders import ABOUT, contender, weights


@pytest.mark.parametrize("vocabulary", [6, 135, 256])
def test_all_contenders_have_nearly_as_many_weights(vocabulary):
    sizes = [weights(contender(name, vocabulary)) for name in ABOUT]

    assert max(sizes) < 1.02 * min(sizes)
    assert 100_000 < min(sizes) < 250_000


def test_every_contender_may_be_served():
    assert not [name for name, memory in contenders.MEMORIES.items() if memory.rule.unsafe]


def test_each_contender_is_what_its_name_says():
    assert contender("titans", 8).memory.form is Form.TITANS
    assert not contender("delta", 8).memory.rule.modifies
    assert contender("frozen", 8).memory.rule.rate_max == 0.0
    assert contender("transformer", 8).memory_blocks == ()
    assert contender("hope", 8).attention_blocks == ()
