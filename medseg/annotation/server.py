"""`medseg serve`: MONAI Label's protocol over HTTP, for the extension of 3D Slicer that needs no
change, and for OHIF.

Requests are taken by one thread of asyncio, behind `medseg.annotation.guard`. A second thread
segments one scan after another, a third reads and writes the data set.
"""

from __future__ import annotations

import asyncio
import json
import logging
import socket
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from medseg.annotation.forms import Form, form_of
from medseg.annotation.guard import MAX_PLAIN_BYTES, SILENT_S, Guard, Login, Rules
from medseg.annotation.listing import in_order
from medseg.annotation.protocol import Refused, multipart, parse_object
from medseg.annotation.served import Served
from medseg.annotation.service import Service
from medseg.errors import BadConfig
from medseg.io import strip_suffix

if TYPE_CHECKING:
    from starlette.requests import Request
    from starlette.responses import Response
    from starlette.types import ASGIApp

Answer = TypeVar("Answer")
#: Scans that may wait to be segmented.
MAX_WAITING = 16
#: Connections at a time.
_CONNECTIONS = 256
#: Seconds that open requests have to end once the server is told to.
_GRACE_S = 5
_ABOUT = (
    "medseg serves this folder of scans by MONAI Label's protocol.\n"
    "Give this address to the module MONAI Label in 3D Slicer.\n"
)


@dataclass(frozen=True, kw_only=True)
class ServerOptions:
    """Where to listen, and to whom. port 0 takes a free one; login: without one nobody is asked."""

    host: str = "127.0.0.1"
    port: int = 8000
    rules: Rules = field(default_factory=Rules)
    login: Login | None = None


def check_libraries() -> None:
    """Raise `BadConfig` where the libraries of HTTP are not there."""
    try:
        import python_multipart  # noqa: F401
        import starlette  # noqa: F401
        import uvicorn  # noqa: F401
    except ImportError:
        raise BadConfig(
            "serving needs starlette, uvicorn and python-multipart; install them with: pip install"
            ' "medseg[serve]"'
        ) from None


class Server:
    """Answers for a service until told to stop."""

    def __init__(self, service: Service, options: ServerOptions) -> None:
        self._service, self._options = service, options
        self._segmenting, self._filing = ThreadPoolExecutor(1), ThreadPoolExecutor(1)
        self._waiting = 0
        self._running: Any = None
        self.stopped, self.listening = threading.Event(), threading.Event()
        self.port = options.port

    def app(self) -> ASGIApp:
        """What answers a request (ASGI)."""
        from starlette.routing import Route, Router

        routes = []
        for path, methods in self._endpoints().items():
            for method, endpoint in methods.items():
                # Clients ask for some with a slash at the end, and people without.
                other = path.rstrip("/") if path.endswith("/") else f"{path}/"
                for one in dict.fromkeys((path, other or "/")):
                    routes.append((one, method, endpoint))
        by_path: dict[str, dict[str, Any]] = {}
        for path, method, endpoint in routes:
            by_path.setdefault(path, {})[method] = endpoint
        router = Router(
            [Route(path, _by_method(ends), methods=list(ends)) for path, ends in by_path.items()],
            redirect_slashes=False,
        )
        return Guard(
            router, self._options.rules, login=self._options.login,
            told=self._service.without_paths,
        )  # fmt: skip

    def _endpoints(self) -> dict[str, dict[str, Any]]:
        return {
            "/": {"GET": self._root},
            "/logs/": {"GET": self._logs},
            "/info/": {"GET": self._info},
            "/auth/": {"GET": self._auth},
            "/auth/token": {"POST": self._token},
            "/auth/token/valid": {"GET": self._valid},
            "/session/": {"PUT": self._start_session},
            "/session/{identity}": {"GET": self._session, "DELETE": self._end_session},
            "/activelearning/{strategy}": {"POST": self._next_sample},
            "/datastore/": {"GET": self._datastore, "PUT": self._add_image},
            "/datastore/image": {"GET": self._image, "PUT": self._add_image},
            "/datastore/label": {"GET": self._label, "PUT": self._save_label},
            "/infer/{model}": {"POST": self._infer},
            "/train/": {"GET": self._training, "POST": self._train, "DELETE": self._end_training},
            "/train/{model}": {"POST": self._train},
        }

    def close(self) -> None:
        """End what is being computed, and wait for it."""
        self.stopped.set()
        self._service.lessons.close()
        for executor in (self._segmenting, self._filing):
            executor.shutdown(cancel_futures=True)

    def run(self) -> None:
        """Answer until told to `stop`, or until an exception (a signal) arrives. Raises `BadConfig`
        where it cannot listen.
        """
        check_libraries()
        import uvicorn

        options, stopped = self._options, self.stopped

        class Stopping(uvicorn.Server):
            async def shutdown(self, sockets: Any = None) -> None:
                stopped.set()
                await super().shutdown(sockets)

        with _listening(options.host, options.port) as listener:
            self.port = listener.getsockname()[1]
            config = uvicorn.Config(
                self.app(), http=_protocol(), ws="none", lifespan="off", loop="asyncio",
                log_config=None, log_level="critical", access_log=False, server_header=False,
                proxy_headers=False, timeout_keep_alive=30, timeout_graceful_shutdown=_GRACE_S,
                limit_concurrency=_CONNECTIONS,
            )  # fmt: skip
            _silence("uvicorn", "uvicorn.error", "uvicorn.asgi", "asyncio", "python_multipart")
            host = f"[{options.host}]" if ":" in options.host else options.host
            self._service.tell(f"listening on http://{host}:{self.port}")
            self._running = Stopping(config)
            self.listening.set()
            self._running.run(sockets=[listener])

    def stop(self) -> None:
        """Make `run` return, from another thread."""
        if self._running is not None:
            self._running.should_exit = True

    # Threads --------------------------------------------------------------------------------------

    async def _file(self, function: Callable[..., Answer], *arguments: Any) -> Answer:
        """What a function returns that reads or changes the data set."""
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._filing, partial(function, *arguments))

    async def _in_turn(
        self,
        request: Request,
        function: Callable[[Callable[[], bool]], Answer],
        unwanted: Callable[[Answer], None] = lambda answer: None,
    ) -> Answer:
        """What a function returns that computes; it waits for its turn, and is told when nobody
        waits for it any more. unwanted: gets what then came of it.
        """
        from starlette.requests import ClientDisconnect

        if self._waiting >= MAX_WAITING:
            raise Refused(429, "too many scans wait to be segmented; try again later")
        gone = threading.Event()
        self._waiting += 1
        job = self._segmenting.submit(function, lambda: gone.is_set() or self.stopped.is_set())
        work: asyncio.Future[Answer] = asyncio.wrap_future(job)
        leaving = asyncio.create_task(_left(request))
        try:
            both: set[asyncio.Future[Any]] = {work, leaving}
            await asyncio.wait(both, return_when=asyncio.FIRST_COMPLETED)
            if not work.done():
                raise ClientDisconnect
            return work.result()
        finally:
            leaving.cancel()
            self._waiting -= 1
            if not work.done():
                gone.set()
                job.add_done_callback(partial(_thrown_away, unwanted=unwanted))
                work.cancel()

    # Who asks -------------------------------------------------------------------------------------

    async def _root(self, request: Request) -> Response:
        from starlette.responses import PlainTextResponse

        return PlainTextResponse(_ABOUT)

    async def _logs(self, request: Request) -> Response:
        from starlette.responses import PlainTextResponse

        return PlainTextResponse("".join(f"{line}\n" for line in self._service.lines))

    async def _info(self, request: Request) -> Response:
        return _as_json(await self._file(self._service.info))

    async def _auth(self, request: Request) -> Response:
        return _as_json({"enabled": self._options.login is not None})

    async def _token(self, request: Request) -> Response:
        login = self._options.login
        if login is None:
            raise Refused(404, "no login is asked for here")
        form = await request.form(max_files=0, max_fields=10)
        name, password = form.get("username", ""), form.get("password", "")
        token = await login.token(str(name), str(password))
        return _as_json({"access_token": token, "token_type": "bearer"})

    async def _valid(self, request: Request) -> Response:
        return _as_json({"username": request.scope.get("user", "")})

    # Scans that are sent for a while --------------------------------------------------------------

    async def _start_session(self, request: Request) -> Response:
        async with form_of(request, self._service.folder) as form:
            return _as_json(await self._file(self._service.start_session, form.file("files")))

    async def _session(self, request: Request) -> Response:
        session = self._service.sessions.get(request.path_params["identity"])
        if session is None:
            raise _NO_SESSION
        return _as_json(self._service.about_session(session))

    async def _end_session(self, request: Request) -> Response:
        session = self._service.sessions.remove(request.path_params["identity"])
        if session is None:
            raise _NO_SESSION
        return _as_json(self._service.about_session(session))

    # The data set ---------------------------------------------------------------------------------

    async def _next_sample(self, request: Request) -> Response:
        params = await _json_of(request)
        client = str(params.get("client_id"))[:100]
        strategy = request.path_params["strategy"]
        if strategy != "uncertain":
            return _as_json(await self._file(self._service.next_sample, strategy, client))
        find = partial(self._service.next_sample, strategy, client)
        return _as_json(await self._in_turn(request, lambda is_over: find(is_over=is_over)))

    async def _datastore(self, request: Request) -> Response:
        output = request.query_params.get("output", "stats")
        service = self._service
        if output not in ("all", "stats"):
            raise Refused(400, "output is all or stats")
        return _as_json(await self._file(service.datastore if output == "all" else service.status))

    async def _image(self, request: Request) -> Response:
        from starlette.responses import FileResponse

        path = await self._file(self._service.image_file, _query(request, "image"))
        name = f"scan{path.name[len(strip_suffix(path)) :]}"
        return FileResponse(path, media_type="application/octet-stream", filename=name)

    async def _add_image(self, request: Request) -> Response:
        identity = _query(request, "image")
        async with form_of(request, self._service.folder) as form:
            parse_object(form.texts.get("params", ""), "params")
            file = form.file("file")
            return _as_json({"image": await self._file(self._service.add_image, identity, file)})

    async def _label(self, request: Request) -> Response:
        from starlette.responses import Response

        identity, tag = _query(request, "label"), _query(request, "tag")
        path = await self._file(self._service.label_file, identity, tag)
        content = await self._file(_taken, path)
        return Response(
            content,
            media_type="application/octet-stream",
            headers={"Content-Disposition": 'attachment; filename="label.nii.gz"'},
        )

    async def _save_label(self, request: Request) -> Response:
        identity, tag = _query(request, "image"), request.query_params.get("tag", "")
        async with form_of(request, self._service.folder) as form:
            params = parse_object(form.texts.get("params", ""), "params")
            file = form.file("label")
            return _as_json(await self._file(self._service.save_label, identity, tag, file, params))

    # Models ---------------------------------------------------------------------------------------

    async def _infer(self, request: Request) -> Response:
        from starlette.responses import Response

        output = request.query_params.get("output", "all")
        if output not in ("all", "image", "json"):
            raise Refused(400, "output is all, image or json")
        async with form_of(request, self._service.folder) as form:
            params = parse_object(form.texts.get("params", ""), "params")
            if "label" in form.files:
                raise Refused(400, "no model here takes scribbles; leave the label out")
            model = request.path_params["model"]
            served = self._service.model(model)
            files = await self._scan_of(request, form, served)
            path, said = await self._in_turn(
                request,
                lambda is_over: self._service.infer(model, files, params, is_over=is_over),
                lambda labels: labels[0].unlink(missing_ok=True),
            )
        content = await self._file(_taken, path)
        if output == "json":
            return _as_json(said)
        name = f"labels{''.join(path.suffixes)}"
        if output == "image":
            return Response(
                content,
                media_type="application/octet-stream",
                headers={"Content-Disposition": f'attachment; filename="{name}"'},
            )
        body, kind = multipart(said, content, name)
        return Response(body, media_type=kind)

    async def _scan_of(self, request: Request, form: Form, served: Served) -> Sequence[Path]:
        """The files of the scan that a request is about, in the order of a model's channels."""
        if identity := request.query_params.get("session_id", ""):
            session = self._service.sessions.get(identity)
            if session is None:
                raise _NO_SESSION
            return [session.scan]
        if "file" in form.files:
            return [form.files["file"]]
        case = await self._file(self._service.case, _query(request, "image"))
        return in_order(case.images, self._service.store.channels, served.channels)

    # Training -------------------------------------------------------------------------------------

    async def _training(self, request: Request) -> Response:
        return _as_json(await self._file(self._service.lessons.task))

    async def _train(self, request: Request) -> Response:
        params = await _json_of(request)
        name = request.path_params.get("model") or next(iter(self._service.trainers()), "")
        model = self._service.model(name)
        # Behind the scans that wait, for one thing computes at a time.
        begin = partial(self._service.lessons.begin, model, params)
        return _as_json(await self._in_turn(request, lambda is_over: begin()))

    async def _end_training(self, request: Request) -> Response:
        return _as_json(await asyncio.to_thread(self._service.lessons.end))


_NO_SESSION = Refused(404, "there is no session of this name")


def _by_method(endpoints: Mapping[str, Any]) -> Any:
    """One endpoint of several, by the method."""

    async def endpoint(request: Request) -> Response:
        method = "GET" if request.method == "HEAD" else request.method
        response: Response = await endpoints[method](request)
        return response

    return endpoint


def _query(request: Request, name: str) -> str:
    """What the address says of something. Raises `Refused` where that is missing."""
    value = request.query_params.get(name, "")
    if not value:
        raise Refused(400, f"the address does not say which {name}")
    return value


async def _json_of(request: Request) -> dict[str, Any]:
    """The JSON object that a request brings, or {}. Raises `Refused`."""
    content = b""
    async for part in request.stream():
        content += part
        if len(content) > MAX_PLAIN_BYTES:
            raise Refused(413, "more is sent than is read here")
    try:
        return parse_object(content.decode("utf-8"), "the request")
    except UnicodeDecodeError:
        raise Refused(400, "the request is not text in UTF-8") from None


def _as_json(value: Any) -> Response:
    from starlette.responses import Response

    return Response(json.dumps(value), media_type="application/json")


async def _left(request: Request) -> None:
    """Returns when who asked is gone."""
    while (await request.receive())["type"] != "http.disconnect":
        pass


def _thrown_away(job: Future[Answer], unwanted: Callable[[Answer], None]) -> None:
    if not job.cancelled() and job.exception() is None:
        unwanted(job.result())


def _taken(path: Path) -> bytes:
    """The content of a file, which is then removed."""
    try:
        return path.read_bytes()
    finally:
        path.unlink(missing_ok=True)


@contextmanager
def _listening(host: str, port: int) -> Iterator[socket.socket]:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        listener = socket.create_server((host, port), family=family, backlog=128)
    except (OSError, OverflowError) as error:
        reason = getattr(error, "strerror", None) or "there is no such place"
        raise BadConfig(
            f"cannot listen on {host}, port {port}: {reason}; choose another --port or --host"
        ) from None
    with listener:
        yield listener


def _protocol() -> Any:
    """HTTP of uvicorn, which answers what is no HTTP as all else is answered."""
    from uvicorn.protocols.http.h11_impl import H11Protocol

    class Protocol(H11Protocol):
        def connection_made(self, transport: Any) -> None:
            super().connection_made(transport)
            self.loop.call_later(SILENT_S, self._close_if_silent)

        def _close_if_silent(self) -> None:
            if self.cycle is None:  # which a whole head of a request makes
                self.transport.close()

        def send_400_response(self, msg: str) -> None:
            super().send_400_response('{"detail": "this is no HTTP"}')

    return Protocol


def _silence(*names: str) -> None:
    """Loggers of others, which would name addresses."""
    for name in names:
        logger = logging.getLogger(name)
        logger.handlers = [logging.NullHandler()]
        logger.propagate = False
