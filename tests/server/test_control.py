"""Who may ask a running coordinator for something is who can read its key; everybody else finds nothing there."""

import json
import secrets
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, Response
from starlette.routing import Route

from server.control import CONTROL_KEY, MAX_STUDY_BYTES, SubmitRequest, ask_coordinator, control_routes
from server.submissions import STOP, Submissions
from shared.errors import ConfigurationError, ConnectionFailedError, StorageError, WardroundError
from shared.study import Study
from shared.supervision import read_instance
from tests.wardround.serving import serving

TOKEN = "a-token-of-its-own"
KEY = secrets.token_hex(32)
STUDY = Study.from_table({"name": "tests", "task": "breast-cancer", "privacy": {"epsilon": 3.0, "delta": 1e-4}})
Told = list[tuple[str, str]]


@pytest.fixture(scope="module")
def kit(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("coordinator")


@pytest.fixture(scope="module")
def submissions(kit: Path) -> Submissions:
    return Submissions(kit / "runs")


@pytest.fixture(scope="module")
def told(kit: Path, submissions: Submissions) -> Iterator[Told]:
    """A coordinator's control is served; what it was told was done."""
    done: Told = []
    (kit / "state").mkdir()
    (kit / "state" / CONTROL_KEY).write_text(KEY)
    with serving(kit, control_routes(submissions, KEY, observe=lambda action, run: done.append((action, run)))):
        yield done


@pytest.fixture(scope="module")
def page(kit: Path, told: Told) -> Iterator[httpx.Client]:
    """A client of that port which has the key."""
    instance = read_instance(kit / "state")
    assert instance is not None
    with httpx.Client(base_url=f"http://127.0.0.1:{instance.ports['page']}", headers={"authorization": f"Bearer {KEY}"}, trust_env=False) as client:
        yield client


def body(token: str = TOKEN, **study: Any) -> dict[str, Any]:
    return {"study": {**STUDY.to_table(), **study}, "token": token}


def test_submit_stop_and_resume(kit: Path, submissions: Submissions, told: Told) -> None:
    token = secrets.token_urlsafe(12)
    asked = SubmitRequest(study=STUDY.to_table(), token=token)
    run = ask_coordinator(kit / "state", "/studies", asked)
    assert ask_coordinator(kit / "state", "/studies", asked) == run
    assert submissions.folder(run).study == STUDY
    assert ask_coordinator(kit / "state", f"/studies/{run}/stop") == run
    assert (kit / "runs" / run / STOP).exists()
    submissions.update(run, state="stopped")
    assert ask_coordinator(kit / "state", f"/studies/{run}/resume") == run
    assert submissions.get(run).state == "queued"
    assert told[-4:] == [("submitted", run), ("submitted", run), ("stopped", run), ("resumed", run)]


def test_a_refusal_is_told_with_code_and_remedy(kit: Path, told: Told) -> None:
    before = list(told)
    with pytest.raises(WardroundError) as refused:
        ask_coordinator(kit / "state", "/studies/tests-20300101T000000Z-abcd/stop")
    assert (refused.value.code, refused.value.exit_code) == (ConfigurationError.code, 3)
    assert "wardround study list" in refused.value.remedy
    token = secrets.token_urlsafe(12)
    ask_coordinator(kit / "state", "/studies", SubmitRequest(study=STUDY.to_table(), token=token))
    with pytest.raises(WardroundError, match="another study"):
        ask_coordinator(kit / "state", "/studies", SubmitRequest(study=STUDY.replace(seed=8).to_table(), token=token))
    assert len(told) == len(before) + 1


WRONG: list[dict[str, str] | dict[str, bytes]] = [
    {}, {"authorization": ""}, {"authorization": "Bearer"}, {"authorization": KEY}, {"authorization": f"bearer {KEY}"}, {"authorization": f"Bearer {KEY[:-1]}"},
    {"authorization": f"Bearer {KEY}x"}, {"authorization": f"Basic {KEY}"}, {"authorization": "Bearer schlüssel".encode("latin-1")}, {"authorization": b"\xff" * 40},
    {"cookie": f"authorization=Bearer {KEY}"},
]  # fmt: skip


@pytest.mark.parametrize("headers", WRONG, ids=range(len(WRONG)))
@pytest.mark.parametrize("path", ["/studies", "/studies/x/stop", "/studies/x/resume"])
def test_without_the_key_there_is_nothing(page: httpx.Client, told: Told, submissions: Submissions, headers: Any, path: str) -> None:
    before = submissions.all().keys()
    request = httpx.Request("POST", page.base_url.join(path), headers=headers, json=body())
    response = page.send(request)
    absent = page.post("/nowhere/at/all")
    assert (response.status_code, absent.status_code) == (404, 404)
    assert KEY not in response.text
    assert submissions.all().keys() == before


@pytest.mark.parametrize("method", ["GET", "PUT", "DELETE", "PATCH"])
def test_nothing_is_done_by_another_method(page: httpx.Client, told: Told, method: str) -> None:
    before = list(told)
    assert page.request(method, "/studies", json=body()).status_code in (404, 405)
    assert told == before


TRICKS = ["..%2f..%2fetc", "%2e%2e", "x%00", "tests-20300101T000000Z-abcd%0a", "..%2fruns%2ftests-20300101T000000Z-abcd", "%ff", "x" * 5000]


@pytest.mark.parametrize("name", TRICKS, ids=range(len(TRICKS)))
@pytest.mark.parametrize("action", ["stop", "resume"])
def test_no_name_in_a_path_leads_out(page: httpx.Client, kit: Path, told: Told, name: str, action: str) -> None:
    files = {path for path in kit.rglob("*") if path.is_file()}
    assert page.post(f"/studies/{name}/{action}").status_code in (404, 422)
    assert {path for path in kit.rglob("*") if path.is_file()} == files


JUNK: list[bytes] = [
    b"", b"{", b"null", b"[]", b"\xff", b'{"study": {}}', b'{"token": "a-token-of-its-own"}', b'{"study": 5, "token": "a-token-of-its-own"}',
    b'{"study": {}, "token": "a-token-of-its-own"}', b'{"study": {}, "token": "a-token-of-its-own", "more": 1}', b"[" * 50_000,
    b'{"study": {"name": ' + b"[" * 40_000 + b"]" * 40_000 + b'}, "token": "a-token-of-its-own"}', json.dumps(body(token="short")).encode(),
    json.dumps(body(name="../../etc")).encode(), json.dumps(body(rounds={"count": 10**400})).encode(), json.dumps(body(task=None)).encode(),
    json.dumps(body(seed=2**100)).encode(), json.dumps(body()).replace("3.0", "NaN").encode(),
]  # fmt: skip


@pytest.mark.parametrize("content", JUNK, ids=range(len(JUNK)))
def test_junk_is_refused_and_makes_nothing(page: httpx.Client, submissions: Submissions, content: bytes) -> None:
    before = submissions.all().keys()
    response = page.post("/studies", content=content)
    assert response.status_code == 422
    assert set(response.json()) == {"code", "what", "remedy"}
    assert submissions.all().keys() == before


TABLES = st.recursive(st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text()), lambda inner: st.one_of(
    st.lists(inner, max_size=3), st.dictionaries(st.sampled_from(["name", "count", "epsilon", "unit", "x"]), inner, max_size=3)), max_leaves=6)  # fmt: skip


@pytest.mark.slow
@settings(max_examples=60)
@given(study=st.dictionaries(st.sampled_from([*STUDY.to_table(), "x"]), TABLES, max_size=4))
def test_whatever_table_comes_the_answer_is_a_refusal_or_a_run(page: httpx.Client, study: dict[str, Any]) -> None:
    response = page.post("/studies", content=json.dumps(body(token=secrets.token_hex(8), **study)).encode())
    assert response.status_code in (200, 422)


@pytest.mark.parametrize("size", [MAX_STUDY_BYTES + 1, 3_000_000])
def test_a_body_longer_than_any_study_is_refused(page: httpx.Client, submissions: Submissions, size: int) -> None:
    before = submissions.all().keys()
    content = json.dumps(body(token=secrets.token_hex(8))).encode()
    response = page.post("/studies", content=content + b" " * (size - len(content)))  # it would be a study, were it shorter
    assert response.status_code == 422
    assert str(MAX_STUDY_BYTES) in response.json()["what"]
    assert submissions.all().keys() == before


# The command line's end ------------------------------------------------------------------------------------------------------------------


def test_where_no_coordinator_runs_that_is_said(tmp_path: Path) -> None:
    (tmp_path / "state").mkdir()
    with pytest.raises(ConnectionFailedError, match="found none"):
        ask_coordinator(tmp_path / "state", "/studies")


def test_who_cannot_read_the_key_is_told_so(tmp_path: Path) -> None:
    with serving(tmp_path, []), pytest.raises(StorageError, match=CONTROL_KEY):
        ask_coordinator(tmp_path / "state", "/studies")


FOREIGN: list[Response] = [
    PlainTextResponse("hello"), JSONResponse({"detail": "x"}, status_code=422), JSONResponse(["x"]), JSONResponse({}), JSONResponse({}, status_code=500),
    JSONResponse({"run": "x"}, status_code=201), JSONResponse("x", status_code=422), PlainTextResponse("x", status_code=302, headers={"location": "/studies"}),
]  # fmt: skip


@pytest.mark.parametrize("response", FOREIGN, ids=range(len(FOREIGN)))
def test_another_program_at_the_page_s_port_is_recognised(tmp_path: Path, response: Response) -> None:
    async def answer(request: Request) -> Response:
        return response

    with serving(tmp_path, [Route("/studies", answer, methods=["POST"])]):
        (tmp_path / "state" / CONTROL_KEY).write_text(KEY)
        with pytest.raises(ConnectionFailedError, match="expected an answer"):
            ask_coordinator(tmp_path / "state", "/studies")
