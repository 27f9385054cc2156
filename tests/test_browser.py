"""The web page in a real browser, against a real server."""

import re
import uuid
from pathlib import Path

import httpx2
import pytest

CHROMIUM = Path("/usr/bin/chromium")
KEY = "acme-key-0123456789"

pytestmark = [
    pytest.mark.browser,
    pytest.mark.skipif(not CHROMIUM.exists(), reason=f"{CHROMIUM} is not installed"),
]


@pytest.fixture(scope="module")
def chromium():
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=str(CHROMIUM), args=["--no-sandbox", "--disable-dev-shm-usage"]
        )
        yield browser
        browser.close()


@pytest.fixture
def tab(chromium):
    """A fresh tab; `tab.complaints` collects what goes wrong in it."""
    context = chromium.new_context(viewport={"width": 1280, "height": 800})
    context.set_default_timeout(10_000)
    tab = context.new_page()
    tab.complaints = []
    tab.on("pageerror", lambda error: tab.complaints.append(str(error)))
    tab.on(
        "console",
        lambda said: (
            tab.complaints.append(f"{said.text} {said.location['url']}")
            if said.type == "error"
            else None
        ),
    )
    yield tab
    context.close()


@pytest.fixture
def page(tab, server):
    """The page, connected, with a session that nobody has talked in."""
    tab.goto(f"{server.url}/#tab-{uuid.uuid4().hex}")
    tab.locator(".welcome").wait_for()
    yield tab
    assert tab.complaints == []


def say(page, words, seconds=30):
    """Say something and wait until the reply is whole."""
    replies = page.locator(".message.assistant").count()
    page.fill("#text", words)
    page.press("#text", "Enter")
    reply = page.locator(".message.assistant").nth(replies)
    reply.locator(".meta").wait_for(timeout=1000 * seconds)
    return reply


def grown(page, length):
    """Wait until the reply is longer."""
    page.wait_for_function(
        "n => document.querySelector('.message.assistant .body').textContent.length > n",
        arg=length,
    )


def test_what_is_said_is_answered_and_shown_word_by_word(page, endless):
    page.select_option("#mode", "off")
    page.fill("#text", endless)
    page.press("#text", "Enter")
    reply = page.locator(".message.assistant[data-streaming] .body")

    lengths = []
    for _ in range(3):
        grown(page, lengths[-1] if lengths else 0)
        lengths.append(len(reply.text_content()))

    assert lengths == sorted(set(lengths))
    assert page.locator(".message.user .body").text_content() == endless
    page.click("#stop")
    page.wait_for_selector("#send:visible")


def test_a_reply_that_is_stopped_says_so_and_the_talk_goes_on(page, endless):
    page.select_option("#mode", "off")
    page.fill("#text", endless)
    page.press("#text", "Enter")
    grown(page, 3)
    page.click("#stop")

    page.locator(".message.assistant .meta").get_by_text("stopped").wait_for()
    assert page.locator("#stop").is_hidden()
    page.select_option("#mode", "read_write")
    assert "version" in say(page, "hello").locator(".meta").text_content()


def test_the_memory_is_shown_at_work(page):
    assert page.locator("#memory-empty").is_visible()

    say(page, "it rains in the hills today and all of the week")

    page.wait_for_selector("#memory-facts:visible")
    page.locator("#fact-turns").get_by_text("1", exact=True).wait_for()
    assert int(re.sub(r"\D", "", page.locator("#fact-tokens").text_content())) > 20
    assert re.fullmatch(r"\d+\.\d\d", page.locator("#surprise").text_content())
    assert page.locator("#levels strong").all_text_contents() == ["fast", "slow"]
    assert page.locator("#news li").count() > 0


def test_a_reload_keeps_the_talk_and_the_memory(page):
    name = page.locator("#title").text_content()
    say(page, "my name is Ada")
    before = [text.strip() for text in page.locator(".message .body").all_text_contents()]

    page.reload()
    page.wait_for_selector(".message.assistant")

    assert page.locator("#title").text_content() == name
    found = [text.strip() for text in page.locator(".message .body").all_text_contents()]
    assert found == before
    page.locator("#fact-turns").get_by_text("1", exact=True).wait_for()
    assert name in page.locator(".session .name").all_text_contents()


def test_markup_in_a_message_is_text(page):
    words = "<img src=x onerror=alert(1)><b>bold</b>"

    say(page, words)

    assert page.locator(".message.user .body").text_content() == words
    assert page.locator(".message b, .message img").count() == 0


def test_a_session_is_forgotten_when_it_is_asked_to_be(page):
    name = page.locator("#title").text_content()
    say(page, "hello")
    page.wait_for_timeout(500)  # the page is still asking how the session stands

    page.click(f"[aria-label='Forget {name}']")
    page.click("#delete-dialog button[value=yes]")

    page.locator(".session .name").get_by_text(name, exact=True).wait_for(state="detached")


def test_an_older_version_is_gone_back_to_and_copied(page, server):
    name = page.locator("#title").text_content()
    for number, words in enumerate(("my bees swarm in May", "the mill stands still"), 1):
        say(page, words)
        page.locator("#fact-turns").get_by_text(str(number), exact=True).wait_for()
    first = page.locator(".version", has_text="1 turn").last

    first.get_by_role("button", name="Go back").click()
    page.wait_for_selector("#notice:has-text('Went back to version')")

    page.locator("#fact-turns").get_by_text("1", exact=True).wait_for()
    said = page.locator(".message.user .body").all_text_contents()
    assert said == ["my bees swarm in May"]

    page.locator(".version").first.get_by_role("button", name="Fork").press("Enter")
    page.fill("#fork-name", f"{name}-twin")
    page.press("#fork-name", "Enter")
    page.locator("#title").get_by_text(f"{name}-twin", exact=True).wait_for()
    page.locator(".message.user .body").get_by_text("my bees swarm in May").wait_for()
    say(page, "and the twin hears this")

    said = page.locator(".message.user .body").all_text_contents()
    assert said == ["my bees swarm in May", "and the twin hears this"]
    with httpx2.Client(base_url=server.url) as http:
        assert http.get(f"/v1/sessions/{name}").json()["turns"] == 1


def test_a_frozen_memory_is_read_and_not_changed(page):
    say(page, "my bees swarm in May")
    page.wait_for_selector("#memory-facts:visible")

    page.locator("#freeze").check()
    page.wait_for_selector("#frozen:visible")
    meta = say(page, "do not learn this").locator(".meta").text_content()
    assert "read only" in meta

    page.locator("#freeze").uncheck()
    page.wait_for_selector("#frozen", state="hidden")
    assert "version" in say(page, "learn this").locator(".meta").text_content()


def test_a_server_with_keys_is_opened_with_one(tab, serve):
    server = serve("--store", "memory", HOPE_API_KEYS=f"acme:{KEY}").greeted()
    tab.goto(f"{server.url}/#locked")
    tab.wait_for_selector("#key-dialog[open]")
    tab.fill("#key", "wrong-key-0123456789")
    tab.press("#key", "Enter")
    tab.locator("#key-words").get_by_text("does not know that key").wait_for()
    tab.fill("#key", KEY)
    tab.press("#key", "Enter")
    tab.wait_for_selector("#line[data-state=open]")

    say(tab, "hello")

    assert all("401" in words or "WebSocket" in words for words in tab.complaints)
