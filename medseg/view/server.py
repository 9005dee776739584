"""Show a page with a large scan to the browser of this machine: a tiny server on the loopback
address.

It serves the four resources of one page under a random path that only the printed address names,
to clients that ask for 127.0.0.1 by that name (a page from elsewhere cannot, whatever name it gives
to this address), and it logs nothing.
"""

from __future__ import annotations

import hmac
import re
import secrets
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from medseg.errors import BadOutput
from medseg.view.page import Contents, page_html

_HOST = "127.0.0.1"
_HEADERS = {
    "Cache-Control": "no-store",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
}


class PageServer:
    """A server of one page. Listens once it is made; `serve` answers until `close`, or an exception
    in its thread.
    """

    def __init__(self, contents: Contents, port: int = 0) -> None:
        """`port` 0 takes a free one. Raises `BadOutput` if the port is taken."""
        page = page_html(contents, served=True)
        policy = re.search(r'http-equiv="Content-Security-Policy" content="([^"]*)"', page)
        resources = {
            "": (page.encode(), "text/html; charset=utf-8"),
            "scan.nii": (contents.scan, "application/octet-stream"),
            "labels.nii": (contents.labels, "application/octet-stream"),
            "surfaces.gz": (contents.surfaces, "application/octet-stream"),
        }
        self._token = secrets.token_urlsafe(24)
        handler = _handler(self._token, resources, policy[1] if policy else "default-src 'none'")
        try:
            self._server = ThreadingHTTPServer((_HOST, port), handler)
        except OSError:
            raise BadOutput(
                f"port {port} on this machine is taken; choose another with --port"
            ) from None
        self._server.daemon_threads = True

    @property
    def address(self) -> str:
        """What to open in a browser on this machine."""
        return f"http://{_HOST}:{self._server.server_port}/{self._token}/"

    def serve(self) -> None:
        """Answer until another thread calls `close`, or until interrupted."""
        self._server.serve_forever(poll_interval=0.2)

    def close(self) -> None:
        """Stop answering and free the port."""
        self._server.server_close()

    def stop(self) -> None:
        """Make `serve` return, from another thread."""
        self._server.shutdown()


def _handler(
    token: str, resources: dict[str, tuple[bytes, str]], policy: str
) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        server_version = "medseg"
        sys_version = ""
        timeout = 30  # seconds of silence after which a connection is closed

        def do_GET(self) -> None:
            self._answer(body=True)

        def do_HEAD(self) -> None:
            self._answer(body=False)

        def _answer(self, body: bool) -> None:
            resource = self._find()
            content, kind = resource if resource else (b"not here\n", "text/plain; charset=utf-8")
            self.send_response(HTTPStatus.OK if resource else HTTPStatus.NOT_FOUND)
            for name, value in _HEADERS.items():
                self.send_header(name, value)
            self.send_header("Content-Security-Policy", f"{policy}; frame-ancestors 'none'")
            self.send_header("Content-Type", kind)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            if body:
                try:
                    self.wfile.write(content)
                except (BrokenPipeError, ConnectionResetError):
                    self.close_connection = True  # the browser went away

        def _find(self) -> tuple[bytes, str] | None:
            host, port = self.connection.getsockname()
            if self.headers.get("Host") != f"{host}:{port}":
                return None
            _, given, name = [*self.path.split("/", 2), "", ""][:3]
            known = hmac.compare_digest(given.encode("utf-8", "replace"), token.encode())
            return resources.get(name) if known and self.path.count("/") == 2 else None

        def log_message(self, *arguments: object) -> None:
            """Nothing: a log of what somebody looks at is nobody's business."""

    return Handler
