"""The web pages of razor-local serve, in a headless Chromium."""

from __future__ import annotations

import base64
import hashlib
import re
from collections.abc import Iterator

import pytest

from razor_local.server.build import build_server, has_web_ui
from razor_local.server.command import PAGE
from tests.support.browser import WHY_MISSING, Browser
from tests.support.server import Server
from tests.support.texts import FACT, QUESTION

in_browser = [
    pytest.mark.slow,
    pytest.mark.skipif(WHY_MISSING is not None, reason=WHY_MISSING or ""),
]

PROMPT = f"{FACT} {QUESTION}"
ANSWER = "The secret code of Marlow is 48213."
ENTER = "\ue007"
ANSWERED = f"return document.querySelector('.assistant .text')?.textContent.startsWith({ANSWER!r})"
NOT_BUSY = "return fetch('slots').then(x => x.json()).then(x => !x.some(y => y.is_processing))"
IDLE = "return document.querySelector('#send').textContent == 'Send' && document.body.innerText"


def test_the_policy_names_the_script_and_the_style():
    page = (PAGE / "index.html").read_text()
    for tag in ("script", "style"):
        body = re.search(rf"<{tag}>(.*?)</{tag}>", page, re.DOTALL)[1]
        digest = base64.b64encode(hashlib.sha256(body.encode()).digest()).decode()
        assert f"{tag}-src 'sha256-{digest}'" in page, digest


@pytest.fixture
def browser() -> Iterator[Browser]:
    build_server()
    with Browser() as running:
        yield running


def serve(*args: object) -> Server:
    options = args if "--" in args else (*args, "--")
    return Server("-c", 8192, "--parallel", 2, *options, "--temp", 0)


def texts(browser: Browser, kind: str) -> list[str]:
    """Return the messages on razor_local's own page."""
    return browser.run(
        f"return [...document.querySelectorAll('.{kind} .text')].map(x => x.textContent)"
    )


class TestOwnPage:
    pytestmark = in_browser

    def test_a_conversation(self, browser):
        with serve("--", "--path", PAGE) as server:
            browser.open(f"http://{server.address}/")
            browser.wait(
                "return document.querySelector('#info').textContent.includes('instead of')"
            )
            browser.run(
                "const main = document.querySelector('main'); window.lengths = new Set();"
                "new MutationObserver(() => lengths.add(main.innerText.length))"
                ".observe(main, {childList: true, subtree: true})"
            )
            browser.type("#text", PROMPT + ENTER)
            browser.wait(ANSWERED)
            browser.wait(IDLE)
            assert browser.run("return lengths.size") > 5  # it was streamed
            browser.type("#text", "Hello" + ENTER)
            browser.wait("return document.querySelectorAll('.assistant').length == 2")
            browser.wait(IDLE)

            # an edit of the first message
            browser.click(".user nav button:nth-last-child(1)")
            browser.run("document.querySelector('article textarea').value = ''")
            browser.type("article textarea", PROMPT.replace("Marlow", "Dover") + ENTER)
            browser.wait("return document.querySelectorAll('article').length == 2")
            browser.wait(
                "return document.querySelector('.assistant .text').textContent.includes('Dover')"
            )
            browser.wait(IDLE)
            (answer,) = texts(browser, "assistant")

            browser.click(".assistant nav button:nth-last-child(1)")  # regenerate
            browser.wait("return document.querySelector('.busy')")
            browser.wait(IDLE)
            assert len(texts(browser, "assistant")) == 1 and "48213" in answer
            assert browser.errors() == []
            assert all(url.startswith(f"http://{server.address}/") for url in browser.requests())

    def test_stop_and_errors(self, browser):
        with serve("--", "--path", PAGE, "--ignore-eos") as server:
            browser.open(f"http://{server.address}/")
            browser.type("#text", PROMPT + ENTER)
            browser.wait(
                "return document.querySelector('.assistant .text')?.textContent.length > 40"
            )
            browser.click("#send")
            browser.wait(IDLE)
            (answer,) = texts(browser, "assistant")
            assert answer.startswith(ANSWER)
            browser.wait(NOT_BUSY)
            assert texts(browser, "assistant") == [answer]
            browser.run("document.querySelector('#text').value = arguments[0]", "word " * 9000)
            browser.click("#send")
            browser.wait("return document.querySelector('.error')?.textContent.includes('exceeds')")

    def test_an_api_key(self, browser):
        with serve("--api-key", "a key", "--", "--path", PAGE) as server:
            browser.open(f"http://{server.address}/")
            browser.wait("return document.body.innerText.includes('This server needs an API key.')")
            browser.type("#key", "a key" + ENTER)
            browser.type("#text", PROMPT + ENTER)
            browser.wait(ANSWERED)


USER = "[aria-label='User message with actions']"
ASSISTANT = "[aria-label='Assistant message with actions']"
SHOWN = f"return document.querySelector({ASSISTANT!r})?.innerText.includes(arguments[0])"
PRESS = (
    "const buttons = [...document.querySelectorAll('button')];"
    "buttons.find(x => x.innerText == arguments[0]).click()"
)
SENT = "return document.querySelector('form').innerText.includes('Send')"


class TestLlamaPage:
    """The page that RAZOR_WEB_UI=ON builds."""

    pytestmark = in_browser

    @pytest.fixture(autouse=True)
    def built(self) -> None:
        if not has_web_ui():
            pytest.skip("needs a build with RAZOR_WEB_UI=ON")

    def test_a_conversation(self, browser):
        with serve() as server:
            browser.open(f"http://{server.address}/")
            browser.type("textarea", PROMPT + ENTER)
            browser.wait(SHOWN, ANSWER)
            browser.wait(SENT)

            # an edit of the first message: the earlier version is kept
            browser.click(f"{USER} [aria-label='Edit']")
            field = "[placeholder^='Edit your message']"
            browser.run("document.querySelector(arguments[0]).select()", field)
            browser.type(field, PROMPT.replace("Marlow", "Dover") + ENTER)
            browser.wait(SHOWN, "Dover")
            browser.wait(SENT)
            assert browser.run(f"return document.querySelectorAll({ASSISTANT!r}).length") == 1
            browser.element("[aria-label='Message version 2 of 2']")
            browser.click(f"{ASSISTANT} [aria-label='Regenerate']")
            browser.element(f"{ASSISTANT} [aria-label='Message version 2 of 2']")
            browser.wait(SENT)

            # the page requests /tools, which answers 403 without --tools
            errors = [text for text in browser.errors() if "/tools - " not in text]
            assert errors == []
            assert all(url.startswith(f"http://{server.address}/") for url in browser.requests())

    def test_stop(self, browser):
        with serve("--", "--ignore-eos") as server:
            browser.open(f"http://{server.address}/")
            browser.type("textarea", PROMPT + ENTER)
            browser.wait(SHOWN, ANSWER)
            browser.run(PRESS, "Stop")
            browser.wait(SENT)
            browser.wait(NOT_BUSY)

    def test_an_api_key(self, browser):
        with serve("--api-key", "a key") as server:
            browser.open(f"http://{server.address}/")
            browser.wait("return document.body.innerText.includes('Enter API Key')")
            browser.run(PRESS, "Enter API Key")
            browser.type("input", "a key" + ENTER)
            browser.type("textarea", PROMPT + ENTER)
            browser.wait(SHOWN, ANSWER)
