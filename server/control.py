"""What the command line asks of a running coordinator, over loopback: submit, stop and resume a study.

Who may ask is who can read `control.key` in the coordinator's state: the key comes as a bearer token with every request, so neither another user
of the machine nor a page in a browser can.
"""

import secrets
from collections.abc import Awaitable, Callable
from pathlib import Path

import httpx
from pydantic import Field, ValidationError
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from server.submissions import Submissions
from shared.config import Settings
from shared.errors import ConnectionFailedError, WardroundError
from shared.files import storage_errors
from shared.study import Study
from shared.supervision import read_instance

CONTROL_KEY = "control.key"  # in the coordinator's state
MAX_STUDY_BYTES = 100_000
SECONDS = 30.0


class SubmitRequest(Settings):
    """A study, resolved, and a token that makes a retry safe."""

    study: dict[str, object]
    token: str = Field(max_length=100)


def control_routes(submissions: Submissions, key: str, *, observe: Callable[[str, str], None] = lambda action, run: None) -> list[Route]:
    """POST /studies, /studies/{run}/stop and /studies/{run}/resume.

    Args:
        observe: told the action and the run, once it is done.
    """

    def guarded(action: str, handle: Callable[[Request], Awaitable[str]]) -> Callable[[Request], Awaitable[Response]]:
        async def answer(request: Request) -> Response:
            if not secrets.compare_digest(request.headers.get("authorization", "").encode(), f"Bearer {key}".encode()):
                return JSONResponse({"detail": "Not Found"}, status_code=404)
            try:
                run = await handle(request)
            except WardroundError as error:
                return JSONResponse({"code": error.code, "what": error.what, "remedy": error.remedy}, status_code=422)
            observe(action, run)
            return JSONResponse({"run": run})

        return answer

    async def submit(request: Request) -> str:
        try:
            asked = SubmitRequest.model_validate_json(await _body(request))
        except ValidationError:
            raise WardroundError("expected a study and a token, got other content", "submit with 'wardround study submit'") from None
        return submissions.submit(Study.from_table(asked.study), asked.token)

    async def stop(request: Request) -> str:
        submissions.stop(request.path_params["run"])
        return str(request.path_params["run"])

    async def resume(request: Request) -> str:
        submissions.resume(request.path_params["run"])
        return str(request.path_params["run"])

    return [
        Route("/studies", guarded("submitted", submit), methods=["POST"]),
        Route("/studies/{run}/stop", guarded("stopped", stop), methods=["POST"]),
        Route("/studies/{run}/resume", guarded("resumed", resume), methods=["POST"]),
    ]


async def _body(request: Request) -> bytes:
    """The body; what is longer than any study is not read to its end."""
    body = b""
    async for piece in request.stream():
        body += piece
        if len(body) > MAX_STUDY_BYTES:
            raise WardroundError(f"expected a study of at most {MAX_STUDY_BYTES} bytes, got more", "submit with 'wardround study submit'")
    return body


def ask_coordinator(state: Path, path: str, body: Settings | None = None) -> str:
    """The run that a request to the coordinator working in `state` was about.

    Raises:
        ConnectionFailedError: none works there, or it does not answer.
        WardroundError: its refusal.
    """
    instance = read_instance(state)
    if instance is None or "page" not in instance.ports:
        raise ConnectionFailedError(
            f"{state.parent}: expected a running coordinator, found none", f"run 'wardround coordinator start {state.parent}'"
        )
    with storage_errors(state / CONTROL_KEY, "read", remedy="run this as the user that started the coordinator"):
        key = (state / CONTROL_KEY).read_text().strip()
    try:
        response = httpx.post(
            f"http://127.0.0.1:{instance.ports['page']}{path}",
            headers={"authorization": f"Bearer {key}", "content-type": "application/json"},
            content=b"" if body is None else body.model_dump_json().encode(), timeout=SECONDS, trust_env=False,
        )  # fmt: skip
        content = response.json()
    except (httpx.HTTPError, ValueError) as error:
        raise ConnectionFailedError(f"coordinator: expected an answer, got {type(error).__name__}", "see 'wardround coordinator status'") from error
    fields = content if isinstance(content, dict) else {}
    if response.status_code == 422 and {"what", "remedy", "code"} <= fields.keys():
        raise _refusal(fields)
    if response.status_code != 200 or "run" not in fields:
        raise ConnectionFailedError(f"coordinator: expected an answer, got HTTP {response.status_code}", "is another program at its page's port?")
    return str(fields["run"])


def _refusal(content: dict[str, str]) -> WardroundError:
    error = WardroundError(content["what"], content["remedy"])
    error.code = content["code"]
    return error
