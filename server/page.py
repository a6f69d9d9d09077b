"""The coordinator's page and its status as JSON: read-only, for this machine's own browsers and programs.

What is promised to who opens it: no request but for `/status.json`, nothing stored, and no text of a site's is ever taken for markup (the page's own
policy forbids it as well). What is promised to the federation: it is served on loopback, and only under a name of this machine, so that a foreign
page that has its own name resolve to 127.0.0.1 (DNS rebinding) gets nothing to read.
"""

import base64
import hashlib
import re
from collections.abc import Callable
from pathlib import Path

from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from server.status import CoordinatorStatus, Failure
from shared.errors import WardroundError

PAGE = Path(__file__).with_name("page.html")
HOST_PATTERN = re.compile(r"(localhost|127\.0\.0\.1|\[::1\])(:\d{1,5})?", re.IGNORECASE)
HEADERS = {
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cache-Control": "no-store",
}


def page_routes(status: Callable[[], CoordinatorStatus]) -> list[Route]:
    """`GET /` is the page, `GET /status.json` what `status` says; both answer 404 to any Host but localhost, 127.0.0.1 and [::1].

    Args:
        status: called in a thread of a pool, at each request; a `WardroundError` of it is answered with 503 and its code, what and remedy.

    Example:
        Starlette(routes=page_routes(lambda: status_now))
    """
    content = PAGE.read_bytes()
    headers = {**HEADERS, "Content-Security-Policy": content_security_policy(content.decode())}

    def page(request: Request) -> Response:
        return Response(content, media_type="text/html", headers=headers) if _is_local(request) else _not_found()

    def status_json(request: Request) -> Response:
        return _status_response(status) if _is_local(request) else _not_found()

    return [Route("/", page, methods=["GET"]), Route("/status.json", status_json, methods=["GET"])]


def content_security_policy(html: str) -> str:
    """Nothing may be loaded or run but the style and the script that stand in `html`, named by hash, and this server alone may be asked."""
    sources = {tag: " ".join(f"'sha256-{_digest(text)}'" for text in re.findall(rf"<{tag}>(.*?)</{tag}>", html, re.S)) for tag in ("style", "script")}
    return "; ".join(
        (
            "default-src 'none'",
            f"script-src {sources['script']}",
            f"style-src {sources['style']}",
            "connect-src 'self'",
            "img-src data:",  # the empty icon, which keeps a browser from asking for /favicon.ico
            "base-uri 'none'",
            "form-action 'none'",
            "frame-ancestors 'none'",
            "require-trusted-types-for 'script'",
        )
    )


def _digest(text: str) -> str:
    return base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()


def _status_response(status: Callable[[], CoordinatorStatus]) -> Response:
    try:
        return Response(status().model_dump_json(), media_type="application/json", headers=HEADERS)
    except WardroundError as error:
        return JSONResponse(Failure.of(error).model_dump(mode="json"), status_code=503, headers=HEADERS)


def _is_local(request: Request) -> bool:
    """True under a name of this machine alone; of two Host headers neither is believed."""
    hosts = request.headers.getlist("host")
    return len(hosts) == 1 and HOST_PATTERN.fullmatch(hosts[0]) is not None


def _not_found() -> Response:
    return Response("Not Found", status_code=404, media_type="text/plain", headers=HEADERS)
