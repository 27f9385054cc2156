"""A server that dies at any step of a turn keeps what it acknowledged, and nothing by halves."""

from collections import Counter
from itertools import count

import pytest

from tests.faults.death import PHASES, DieAt
from tests.faults.oracle import Fate, Violation, Witness

BEFORE, TEXT = "my name is Ada", "it rains in the hills"
SOME = 12  # sessions that are begun at a time


def fresh(zygote, store, twins, label):
    """Yield sessions that nobody has heard of."""
    for number in count():
        yield Witness(f"{label}-{number}", twins, store)


def begun(zygote, store, twins, label):
    """Yield sessions with a turn behind them, resident nowhere."""
    sessions = fresh(zygote, store, twins, label)
    while True:
        some = [next(sessions) for _ in range(SOME)]
        server = zygote.spawn(store)
        for witness in some:
            assert witness.say(server.url, BEFORE).fate is Fate.COMMITTED
        assert server.turn_over(SOME)
        server.terminate()
        server.wait()
        yield from some


# what a store holds after the death of a new session's server, `half` and `sent` tell already
@pytest.mark.parametrize(
    ("sessions", "phase"),
    [*((begun, phase) for phase in PHASES), (fresh, "half"), (fresh, "sent")],
)
def test_a_server_may_die_at_every_step_of_a_turn(zygote, store, twins, sessions, phase):
    died, violations = Counter(), []
    label = f"{sessions.__name__}-{phase}"
    server, survived = zygote.spawn(store.url), False
    for step, witness in enumerate(sessions(zygote, store.url, twins, label), 1):
        server.arm(DieAt(step, phase))
        other = zygote.spawn(store.url)  # gets ready meanwhile
        witness.say(server.url, TEXT)
        survived = server.turn_over()
        server.close()
        where, server = server.died, other
        try:
            witness.examine(server.url)
        except Violation as violation:
            violations.append(f"{step}, {where}: {violation}")
        if survived:
            break
        died[where] += 1
    server.close()

    assert not violations, "\n".join(violations)
    assert sum(died.values()) >= 5
    if phase in {"before", "after"}:
        assert died[f"terminal event {phase}"] == 1
        assert died[f"consolidation {phase}"] >= 1
