"""What stands before every request of a server: who may ask, how much may be sent, and that every
answer which is no success is one sentence.

A page of somebody else, open in a browser of this machine, can send requests to it. By a name of
its own that leads here (DNS rebinding) it is refused by `Host`, and by our own address through
`Origin` (RFC 6454), which browsers add to whatever may change something.
"""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import re
import secrets
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from traceback import extract_tb
from typing import TYPE_CHECKING, Any

from medseg import logs
from medseg.annotation.protocol import Refused
from medseg.errors import BadConfig, BadOutput, MedsegError, NotEnoughMemory
from medseg.files import read_text
from medseg.text import harmless

if TYPE_CHECKING:
    from starlette.types import ASGIApp, Message, Receive, Scope, Send

#: Most bytes of a request that brings no file.
MAX_PLAIN_BYTES = 1 << 20
#: Requests at a time that bring something.
MAX_UPLOADS = 8
#: Seconds without a byte after which a sender is given up.
SILENT_S = 60.0
#: Seconds, in all and of silence, for which what is not wanted is still taken and thrown away: who
#: sends it reads the answer only then.
DRAIN_S, DRAIN_SILENT_S = 30.0, 2.0
#: Seconds for which a token is good, and how many there may be.
TOKEN_S, MAX_TOKENS = 12 * 3600.0, 1000
#: Seconds that a wrong password costs, and how many may wait for that.
WRONG_S, MAX_WRONG = 1.0, 5
_LOOPBACK = ("localhost", "127.0.0.1", "[::1]")
_HOST = re.compile(r"(\[[0-9a-f:.]+\]|[^\s:\[\]@/]+)(:[0-9]{1,5})?", re.IGNORECASE)
_WITH_FILES = ("/infer/", "/session/", "/session", "/datastore/", "/datastore")
_WITHOUT_LOGIN = ("/auth/", "/auth", "/auth/token", "/auth/token/")
_HEADERS = {
    "Cache-Control": "no-store",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Content-Security-Policy": "default-src 'none'; frame-ancestors 'none'",
}


@dataclass(frozen=True, kw_only=True)
class Rules:
    """Who may ask, and for how much.

    names: further names by which this server may be called. origins: of pages that may ask it.
    max_bytes: of a request that brings a file.
    """

    names: tuple[str, ...] = ()
    origins: tuple[str, ...] = ()
    max_bytes: int = 2 * 2**30


class Login:
    """Names with passwords, and the tokens that were given for them."""

    def __init__(
        self, passwords: Mapping[str, str], clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._passwords, self._clock = dict(passwords), clock
        self._tokens: dict[str, tuple[float, str]] = {}  # by their hash
        self._wrong = asyncio.Lock()
        self._waiting = 0

    async def token(self, name: str, password: str) -> str:
        """A new token. Raises `Refused` where name and password do not belong together."""
        if self._waiting >= MAX_WRONG:
            raise Refused(429, "too many wrong passwords were given; try again later")
        right = self._passwords.get(name, "")
        if not hmac.compare_digest(_digest(password), _digest(right)) or not right:
            self._waiting += 1
            try:
                async with self._wrong:
                    await asyncio.sleep(WRONG_S)
            finally:
                self._waiting -= 1
            raise Refused(401, "the name or the password is wrong")
        token = secrets.token_urlsafe(32)
        while len(self._tokens) >= MAX_TOKENS:
            del self._tokens[next(iter(self._tokens))]
        self._tokens[_digest(token)] = (self._clock() + TOKEN_S, name)
        return token

    def user(self, authorization: str) -> str:
        """Who sent a header `Authorization: bearer TOKEN` (RFC 6750); '' for nobody."""
        scheme, _, token = authorization.partition(" ")
        until_s, name = self._tokens.get(_digest(token.strip()), (0.0, ""))
        return name if scheme.lower() == "bearer" and self._clock() < until_s else ""


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8", "replace")).hexdigest()


def read_login(path: Path) -> Login:
    """The names and passwords of a file, a line NAME:PASSWORD for each. Raises `BadFile`,
    `BadConfig`.
    """
    passwords: dict[str, str] = {}
    for number, line in enumerate(read_text(path).splitlines(), 1):
        if not line.strip() or line.startswith("#"):
            continue
        name, colon, password = line.partition(":")
        if not name.strip() or not colon or len(password) < 8:
            raise BadConfig(
                f"{path}: line {number} is not NAME:PASSWORD with a password of 8 characters or"
                " more"
            )
        passwords[name.strip()] = password
    if not passwords:
        raise BadConfig(f"{path}: holds no line NAME:PASSWORD")
    return Login(passwords)


class Guard:
    """An application (ASGI) around another one, which only gets what it should.

    told: what an error of medseg's becomes before it is sent, so that no path is in it.
    """

    def __init__(
        self, app: ASGIApp, rules: Rules, *, login: Login | None, told: Callable[[str], str]
    ) -> None:
        self._app, self._rules, self._login, self._told = app, rules, login, told
        self._uploads = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request."""
        if scope["type"] != "http":
            return
        from starlette.requests import ClientDisconnect

        headers = {
            name.decode("latin-1"): value.decode("latin-1") for name, value in scope["headers"]
        }
        answer = _Answer(send, self._origin_headers(scope, headers))
        has_file = scope["path"].startswith(_WITH_FILES)
        limit = self._rules.max_bytes if has_file else MAX_PLAIN_BYTES
        body = _Body(receive, limit, method=scope["method"], headers=headers)
        scope["app"] = self  # Starlette then raises what it does not find
        try:
            self._check(scope, headers)
            if scope["method"] == "OPTIONS":
                await answer.options()
                return
            body.check()
            if body.is_declared and has_file:
                await self._with_upload(scope, body, answer)
            else:
                await self._app(scope, body.receive, answer.send)
        except ClientDisconnect:
            return
        except Exception as error:
            status, text, more = self._explained(error)
            if not answer.begun:
                await body.drain()
                await answer.refuse(status, text, more)

    async def _with_upload(self, scope: Scope, body: _Body, answer: _Answer) -> None:
        if self._uploads >= MAX_UPLOADS:
            raise Refused(429, "too much is being sent at a time; try again later")
        self._uploads += 1
        try:
            await self._app(scope, body.receive, answer.send)
        finally:
            self._uploads -= 1

    def _check(self, scope: Scope, headers: Mapping[str, str]) -> None:
        """Raise `Refused` for who may not ask."""
        if scope.get("http_version") not in ("1.0", "1.1"):
            raise Refused(400, "this is no HTTP that is spoken here")
        if not self._is_our_name(scope, headers.get("host", "")):
            raise Refused(
                421,
                "this server is not called so; ask it by its address, or start it with --name",
            )
        origin = headers.get("origin", "")
        if origin and not self._may_ask(origin, headers):
            raise Refused(403, "pages of this origin may not ask; see --allow-origin")
        if self._login is None or scope["path"] in _WITHOUT_LOGIN or scope["method"] == "OPTIONS":
            return
        user = self._login.user(headers.get("authorization", ""))
        if not user:
            raise Refused(401, "log in first, with a name and a password")
        scope["user"] = user

    def _is_our_name(self, scope: Scope, host: str) -> bool:
        match = _HOST.fullmatch(host)
        if match is None:
            return False
        name = match[1].lower()
        address = str((scope.get("server") or ("",))[0]).lower().removeprefix("::ffff:")
        address = f"[{address}]" if ":" in address else address
        here = _LOOPBACK if address.startswith("127.") or address in _LOOPBACK else ()
        return name in (address, *here, *self._rules.names)

    def _may_ask(self, origin: str, headers: Mapping[str, str]) -> bool:
        own = origin.lower().partition("://")[2] == headers.get("host", "").lower()
        return own or origin.lower() in self._rules.origins

    def _origin_headers(self, scope: Scope, headers: Mapping[str, str]) -> dict[str, str]:
        """What tells a browser that a page may read the answer (fetch.spec.whatwg.org); only where
        that was asked for.
        """
        origin = headers.get("origin", "").lower()
        if origin not in self._rules.origins:
            return {"Vary": "Origin"} if self._rules.origins else {}
        return {
            "Vary": "Origin",
            "Access-Control-Allow-Origin": origin,
            "Access-Control-Allow-Methods": "GET, PUT, POST, DELETE, OPTIONS",
            "Access-Control-Allow-Headers": "authorization, content-type",
            "Access-Control-Expose-Headers": "content-disposition",
            "Cross-Origin-Resource-Policy": "cross-origin",
        }

    def _explained(self, error: Exception) -> tuple[int, str, Mapping[str, str]]:
        """Status, sentence and further headers of what went wrong."""
        from starlette.exceptions import HTTPException

        if isinstance(error, Refused):
            more = {"WWW-Authenticate": "Bearer"} if error.status == 401 else {}
            return error.status, str(error), more
        if isinstance(error, HTTPException):
            sentence = {404: "there is nothing here", 405: "this cannot be done here"}
            text = sentence.get(error.status_code, str(error.detail))
            return error.status_code, text, error.headers or {}
        if isinstance(error, MedsegError):
            busy = isinstance(error, NotEnoughMemory | BadOutput)
            return 503 if busy else 400, self._told(str(error)), {}
        frames = [f"{Path(f.filename).name} {f.lineno}" for f in extract_tb(error.__traceback__)]
        logs.warning(__name__, "failed: %s at %s", type(error).__name__, ", ".join(frames[-4:]))
        return 500, "the server failed; its log says where", {}


class _Body:
    """What a request brings, counted while it comes."""

    def __init__(
        self, receive: Receive, limit: int, *, method: str, headers: Mapping[str, str]
    ) -> None:
        self._receive, self._limit = receive, limit
        self._count, self._is_whole, self._begun = 0, False, False
        self._length = headers.get("content-length", "0")
        self._expects = "expect" in headers
        # MONAI Label's client repeats the length of an upload in what it asks next.
        has_body = method in ("POST", "PUT", "PATCH")
        self.is_declared = has_body and (self._length != "0" or "transfer-encoding" in headers)

    def check(self) -> None:
        """Raise `Refused` where it says that it is too large."""
        if self.is_declared and int(self._length[:20]) > self._limit:
            raise self._too_large()

    def _too_large(self) -> Refused:
        return Refused(413, f"more than {_size(self._limit)} is sent, which is the limit here")

    async def receive(self) -> Message:
        """The next part. Raises `Refused` for too much, and for silence."""
        if self._is_whole:
            return await self._receive()
        self._begun = True
        try:
            message = await asyncio.wait_for(self._receive(), SILENT_S)
        except TimeoutError:
            raise Refused(408, "nothing came for too long") from None
        self._note(message)
        if self._count > self._limit:
            raise self._too_large()
        return message

    def _note(self, message: Message) -> None:
        self._count += len(message.get("body", b""))
        self._is_whole = message["type"] != "http.request" or not message.get("more_body", False)

    async def drain(self) -> None:
        """Take what is still coming, for a while."""
        if not self.is_declared or (self._expects and not self._begun):
            return
        until_s = time.monotonic() + DRAIN_S
        while not self._is_whole and time.monotonic() < until_s:
            try:
                self._note(await asyncio.wait_for(self._receive(), DRAIN_SILENT_S))
            except TimeoutError:
                return


class _Answer:
    """An answer on its way, with the headers that all have."""

    def __init__(self, send: Send, headers: Mapping[str, str]) -> None:
        self._send, self._headers = send, {**_HEADERS, **headers}
        self.begun = False

    async def send(self, message: Message) -> None:
        """Send a part of it."""
        if message["type"] == "http.response.start":
            self.begun = True
            more = [(k.lower().encode(), v.encode()) for k, v in self._headers.items()]
            message = {**message, "headers": [*message.get("headers", []), *more]}
        await self._send(message)

    async def options(self) -> None:
        """What a browser asks before it lets a page ask."""
        await self.send({"type": "http.response.start", "status": 204, "headers": []})
        await self.send({"type": "http.response.body", "body": b""})

    async def refuse(self, status: int, text: str, more: Mapping[str, str]) -> None:
        """One sentence."""
        import json

        content = json.dumps({"detail": harmless(text)}).encode()
        headers: list[Any] = [(b"content-type", b"application/json")]
        headers += [(b"content-length", str(len(content)).encode())]
        headers += [(k.lower().encode(), v.encode()) for k, v in more.items()]
        await self.send({"type": "http.response.start", "status": status, "headers": headers})
        await self.send({"type": "http.response.body", "body": content})


def _size(count: int) -> str:
    return f"{count / 2**30:.3g} GB" if count >= 2**28 else f"{count / 2**20:.3g} MB"
