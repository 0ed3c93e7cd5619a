"""Who may ask the service: known hosts, no foreign pages, and where a token is set, those who have it.

- *DNS rebinding*: a page of somebody else's may give its name the service's address. So the name in Host must be one of
  the service's own. An address needs no name server and cannot be rebound.
- *Cross-site requests*: a foreign page's requests tell by Origin and Sec-Fetch-Site (W3C Fetch Metadata) where they
  come from, and are refused, whichever method. The same machine on another port is foreign, too. Only links lead in.
- *Tokens*: `Authorization: Bearer` (RFC 6750), or a cookie that POST /login sets. It holds a code made from the token,
  not the token. Both are compared in constant time.
- *Answers* are shown by this page alone, run nothing, and are kept by no cache but the user's own.
"""

from __future__ import annotations

import hashlib
import hmac
import ipaddress
import re
from collections.abc import Iterable
from dataclasses import dataclass

from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from searchengine.errors import UsageError
from searchengine.web.problems import problem

CONTENT_SECURITY_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data: blob:; connect-src 'self'; "
    "manifest-src 'self'; form-action 'self'; base-uri 'none'; frame-ancestors 'none'"
)
# What a route sets itself stays: these are for whatever says nothing else.
HEADERS = {
    "content-security-policy": CONTENT_SECURITY_POLICY,
    "x-content-type-options": "nosniff",
    "x-frame-options": "DENY",
    "cross-origin-resource-policy": "same-origin",
    "cross-origin-opener-policy": "same-origin",
    # Not no-referrer: forms would send "Origin: null" then.
    "referrer-policy": "same-origin",
    "permissions-policy": "camera=(), geolocation=(), microphone=()",
    "cache-control": "no-store",
}
# The page without any data, for it has the login form; the path of each of its files begins with PAGE.
OPEN_PATHS = frozenset({"/", "/healthz", "/login", "/favicon.ico"})
PAGE = "/page/"
SESSION_SECONDS = 30 * 86_400
TOKEN = re.compile(r"[!-~]+")
HOST = re.compile(r"(\[[0-9a-f:.]+\]|[0-9a-z_.-]+)(:\d{1,5})?")


@dataclass(frozen=True, kw_only=True)
class Access:
    """Who is let in. `host` is what the service is bound to, `allowed_hosts` are other names it is asked by.

    Raises UsageError for a token that no header could carry.
    """

    host: str = "127.0.0.1"
    allowed_hosts: tuple[str, ...] = ()
    token: str | None = None

    def __post_init__(self) -> None:
        if self.token is not None and not TOKEN.fullmatch(self.token):
            raise UsageError("the token is empty or has characters other than ASCII's visible ones; choose another")

    @property
    def is_local(self) -> bool:
        """Whether only this machine can reach what is bound to `host`."""
        return _is_loopback(self.host)

    def knows(self, host: str) -> bool:
        """Whether the service goes by the Host header `host`."""
        match = HOST.fullmatch(host.lower())
        if match is None:
            return False
        name = match[1].strip("[]").rstrip(".")
        if name == "localhost" or name in {known.lower().rstrip(".") for known in (self.host, *self.allowed_hosts)}:
            return True
        return _is_loopback(name) if self.is_local else _is_address(name)

    def is_token(self, token: str) -> bool:
        """Whether it is the right one; nobody learns by the time it takes how much of it is right."""
        return self.token is not None and hmac.compare_digest(token.encode(), self.token.encode())

    @property
    def cookie_name(self) -> str:
        """Its own for each token, for the ports of a machine share their cookies."""
        return f"searchengine-{self._code('name')[:8]}"

    def cookie(self, *, is_secure: bool) -> str:
        """A Set-Cookie header for who has shown the token (RFC 6265bis)."""
        kept = f"{self.cookie_name}={self._code('session')}; Max-Age={SESSION_SECONDS}"
        return f"{kept}; {_ATTRIBUTES}{'; Secure' * is_secure}"

    def no_cookie(self) -> str:
        """A Set-Cookie header that takes it back."""
        return f"{self.cookie_name}=; Max-Age=0; {_ATTRIBUTES}"

    def admits(self, headers: Headers) -> bool:
        """Whether the headers of a request have the token, or the cookie for it."""
        if self.token is None:
            return True
        scheme, _, token = headers.get("authorization", "").partition(" ")
        if scheme.lower() == "bearer" and self.is_token(token.strip()):
            return True
        session = _cookies(headers.getlist("cookie")).get(self.cookie_name, "")
        return hmac.compare_digest(session.encode(), self._code("session").encode())

    def _code(self, purpose: str) -> str:
        return hmac.digest((self.token or "").encode(), f"searchengine {purpose}".encode(), hashlib.sha256).hex()


_ATTRIBUTES = "Path=/; HttpOnly; SameSite=Strict"


class Guard:
    """ASGI middleware around everything: lets in whom `access` does, and puts `HEADERS` on every answer."""

    def __init__(self, app: ASGIApp, *, access: Access) -> None:
        self._app = app
        self._access = access

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self._app(scope, receive, send)
            return
        if scope["type"] != "http":  # there are no web sockets here
            await send({"type": "websocket.close", "code": 1008})
            return
        has_begun = False

        async def hardened(message: Message) -> None:
            nonlocal has_begun
            if message["type"] == "http.response.start":
                has_begun = True
                headers = MutableHeaders(scope=message)
                for name, value in HEADERS.items():
                    headers.setdefault(name, value)
            await send(message)

        refusal = self._refusal(scope)
        if refusal is not None:
            await refusal(scope, receive, hardened)
            return
        try:
            await self._app(scope, receive, hardened)
        except Exception:
            if not has_begun:  # else Starlette would answer, outside of this
                answer = problem(500, "the service met an error of its own; its log tells more")
                await answer(scope, receive, hardened)
            raise

    def _refusal(self, scope: Scope) -> Response | None:
        headers = Headers(scope=scope)
        hosts = headers.getlist("host")
        if len(hosts) != 1 or not self._access.knows(hosts[0]):
            return problem(421, "the service does not go by that name; start it with --allow-host NAME")
        if _is_foreign(headers, host=hosts[0], method=scope["method"]):
            return problem(403, "a page of another site asked; open the service's own page")
        path = scope["path"]
        if not (path in OPEN_PATHS or path.startswith(PAGE) or self._access.admits(headers)):
            return problem(
                401,
                "the service wants its token: Authorization: Bearer TOKEN, or log in on the page",
                headers={"www-authenticate": 'Bearer realm="searchengine"'},
            )
        return None


def _is_foreign(headers: Headers, *, host: str, method: str) -> bool:
    """Whether a page of another origin makes this request. A link that is followed is its user's request."""
    origins = headers.getlist("origin")
    # The scheme is left out: before a proxy it may be another.
    if any(origin.lower().partition("://")[2] != host.lower() for origin in origins):
        return True
    if headers.get("sec-fetch-site", "none") in ("none", "same-origin"):
        return False
    follows_link = headers.get("sec-fetch-mode") == "navigate" and headers.get("sec-fetch-dest") == "document"
    return not (follows_link and method in ("GET", "HEAD"))


def _cookies(headers: Iterable[str]) -> dict[str, str]:
    found: dict[str, str] = {}
    for header in headers:
        for pair in header.split(";"):
            name, _, value = pair.strip().partition("=")
            found.setdefault(name, value)
    return found


def _is_address(name: str) -> bool:
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True


def _is_loopback(name: str) -> bool:
    return name.lower() == "localhost" or (_is_address(name) and ipaddress.ip_address(name).is_loopback)
