"""What the async client can do to a session besides talking to it, against the stand-in."""

from __future__ import annotations

import io
import socket

import pytest

from clients.client import AsyncHope, HopeError, Refused, Unreachable

pytestmark = pytest.mark.anyio


@pytest.fixture
async def hope(stand_in):
    async with AsyncHope(stand_in.url) as hope:
        yield hope


@pytest.fixture
async def nora(hope):
    """Return a session of two versions."""
    session = hope.session("nora")
    await session.ask("one")
    await session.ask("two")
    return session


async def test_versions_are_told_the_newest_first(nora):
    assert [(one.version, one.turns) for one in await nora.versions()] == [(2, 2), (1, 1)]


async def test_a_session_goes_on_from_an_older_version(nora, stand_in):
    now = await nora.rollback(1)

    assert (now.version, now.turns) == (3, 1)
    assert [said for said, _ in stand_in.sessions["nora"]] == ["one"]


async def test_a_rollback_may_insist_on_what_it_undoes(nora):
    with pytest.raises(Refused) as caught:
        await nora.rollback(1, if_version=1)

    assert (caught.value.status, caught.value.code) == (412, "precondition_failed")
    assert (await nora.rollback(1, if_version=2)).version == 3


async def test_a_version_that_is_not_kept_is_refused(nora):
    with pytest.raises(Refused, match="Version 9 is not kept"):
        await nora.rollback(9)


async def test_a_frozen_session_says_so_until_it_is_thawed(nora):
    frozen, status = await nora.freeze(), await nora.status()
    with pytest.raises(Refused, match="frozen"):
        await nora.rollback(1)

    assert (frozen.frozen, status.frozen) == (True, True)
    assert not (await nora.unfreeze()).frozen


async def test_a_fork_is_a_session_of_its_own(hope, nora, stand_in):
    twin = await nora.fork("twin", version=1)
    await twin.ask("three")

    assert twin is hope.session("twin")
    assert [said for said, _ in stand_in.sessions["twin"]] == ["one", "three"]
    assert [said for said, _ in stand_in.sessions["nora"]] == ["one", "two"]


async def test_a_fork_without_a_name_is_given_one(nora):
    assert (await nora.fork()).name == "conv_1"


async def test_a_name_that_is_taken_is_not_overwritten(nora):
    with pytest.raises(Refused, match="exists already"):
        await nora.fork("nora")


async def test_two_versions_are_compared(nora):
    last = await nora.diff()
    chosen = await nora.diff(before=2, after=1)

    assert (last.from_version, last.to_version) == (1, 2)
    assert (chosen.from_version, chosen.to_version) == (2, 1)
    assert chosen.levels[0].change == 0.75


async def test_a_session_is_written_to_a_file_and_read_from_it(hope, nora, stand_in, tmp_path):
    path = tmp_path / "nora.safetensors"
    told, sent = [], []

    written = await nora.export(path, on_progress=lambda *so_far: told.append(so_far))
    size = path.stat().st_size
    twin = await hope.import_session(
        "twin", path, user="ada", on_progress=lambda *so_far: sent.append(so_far)
    )

    assert (written.version, written.bytes) == (2, size)
    assert told[-1] == sent[-1] == (size, size)
    assert len(sent) > 1
    assert [item.name for item in tmp_path.iterdir()] == [path.name]
    assert stand_in.sessions["twin"] == stand_in.sessions["nora"]
    assert (await twin.status()).user == "ada"


async def test_an_older_version_is_written_when_it_is_asked_for(nora, tmp_path):
    assert (await nora.export(tmp_path / "old", version=1)).version == 1


async def test_open_files_are_written_to_and_read_from_where_they_stand(hope, nora, stand_in):
    file = io.BytesIO(b"before")
    file.seek(0, io.SEEK_END)

    await nora.export(file)
    file.seek(6)
    await hope.import_session("twin", file)

    assert file.getvalue().startswith(b"before[[")
    assert stand_in.sessions["twin"] == stand_in.sessions["nora"]


async def test_what_cannot_be_had_leaves_a_file_as_it_was(hope, tmp_path):
    path = tmp_path / "kept"
    path.write_bytes(b"as it was")

    with pytest.raises(Refused) as caught:
        await hope.session("nobody").export(path)

    assert (caught.value.status, path.read_bytes()) == (404, b"as it was")
    assert [*tmp_path.iterdir()] == [path]


async def test_a_file_that_breaks_off_leaves_nothing_behind(cut_off, tmp_path):
    async with AsyncHope(cut_off) as hope:
        with pytest.raises(HopeError, match="broke off"):
            await hope.session("nora").export(tmp_path / "nora")

    assert [*tmp_path.iterdir()] == []


async def test_a_progress_that_raises_leaves_nothing_behind(nora, tmp_path):
    def stumble(done, size):
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        await nora.export(tmp_path / "nora", on_progress=stumble)

    assert [*tmp_path.iterdir()] == []


async def test_a_file_that_is_no_session_is_refused(hope, tmp_path):
    path = tmp_path / "no session"
    path.write_bytes(b"hello")

    with pytest.raises(Refused) as caught:
        await hope.import_session("twin", path)

    assert caught.value.code == "invalid_archive"


async def test_a_file_that_is_not_there_is_the_callers_mistake(hope, tmp_path):
    with pytest.raises(FileNotFoundError):
        await hope.import_session("twin", tmp_path / "nowhere")


async def test_deleting_returns_a_receipt(nora):
    gone = await nora.delete()

    assert (gone.id, gone.keys, gone.remains) == ("nora", 3, "backups until they age out")


async def test_a_person_is_forgotten_in_all_their_sessions(hope, stand_in):
    for name, user in (("a", "ada"), ("b", "bob"), ("c", "ada")):
        await hope.session(name).ask("hi")
        stand_in.users[name] = user

    gone = await hope.forget_user("ada")

    assert ([one.id for one in gone.sessions], gone.keys) == (["a", "c"], 6)
    assert [*stand_in.sessions] == ["b"]


async def test_a_silent_address_is_unreachable_for_files_too(tmp_path):
    with socket.socket() as held:
        held.bind(("127.0.0.1", 0))
        async with AsyncHope(f"http://127.0.0.1:{held.getsockname()[1]}") as hope:
            with pytest.raises(Unreachable):
                await hope.session("nora").export(tmp_path / "nora")
