"""The coordinator's page: its routes refuse foreign names, and in a real browser every state shows, no text becomes markup, nothing else is asked."""

import asyncio
import re
import socket
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, get_args

import httpx
import pytest
import uvicorn
from hatchling.builders.wheel import WheelBuilder
from starlette.applications import Starlette

from server.page import PAGE, content_security_policy, page_routes
from server.status import (
    AuditHead,
    CoordinatorStatus,
    Failure,
    Fault,
    HistoryPoint,
    SiteState,
    SiteStatus,
    StudySite,
    StudyState,
    StudyStatus,
)
from shared.errors import StorageError
from shared.results import Status
from wardround.report.wording import metric_title

CHROMIUM = Path("/usr/bin/chromium")
BROWSER_ARGUMENTS = ["--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-component-update", "--disable-sync"]
NOW = datetime(2026, 3, 4, 12, 0, tzinfo=UTC)
HOSTILE = "<img src=x onerror=\"fetch('/stolen')\"><script>fetch('/stolen')</script>"
HEAD = "3f9a" * 16


# A coordinator, made up -----------------------------------------------------------------------------------------------------------


def status_of(*, sites: tuple[SiteStatus, ...] = (), studies: tuple[StudyStatus, ...] = (), **changes: object) -> CoordinatorStatus:
    """A coordinator of these sites and studies."""
    fields: dict[str, object] = {
        "federation": "heart-consortium",
        "wardround": "0.1.0",
        "time": NOW,
        "started": NOW - timedelta(hours=5),
        "generation": 7,
        "quorum": 2,
        "sites": sites,
        "studies": studies,
        "audit": AuditHead(head=HEAD, rows=1284),
    }
    return CoordinatorStatus.model_validate({**fields, **changes})


def running(number: int = 12) -> StudyStatus:
    """A study in the middle, with everything that a card can show."""
    values = [0.62 + 0.22 * (1 - 0.8**index) for index in range(1, number)]
    history = [HistoryPoint(round=index, value=value, low=value - 0.05, high=value + 0.04) for index, value in enumerate(values, start=1)]
    late = "E801 A site's answer did not come before the deadline."
    return StudyStatus(
        run="heart-disease-20260304T115500Z-1a2b",
        study="heart-disease",
        task="heart-disease",
        state="running",
        round=number,
        rounds=30,
        submitted=NOW - timedelta(minutes=5),
        metric="auroc",
        history=tuple(history),
        seconds_per_round=4.2,
        epsilon_asked=3.0,
        sites=(
            StudySite(name="cleveland", status="ok", epsilon=1.2344),
            StudySite(name="hungary", status="missing", reason=late, epsilon=1.1),
            StudySite(name="switzerland", status="refused", reason="E700 The ledger has no room left for what was asked.", epsilon=2.9),
            StudySite(name="va", status="failed", reason="E101 The site's own code failed; its log says why."),
            StudySite(name="zürich", status="not asked", epsilon=0.4),
            StudySite(name="basel", status="at work", epsilon=0.6),
        ),
        faults=(
            *(Fault(round=at, site="hungary", status="missing", reason=late) for at in range(number, 2, -1)),
            Fault(round=2, site="switzerland", status="refused", reason="E700 The ledger has no room left for what was asked."),
        ),
    )


def ended(state: StudyState, *, index: int, error: Failure | None = None) -> StudyStatus:
    """A study without rounds in `state`."""
    name = state.replace(" ", "-")
    submitted = NOW - timedelta(hours=index + 1)
    return StudyStatus(run=f"{name}-20260304T080000Z-{index:04x}", study=name, task="tiny", state=state, rounds=5, submitted=submitted, error=error)


def everything() -> CoordinatorStatus:
    """Every state of a site, of a study and of an answer at once."""
    approved = NOW + timedelta(days=200)
    contact = {"online": NOW - timedelta(seconds=4), "offline": NOW - timedelta(minutes=47), "revoked": NOW - timedelta(days=12)}
    sites = tuple(
        SiteStatus(
            name=f"hospital-{index}",
            state=state,
            last_contact=contact.get(state),
            expires=None if state == "awaiting approval" else approved,
            declared_size=None if state == "awaiting approval" else 100 * index + 1200,
        )
        for index, state in enumerate(get_args(SiteState))
    )
    error = Failure(
        code="E800", what="round 3: expected usable answers of 2 sites, got 1: va: E801 too late", remedy="mend the named sites and resume"
    )
    studies = tuple(
        running() if state == "running" else ended(state, index=index, error=error if state == "failed" else None)
        for index, state in enumerate(get_args(StudyState))
    )
    return status_of(sites=sites, studies=studies, warnings=("hospital-1: its approval ends in 12 days; run wardround renew",))


# Routes ---------------------------------------------------------------------------------------------------------------------------


def ask(
    path: str, *, method: str = "GET", headers: list[tuple[str, str]] | None = None, status: Callable[[], CoordinatorStatus] | None = None
) -> httpx.Response:
    """The routes' answer, without a socket between: so that a Host reaches them which no server would let through."""

    async def answer() -> httpx.Response:
        transport = httpx.ASGITransport(Starlette(routes=page_routes(status or everything)))
        async with httpx.AsyncClient(transport=transport, base_url="http://localhost:8480") as client:
            return await client.request(method, path, headers=headers)

    return asyncio.run(answer())


def test_status_json_is_the_model() -> None:
    response = ask("/status.json")
    assert response.status_code == 200 and response.headers["content-type"] == "application/json"
    assert CoordinatorStatus.model_validate_json(response.content) == everything()
    body = response.json()
    assert (body["schema_version"], body["time"], body["sites"][2]["last_contact"]) == (1, "2026-03-04T12:00:00Z", None)


@pytest.mark.parametrize("host", ["localhost", "LOCALHOST:8480", "127.0.0.1:1", "127.0.0.1", "[::1]:8480", "[::1]"])
@pytest.mark.parametrize("path", ["/", "/status.json"])
def test_a_name_of_this_machine_is_answered(host: str, path: str) -> None:
    assert ask(path, headers=[("Host", host)]).status_code == 200


@pytest.mark.parametrize(
    "host",
    ["evil.example", "evil.example:8480", "localhost.evil.example", "evil.example#localhost", "127.0.0.1.evil.example", "127.0.0.2", "0.0.0.0:8480",
     "localhost:8480@evil.example", "localhost:", "localhost:port", "localhost:123456", "[::1", "::1", "", " ", "localhost\t.evil"],
)  # fmt: skip
@pytest.mark.parametrize("path", ["/", "/status.json"])
def test_a_foreign_host_finds_nothing(host: str, path: str) -> None:
    asked: list[str] = []

    def status() -> CoordinatorStatus:
        asked.append(path)
        return everything()

    response = ask(path, headers=[("Host", host)], status=status)
    assert (response.status_code, response.content, asked) == (404, b"Not Found", [])


def test_two_host_headers_are_refused() -> None:
    response = ask("/status.json", headers=[("Host", "localhost"), ("Host", "localhost")])
    assert response.status_code == 404


@pytest.mark.parametrize("method", ["POST", "PUT", "DELETE", "PATCH", "OPTIONS"])
@pytest.mark.parametrize("path", ["/", "/status.json"])
def test_nothing_but_reading(method: str, path: str) -> None:
    assert ask(path, method=method).status_code == 405


@pytest.mark.parametrize("path", ["/", "/status.json"])
def test_headers_forbid_what_is_not_needed(path: str) -> None:
    headers = ask(path).headers
    assert headers["x-content-type-options"] == "nosniff" and headers["referrer-policy"] == "no-referrer" and headers["cache-control"] == "no-store"
    assert "set-cookie" not in headers and "access-control-allow-origin" not in headers


def test_the_policy_names_the_page_s_own_style_and_script_alone() -> None:
    policy = ask("/").headers["content-security-policy"]
    rules = dict(rule.split(" ", 1) for rule in policy.split("; "))
    assert rules["default-src"] == "'none'" and rules["connect-src"] == "'self'" and rules["frame-ancestors"] == "'none'"
    assert all(re.fullmatch(r"'sha256-[A-Za-z0-9+/]{43}='", rules[name]) for name in ("script-src", "style-src"))
    assert "unsafe" not in policy and "*" not in policy
    html = PAGE.read_text(encoding="utf-8")
    assert content_security_policy(html.replace("const POLL", "let POLL")) != policy


def test_the_page_has_neither_addresses_nor_a_way_to_markup() -> None:
    html = PAGE.read_text(encoding="utf-8")
    assert set(re.findall(r"https?://[^\"' )]*", html)) == {"http://www.w3.org/2000/svg"}
    assert not re.search(
        r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|DOMParser|eval\(|new Function|localStorage|cookie| style=| on\w+=", html
    )


def test_an_error_of_ours_is_told_with_its_remedy() -> None:
    def broken() -> CoordinatorStatus:
        raise StorageError("the roster could not be read", "restore it")

    response = ask("/status.json", status=broken)
    assert response.status_code == 503 and response.json() == {"code": "E103", "what": "the roster could not be read", "remedy": "restore it"}


def test_the_page_is_in_the_wheel() -> None:
    included = {file.distribution_path for file in WheelBuilder(str(Path(__file__).parents[2])).recurse_included_files()}
    assert {"server/page.html", "server/page.py"} <= included


def test_metrics_are_named_as_in_the_report() -> None:
    block = re.search(r"METRIC_TITLES = \{(.*?)\};", PAGE.read_text(encoding="utf-8"), re.S)
    assert block is not None
    titles = dict(re.findall(r'(\w+): "([^"]+)"', block[1]))
    assert len(titles) >= 9
    assert titles == {name: metric_title(name) for name in titles}


# In a browser ---------------------------------------------------------------------------------------------------------------------


@dataclass(kw_only=True)
class Desk:
    """A coordinator's page on loopback, whose status a test sets; it may go away and come back."""

    status: CoordinatorStatus
    failing: StorageError | None = None
    port: int = 0
    server: uvicorn.Server | None = None
    thread: threading.Thread | None = None
    paths: list[str] = field(default_factory=list)  # that were asked for

    @property
    def address(self) -> str:
        """Of the page."""
        return f"http://127.0.0.1:{self.port}/"

    def answer(self) -> CoordinatorStatus:
        """What the page is told."""
        if self.failing is not None:
            raise self.failing
        return self.status

    def start(self) -> None:
        """Serve until `stop`, at the port of before where there was one."""
        listener = socket.create_server(("127.0.0.1", self.port))
        self.port = listener.getsockname()[1]
        app = Starlette(routes=page_routes(self.answer))

        async def noted(scope: Any, receive: Any, send: Any) -> None:
            self.paths.append(scope["path"])
            await app(scope, receive, send)

        self.server = uvicorn.Server(uvicorn.Config(noted, log_level="critical", lifespan="off", ws="none", timeout_graceful_shutdown=1))
        self.thread = threading.Thread(target=self.server.run, args=([listener],), daemon=True)
        self.thread.start()
        assert httpx.get(self.address, timeout=20).status_code == 200

    def stop(self) -> None:
        """No longer listening when this returns."""
        if self.server is None or self.thread is None:
            return
        self.server.should_exit = True
        self.thread.join(timeout=20)
        assert not self.thread.is_alive()
        self.server = self.thread = None


@dataclass(kw_only=True)
class Visit:
    """A page in the browser, and all that it asked for or complained of."""

    page: Any  # Playwright's, which is imported where it is used
    asked: list[str] = field(default_factory=list)
    said: list[str] = field(default_factory=list)


@pytest.fixture
def desk() -> Iterator[Desk]:
    desk = Desk(status=everything())
    desk.start()
    yield desk
    desk.stop()


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    sync_api = pytest.importorskip("playwright.sync_api")
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=str(CHROMIUM), headless=True, args=BROWSER_ARGUMENTS)
        yield browser
        browser.close()


@pytest.fixture
def visit(desk: Desk, browser: Any) -> Iterator[Callable[..., Visit]]:
    contexts = []

    def open_page(*, width: int = 1200, scheme: str = "light") -> Visit:
        context = browser.new_context(viewport={"width": width, "height": 900}, color_scheme=scheme)
        contexts.append(context)
        page = context.new_page()
        visit = Visit(page=page)
        page.on("request", lambda request: visit.asked.append(request.url))
        page.on("console", lambda message: visit.said.append(message.text))
        page.on("pageerror", lambda error: visit.said.append(str(error)))
        page.goto(desk.address)
        page.get_by_text("live, updated").wait_for()
        return visit

    yield open_page
    for context in contexts:
        context.close()


def in_a_browser(test: Callable[..., None]) -> Callable[..., None]:
    """A test that needs Debian's chromium."""
    skipped = pytest.mark.skipif(not CHROMIUM.exists(), reason="needs /usr/bin/chromium: apt-get install chromium")
    return pytest.mark.slow(pytest.mark.browser(skipped(test)))


def next_status(visit: Visit) -> None:
    """Return when the page has asked once more and drawn what came."""
    visit.page.wait_for_event("requestfinished", timeout=20_000)


@in_a_browser
@pytest.mark.parametrize("width", [400, 1200])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_everything_shows_and_nothing_overflows(visit: Callable[..., Visit], width: int, scheme: str) -> None:
    seen = visit(width=width, scheme=scheme)
    page = seen.page
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    assert page.locator("#sites tbody tr").count() == len(get_args(SiteState))
    assert page.locator("article.study").count() == len(get_args(StudyState))
    text = page.locator("body").inner_text()
    for state in (*get_args(SiteState), *get_args(StudyState), *get_args(Status)):
        assert state in text, state
    for words in (
        "heart-consortium", "roster generation 7", "quorum 2", "wardround 0.1.0", "1 of 6 sites online", "12 of 30 rounds", "4.2 s a round",
        "47 min ago", "1.235 of 3", "42 % of what was planned", "rounds 3–12", "AUROC over all sites, 95 % interval", "E700 The ledger has no room left", "E800",
        "mend the named sites and resume", "its approval ends in 12 days", "1,284 rows", HEAD[:16],
    ):  # fmt: skip
        assert words in text, words
    assert page.locator("#audit-head summary code").get_attribute("title") == HEAD
    assert page.get_by_role("progressbar", name="heart-disease").get_attribute("aria-valuetext") == "12 of 30 rounds"
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") == {"light": "rgb(255, 255, 255)", "dark": "rgb(17, 22, 28)"}[scheme]
    assert seen.said == []
    assert set(seen.asked) <= {page.url, f"{page.url}status.json", "data:,"}


@in_a_browser
def test_states_differ_by_more_than_colour(visit: Callable[..., Visit]) -> None:
    page = visit().page
    drawn = page.evaluate("""[...document.querySelectorAll('.state')].map(state => {
        const path = state.querySelector('path');
        return [state.textContent, path.getAttribute('d') + (getComputedStyle(path).fill === 'none' ? '' : ' filled')];
    })""")
    shapes = dict(drawn)
    for states in (get_args(SiteState), get_args(StudyState), get_args(Status)):
        assert len({shapes[state] for state in states}) == len(states)


@in_a_browser
def test_the_curve_is_where_the_numbers_are(visit: Callable[..., Visit]) -> None:
    """The points of the drawing, read back in pixels, lie on one line with their values; the band reaches from low to high."""
    page = visit().page
    plot = page.locator("article.study svg.plot").first
    assert "from 0.664 after round 1" in str(plot.get_attribute("aria-label"))
    history = running().history
    dots = plot.evaluate(
        "plot => [...plot.querySelectorAll('.dot')].map(dot => [parseFloat(dot.getAttribute('cx')), parseFloat(dot.getAttribute('cy'))])"
    )
    assert [x for x, _ in dots] == pytest.approx([100 * point.round / 30 for point in history], abs=0.01)
    values = [point.value for point in history if point.value is not None]
    slope = (dots[-1][1] - dots[0][1]) / (values[-1] - values[0])
    assert slope < 0
    assert [y for _, y in dots] == pytest.approx([dots[0][1] + slope * (value - values[0]) for value in values], abs=0.02)
    band = plot.evaluate("plot => { const box = plot.querySelector('.band').getBBox(); return [box.y / 10, (box.y + box.height) / 10]; }")
    ends = [min(point.low for point in history if point.low is not None), max(point.high for point in history if point.high is not None)]
    assert band == pytest.approx([dots[0][1] + slope * (end - values[0]) for end in reversed(ends)], abs=0.2)


@in_a_browser
def test_a_chart_is_there_once_it_has_a_point(desk: Desk, visit: Callable[..., Visit]) -> None:
    unknown = tuple(HistoryPoint(round=index, value=None) for index in range(1, 5))
    desk.status = status_of(studies=(running().model_copy(update={"history": unknown, "metric": None}),))
    page = visit().page
    figure, table = page.locator("article.study figure"), page.locator("article.study table")
    assert not figure.is_visible() and table.is_visible()
    assert table.bounding_box()["width"] > 1000  # the whole card is the table's
    desk.status = status_of(studies=(running(),))
    page.locator("svg.plot").wait_for()
    assert figure.is_visible() and table.bounding_box()["width"] < 600


@in_a_browser
def test_what_sites_say_alike_is_said_once(desk: Desk, visit: Callable[..., Visit]) -> None:
    withheld, own = "policy.exact_metrics: statistics leave with noise only", "E101 The site's own code failed; its log says why."
    sites = (*(StudySite(name=name, status="ok", reason=withheld) for name in ("a", "b", "c")), StudySite(name="d", status="failed", reason=own))
    faults = tuple(Fault(round=at, site=name, status="failed", reason=own) for at in (9, 8, 7, 4) for name in ("d", "e"))
    desk.status = status_of(studies=(running().model_copy(update={"sites": sites, "faults": faults}),))
    page = visit(width=400).page
    card = page.locator("article.study")
    assert card.inner_text().count(withheld) == 1 and card.locator(".shared li").all_inner_texts() == [f"a, b, c: {withheld}"]
    assert card.locator(".answers tbody tr").nth(3).inner_text().count(own) == 1
    assert [text.split("\n")[0] for text in card.locator(".faults li").all_inner_texts()] == ["rounds 7–9", "rounds 7–9", "round 4", "round 4"]


@in_a_browser
def test_a_budget_spent_as_planned_does_not_alarm(desk: Desk, visit: Callable[..., Visit]) -> None:
    sites = (
        StudySite(name="planned", status="ok", epsilon=3.0), StudySite(name="refusing", status="refused", reason="E700 no room", epsilon=0.5),
        StudySite(name="beyond", status="ok", epsilon=3.1),
    )  # fmt: skip
    desk.status = status_of(studies=(running().model_copy(update={"sites": sites}),))
    page = visit().page
    fills = page.evaluate("[...document.querySelectorAll('.bar .spent')].map(bar => getComputedStyle(bar).fill)")
    assert fills == ["rgb(0, 114, 178)", "rgb(200, 80, 10)", "rgb(200, 80, 10)"]
    assert page.get_by_text("100 % of what was planned").count() == 1


@in_a_browser
def test_a_hostile_text_is_text_everywhere(desk: Desk, visit: Callable[..., Visit]) -> None:
    study = running().model_copy(
        update={
            "run": HOSTILE, "study": HOSTILE, "task": HOSTILE, "metric": HOSTILE, "error": Failure(code=HOSTILE, what=HOSTILE, remedy=HOSTILE),
            "sites": (StudySite(name=HOSTILE, status="refused", reason=HOSTILE, epsilon=1.0),),
            "faults": (Fault(round=1, site=HOSTILE, status="refused", reason=HOSTILE),),
        }
    )  # fmt: skip
    desk.status = status_of(
        sites=(SiteStatus(name=HOSTILE, state="online"),), studies=(study,), federation=HOSTILE, wardround=HOSTILE, warnings=(HOSTILE,)
    )
    seen = visit(width=400)
    page = seen.page
    assert page.evaluate("[document.querySelectorAll('img').length, document.querySelectorAll('body script').length]") == [0, 1]
    assert page.locator("h1").inner_text() == HOSTILE
    assert page.locator("#sites tbody th span").inner_text() == HOSTILE
    assert page.locator("article h3").inner_text() == HOSTILE
    assert page.locator("body").inner_text().count(HOSTILE) >= 12
    assert page.evaluate("document.documentElement.scrollWidth") <= 400
    assert seen.said == [] and set(desk.paths) == {"/", "/status.json"}


@in_a_browser
def test_a_script_that_gets_in_does_not_run(desk: Desk, visit: Callable[..., Visit]) -> None:
    """The policy holds by itself, should the page's own care ever fail."""
    seen = visit()
    page = seen.page
    refused = """attempt => {
        const box = document.body.appendChild(document.createElement('p'));
        try { attempt === 'markup' ? box.innerHTML = '<img src=x>' : box.setAttribute('onclick', 'window.stolen = 1'); } catch (error) { return error.name; }
    }"""
    assert [page.evaluate(refused, attempt) for attempt in ("markup", "handler")] == ["TypeError", "TypeError"]
    page.evaluate("document.body.appendChild(document.createElement('img')).src = '/picture'")
    page.evaluate("document.head.appendChild(document.createElement('link')).setAttribute('href', '/style')")
    page.evaluate("Object.assign(document.head.lastChild, { rel: 'stylesheet' })")
    next_status(seen)
    assert page.evaluate("window.stolen") is None
    assert set(desk.paths) == {"/", "/status.json"}
    assert sum("Content Security Policy" in text for text in seen.said) >= 2


@in_a_browser
def test_empty_states_say_what_to_do(desk: Desk, visit: Callable[..., Visit]) -> None:
    desk.status = status_of(audit=AuditHead(head="", rows=0))
    page = visit(width=400).page
    assert page.get_by_text("wardround study submit").is_visible() and page.get_by_text("wardround provision").is_visible()
    assert page.get_by_text("Nothing has been written to the audit log yet").is_visible()
    assert not page.locator("#sites").is_visible() and not page.locator("#warnings").is_visible() and not page.locator("#audit-head").is_visible()
    desk.status = everything()
    page.locator("article.study").first.wait_for()
    assert not page.get_by_text("wardround study submit").is_visible()


@in_a_browser
def test_changes_come_in_place_and_are_told(desk: Desk, visit: Callable[..., Visit]) -> None:
    """A changed status changes words and lengths, and neither the elements nor their place, the focus or what was opened."""
    page = visit().page
    page.locator("#audit-head summary").focus()
    page.keyboard.press("Enter")
    page.locator("#audit-head code.whole").wait_for()
    before = page.evaluate(
        "window.kept = [...document.querySelectorAll('section, article, tr, h3, progress')]; kept.map(e => e.getBoundingClientRect().top)"
    )
    study = running()
    later = running(13).model_copy(update={"faults": study.faults})
    sites = tuple(site.model_copy(update={"state": "online"}) if site.state == "offline" else site for site in desk.status.sites)
    studies = tuple(later if other.run == study.run else other for other in desk.status.studies)
    desk.status = desk.status.model_copy(update={"sites": sites, "studies": studies, "time": NOW + timedelta(seconds=2)})
    page.get_by_text("13 of 30 rounds").wait_for()
    assert page.locator("#news").inner_text() == "site hospital-1: online"
    assert page.get_by_text("2 of 6 sites online").is_visible()
    assert page.locator("article.study progress").first.get_attribute("value") == "13"
    assert page.locator("article.study svg.plot").first.locator(".dot").count() == 12
    after = page.evaluate(
        "[...document.querySelectorAll('section, article, tr, h3, progress')].map((e, i) => e === kept[i] && e.getBoundingClientRect().top)"
    )
    assert after == before
    assert page.evaluate("document.activeElement.tagName + document.activeElement.parentElement.open") == "SUMMARYtrue"


@in_a_browser
def test_studies_come_and_go_and_change_places(desk: Desk, visit: Callable[..., Visit]) -> None:
    page = visit().page
    names = page.locator("article.study h3")
    assert names.all_inner_texts() == ["heart-disease", "queued", "waiting-for-sites", "completed", "failed", "stopped", "interrupted"]
    new = ended("queued", index=-1).model_copy(update={"study": "newest", "run": "newest-run"})
    kept = [study.model_copy(update={"state": "completed"}) if study.state == "running" else study for study in desk.status.studies]
    desk.status = desk.status.model_copy(update={"studies": (*(study for study in kept if study.study != "failed"), new)})
    page.get_by_text("newest-run", exact=True).wait_for()
    assert names.all_inner_texts() == ["newest", "queued", "waiting-for-sites", "heart-disease", "completed", "stopped", "interrupted"]


@in_a_browser
def test_a_lost_connection_is_said_and_found_again(desk: Desk, visit: Callable[..., Visit]) -> None:
    seen = visit(width=400)
    page = seen.page
    top = page.locator("#sites-title").bounding_box()
    desk.stop()
    line = page.locator("#connection")
    page.locator("#connection", has_text=re.compile("connection lost, last seen .*; asking again")).wait_for(timeout=20_000)
    assert page.locator("#news").inner_text() == "connection lost. What is shown may be out of date."
    assert page.title().startswith("(no connection)")
    assert page.get_by_text("hospital-0").is_visible()  # what was known stays
    assert page.locator("#sites-title").bounding_box() == top
    page.locator("#connection", has_text=re.compile("asking again in [5-8] s")).wait_for(timeout=20_000)  # ever less often
    desk.start()
    page.get_by_text("live, updated").wait_for(timeout=40_000)
    assert "lost" not in line.inner_text() and page.locator("#news").inner_text() == "connected again"
    assert page.title() == "heart-consortium · Wardround coordinator"


@in_a_browser
def test_an_error_of_the_coordinator_is_shown_with_its_code(desk: Desk, visit: Callable[..., Visit], monkeypatch: pytest.MonkeyPatch) -> None:
    page = visit().page
    with monkeypatch.context() as patch:
        patch.setattr(desk, "failing", StorageError("the roster could not be read"))
        page.locator("#connection", has_text="the coordinator answers with an error: E103 the roster could not be read").wait_for()
    page.get_by_text("live, updated").wait_for(timeout=20_000)


@in_a_browser
def test_the_keyboard_and_a_screen_reader_find_their_way(visit: Callable[..., Visit]) -> None:
    page = visit(width=400).page
    for role, name in (("main", None), ("banner", None), ("contentinfo", None), ("region", "Sites"), ("region", "Studies"), ("region", "Audit log")):
        assert page.get_by_role(role, **({"name": name} if name else {})).count() == 1, (role, name)
    assert page.get_by_role("columnheader", name="Last contact").count() == 1
    assert page.get_by_role("rowheader", name="hospital-0").count() >= 1
    assert page.get_by_role("article", name="heart-disease").count() == 1
    reached = set()
    for _ in range(8):
        page.keyboard.press("Tab")
        reached.add(page.evaluate("document.activeElement.className || document.activeElement.tagName"))
    assert {"skip", "faults", "SUMMARY", "A"} <= reached
    assert page.evaluate("""[...document.querySelectorAll('#news, #connection')].map(e => e.getAttribute('aria-live'))""") == [None, "polite"]
