"""Who may talk to the server: the token, names of this machine, no foreign web pages; how a refusal looks."""

from __future__ import annotations

import base64
import binascii
import hmac
import ipaddress
import json
import os
from collections import Counter
from typing import Any

try:
    from starlette.responses import Response
    from starlette.types import ASGIApp, Message, Receive, Scope, Send
except ImportError as error:  # pragma: no cover
    raise ImportError(f"butterfly serve: no {error.name} here: pip install 'butterfly-llm[serve]'") from None

_KINDS = {
    401: "invalid_api_key", 403: "forbidden", 404: "not_found", 405: "method_not_allowed",
    408: "timeout", 413: "body_too_large", 422: "invalid_request", 429: "slots_in_use",
    503: "unavailable", 507: "disk",
}  # fmt: skip


class Refused(Exception):
    def __init__(self, status: int, message: str, **headers: str) -> None:
        self.status, self.message = status, message
        self.headers = {name.replace("_", "-"): value for name, value in headers.items()}


def answer_json(status: int, value: Any, headers: dict[str, str] | None = None) -> Response:
    return Response(json.dumps(value), status, headers, "application/json")


def error_body(status: int, message: str) -> dict[str, Any]:
    kind = "server_error" if status >= 500 else "invalid_request_error"
    code = _KINDS.get(status, "error")
    return {"error": {"message": message, "type": kind, "param": None, "code": code}}


def refusal(status: int, message: str, headers: dict[str, str] | None = None) -> Response:
    return answer_json(status, error_body(status, message), headers)


class Guard:
    """Before any route: the token, or without one the names of this machine; foreign pages; counting.

    Without a token a web page elsewhere must not reach the server through the user's browser, by its own
    requests (Origin) or by a name of its own that resolves to 127.0.0.1 (Host).
    """

    def __init__(self, app: ASGIApp, *, token: str | None, statuses: Counter[int]) -> None:
        self.app, self.statuses = app, statuses
        self.token = None if token is None else token.encode()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self.app(scope, receive, send)

        async def counted(message: Message) -> None:
            if message["type"] == "http.response.start":
                self.statuses[message["status"]] += 1
            await send(message)

        answer = None if scope["path"] == "/health" else self._refuse(dict(scope["headers"]))
        await (self.app if answer is None else answer)(scope, receive, counted)

    def _refuse(self, headers: dict[bytes, bytes]) -> Response | None:
        host, origin = headers.get(b"host", b""), headers.get(b"origin")
        if self.token is not None:
            given = _credential(headers.get(b"authorization", b""))
            if not hmac.compare_digest(given, self.token):
                challenge = {
                    "WWW-Authenticate": 'Bearer, Basic realm="butterfly: any name, token as password"'
                }
                return refusal(401, "a valid token is needed: Authorization: Bearer TOKEN", challenge)
        elif not loopback(_name(host)):
            return refusal(403, "this server answers to names of this machine only; it has no token")
        if origin is not None and origin.partition(b"://")[2] != host:
            return refusal(403, "requests from other web pages are refused")
        return None


def _credential(authorization: bytes) -> bytes:
    """The token of a Bearer header, or the password of a Basic one (which is what browsers can send)."""
    scheme, _, value = authorization.strip().partition(b" ")
    if scheme.lower() == b"bearer":
        return value.strip()
    if scheme.lower() == b"basic":
        try:
            return base64.b64decode(value.strip(), validate=True).partition(b":")[2]
        except (binascii.Error, ValueError):
            return b""
    return b""


def _name(host: bytes) -> str:
    """The host of a Host header, without the port and the brackets of IPv6."""
    text = host.decode("latin-1")
    if text.startswith("["):
        return text[1:].partition("]")[0]
    return text.rpartition(":")[0] if text.count(":") == 1 else text


def loopback(host: str) -> bool:
    try:
        return host.lower() == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def token_of(flag: str | None) -> str | None:
    """The token by flag or from BUTTERFLY_TOKEN; ValueError when it cannot be one."""
    token = flag if flag is not None else os.environ.get("BUTTERFLY_TOKEN") or None
    if token is not None and (not token or not token.isascii() or any(c <= " " for c in token)):
        raise ValueError("serve: the token must be one word of ASCII characters")
    return token
