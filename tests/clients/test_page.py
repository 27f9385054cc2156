"""The web page in a real browser, against the stand-in server and a strict content policy."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

CHROMIUM = Path("/usr/bin/chromium")
playwright = pytest.importorskip("playwright.sync_api")

pytestmark = [
    pytest.mark.browser,
    pytest.mark.skipif(not CHROMIUM.exists(), reason="needs Debian's chromium"),
]


@pytest.fixture(scope="module")
def browser():
    with playwright.sync_playwright() as player:
        browser = player.chromium.launch(
            executable_path=str(CHROMIUM), args=["--no-sandbox", "--disable-dev-shm-usage"]
        )
        yield browser
        browser.close()


@pytest.fixture
def page(browser):
    """A fresh tab; the test fails on any error in its scripts."""
    context = browser.new_context()
    page = context.new_page()
    page.set_default_timeout(8000)
    errors = []
    page.on("pageerror", lambda error: errors.append(error))
    page.on("console", lambda line: "Policy" in line.text and errors.append(line.text))
    yield page
    context.close()
    assert errors == []


def say(page, text):
    page.fill("#text", text)
    page.press("#text", "Enter")


def connected(page):
    page.wait_for_selector("#line[data-state=open]")
    page.wait_for_selector("[aria-current=true]")


def test_a_reply_is_shown_as_text_and_the_memory_follows(page, stand_in):
    page.goto(f"{stand_in.url}/")
    connected(page)
    say(page, "<img/src=x/onerror=alert(1)> and `code`")
    meta = page.locator(".message.assistant .meta")

    meta.wait_for()
    page.wait_for_selector("#fact-version:text-is('1')")
    page.wait_for_selector("#news li")

    assert "version 1 · 3 + 3 tokens · surprise 2.25 · consolidated mid" in meta.inner_text()
    assert page.locator(".message img").count() == 0
    assert page.locator(".message.assistant code").inner_text() == "code"
    assert page.locator(".level strong").all_inner_texts() == ["mid"]
    assert "12 s ago, at token 64" in page.locator(".level").inner_text()
    assert "durability: always" in page.locator("#foot").inner_text()


def test_a_new_conversation_begins_with_a_fresh_window(page, stand_in):
    sent = []
    page.on("websocket", lambda line: line.on("framesent", lambda frame: sent.append(frame)))
    page.goto(f"{stand_in.url}/")
    connected(page)
    for turn, fresh in enumerate((False, True, False), 1):
        if fresh:
            page.check("#fresh")
        say(page, f"hello {turn}")
        page.wait_for_selector(f"#fact-version:text-is('{turn}')")

    asked = [json.loads(frame)["memory"] for frame in sent if "response.create" in frame]
    assert [memory.get("window") for memory in asked] == [None, "fresh", None]
    assert not page.is_checked("#fresh")
    assert page.locator(".begun").inner_text() == "a new conversation"


def test_escape_stops_a_reply_and_what_was_said_is_kept(page, stand_in):
    page.goto(f"{stand_in.url}/#nora")
    connected(page)
    say(page, "forever")
    page.wait_for_selector(".message.assistant p:has-text('on and')")

    page.keyboard.press("Escape")
    page.wait_for_selector(".meta:has-text('stopped; what was said is kept')")
    page.reload()

    page.wait_for_selector(".message.assistant p:has-text('on and')")
    assert len(stand_in.sessions["nora"]) == 1


def test_a_lost_line_is_mended_and_the_words_come_back(page, stand_in):
    page.goto(f"{stand_in.url}/")
    connected(page)
    say(page, "drop it")

    page.wait_for_selector("#notice:has-text('the turn was not kept')")

    assert page.input_value("#text") == "drop it"
    assert stand_in.sockets == 2


def test_a_memory_that_had_to_be_recovered_is_told(page, stand_in):
    stand_in.recovered = "version 3 is damaged; version 2 stands in"
    page.goto(f"{stand_in.url}/")
    connected(page)
    say(page, "hello")

    page.wait_for_selector("#notice:has-text('version 3 is damaged; version 2 stands in')")


def test_versions_say_when_and_how_much_and_why_not(page, stand_in):
    stand_in.sessions["nora"] = [("one", "one "), ("two", "two ")]
    page.goto(f"{stand_in.url}/#nora")
    connected(page)
    rows = page.locator(".version")
    rows.nth(1).wait_for()
    assert rows.nth(1).locator(".version-words").inner_text().split() == [
        "1", "1", "min", "ago", "1,234", "tokens", "·", "1", "turn",
    ]  # fmt: skip
    assert rows.nth(0).locator(".now").inner_text() == "now"

    stand_in.frozen.add("nora")  # by somebody else, meanwhile
    page.click("[aria-label='Go back to version 1']")
    page.wait_for_selector("#notice:has-text('Session nora is frozen; unfreeze it first.')")
    stand_in.frozen.clear()
    stand_in.commit("nora", stand_in.sessions["nora"])
    page.click("[aria-label='Go back to version 1']")
    page.wait_for_selector("#notice:has-text('The session is at version 3.')")

    assert len(stand_in.sessions["nora"]) == 2


@pytest.mark.parametrize("key", [None, "sesame??>>"], ids=["open", "locked"])
def test_a_session_is_saved_to_a_file(page, serve, key):
    house = serve(key=key)
    house.sessions["nora"] = [("one", "one ")]
    page.goto(f"{house.url}/#nora")
    if key:
        page.fill("#key", key)
        page.press("#key", "Enter")
    connected(page)
    page.wait_for_selector("#memory-facts:visible")

    with page.expect_download() as saved:
        page.click("#export")

    assert saved.value.suggested_filename == "nora.1.safetensors"
    assert saved.value.path().read_bytes().startswith(b'[["one", "one "]]')


def test_a_refusal_is_told_in_words(page, stand_in):
    page.goto(f"{stand_in.url}/")
    connected(page)
    say(page, "refuse me")

    page.wait_for_selector(".meta.bad:has-text('Refused: version_conflict.')")


def test_the_key_is_asked_for_until_it_is_right(page, serve):
    locked = serve(key="sesame??>>")
    page.goto(f"{locked.url}/")

    page.fill("#key", "wrong")
    page.press("#key", "Enter")
    page.wait_for_selector("#key-words:has-text('does not know that key')")
    page.fill("#key", "sesame??>>")
    page.press("#key", "Enter")
    connected(page)
    say(page, "hello there")

    page.wait_for_selector(".message.assistant .meta:has-text('version 1')")


def test_a_session_is_begun_left_and_forgotten(page, stand_in):
    stand_in.sessions["nora"] = [("hi", "hello")]
    page.goto(f"{stand_in.url}/")
    connected(page)
    page.click("#new-session")
    page.fill("#new-name", "ada@home")
    page.press("#new-name", "Enter")
    say(page, "remember this")
    page.wait_for_selector(".message.assistant .meta")

    page.click(".session:has-text('nora')")
    page.wait_for_selector(".message.assistant:has-text('hello')")
    page.hover(".session-list li:has-text('ada')")
    page.click("[aria-label='Forget ada@home']")
    page.click("#delete-dialog .danger")
    playwright.expect(page.locator(".session")).to_have_count(1)

    assert list(stand_in.sessions) == ["nora"]


def test_on_a_phone_the_panels_are_drawers(page, stand_in):
    page.set_viewport_size({"width": 390, "height": 844})
    page.goto(f"{stand_in.url}/")
    page.wait_for_selector("#line[data-state=open]")

    assert not page.is_visible("#memory")
    page.click("[data-drawer=memory]")
    page.wait_for_selector("#memory", state="visible")
    page.keyboard.press("Escape")

    page.wait_for_selector("#memory", state="hidden")
    assert page.evaluate("document.documentElement.scrollWidth") == 390
