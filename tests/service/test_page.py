"""The page, in a real browser against the real service; nothing that it does may break its own policy."""

import os
import re
import shutil
import socket
import threading
from contextlib import suppress
from pathlib import Path

import pytest
from playwright.sync_api import expect, sync_playwright

from agents.service.app import STATIC, create_app
from agents.service.keys import Keys
from agents.service.middleware import CONTENT_SECURITY_POLICY
from agents.service.settings import Settings
from agents.store import Stored
from agents.types import Message
from tests.service.conftest import Running

# On a busy machine a page takes its time; what comes, comes at once, so that nobody waits so long.
pytestmark = pytest.mark.timeout(180)
expect.set_options(timeout=30_000)

RICH = """\
# A heading

Some *emphasis*, **strong**, ~~struck~~ and `inline code`, with a [link](https://example.org/a_(b)) \
and https://example.com/x_y; 5 * 3 * 2 stays, and so does snake_case_name.

1. First
   - nested with **bold**
     1. deep
2. Second

- [x] done

```python
def double(number: int) -> int:
    return number * 2  # <b>no markup</b>
```

| Model | Price |
|:------|------:|
| small | $0.15 |
| large, `a\\|b` | **$2.50** |

> A quote
> - with a list

---

#### About C#

That is all. ##
"""

EVIL = """\
<img src=x onerror="window.hit = 1"> <script>window.hit = 2</script>
<svg/onload=window.hit=3> <a href="javascript:window.hit=4">a</a>

[one](javascript:window.hit=5) [two](JaVaScRiPt:window.hit=6)
[three]( data:text/html,<script>window.hit=7</script>)
[four](vbscript:x) [five](/relative) [six](//evil.example) <javascript:window.hit=8>
![p](javascript:window.hit=9)

![seven](https://example.org/tracked.png) [eight](https://example.org/"onmouseover="window.hit=10)

```html"><img src=x onerror=window.hit=11>
<script>window.hit = 12</script>
```

| <img src=x onerror=window.hit=13> | b |
|---|---|
| <script>window.hit=14</script> | &lt;script&gt;window.hit=15&lt;/script&gt; |
"""


def _browser_path():
    names = ("chromium", "chromium-browser", "google-chrome")
    return next(filter(None, map(shutil.which, names)), None)


@pytest.fixture(scope="module")
def browser():
    path = _browser_path()
    if path is None:
        missing = "no Chromium on this machine: install one, for example the package `chromium`"
        if os.environ.get("REQUIRE_BROWSER"):
            pytest.fail(missing)
        pytest.skip(missing)
    flags = "no-sandbox disable-gpu disable-quic no-first-run disable-background-networking"
    flags += " disable-component-update disable-sync"
    # One process for all pages: to begin one for each takes longer than most tests.
    flags += " renderer-process-limit=1 process-per-site disable-site-isolation-trials"
    with sync_playwright() as playwright:
        chromium = playwright.chromium.launch(
            executable_path=path, args=[f"--{flag}" for flag in flags.split()]
        )
        yield chromium
        chromium.close()


@pytest.fixture(scope="module")
def room(browser):
    """What windows share that are not different; each service, being an origin, has its own storage."""
    context = browser.new_context(locale="en-US", viewport={"width": 1180, "height": 800})
    yield context
    context.close()


@pytest.fixture(scope="module")
def idle(tmp_path_factory):
    """The address of a service for tests that look at the page alone, and say and keep nothing."""
    database = f"sqlite:///{tmp_path_factory.mktemp('idle')}/chat.db"
    service = Running(create_app(Settings(database=database, base_url="http://127.0.0.1:1")))
    yield service.url
    service.stop()


class Windows:
    """Opens windows of the browser, and remembers all that a console should not hold."""

    def __init__(self, browser, room):
        self._browser = browser
        self._room = room
        self._opened = []
        self.complaints = []
        self.expected = re.compile("(?!)")

    def forgive(self, pattern):
        """What the browser may say of the trouble that a test makes."""
        self.expected = re.compile(pattern)

    def __call__(self, url, *, script="", **options):
        context = self._room
        if options:
            context = self._browser.new_context(locale="en-US", **options)
            self._opened.append(context)
        page = context.new_page()
        self._opened.append(page)
        page.on("console", self._heard)
        page.on("pageerror", lambda error: self.complaints.append(f"uncaught: {error}"))
        page.add_init_script(
            "addEventListener('securitypolicyviolation',"
            " (event) => console.error(`policy: ${event.violatedDirective} ${event.blockedURI}`));"
            + script
        )
        page.goto(url)
        return page

    def _heard(self, message):
        if message.type in ("error", "warning") and not self.expected.search(message.text):
            self.complaints.append(message.text)

    def close(self):
        for opened in reversed(self._opened):
            opened.close()


@pytest.fixture
def windows(browser, room):
    opened = Windows(browser, room)
    yield opened
    opened.close()
    assert opened.complaints == []


def box(page):
    return page.get_by_label("Message", exact=True)


def ask(page, text):
    box(page).fill(text)
    box(page).press("Enter")


def answers(page):
    return page.get_by_role("article", name="Answer")


def hold_talk(page, text="What is 12 x 12?"):
    """Ask, and wait for the end of the answer."""
    before = answers(page).count()
    ask(page, text)
    # `wait_for` looks at each frame, `expect` after ever longer pauses.
    page.locator("article.answer:not([aria-busy]) .facts:has-text('tokens')").nth(before).wait_for()


def once(page, path, handle):
    """Let the next request to a path be handled so.

    `page.route(..., times=1)` would take the route away just when the page asks for something else, which
    Chromium then may leave hanging for ever.
    """
    handled = []

    def first(route):
        if handled:
            route.continue_()
        else:
            handled.append(route)
            handle(route)

    page.route(path, first)


def status(page):
    return page.locator(".notice")


def see(place, words):
    """Wait until the words are there; `expect` would look again after ever longer pauses."""
    place.filter(has_text=words).wait_for()


# The page's long pauses, shorter: they end in nothing that a test waits for.
HASTY = (
    "{ const later = window.setTimeout; window.setTimeout = (work, after, ...more) =>"
    " later(work, after === 1500 ? 50 : after, ...more); }"
)


def wide(page):
    """How much wider than the window the page is, with all that it shows."""
    return page.evaluate(
        "Math.max(...['html', '#main', '.scroller', '.usage', '.composer']"
        ".flatMap((name) => [...document.querySelectorAll(name)])"
        ".map((node) => node.scrollWidth)) - innerWidth"
    )


class Wire:
    """A line between browser and service that can be cut, and that can lose the service's words."""

    def __init__(self, service):
        self._target = service.socket.getsockname()
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self._listener.getsockname()[1]}"
        self.refusing = False
        self.losing = (
            None  # a piece of the requests whose answer is lost; a browser may try by itself
        )
        self.lost = threading.Event()
        self._open = []
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self):
        while True:
            try:
                near, _ = self._listener.accept()
            except OSError:
                return
            if self.refusing:
                near.close()
                continue
            far = socket.create_connection(self._target)
            self._open += [near, far]
            silent = threading.Event()
            for one, other, up in ((near, far, True), (far, near, False)):
                threading.Thread(
                    target=self._pass, args=(one, other, up, silent), daemon=True
                ).start()

    def _pass(self, one, other, up, silent):
        with suppress(OSError):
            while data := one.recv(65536):
                if up and self.losing and self.losing in data:
                    silent.set()
                if up or not silent.is_set():
                    other.sendall(data)
                else:  # the service has begun to answer: so it has the message
                    self.lost.set()
                    break
        for end in (one, other):
            with suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)

    def cut(self):
        for end in self._open:
            with suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)

    def close(self):
        self.refusing = True
        self._listener.close()
        self.cut()
        for end in self._open:
            end.close()


@pytest.fixture
def wire():
    made = []

    def between(service):
        made.append(Wire(service))
        return made[-1]

    yield between
    for one in made:
        one.close()


def only_conversation(chat):
    (found,) = chat.ask("GET", "/conversations").json()["data"]
    return found["id"]


def test_a_talk_of_two_turns_with_a_tool_is_found_again_after_a_reload(chat, windows):
    page = windows(chat.url)
    hold_talk(page, "What is 12 x 12?")
    call = answers(page).first.locator("details.call")
    expect(call).to_contain_text("calculator")
    call.locator("summary").click()
    expect(call.locator("pre").first).to_contain_text('"expression"')
    expect(call.locator("pre").last).to_have_text("144")
    hold_talk(page, "What is 144 x 3?")
    see(answers(page).last, "432")
    first = page.locator("#totals").inner_text()
    assert re.fullmatch(r"[\d,]+ tokens · \$0\.0\d+", first)
    expect(page).to_have_title("What is 12 x 12? · Chat")
    assert re.search(r"#/c/.+", page.url)
    page.reload()
    expect(answers(page)).to_have_count(2)
    see(answers(page).first, "144")
    see(answers(page).last, "432")
    expect(page.locator("#totals")).to_have_text(first)
    stored = chat.ask("GET", f"/conversations/{only_conversation(chat)}").json()
    assert first.startswith(f"{stored['usage']['total_tokens']:,} tokens")
    page.goto(chat.url)
    page.get_by_role("link", name="What is 12 x 12?").click()
    expect(answers(page)).to_have_count(2)


@pytest.mark.parametrize("how", ["button", "Escape"])
def test_what_came_before_a_stop_is_kept_and_marked(serve, held, windows, how):
    chat = serve(base_url=held.url)
    page = windows(chat.url)
    ask(page, "Tell me a story")
    see(answers(page), "Once upon")
    page.locator("#list .answering").wait_for()
    if how == "button":
        page.get_by_role("button", name="Stop answering").click()
    else:
        page.keyboard.press("Escape")
    see(status(page), "Stopped")
    see(answers(page), "Once upon")
    see(answers(page), "Partial answer")
    assert held.gone.wait(30)
    page.reload()
    see(answers(page), "Partial answer")
    assert chat.messages(only_conversation(chat))[-1]["status"] == "partial"


def test_an_answer_is_written_anew(chat, server, windows):
    server.reply("The first try.")
    server.reply("The second try.")
    page = windows(chat.url)
    hold_talk(page, "Hello")
    see(answers(page), "The first try.")
    page.get_by_role("button", name="Regenerate answer").click()
    see(answers(page), "The second try.")
    page.get_by_role("button", name="Regenerate answer").wait_for()
    expect(answers(page)).to_have_count(1)
    texts = [message["content"] for message in chat.messages(only_conversation(chat))]
    assert texts == ["Hello", "The second try."]


def test_an_edited_message_goes_on_in_a_branch(chat, windows):
    page = windows(chat.url)
    hold_talk(page, "What is 2 x 3?")
    hold_talk(page, "What is 12 x 12?")
    first = only_conversation(chat)
    message = page.get_by_role("article", name="Your message").last
    message.hover()
    message.get_by_role("button", name="Edit message").click()
    page.get_by_label("Edited message").fill("What is 20 x 20?")
    page.get_by_role("button", name="Send in a branch").click()
    expect(answers(page)).to_have_count(2)
    see(answers(page).last, "400")
    expect(page.get_by_role("article", name="Your message").last).to_contain_text("20 x 20")
    see(status(page), "This is a branch")
    parent = page.locator("#heading").get_by_role("link")
    expect(page.locator("#heading")).to_contain_text("Branch of")
    parent.click()
    see(answers(page).last, "144")
    assert first in page.url
    assert "20 x 20" not in str(chat.messages(first))


def test_conversations_are_searched_as_one_types(chat, windows):
    for text in ("the ostrich cannot fly", "the heron can"):
        chat.say(chat.new(title=text[4:9]), text)
    page = windows(chat.url)
    rows = page.locator("#list li")
    expect(rows).to_have_count(2)
    page.keyboard.press("Control+k")
    expect(page.get_by_label("Search conversations")).to_be_focused()
    page.keyboard.type("cannot")
    expect(rows).to_have_count(1)
    expect(rows.locator(".snippet")).to_contain_text("the ostrich cannot fly")
    expect(rows.locator("mark").first).to_have_text("cannot")
    page.get_by_label("Search conversations").fill("nowhere")
    expect(page.locator("#list-note")).to_have_text("Nothing found.")
    page.keyboard.press("Escape")
    expect(rows).to_have_count(2)


def test_a_long_list_of_conversations_comes_in_pages(chat, windows):
    for number in range(60):
        chat.service.store.conversations.create(title=f"Talk {number}", owner="local")
    page = windows(chat.url)
    rows = page.locator("#list li")
    expect(rows).to_have_count(50)
    page.get_by_role("button", name="Show more").click()
    expect(rows).to_have_count(60)
    page.get_by_role("button", name="Show more").wait_for(state="hidden")
    expect(rows.nth(50).get_by_role("link")).to_be_focused()


def test_a_conversation_is_renamed_exported_and_deleted(chat, windows):
    windows.forgive("status of 401")
    secret = Keys(chat.service.store).create("ann")[1]
    page = windows(chat.url)
    page.get_by_label("Key", exact=True).fill(secret)
    page.get_by_role("button", name="Use key").click()
    hold_talk(page, "What is 12 x 12?")
    page.get_by_role("button", name="What is 12 x 12?", exact=True).click()
    page.get_by_label("Title", exact=True).fill("Squares <b>")
    page.keyboard.press("Enter")
    expect(page.locator("#list .name")).to_have_text("Squares <b>")
    page.get_by_role("heading", name="Squares <b>").wait_for()

    for words, name, holds in (
        ("Export as Markdown", r".+\.md", "144"),
        ("Export for OpenAI", r".+\.json", '"tool_calls"'),
        ("Export for Anthropic", r".+\.json", '"tool_use"'),
    ):
        page.get_by_role("button", name="Actions for this conversation").click()
        with page.expect_download() as saving:
            page.get_by_role("menuitem", name=words).click()
        assert re.fullmatch(name, saving.value.suggested_filename)
        assert holds in Path(saving.value.path()).read_text(encoding="utf-8")

    page.get_by_role("button", name="Actions for this conversation").click()
    page.get_by_role("menuitem", name="Delete…").click()
    question = page.get_by_role("dialog")
    expect(question.get_by_role("button", name="Cancel")).to_be_focused()
    expect(question).to_contain_text("Squares <b>")
    question.get_by_role("button", name="Delete").click()
    expect(page.locator("#list-note")).to_have_text("No conversations yet.")
    assert chat.ask("GET", "/conversations", key=secret).json()["data"] == []


@pytest.mark.parametrize("place", ["list", "heading"])
def test_a_title_that_is_being_written_is_not_taken_away(serve, held, windows, place):
    chat = serve(base_url=held.url)
    page = windows(f"{chat.url}/#/c/{chat.new(title='Before')}")
    page.get_by_role("heading", name="Before").wait_for()
    if place == "heading":
        ask(page, "Tell me a story")
        see(answers(page), "Once upon")
        page.get_by_role("button", name="Before", exact=True).click()
    else:
        page.goto(f"{chat.url}/#/")
        ask(page, "Tell me a story")
        see(answers(page), "Once upon")
        page.get_by_role("link", name="Before").focus()
        page.keyboard.press("F2")
    page.get_by_label("Title", exact=True).fill("Aft")
    with page.expect_response("**/conversations?**"):  # the list, made anew after the answer
        held.let_go.set()
    see(answers(page), "Once upon a time")
    page.keyboard.type("er")
    page.keyboard.press("Enter")
    page.locator("#list .name", has_text="After").wait_for()


def test_usage_is_a_chart_and_a_table(chat, windows):
    chat.say(chat.new(), "What is 12 x 12?")
    page = windows(chat.url)
    page.keyboard.press("Alt+u")
    chart = page.get_by_role("img", name="Cost by day and model")
    expect(chart.locator("rect.piece")).to_have_count(1)
    expect(chart.locator("rect.piece")).to_have_attribute("height", re.compile(r"\d\d\d"))
    expect(page.locator(".usage-table tbody tr")).to_have_count(1)
    total = chat.ask("GET", "/usage").json()["total"]
    tokens = total["prompt_tokens"] + total["completion_tokens"]
    expect(page.locator(".cards")).to_contain_text(f"{tokens:,}")
    page.get_by_role("button", name="Calls").click()
    page.get_by_role("img", name="Calls by day and model").wait_for()
    page.get_by_role("button", name="7 days").click()
    expect(page.get_by_role("button", name="7 days")).to_have_attribute("aria-pressed", "true")
    expect(page.locator("g.day")).to_have_count(7)


def test_a_key_is_asked_for_kept_and_forgotten(chat, windows):
    windows.forgive("status of 401")
    secret = Keys(chat.service.store).create("ann")[1]
    chat.say(chat.new(key=secret), "What is 12 x 12?", key=secret)
    page = windows(chat.url)
    dialog = page.get_by_role("dialog", name="Your key")
    expect(dialog.get_by_label("Key", exact=True)).to_be_focused()
    page.keyboard.press("Escape")
    dialog.wait_for()
    dialog.get_by_label("Key", exact=True).fill("llm-wrong")
    page.keyboard.press("Enter")
    expect(dialog).to_contain_text("does not know this key")
    dialog.get_by_label("Key", exact=True).fill(secret)
    page.keyboard.press("Enter")
    dialog.wait_for(state="hidden")
    expect(page.locator("#owner")).to_have_text("ann")
    expect(page.locator("#list li")).to_have_count(1)
    page.reload()
    expect(page.locator("#list li")).to_have_count(1)
    assert page.evaluate("localStorage.getItem('key')") is None
    another = windows(chat.url)
    another.get_by_role("dialog", name="Your key").wait_for()
    another.get_by_label("Key", exact=True).fill(secret)
    another.get_by_label("Remember it in this browser").check()
    another.get_by_role("button", name="Use key").click()
    third = windows(chat.url)
    expect(third.locator("#list li")).to_have_count(1)
    third.get_by_role("button", name="Forget key").click()
    third.get_by_role("dialog", name="Your key").wait_for()
    assert secret not in third.evaluate("JSON.stringify({...localStorage, ...sessionStorage})")


def test_a_key_that_is_revoked_is_asked_for_again_and_the_draft_stays(chat, windows):
    windows.forgive("status of 401")
    keys = Keys(chat.service.store)
    _, first = keys.create("ann")
    page = windows(chat.url)
    page.get_by_label("Key", exact=True).fill(first)
    page.keyboard.press("Enter")
    expect(box(page)).to_be_focused()
    keys.revoke("ann")
    second = keys.create("ann", owner="ann")[1]
    ask(page, "What is 12 x 12?")
    page.get_by_role("dialog", name="Your key").wait_for()
    page.get_by_label("Key", exact=True).fill(second)
    page.keyboard.press("Enter")
    page.get_by_role("dialog").wait_for(state="hidden")
    expect(box(page)).to_have_value("What is 12 x 12?")
    box(page).press("Enter")
    see(answers(page), "144")


def test_a_cut_answer_is_said_and_what_came_is_kept(serve, held, windows, wire):
    windows.forgive("ERR_|Failed to load resource")
    chat = serve(base_url=held.url)
    line = wire(chat)
    page = windows(line.url)
    ask(page, "Tell me a story")
    see(answers(page), "Once upon")
    line.cut()
    see(status(page), "cut")
    see(status(page), "what the service kept")
    see(answers(page), "Once upon")
    see(answers(page), "Partial answer")
    assert len(chat.messages(only_conversation(chat))) == 2


def test_a_cut_answer_stays_on_the_page_while_the_service_is_away(serve, held, windows, wire):
    windows.forgive("ERR_|Failed to load resource")
    chat = serve(base_url=held.url)
    line = wire(chat)
    page = windows(line.url)
    ask(page, "Tell me a story")
    see(answers(page), "Once upon")
    line.refusing = True
    line.cut()
    see(status(page), "cannot be reached")
    see(answers(page), "Once upon")
    see(answers(page), "Cut")
    line.refusing = False
    page.get_by_role("button", name="Load again").click()
    see(answers(page), "Partial answer")


def test_a_message_that_could_not_be_sent_stays_and_is_sent_once(chat, windows, wire):
    windows.forgive("ERR_|Failed to load resource")
    line = wire(chat)
    page = windows(line.url)
    hold_talk(page, "What is 2 x 3?")
    line.refusing = True
    line.cut()
    ask(page, "What is 12 x 12?")
    see(status(page), "cannot be reached")
    expect(box(page)).to_have_value("What is 12 x 12?")
    line.refusing = False
    page.reload()
    expect(box(page)).to_have_value("What is 12 x 12?")
    page.get_by_role("button", name="Send message").click()
    expect(answers(page)).to_have_count(2)
    see(answers(page).last, "144")
    expect(box(page)).to_have_value("")
    said = [m for m in chat.messages(only_conversation(chat)) if m["role"] == "user"]
    assert [message["content"] for message in said] == ["What is 2 x 3?", "What is 12 x 12?"]


@pytest.mark.parametrize("lost", ["conversation", "message"])
def test_a_message_whose_answer_was_lost_on_the_way_is_not_doubled(chat, windows, wire, lost):
    windows.forgive("ERR_|Failed to load resource")
    line = wire(chat)
    page = windows(line.url)
    expect(page.locator("#list-note")).to_have_text("No conversations yet.")
    path = b"POST /conversations HTTP" if lost == "conversation" else b"/messages HTTP"
    line.losing = path
    ask(page, "What is 12 x 12?")
    said = "cannot be reached" if lost == "conversation" else "your message had arrived"
    see(status(page), said)
    assert line.lost.is_set()
    line.losing = None
    page.get_by_role("button", name="Try again").click()
    see(answers(page).last, "144")
    expect(box(page)).to_have_value("")
    said = [m for m in chat.messages(only_conversation(chat)) if m["role"] == "user"]
    assert [message["content"] for message in said] == ["What is 12 x 12?"]


def test_two_windows_on_one_conversation_do_not_disturb_each_other(serve, held, windows):
    windows.forgive("status of 409")
    chat = serve(base_url=held.url)
    one = windows(f"{chat.url}/#/c/{chat.new(title='Stories')}")
    two = windows(one.url, script=HASTY)
    two.get_by_role("heading", name="Stories").wait_for()
    ask(one, "Tell me a story")
    see(answers(one), "Once upon")
    ask(two, "And another")
    see(status(two), "Your message waits here")
    expect(box(two)).to_have_value("And another")
    three = windows(one.url, script=HASTY)
    see(status(three), "in another window")
    held.let_go.set()
    for page in (one, two, three):
        see(answers(page), "Once upon a time")
    two.get_by_role("button", name="Send message").click()
    expect(answers(two)).to_have_count(2)
    said = [m for m in chat.messages(only_conversation(chat)) if m["role"] == "user"]
    assert [message["content"] for message in said] == ["Tell me a story", "And another"]


def test_an_answer_goes_on_while_another_conversation_is_read(serve, held, windows):
    chat = serve(base_url=held.url)
    chat.new(title="Another")
    page = windows(chat.url)
    ask(page, "Tell me a story")
    see(answers(page), "Once upon")
    page.get_by_role("link", name="Another").click()
    expect(answers(page)).to_have_count(0)
    held.let_go.set()
    expect(page.locator("#list .answering").locator("visible=true")).to_have_count(0)
    page.get_by_role("link", name="Tell me a story").click()
    see(answers(page), "Once upon a time")
    expect(answers(page)).not_to_contain_text("Partial")


def test_a_refusal_for_the_budget_is_said_clearly(serve, windows):
    windows.forgive("status of 402")
    page = windows(serve(budget_usd="0.00000001").url)
    ask(page, "What is 12 x 12?")
    see(status(page), "The budget does not allow this")
    expect(page.get_by_role("article", name="Your message")).to_contain_text("What is 12 x 12?")


def test_too_many_requests_are_counted_down(chat, windows):
    windows.forgive("status of 429")
    page = windows(chat.url, viewport={"width": 1180, "height": 800})  # with a clock of its own
    once(
        page,
        "**/messages",
        lambda route: route.fulfill(
            status=429,
            headers={"retry-after": "2", "content-type": "application/problem+json"},
            body='{"title": "Too many requests", "status": 429, "detail": "Slowly."}',
        ),
    )
    page.clock.install()
    ask(page, "What is 12 x 12?")
    see(status(page), "Slowly. Wait 2 s")
    expect(page.get_by_role("button", name="Send message")).to_be_disabled()
    page.clock.run_for(3000)
    see(status(page), "You can go on now")
    page.get_by_role("button", name="Try again").click()
    page.clock.run_for(1000)
    see(answers(page), "144")


def test_a_model_that_fails_is_said_and_can_be_asked_again(chat, server, windows):
    server.reply("no", status=400)
    page = windows(chat.url)
    ask(page, "What is 12 x 12?")
    expect(status(page)).to_have_class(re.compile("error"))
    page.get_by_role("button", name="Try again").click()
    see(answers(page), "144")
    assert len([m for m in chat.messages(only_conversation(chat)) if m["role"] == "user"]) == 1


def test_being_offline_is_said(chat, windows):
    windows.forgive("ERR_INTERNET_DISCONNECTED")
    page = windows(chat.url)
    expect(box(page)).to_be_focused()
    page.context.set_offline(True)
    see(status(page), "You are offline")
    page.context.set_offline(False)
    see(status(page), "online again")


def test_what_is_asked_before_the_conversation_is_there_waits_for_it(chat, windows):
    name = chat.new()
    chat.say(name, "What is 2 x 3?")
    page = windows(chat.url)
    late = []
    once(page, f"**/conversations/{name}", late.append)
    page.get_by_role("link", name="What is 2 x 3?").click()
    page.get_by_text("Loading…").wait_for()
    ask(page, "What is 12 x 12?")
    box(page).press("Enter")
    late[0].continue_()
    expect(answers(page)).to_have_count(2)
    see(answers(page).last, "144")
    assert len([m for m in chat.messages(name) if m["role"] == "user"]) == 2


def test_nothing_that_a_model_or_a_person_says_becomes_html(chat, server, windows):
    server.reply(EVIL, reasoning=EVIL)
    page = windows(chat.url)
    hold_talk(page, EVIL)
    chat.ask("PATCH", f"/conversations/{only_conversation(chat)}", json={"title": EVIL[:100]})
    for _ in range(2):
        see(answers(page), '<img src=x onerror="window.hit = 1">')
        see(answers(page), "[one](javascript:window.hit=5)")
        assert page.locator("main :is(img, script, iframe, object, embed, base, form)").count() == 0
        assert page.locator("#list :is(img, script)").count() == 0
        links = (
            answers(page)
            .locator("a")
            .evaluate_all("(links) => links.map(({ href, rel, target }) => [href, rel, target])")
        )
        assert {link[0].split(":")[0] for link in links} <= {"http", "https", "mailto"}
        assert all(link[1:] == ["noopener noreferrer", "_blank"] for link in links)
        assert ["https://example.org/tracked.png"] in [link[:1] for link in links]
        inline = "[...document.querySelectorAll('*')].flatMap((node) => [...node.attributes])"
        inline += ".filter(({ name }) => name.startsWith('on') || name === 'srcdoc').length"
        assert page.evaluate(inline) == 0
        assert page.evaluate("window.hit") is None
        page.reload()


def test_the_policy_stops_what_the_page_itself_would_never_do(idle, windows):
    windows.forgive("policy|Policy|TrustedHTML|Trusted")
    page = windows(idle)
    assert page.request.get(idle).headers["content-security-policy"] == CONTENT_SECURITY_POLICY
    tried = page.evaluate(
        """() => {
          try { document.body.innerHTML = "<img src=x onerror='window.hit=1'>"; return "made HTML"; }
          catch (error) { return error.name; }
        }"""
    )
    assert tried == "TypeError"


def test_the_files_of_the_page_make_no_html_and_load_nothing_from_elsewhere():
    page = (STATIC / "index.html").read_text(encoding="utf-8")
    assert not re.search(r"<style|\sstyle=|\son\w+=|<script(?![^>]*src=)", page)
    assert re.findall(r"<script[^>]*>([^<]+)</script>", page) == []
    for file in STATIC.iterdir():
        text = file.read_text(encoding="utf-8")
        assert not re.search(r"innerHTML|outerHTML|insertAdjacent|document\.write|eval\(", text)
        assert not re.search(r"(src|href|from|url\()\s*=?\s*[\"'(]?(https?:)?//", text), file


def test_markdown_is_shown_as_it_is_meant(chat, server, windows):
    server.reply(RICH)
    page = windows(chat.url)
    hold_talk(page, "Show me")
    shown = answers(page).locator(".markdown")
    for selector, text in (
        ("h2", "A heading"),
        ("h5", "About C#"),
        ("em", "emphasis"),
        ("strong >> nth=0", "strong"),
        ("del", "struck"),
        ("p > code", "inline code"),
        ("ol > li > ul > li > ol > li", "deep"),
        ("blockquote > ul > li", "a list"),
        ("figcaption", "python"),
        ("td:has(code)", "large, a|b"),
    ):
        expect(shown.locator(selector).first).to_contain_text(text)
    expect(shown.locator("ol").first.locator("> li")).to_have_count(2)
    expect(shown.locator("pre")).to_contain_text("# <b>no markup</b>")
    expect(shown).to_contain_text("5 * 3 * 2 stays, and so does snake_case_name.")
    links = shown.locator("a").evaluate_all("(links) => links.map(({ href }) => href)")
    assert links == ["https://example.org/a_(b)", "https://example.com/x_y"]
    assert shown.locator("hr").count() == 1
    expect(shown.locator("input[type=checkbox]")).to_be_checked()
    page.context.grant_permissions(["clipboard-read", "clipboard-write"])
    shown.get_by_role("button", name="Copy code").click()
    expect(page.locator("#announcer")).to_have_text("Copied")
    assert page.evaluate("navigator.clipboard.readText()").startswith("def double")


def test_markdown_that_grows_comes_to_the_same_as_at_once(idle, windows):
    page = windows(idle)
    different = page.evaluate(
        """async (text) => {
          const { Markdown, markdown } = await import("/static/markdown.js");
          const whole = markdown(text).innerHTML;
          const wrong = [];
          for (const size of [1, 2, 7, 50]) {
            const root = document.createElement("div");
            const growing = new Markdown(root);
            for (let at = 0; at < text.length; at += size) {
              growing.append(text.slice(at, at + size));
              growing.draw();
              const so_far = markdown(text.slice(0, at + size)).innerHTML;
              if (root.innerHTML !== so_far) wrong.push([size, at, root.innerHTML, so_far]);
            }
            if (root.innerHTML !== whole) wrong.push([size, "end", root.innerHTML, whole]);
          }
          return wrong.slice(0, 3);
        }""",
        RICH + EVIL,
    )
    assert different == []


LONG = {
    "prose": "A sentence with *some* `code` and [a link](https://example.org). " * 8 + "\n\n",
    "code": "```python\n" + "    value = compute(value, 12)  # again\n" * 3000,
    "marks": "*a **b _c ~~d `e ",
    "brackets": "[![[(<&",
    "nested": "".join(">" * depth + " - " * depth + "x\n" for depth in range(300)),
    "spaces": "# " + " " * 50_000 + "#" * 50_000 + "x\n",
}


MEASURE = """() => {
  const sums = new Map();
  for (let number = 0; number < 300_000; number += 1) {
    const name = `word${number % 5000}`;
    sums.set(name, (sums.get(name) ?? 0) + number);
  }
}"""


class Work:
    """What a page costs the processor, beside a known piece of work: so a slow machine says the same."""

    def __init__(self, page):
        self._page = page
        self._session = page.context.new_cdp_session(page)
        self._session.send("Performance.enable", {"timeDomain": "threadTicks"})
        self._measure = max(self._seconds(MEASURE, "")[0] for _ in range(3))

    def times(self, script, text):
        """How many times the measure (30 ms in 2026) a function of the text takes, and what it gives."""
        seconds, result = self._seconds(script, text)
        return seconds / self._measure, result

    def _seconds(self, script, text):
        before = self._so_far()
        result = self._page.evaluate(script, text)
        return self._so_far() - before, result

    def _so_far(self):
        metrics = self._session.send("Performance.getMetrics")["metrics"]
        return next(each["value"] for each in metrics if each["name"] == "ThreadTime")


def test_long_answers_are_drawn_quickly_whatever_is_in_them(idle, windows):
    work = Work(windows(idle))
    for kind, text in LONG.items():
        times, _ = work.times(
            """async (text) => {
              const { Markdown } = await import("/static/markdown.js");
              const growing = new Markdown(document.createElement("div"));
              for (let at = 0; at < text.length; at += 5000) {
                growing.append(text.slice(at, at + 5000));
                growing.draw();
              }
            }""",
            (text * (100_000 // len(text) + 1))[:100_000],
        )
        assert times < 130, kind  # for twenty drawings


HOSTILE = {
    "a wide table of short rows": "|a" * 300 + "\n" + "|-" * 300 + "\n" + "x\n" * 300,
    "a link of spaces": "[a](" + " " * 60_000 + "x",
    "brackets before addresses": "[" * 30_000 + " http://a.b" * 3000,
    "brackets around links": "[" * 100_000 + "a](http://a)" * 35_000,
    "a delimiter of spaces": "|\n-" + " " * 100_000 + "x",
    "addresses without a host": "http://[" * 45_000,
    "addresses with brackets behind": ("http://a" + ")" * 3900 + " ") * 120,
    "a fence of spaces": "```" + " " * 100_000 + "\r",
    "a heading of spaces": "# " + " " * 100_000 + "\r",
    "an item of spaces": "- " + " " * 100_000 + "\r",
    "many short lines": "|\n" * 150_000,
}


def test_no_text_takes_for_ever_or_becomes_more_elements_than_it_has_characters(idle, windows):
    work = Work(windows(idle))
    left = 160
    for name, text in HOSTILE.items():
        times, elements = work.times(
            """async (text) => {
              const { markdown } = await import("/static/markdown.js");
              return markdown(text).querySelectorAll("*").length;
            }""",
            text,
        )
        left -= times
        assert left > 0, name
        assert elements <= len(text), name


def test_short_rows_of_a_table_have_no_more_cells_than_they_need(idle, windows):
    page = windows(idle)
    draw = """async (text) => {
      const { markdown } = await import("/static/markdown.js");
      const cell = (node) => [node.textContent, node.colSpan];
      const drawn = markdown(text);
      const rows = [...drawn.querySelectorAll("tbody tr")].map((row) => [...row.cells].map(cell));
      return [rows, drawn.textContent];
    }"""
    table = "|a|b|c|\n|-|-|-|\n|1|2|3|4|\n|1|2|\n1\n"
    assert page.evaluate(draw, table)[0] == [
        [["1", 1], ["2", 1], ["3", 1]],
        [["1", 1], ["2", 1], ["", 1]],
        [["1", 1], ["", 2]],
    ]
    huge = "|a" * 600 + "\n" + "|-" * 600 + "\n" + "|x" * 600
    rows, text = page.evaluate(draw, huge)
    assert rows == []
    assert huge in text  # as it was written


def test_all_can_be_done_by_keyboard(chat, windows):
    page = windows(chat.url)
    expect(box(page)).to_be_focused()
    page.keyboard.type("one line")
    page.keyboard.press("Shift+Enter")
    page.keyboard.type("What is 12 x 12?")
    page.keyboard.press("Enter")
    see(answers(page), "144")
    expect(page.locator(".bubble")).to_have_text("one line\nWhat is 12 x 12?")
    page.keyboard.press("Alt+n")
    page.get_by_role("heading", name="New conversation").wait_for()
    expect(box(page)).to_be_focused()
    page.keyboard.type("What is 2 x 3?")
    page.keyboard.press("Enter")
    see(answers(page), "6")
    expect(page.locator("#list li")).to_have_count(2)

    page.keyboard.press("Control+k")
    page.keyboard.press("ArrowDown")
    page.keyboard.press("ArrowDown")
    expect(page.locator("#list a").nth(1)).to_be_focused()
    outline = "getComputedStyle(document.activeElement).outlineStyle"
    assert page.evaluate(outline) == "solid"
    page.keyboard.press("F2")
    page.keyboard.type("Twelves")
    page.keyboard.press("Enter")
    expect(page.locator("#list .name").nth(0)).to_have_text("Twelves")
    page.locator("#list a").nth(0).focus()
    page.keyboard.press("Enter")
    see(answers(page), "144")

    page.locator("#list a").nth(0).focus()
    page.keyboard.press("Tab")
    page.keyboard.press("Enter")
    expect(page.get_by_role("menuitem", name="Rename")).to_be_focused()
    page.keyboard.press("ArrowUp")
    expect(page.get_by_role("menuitem", name="Delete…")).to_be_focused()
    page.keyboard.press("Escape")
    page.keyboard.press("Delete")
    page.get_by_role("dialog", name="Delete this conversation?").wait_for()
    page.keyboard.press("Escape")
    page.keyboard.press("Control+/")
    page.get_by_role("dialog", name="Keyboard").wait_for()
    page.keyboard.press("Escape")

    page.reload()
    page.get_by_role("button", name="Skip to the message box").focus()
    page.keyboard.press("Enter")
    expect(box(page)).to_be_focused()


def test_the_end_of_an_answer_is_read_out_and_not_each_word(serve, held, windows):
    page = windows(serve(base_url=held.url).url)
    ask(page, "Tell me a story")
    see(answers(page), "Once upon")
    expect(page.locator("#announcer")).to_be_empty()
    assert page.locator("article [aria-live], [aria-live] article").count() == 0
    held.let_go.set()
    expect(page.locator("#announcer")).to_have_text("Answer: Once upon a time")


def test_every_button_and_field_has_a_name(chat, windows):
    page = windows(chat.url)
    hold_talk(page)
    nameless = "(nodes) => nodes.filter((node) => !(node.ariaLabel || node.textContent.trim()"
    nameless += " || node.labels?.length)).map((node) => node.outerHTML)"
    assert page.locator("button, a, input, textarea, select").evaluate_all(nameless) == []
    for landmark in ("main", "navigation", "search", "complementary"):
        assert page.get_by_role(landmark).count() == 1


def test_the_page_fits_a_phone(chat, server, windows):
    server.reply(RICH + "\n" + "wide" * 200)
    page = windows(chat.url, viewport={"width": 320, "height": 568}, has_touch=True, is_mobile=True)
    assert wide(page) <= 0
    box(page).fill("Show me " + "wide" * 60)
    page.get_by_role("button", name="Send message").tap()
    see(answers(page), "That is all.")
    assert wide(page) <= 0
    size = "(node) => parseFloat(getComputedStyle(node).fontSize)"
    assert box(page).evaluate(size) >= 16
    expect(page.locator("#sidebar")).not_to_be_in_viewport()
    page.get_by_role("button", name="Conversations").tap()
    expect(page.locator("#sidebar")).to_be_in_viewport()
    assert page.get_by_label("Search conversations").evaluate(size) >= 16
    page.get_by_role("link", name="Usage").tap()
    expect(page.locator("#sidebar")).not_to_be_in_viewport()
    page.locator(".chart svg").wait_for()
    assert wide(page) <= 0


def test_light_and_dark_follow_the_system_or_the_choice(idle, windows):
    paper = "getComputedStyle(document.body).backgroundColor"
    page = windows(idle, color_scheme="dark", reduced_motion="reduce")
    dark = page.evaluate(paper)
    page.emulate_media(color_scheme="light")
    light = page.evaluate(paper)
    assert (dark, light) == ("rgb(23, 24, 26)", "rgb(255, 255, 255)")
    theme = page.get_by_role("button", name=re.compile("Theme"))
    theme.click()
    theme.click()
    assert page.evaluate(paper) == dark
    page.reload()
    assert page.evaluate(paper) == dark
    expect(theme).to_have_accessible_name("Theme: dark")


def test_the_reader_who_scrolled_up_is_left_in_peace(serve, held, server, windows):
    chat = serve(base_url=held.url)
    name = chat.new()
    long = Stored(Message(role="user", content="line\n" * 80))
    chat.service.store.conversations.append(name, [long], 0)
    page = windows(f"{chat.url}/#/c/{name}")
    ask(page, "Tell me a story")
    see(answers(page).last, "Once upon")
    place = page.locator(".scroller")
    at_end = "(node) => node.scrollHeight - node.scrollTop - node.clientHeight < 3"
    assert place.evaluate(at_end)
    place.hover()
    page.mouse.wheel(0, -900)
    down = page.get_by_role("button", name="Go to the newest message")
    down.wait_for()
    before = place.evaluate("(node) => node.scrollTop")
    held.let_go.set()
    see(answers(page).last, "Once upon a time")
    assert place.evaluate("(node) => node.scrollTop") == before
    down.click()
    down.wait_for(state="hidden")
    assert place.evaluate(at_end)


def test_without_a_secure_context_messages_still_have_names_of_their_own(chat, windows):
    page = windows(chat.url, script="delete Crypto.prototype.randomUUID;")
    with page.expect_request("**/messages") as asked:
        hold_talk(page)
    assert re.fullmatch(r"[0-9a-f]{32}", asked.value.headers["idempotency-key"])


def test_a_draft_outlives_the_page(chat, windows):
    page = windows(chat.url)
    hold_talk(page)
    box(page).fill("Half a tho")
    page.goto(f"{chat.url}/#/")
    expect(box(page)).to_have_value("")
    page.go_back()
    expect(box(page)).to_have_value("Half a tho")
    page.reload()
    expect(box(page)).to_have_value("Half a tho")


@pytest.mark.skipif("CHAT_SCREENSHOTS" not in os.environ, reason="names the folder of the pictures")
def test_pictures_for_the_documentation(chat, server, windows):
    """`CHAT_SCREENSHOTS=docs/images`: writes chat-light, chat-dark, chat-phone and chat-usage.png."""
    folder = Path(os.environ["CHAT_SCREENSHOTS"])
    folder.mkdir(parents=True, exist_ok=True)
    for text in ("Plan a week in Lisbon", "Why is the sky blue?", "Name three sorting algorithms"):
        chat.say(chat.new(), text)
    page = windows(chat.url, viewport={"width": 1180, "height": 1020}, device_scale_factor=2)
    hold_talk(page, "What is 12 x 12?")
    answers(page).first.locator("details.call summary").click()
    server.reply(
        "As a function, with the **square** and the **cube** of a number:\n\n"
        "```python\ndef powers(number: int) -> tuple[int, int]:\n"
        "    return number**2, number**3\n```\n\n"
        "| number | square | cube |\n|---:|---:|---:|\n| 12 | 144 | 1728 |\n"
    )
    hold_talk(page, "Write that as a function, please")
    page.mouse.move(0, 0)
    page.get_by_role("button", name="Go to the newest message").or_(box(page)).first.focus()
    for name, scheme in (("light", "light"), ("dark", "dark")):
        page.emulate_media(color_scheme=scheme)
        page.wait_for_timeout(300)
        page.screenshot(path=folder / f"chat-{name}.png")
    page.emulate_media(color_scheme="light")
    page.goto(f"{chat.url}/#/usage")
    page.locator(".chart svg").wait_for()
    page.screenshot(path=folder / "chat-usage.png")
    phone = windows(
        chat.url,
        viewport={"width": 390, "height": 780},
        device_scale_factor=2,
        has_touch=True,
        is_mobile=True,
    )
    phone.get_by_role("button", name="Conversations").tap()
    phone.get_by_role("link", name="What is 12 x 12?").tap()
    expect(answers(phone)).to_have_count(2)
    phone.wait_for_timeout(300)
    phone.screenshot(path=folder / "chat-phone.png")


def test_a_double_click_on_send_sends_and_does_not_stop(serve, held, windows):
    chat = serve(base_url=held.url)
    # However long the browser takes, the second click comes at once.
    page = windows(chat.url, script="Performance.prototype.now = () => 1000;")
    box(page).fill("Tell me a story")
    page.get_by_role("button", name="Send message").dblclick()
    expect(answers(page)).to_contain_text("Once upon")
    held.let_go.set()
    expect(answers(page)).to_contain_text("Once upon a time")
    assert chat.messages(only_conversation(chat))[-1]["status"] == "ok"


@pytest.mark.parametrize("before", ["conversation", "message"])
def test_what_is_stopped_before_it_is_sent_is_given_back(chat, windows, before):
    windows.forgive("ERR_")
    page = windows(chat.url, script=HASTY if before == "message" else "")
    path = "**/conversations" if before == "conversation" else "**/messages"
    late = []
    once(page, path, late.append)
    ask(page, "What is 12 x 12?")
    expect(page.get_by_role("article", name="Your message")).to_be_visible()
    if before == "message":
        expect(page.locator("#list li")).to_have_count(1)
    page.keyboard.press("Escape")
    if before == "conversation":
        late[0].continue_()
    expect(status(page)).to_have_text("Not sent.")
    expect(box(page)).to_have_value("What is 12 x 12?")
    expect(page.locator("#list li")).to_have_count(0)
    expect(page.get_by_role("heading", name="New conversation")).to_be_visible()
    assert chat.ask("GET", "/conversations").json()["data"] == []
    page.reload()
    expect(box(page)).to_have_value("What is 12 x 12?")
    box(page).press("Enter")
    expect(answers(page)).to_contain_text("144")


def test_an_error_is_shown_with_its_title_and_the_id_of_the_request(chat, windows):
    windows.forgive("status of 503")
    page = windows(chat.url)
    once(
        page,
        "**/messages",
        lambda route: route.fulfill(
            status=503,
            headers={"content-type": "application/problem+json"},
            body='{"title": "Too busy", "status": 503, "detail": "try again", "request_id": "abc1"}',
        ),
    )
    ask(page, "What is 12 x 12?")
    expect(status(page)).to_contain_text("Too busy. Try again.")
    expect(status(page).locator(".request")).to_have_text("Request abc1")


def test_an_error_of_the_model_has_the_id_of_the_request_too(chat, server, windows):
    server.reply("no", status=400)
    page = windows(chat.url)
    with page.expect_response("**/messages") as asked:
        ask(page, "What is 12 x 12?")
    name = asked.value.headers["x-request-id"]
    expect(status(page)).to_contain_text(f"Request {name}")


def test_what_was_said_in_another_window_is_shown_in_its_place(chat, windows):
    name = chat.new(title="Sums")
    chat.say(name, "What is 2 x 3?")
    page = windows(f"{chat.url}/#/c/{name}")
    expect(answers(page)).to_have_count(1)
    chat.say(name, "What is 20 x 20?")
    ask(page, "What is 12 x 12?")
    expect(answers(page)).to_have_count(3)
    said = page.get_by_role("article", name="Your message").locator(".bubble")
    expect(said).to_have_text(["What is 2 x 3?", "What is 20 x 20?", "What is 12 x 12?"])


def test_a_window_that_is_looked_at_again_shows_what_was_said_elsewhere(chat, windows):
    name = chat.new(title="Sums")
    chat.say(name, "What is 2 x 3?")
    page = windows(f"{chat.url}/#/c/{name}")
    expect(answers(page)).to_have_count(1)
    look = "document.dispatchEvent(new Event('visibilitychange'))"
    chat.say(name, "What is 20 x 20?")
    page.evaluate(look)
    expect(answers(page)).to_have_count(2)
    message = page.get_by_role("article", name="Your message").last
    message.hover()
    message.get_by_role("button", name="Edit message").click()
    page.get_by_label("Edited message").fill("What is 7 x 7?")
    chat.say(name, "What is 12 x 12?")
    with page.expect_response("**/conversations?**"):
        page.evaluate(look)
    expect(page.get_by_label("Edited message")).to_have_value("What is 7 x 7?")


@pytest.mark.parametrize("cost", ["null", '"0"'])
def test_a_cost_that_is_not_known_is_never_shown_as_nothing(chat, windows, cost):
    row = '"calls": 2, "prompt_tokens": 7, "completion_tokens": 4, "interrupted": 0'
    known = f'{{"day": "2026-11-20", "model": "a", {row}, "cost": "1.5", "unpriced": 1}}'
    unknown = f'{{"day": "2026-11-20", "model": "b", {row}, "cost": {cost}, "unpriced": 2}}'
    usages = [
        f'{{"days": [{unknown}], "total": {{{row}, "cost": {cost}, "unpriced": 2}}}}',
        f'{{"days": [{known}, {unknown}], "total": {{{row}, "cost": "1.5", "unpriced": 3}}}}',
    ]
    page = windows(chat.url)
    json = "application/json"
    page.route("**/usage?**", lambda route: route.fulfill(body=usages.pop(0), content_type=json))
    expect(box(page)).to_be_focused()
    page.keyboard.press("Alt+u")
    expect(page.locator(".cards .card").first).to_contain_text("unknown")
    expect(page.locator(".usage-table tbody td").last).to_have_text("unknown")
    assert "$0" not in page.locator(".usage").inner_text()
    page.get_by_role("button", name="7 days").click()
    expect(page.locator(".cards .card").first).to_contain_text("≥ $1.50")
    costs = page.locator(".usage-table tbody td:last-child")
    expect(costs).to_have_text(["≥ $1.50", "unknown"])
    expect(page.locator("g.day title", has_text="≥ $1.50")).to_have_count(1)


def test_a_conversation_has_a_title_from_its_first_message_on(serve, held, windows):
    page = windows(serve(base_url=held.url).url)
    ask(page, "Tell me\na long   story")
    expect(answers(page)).to_contain_text("Once upon")
    expect(page.get_by_role("heading", name="Tell me a long story")).to_be_visible()
    expect(page.locator("#list .name")).to_have_text("Tell me a long story")
    expect(page).to_have_title("Tell me a long story · Chat")


def test_what_is_written_from_right_to_left_stands_on_the_right(chat, server, windows):
    server.reply("שלום עולם\n\n- אחת\n\nHello, world")
    page = windows(chat.url)
    hold_talk(page, "مرحبا بالعالم")
    first = "(node) => { const range = document.createRange(); range.selectNodeContents(node);"
    first += " const text = range.getBoundingClientRect(), box = node.getBoundingClientRect();"
    first += " return [text.left - box.left, box.right - text.right]; }"
    paragraphs = answers(page).locator(".markdown > p")
    left, right = paragraphs.first.evaluate(first)
    assert right < 1 < left
    left, right = paragraphs.last.evaluate(first)
    assert left < 1 < right
    for name in ("#box", ".bubble", "#list .name", "h1 button"):
        expect(page.locator(name)).to_have_attribute("dir", "auto")


@pytest.mark.parametrize("nothing", [" \n\t ", "\u200b", "\u00a0\u2003"])
def test_white_space_alone_is_not_sent(chat, windows, nothing):
    page = windows(chat.url)
    ask(page, nothing)
    expect(page.get_by_role("button", name="Send message")).to_be_disabled()
    expect(page.get_by_role("article")).to_have_count(0)
    assert chat.ask("GET", "/conversations").json()["data"] == []


def test_the_list_says_what_a_conversation_cost(chat, windows):
    page = windows(chat.url)
    hold_talk(page)
    cost = page.locator("#totals").inner_text().split(" · ")[1]
    expect(page.locator("#list .row-facts")).to_contain_text(cost)


def test_an_answer_that_is_told_again_is_shown_whole(chat, windows, wire):
    windows.forgive("ERR_|Failed to load resource")
    line = wire(chat)
    page = windows(line.url)
    hold_talk(page, "What is 2 x 3?")
    name = only_conversation(chat)

    def lose(route):
        key = route.request.headers["idempotency-key"]
        chat.say(name, "What is 12 x 12?", headers={"idempotency-key": key})
        line.refusing = True
        line.cut()
        route.abort()

    once(page, "**/messages", lose)
    ask(page, "What is 12 x 12?")
    expect(status(page)).to_contain_text("cannot be reached")
    line.refusing = False
    page.get_by_role("button", name="Try again").click()
    expect(answers(page)).to_have_count(2)
    expect(answers(page).last.locator("details.call")).to_contain_text("calculator")
    expect(answers(page).last.locator(".markdown")).to_contain_text("144")
    expect(box(page)).to_have_value("")
    assert len([m for m in chat.messages(name) if m["role"] == "user"]) == 2


def test_what_is_too_long_for_the_service_is_given_back(serve, windows):
    windows.forgive("status of 413|ERR_")
    chat = serve(max_body_bytes=100_000)
    page = windows(chat.url)
    box(page).fill("word " * 30_000)
    box(page).press("Enter")
    expect(status(page)).to_contain_text("Too large")
    assert len(box(page).input_value()) == 150_000
    assert chat.ask("GET", "/conversations").json()["data"] == []
    ask(page, "word " * 2_000)
    expect(answers(page)).to_have_count(1)
    expect(box(page)).to_have_value("")


def test_a_local_user_who_is_too_quick_is_told_how_long_to_wait(serve, windows):
    windows.forgive("status of 429")
    chat = serve(requests_per_minute=8)
    name = chat.new(title="Sums")
    page = windows(f"{chat.url}/#/c/{name}")
    expect(page.get_by_role("heading", name="Sums")).to_be_visible()
    while chat.ask("GET", "/session").status_code == 200:
        pass
    ask(page, "What is 2 x 3?")
    said = r"Too many requests\. Not more than 8 a minute\. Wait \d+ s\."
    expect(status(page)).to_contain_text(re.compile(said))
    expect(box(page)).to_have_value("What is 2 x 3?")
    expect(page.get_by_role("button", name="Send message")).to_be_disabled()


# Of what the service does not answer the page hears after 45 seconds; here after one.
IMPATIENT = HASTY.replace("1500 ? 50", "45000 ? 1000")


@pytest.mark.parametrize("path", ["**/conversations?*", "**/messages"])
def test_a_service_that_never_answers_is_told(chat, windows, path):
    windows.forgive("ERR_")
    page = windows(chat.url, script=IMPATIENT)
    hold_talk(page, "What is 2 x 3?")
    page.route(path, lambda _: None)  # takes the request, and says nothing
    if path.endswith("messages"):
        ask(page, "What is 12 x 12?")
    else:
        page.get_by_role("searchbox").fill("sum")
    expect(page.get_by_text("does not answer").first).to_be_visible()
