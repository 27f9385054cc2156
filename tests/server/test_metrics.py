"""What a scrape shows after a scripted afternoon."""

import math
import re
import shutil
import subprocess
from pathlib import Path

import anyio
import pytest
from prometheus_client.parser import text_string_to_metric_families

from hope_runtime.consolidation import Consolidated, Outcome
from hope_runtime.report import Learned
from hope_runtime.tokenizer import Role
from memory_store import Full, Unavailable
from server import metrics as module
from server.metrics import Metrics

pytestmark = pytest.mark.anyio

SOURCE = Path(module.__file__).read_text()
# the names that were agreed on; those not served yet stand here too
AGREED = """
requests requests_in_progress requests_queued request_duration_seconds request_queue_seconds
time_to_first_token_seconds inter_token_seconds websocket_connections websocket_close
websocket_backpressure_seconds slow_consumer_closes rate_limited auth_failures tokens
batch_size batch_step_seconds device_memory_bytes sessions_resident session_loads
session_load_seconds session_evictions session_state_bytes duplicate_turns memory_updates
memory_update_seconds memory_update_norm_ratio memory_surprise memory_nonfinite
memory_rollbacks consolidations consolidation_seconds consolidation_backlog_sessions
consolidation_oldest_pending_seconds consolidation_tokens consolidation_probe_loss_delta
store_ops store_op_seconds store_bytes store_up store_durability_info
store_uncommitted_turns store_oldest_uncommitted_seconds store_corrupt store_incompatible
store_version_regressions leases_held lease_events lease_renew_margin_seconds build_info
model_info draining
"""
PROTOCOL = {f"hope_{name}" for name in AGREED.split()}
# sockets opened (OpenMetrics knows one family of a name), consolidations that stay due, and keys
# that an evicting store threw away
OURS = {"hope_websocket_opened", "hope_consolidation_failures", "hope_store_evicted_keys"}
LABELS = {
    "aof",
    "code",
    "direction",
    "endpoint",
    "event",
    "from",
    "fingerprint",
    "kind",
    "le",
    "level",
    "mode",
    "op",
    "outcome",
    "phase",
    "policy",
    "pool",
    "reason",
    "session_state",
    "source",
    "tier",
    "torch",
    "transport",
    "trigger",
    "version",
}
SECRET = "session-of-ada"


@pytest.fixture
async def afternoon(build, fragile, anyio_backend):
    """A server that has seen turns of every kind, and how it was scraped before and after."""
    async with build(fragile, stops=False) as house, house.client() as http:
        house.before = (await http.get("/metrics")).text
        say = {"input": "hello", "conversation": SECRET, "max_output_tokens": 20, "temperature": 0}
        rates = {"memory": {"rates": {"user": 1, "assistant": 1}}}
        await http.post("/v1/responses", json={**say, **rates})
        await http.post("/v1/responses", json={**say, "stream": True})
        await http.post("/v1/responses", json={**say, "input": ""})
        said = {"messages": [{"role": "user", "content": "hello"}], "max_tokens": 2}
        answer = (
            await http.post("/v1/chat/completions", json={**said, "conversation": "c"})
        ).json()
        resent = [*said["messages"], answer["choices"][0]["message"], *said["messages"]]
        body = {**said, "messages": resent, "conversation": "c"}
        await http.post("/v1/chat/completions", json=body)
        house.service.residency.drop(next(iter(house.service.residency._held)))
        fragile.failures.append(Full("no room"))
        await http.post("/v1/responses", json=say)
        fragile.failures.append(Unavailable("10.0.0.5", "reset"))
        await http.post("/v1/responses", json=say)
        turn = house.start("hello", SECRET, most=4000)
        while not turn.text:
            await anext(turn)
        turn.cancel(keep=False)
        async for _ in turn:
            pass
        await http.get("/v1/models", headers={"Origin": "https://evil.example"})
        await http.get("/v1/sessions")
        await http.delete(f"/v1/sessions/{SECRET}")
        house.after = (await http.get("/metrics")).text
        yield house


def families(text):
    """Return every metric by name, without the moments when its series were made."""
    found = text_string_to_metric_families(text)
    return {family.name: family for family in found if not family.name.endswith("_created")}


def series(text):
    """Return every time series by name and labels."""
    return {
        (sample.name, tuple(sorted(sample.labels.items())))
        for family in families(text).values()
        for sample in family.samples
    }


async def test_every_metric_that_is_named_has_samples(afternoon):
    named = set(re.findall(r'"(hope_[a-z_]+)"', SOURCE))
    found = families(afternoon.after)

    assert named == set(found)
    assert named <= PROTOCOL | OURS
    assert [name for name, family in found.items() if not family.samples] == []


async def test_every_series_is_there_before_anything_has_happened(afternoon):
    """So that rate() works from the first scrape; only error codes come when they come."""
    late = series(afternoon.after) - series(afternoon.before)

    assert {name for name, _ in late} <= {"hope_requests_total"}
    assert all(dict(labels)["code"] for _, labels in late)


async def test_labels_come_from_closed_sets_and_never_hold_a_session(afternoon):
    labels = {
        label
        for family in families(afternoon.after).values()
        for sample in family.samples
        for label in sample.labels
    }

    assert labels <= LABELS
    assert SECRET not in afternoon.after
    assert "local" not in afternoon.after


async def test_names_follow_the_conventions_of_prometheus(afternoon):
    for name, family in families(afternoon.after).items():
        assert re.fullmatch(r"hope_[a-z_]+", name)
        assert family.documentation
        assert family.type != "unknown"
        assert not name.endswith("_total")
        if family.type == "histogram":
            assert re.search(r"_(seconds|bytes|size|ratio|surprise)$", name), name


async def test_promtool_has_nothing_to_say(afternoon):
    promtool = shutil.which("promtool") or pytest.skip("promtool is not installed")

    checked = await anyio.run_process(
        [promtool, "check", "metrics"],
        input=afternoon.after.encode(),
        check=False,
        stderr=subprocess.STDOUT,
    )

    assert (checked.returncode, checked.stdout) == (0, b"")


async def test_requests_are_counted_by_how_they_ended(afternoon):
    def count(outcome, endpoint="responses", transport="http", code=""):
        labels = {"endpoint": endpoint, "transport": transport, "outcome": outcome, "code": code}
        return afternoon.sample("hope_requests_total", **labels)

    assert count("incomplete") == 1
    assert count("incomplete", transport="sse") == 1
    assert count("rejected", code="invalid_request") == 1
    assert count("failed", code="store_full") == 1
    assert count("failed", code="store_unavailable") == 1
    assert count("incomplete", endpoint="chat_completions") == 2
    assert afternoon.sample("hope_requests_in_progress") == 0
    assert afternoon.sample("hope_requests_queued") == 0


async def test_tokens_are_counted_by_kind(afternoon):
    said = afternoon.sample("hope_tokens_total", kind="generated")

    assert said >= 4 * 20 + 2 * 2 + 1
    assert afternoon.sample("hope_tokens_total", kind="prompt") > 5 * 5
    assert afternoon.sample("hope_tokens_total", kind="skipped_prefix") > 5


async def test_loads_are_counted_by_where_the_session_was(afternoon):
    def loads(source):
        return afternoon.sample("hope_session_loads_total", source=source, outcome="ok")

    assert loads("new") == 2
    assert loads("host") >= 2
    assert loads("store") == 1
    assert afternoon.sample("hope_time_to_first_token_seconds_count", session_state="new") == 2
    assert afternoon.sample("hope_time_to_first_token_seconds_count", session_state="cold") >= 1
    assert afternoon.sample("hope_time_to_first_token_seconds_count", session_state="warm") >= 1


async def test_learning_is_counted_by_level(afternoon):
    for level in ("fast", "slow"):
        done = sum(
            afternoon.sample("hope_memory_updates_total", level=level, outcome=outcome)
            for outcome in Outcome
        )
        assert done > 0
        assert afternoon.sample("hope_memory_surprise_count", level=level) == done
        assert afternoon.sample("hope_consolidation_tokens_total", level=level) > 0
        assert afternoon.sample("hope_consolidation_backlog_sessions", level=level) == 0


async def test_the_store_is_counted_by_what_it_said(afternoon):
    def ops(op, outcome):
        return afternoon.sample("hope_store_ops_total", op=op, outcome=outcome)

    assert ops("commit", "oom") == 1
    assert ops("commit", "timeout") == 1
    assert ops("commit", "ok") == afternoon.store.commits
    assert ops("delete", "ok") == 1
    assert afternoon.sample("hope_store_bytes_total", direction="out") > 1000
    assert afternoon.sample("hope_store_bytes_total", direction="in") > 1000
    assert ops("lease", "ok") > 10
    assert (
        afternoon.sample(
            "hope_store_durability_info", mode="memory", policy="noeviction", aof="false"
        )
        == 1
    )


async def test_leases_are_counted_by_what_became_of_them(afternoon):
    def leases(event):
        return afternoon.sample("hope_lease_events_total", event=event)

    assert leases("acquired") == leases("released") > 5
    assert leases("lost") == leases("refused") == leases("fenced") == 0
    assert afternoon.sample("hope_leases_held") == 0


async def test_rollbacks_are_counted_by_reason(afternoon):
    assert afternoon.sample("hope_memory_rollbacks_total", reason="cancelled") == 1
    # the one that the store refused; what became of the other, nobody knows
    assert afternoon.sample("hope_memory_rollbacks_total", reason="failed") == 1


async def test_a_store_that_is_gone_and_comes_back_is_seen(build, fragile):
    async with build(fragile) as house, house.client() as http:
        assert house.sample("hope_store_up") == 1
        fragile.down = Unavailable("10.0.0.5", "refused")
        await http.get("/health/ready")
        assert house.sample("hope_store_up") == 0
        fragile.down = None
        await http.get("/health/ready")
        assert house.sample("hope_store_up") == 1


async def test_ram_and_lanes_are_read_at_every_scrape(endless):
    await endless.turn("hello", "a")
    await endless.turn("hello", "b")

    assert endless.sample("hope_sessions_resident", tier="host") == 2
    assert endless.sample("hope_sessions_resident", tier="device") == 0
    assert endless.sample("hope_device_memory_bytes", pool="weights") > 1000
    turn = endless.start("hello", "c", most=4000)
    while not turn.text:
        await anext(turn)
    assert endless.sample("hope_sessions_resident", tier="device") == 1
    turn.cancel(keep=False)
    await endless.idle()


async def test_one_loss_that_is_no_number_does_not_spoil_the_sum_for_ever(build):
    metrics = Metrics(build.config)
    for loss in (2.0, math.nan, 3.0):
        outcome = Outcome.APPLIED if loss == loss else Outcome.REJECTED
        metrics.observe(Learned("job", Consolidated("fast", 0, 8, outcome, loss, 3, 0.1, 0.1), 0.1))

    sample = metrics.registry.get_sample_value
    assert sample("hope_memory_surprise_sum", {"level": "fast"}) == 5.0
    assert sample("hope_memory_nonfinite_total", {"level": "fast"}) == 1
    assert (
        sample(
            "hope_consolidations_total",
            {"level": "fast", "trigger": "tokens", "outcome": "rejected"},
        )
        == 1
    )


async def test_the_time_between_tokens_forgets_turns_that_are_over(endless):
    await endless.turn("hello", most=6, rates=((Role.USER, 0.0),))
    turn = endless.start("hello", "other", most=4000)
    while not turn.text:
        await anext(turn)
    turn.cancel(keep=False)
    async for _ in turn:
        pass

    assert endless.metrics._said_at == {}
    assert endless.sample("hope_inter_token_seconds_count") >= 5
