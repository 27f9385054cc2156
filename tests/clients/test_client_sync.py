"""The blocking client against the stand-in server."""

from __future__ import annotations

import _thread
import signal
import threading

import pytest

from clients.core import Patience
from clients.sync import ConnectionLost, Hope, Refused


@pytest.fixture
def hope(stand_in):
    with Hope(stand_in.url, patience=Patience(pause=0.01)) as hope:
        yield hope


def test_a_reply_is_a_plain_loop(hope):
    reply = hope.session("nora").say("one two")

    assert list(reply) == ["one ", "two "]
    assert (reply.text, reply.status, reply.version) == ("one two ", "completed", 1)


def test_asking_returns_the_whole_reply(hope):
    assert hope.session("nora").ask("one two").text == "one two "


def test_leaving_the_loop_stops_the_reply(hope):
    reply = hope.session("nora").say("forever")
    for _ in reply:
        break

    assert (reply.status, reply.cut_short_by, reply.version) == ("incomplete", "cancelled", 1)


def test_an_error_in_the_loop_stops_the_reply(hope):
    reply = hope.session("nora").say("forever")

    def stumble():
        for _ in reply:
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        stumble()

    assert reply.cancel().cut_short_by == "cancelled"


@pytest.mark.usefixtures("interruptible")
def test_control_c_stops_the_reply_and_keeps_what_was_said(hope):
    reply = hope.session("nora").say("forever")
    pieces = []

    def talk():
        for piece in reply:
            pieces.append(piece)
            if len(pieces) == 3:
                threading.Timer(0.02, _thread.interrupt_main).start()

    with pytest.raises(KeyboardInterrupt):
        talk()

    assert reply.cut_short_by == "cancelled"
    assert reply.text.startswith("".join(pieces))
    assert hope.session("nora").status().version == 1


def test_failures_are_raised_where_they_are_awaited(hope):
    with pytest.raises(Refused, match=r"Broken\."):
        hope.session("nora").ask("fail now")
    with pytest.raises(ConnectionLost):
        hope.session("nora").ask("drop it")
    assert hope.session("nora").ask("fine").text == "fine "


def test_sessions_are_listed_read_and_deleted(hope):
    session = hope.session("nora")
    session.ask("one")

    assert [item.content[0].text for item in session.transcript()] == ["one", "one "]
    assert session.status().turns == 1
    assert [one.id for one in hope.sessions()] == ["nora"]
    assert session.delete().deleted
    assert hope.sessions() == []
    assert hope.models()[0].id == "tiny"
    assert hope.health().status == "draining"


def test_a_broken_line_is_not_noticed(hope, stand_in):
    stand_in.faults = [stand_in.cut(6), stand_in.cut(7)]

    assert "".join(hope.session("nora").say("one two")) == "one two "
    assert stand_in.sessions["nora"] == [("one two", "one two ")]


@pytest.mark.usefixtures("interruptible")
def test_control_c_while_the_whole_reply_is_waited_for_stops_it(hope, stand_in):
    reply = hope.session("nora").say("forever")
    here = threading.get_ident()
    threading.Timer(0.2, lambda: signal.pthread_kill(here, signal.SIGINT)).start()

    with pytest.raises(KeyboardInterrupt):
        reply.finish()

    assert (reply.cut_short_by, reply.tries) == ("cancelled", 1)


def test_what_can_be_done_to_a_session(hope, stand_in, tmp_path):
    session = hope.session("nora")
    session.ask("one")
    session.ask("two")

    assert [one.version for one in session.versions()] == [2, 1]
    assert session.diff(1, 2).to_version == 2
    assert session.rollback(1, if_version=2).version == 3
    assert session.freeze().frozen
    assert not session.unfreeze().frozen
    assert session.fork("twin").ask("three").version == 2
    assert session.export(tmp_path / "nora").version == 3
    assert hope.import_session("third", tmp_path / "nora", user="ada").status().turns == 1
    assert [one.id for one in hope.forget_user("ada").sessions] == ["third"]
    assert session.delete().keys == 3


def test_threads_may_share_one_client(hope):
    texts = {}
    threads = [
        threading.Thread(target=lambda n=n: texts.update({n: hope.session(n).ask(n).text}))
        for n in ("a", "b", "c")
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    assert texts == {"a": "a ", "b": "b ", "c": "c "}
