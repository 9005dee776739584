"""DICOMweb: addresses, credentials, what is fetched and pushed, and a PACS that misbehaves. Real
Orthanc at the end.
"""

from __future__ import annotations

import base64
import json
import re
import shutil
import signal
import stat
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from io import BytesIO
from pathlib import Path
from typing import Any

import pytest

from making import networks as tiny

pytest.importorskip(
    "dicomweb_client", reason="a PACS needs dicomweb-client: pip install medseg[pacs]"
)

from pydicom import dcmread

from making.dicom_series import SECRET, series
from medseg.errors import BadConfig, BadFile, BadOutput
from medseg.files import TEMPORARY, private_folder, sweep_folders
from medseg.pacs import client as pacs

pytestmark = pytest.mark.usefixtures("leave_libraries_as_they_were")

UID = "1.2.826.0.1.3680043.8.498"


@pytest.mark.parametrize(
    ("text", "root", "encrypted"),
    [
        ("dicomweb://pacs.example/studies/1.2/series/3.4", "https://pacs.example", True),
        (
            "dicomweb://pacs.example:8443/a/dicom-web/studies/1.2/series/3.4/",
            "https://pacs.example:8443/a/dicom-web",
            True,
        ),
        (
            "dicomweb+http://127.0.0.1:8042/dicom-web/studies/1.2/series/3.4",
            "http://127.0.0.1:8042/dicom-web",
            False,
        ),
        ("dicomweb+http://localhost/studies/1.2/series/3.4", "http://localhost", False),
    ],
)
def test_an_address_is_taken_apart(text: str, root: str, encrypted: bool):
    for form in (text, Path(text)):
        address = pacs.parse_address(form)
        assert (address.root, address.study, address.series, address.encrypted) == (
            root,
            "1.2",
            "3.4",
            encrypted,
        )


@pytest.mark.parametrize(
    "text",
    [
        "dicomweb://host",
        "dicomweb://host/studies/1.2",
        "dicomweb://host/studies/1.2/series/",
        "dicomweb://host/studies/../series/1.2",
        "dicomweb://host/studies/1.2/series/1.2?x=1",
        "dicomweb://host/studies/1.2/series/1.2#x",
        "dicomweb://host/studies/1.2/series/" + "1" * 65,
        "dicomweb://host:99999/studies/1.2/series/3",
        "dicomweb://ho st/studies/1.2/series/3",
        "dicomweb://host\n/studies/1.2/series/3",
        "dicomweb+ftp://host/studies/1.2/series/3",
        "dicomweb:///studies/1.2/series/3",
    ],
)
def test_an_address_that_is_none_is_refused_without_being_repeated(text: str):
    assert pacs.is_address(text)
    with pytest.raises(BadConfig) as refused:
        pacs.parse_address(text)
    assert "1.2" not in str(refused.value) and "dicomweb://HOST" in str(refused.value)


def test_passwords_in_addresses_are_refused():
    with pytest.raises(BadConfig, match="--credentials") as refused:
        pacs.parse_address("dicomweb://me:sesame@host/studies/1.2/series/3")
    assert "sesame" not in str(refused.value)


def test_plain_http_is_for_this_machine_unless_it_is_allowed():
    text = "dicomweb+http://pacs.example/studies/1.2/series/3"
    for refused in (text, text.replace("pacs.example", "127.0.0.1.evil.example")):
        with pytest.raises(BadConfig, match="unencrypted"):
            pacs.parse_address(refused)
    address = pacs.parse_address(text, plain_http=True)
    assert address.root == "http://pacs.example"
    with pytest.raises(BadConfig, match="only sent over https"):
        pacs.Pacs(address, pacs.Access("Bearer", "token"))


@pytest.mark.parametrize(
    ("content", "scheme", "secret"),
    [("Bearer abc.def\n", "Bearer", "abc.def"), ("basic me:pass word", "Basic", "me:pass word")],
)
def test_credentials_are_read_from_a_file_and_never_shown(
    tmp_path: Path, content: str, scheme: str, secret: str
):
    (tmp_path / "secret").write_text(content)
    access = pacs.read_access(tmp_path / "secret")
    assert (access.scheme, access.secret) == (scheme, secret)
    assert secret not in repr(access) and secret not in f"{access}"


@pytest.mark.parametrize(
    "content",
    ["sesame", "Bearer", "Basic sesame", "Bearer a\nBearer b", "Digest a:b", "Bearer \x07"],
)
def test_files_without_credentials_are_refused_without_being_repeated(tmp_path: Path, content: str):
    (tmp_path / "secret").write_text(content)
    with pytest.raises(BadFile, match="holds no credentials") as refused:
        pacs.read_access(tmp_path / "secret")
    assert "sesame" not in str(refused.value)


def part10(piece: Any) -> bytes:
    with BytesIO() as file:
        piece.save_as(file, enforce_file_format=True)
        return file.getvalue()


class Server:
    """A DICOMweb server on 127.0.0.1 that does as the standard says, but for what `answer` says
    instead.
    """

    def __init__(self) -> None:
        self.pieces = series()
        self.study, self.series = (
            str(self.pieces[0].StudyInstanceUID),
            str(self.pieces[0].SeriesInstanceUID),
        )
        self.parts = [part10(piece) for piece in self.pieces]
        self.count: int | None = len(self.parts)
        self.answer: dict[str, Callable[[BaseHTTPRequestHandler], None]] = {}
        self.stored: list[Any] = []
        self.refused: list[str] = []
        self.silent = False  # answers a store request with an empty body
        self.requests: list[tuple[str, str, dict[str, str]]] = []

    @property
    def root(self) -> str:
        return f"127.0.0.1:{self.port}/dicom-web"

    @property
    def address(self) -> str:
        return f"dicomweb+http://{self.root}/studies/{self.study}/series/{self.series}"

    def pacs(self, access: pacs.Access | None = None) -> pacs.Pacs:
        return pacs.Pacs(pacs.parse_address(self.address), access)

    def handle(self, request: BaseHTTPRequestHandler) -> None:
        path, _, query = request.path.partition("?")
        self.requests.append((request.command, request.path, dict(request.headers)))
        body = b""
        if request.command == "POST":
            kind, body = "store", self.body_of(request)
        elif path.endswith("/series"):
            kind = "series"
        elif path.endswith("/instances"):
            kind = "instances"
        else:
            kind = "retrieve"
        if kind in self.answer:
            self.answer[kind](request)
        elif kind == "series":
            row = {"0020000E": {"vr": "UI", "Value": [self.series]}}
            if self.count is not None:
                row["00201209"] = {"vr": "IS", "Value": [self.count]}
            self.json(request, [row] if self.series in query else [])
        elif kind == "instances":
            wanted = re.search(r"SOPInstanceUID=([0-9.]+)", query)
            found = [str(p.SOPInstanceUID) for p in self.pieces + self.stored]
            found = [uid for uid in found if wanted is None or uid == wanted[1]]
            self.json(request, [{"00080018": {"vr": "UI", "Value": [uid]}} for uid in found])
        elif kind == "retrieve":
            self.multipart(request, self.parts)
        else:
            self.store(request, body)

    @staticmethod
    def body_of(request: BaseHTTPRequestHandler) -> bytes:
        if "Content-Length" in request.headers:
            return request.rfile.read(int(request.headers["Content-Length"]))
        body = b""
        while size := int(request.rfile.readline(), 16):
            body += request.rfile.read(size)
            request.rfile.readline()
        request.rfile.readline()
        return body

    def store(self, request: BaseHTTPRequestHandler, body: bytes) -> None:
        boundary = re.search(r'boundary="([^"]+)"', request.headers["Content-Type"])[1].encode()  # type: ignore[index]
        for part in body.split(b"--" + boundary)[1:-1]:
            self.stored.append(dcmread(BytesIO(part.split(b"\r\n\r\n", 1)[1])))
        if self.silent:
            return self.send(request, b"", "application/dicom+json")
        kept = [
            {"00081155": {"vr": "UI", "Value": [str(one.SOPInstanceUID)]}} for one in self.stored
        ]
        failed = [{"00081155": {"vr": "UI", "Value": [uid]}} for uid in self.refused]
        row: dict[str, Any] = {"00081199": {"vr": "SQ", "Value": kept}}
        if failed:
            row["00081198"] = {"vr": "SQ", "Value": failed}
        self.send(
            request, json.dumps(row).encode(), "application/dicom+json", 202 if failed else 200
        )

    def json(self, request: BaseHTTPRequestHandler, rows: object) -> None:
        self.send(request, json.dumps(rows).encode(), "application/dicom+json")

    def multipart(self, request: BaseHTTPRequestHandler, parts: list[bytes]) -> None:
        body = (
            b"".join(
                b"--x\r\nContent-Type: application/dicom\r\n\r\n" + part + b"\r\n" for part in parts
            )
            + b"--x--\r\n"
        )
        self.send(request, body, 'multipart/related; type="application/dicom"; boundary=x')

    @staticmethod
    def send(
        request: BaseHTTPRequestHandler, body: bytes, kind: str, status: int = 200, **headers: str
    ) -> None:
        request.send_response(status)
        request.send_header("Content-Type", kind)
        request.send_header("Content-Length", str(len(body)))
        for name, value in headers.items():
            request.send_header(name.replace("_", "-"), value)
        request.end_headers()
        request.wfile.write(body)


def handler_of(state: Server) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            state.handle(self)

        def do_POST(self) -> None:
            state.handle(self)

        def log_message(self, *_: object) -> None:
            pass

    return Handler


@pytest.fixture
def server() -> Iterator[Server]:
    state = Server()

    with ThreadingHTTPServer(("127.0.0.1", 0), handler_of(state)) as http:
        http.handle_error = lambda *_: None  # type: ignore[method-assign]
        state.port = http.server_address[1]  # type: ignore[attr-defined]
        thread = threading.Thread(target=http.serve_forever, args=(0.02,))
        thread.start()
        yield state
        http.shutdown()
        thread.join()


def test_a_series_is_fetched_byte_by_byte(server: Server, tmp_path: Path):
    assert server.pacs().fetch(tmp_path, pacs.Limits()) == 4
    assert [path.name for path in sorted(tmp_path.iterdir())] == [
        f"{n:05d}.dcm" for n in range(1, 5)
    ]
    assert [path.read_bytes() for path in sorted(tmp_path.iterdir())] == server.parts


def test_where_the_pacs_does_not_count_the_instances_are_listed(server: Server, tmp_path: Path):
    server.count = None
    assert server.pacs().fetch(tmp_path, pacs.Limits()) == 4


def test_a_pacs_that_cannot_unpack_pixels_is_asked_for_them_as_they_are(
    server: Server, tmp_path: Path
):
    def refuse(request: BaseHTTPRequestHandler) -> None:
        if "transfer-syntax=*" in request.headers["Accept"]:
            server.multipart(request, server.parts)
        else:
            server.send(request, b"", "text/plain", 406)

    server.answer["retrieve"] = refuse
    assert server.pacs().fetch(tmp_path, pacs.Limits()) == 4


@pytest.mark.parametrize(
    ("access", "header"),
    [
        (pacs.Access("Bearer", "tok"), "Bearer tok"),
        (pacs.Access("Basic", "me:pw"), "Basic " + base64.b64encode(b"me:pw").decode()),
    ],
    ids=["token", "password"],
)
def test_credentials_go_with_every_request(
    server: Server, tmp_path: Path, access: pacs.Access, header: str
):
    server.pacs(access).fetch(tmp_path, pacs.Limits())
    assert [headers.get("Authorization") for _, _, headers in server.requests] == [header] * 2


def test_the_environment_is_not_asked(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:9")
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    (tmp_path / "netrc").write_text("machine 127.0.0.1 login me password sesame\n")
    (tmp_path / "series").mkdir()
    server.pacs().fetch(tmp_path / "series", pacs.Limits())
    assert all("Authorization" not in headers for _, _, headers in server.requests)


def wrong_series(server: Server) -> list[bytes]:
    other = series(1)[0]
    return [*server.parts[:3], part10(other)]


def replies(
    kind: str, body: bytes = b"", type_: str = "text/html", status: int = 200, **headers: str
) -> Callable:
    return lambda server: server.answer.update(
        {kind: lambda request: server.send(request, body, type_, status, **headers)}
    )


def cut_short(server: Server) -> None:
    def answer(request: BaseHTTPRequestHandler) -> None:
        request.send_response(200)
        request.send_header(
            "Content-Type", 'multipart/related; type="application/dicom"; boundary=x'
        )
        request.send_header("Content-Length", "100000")
        request.end_headers()
        request.wfile.write(b"--x\r\nContent-Type: application/dicom\r\n\r\n" + server.parts[0])
        request.close_connection = True

    server.answer["retrieve"] = answer


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda s: setattr(s, "parts", s.parts[:3]), "sent 3 of 4 instances"),
        (lambda s: setattr(s, "parts", s.parts + s.parts[:1]), "more than the 4 instances"),
        (lambda s: setattr(s, "parts", wrong_series(s)), "another series than the one asked for"),
        (lambda s: setattr(s, "parts", [b"x" * 500] * 4), "not DICOM"),
        (lambda s: setattr(s, "count", 10**9), "1000000000 instances"),
        (lambda s: setattr(s, "count", 0), "0 instances"),
        (lambda s: setattr(s, "count", "many"), "not DICOMweb"),
        (lambda s: setattr(s, "parts", [s.parts[0] + bytes(3 * 2**20)] * 4),
        "more than is allowed for one answer"),
        (cut_short, "broke off"),
        (replies("series", b"[]", "application/json"), "does not have this series"),
        (replies("series", b"<html>", "text/html"), "not DICOMweb"),
        (replies("series", b"[" * 100_000, "application/json"), "not DICOMweb"),
        (replies("series", b"[" + b"1," * 2**25 + b"1]", "application/json"),
        "more than is allowed"),
        (replies("series", status=401), "wants credentials"),
        (replies("series", status=403), "does not allow"),
        (replies("retrieve", status=404), "does not know this address"),
        (replies("retrieve", status=500), "error 500"),
        (replies("series", status=302, Location="http://127.0.0.1:9/"), "redirects"),
        (replies("series", b"x", Content_Encoding="gzip"), "packs its answers"),
        (replies("retrieve", b"x", "text/plain"), "not DICOMweb"),
        (replies("retrieve", b"no boundary", "multipart/related"), "not DICOM"),
    ],
)  # fmt: skip
def test_a_pacs_that_misbehaves_is_refused(
    server: Server, tmp_path: Path, spoil: Callable, message: str
):
    spoil(server)
    with pytest.raises(BadFile, match=message) as refused:
        server.pacs().fetch(tmp_path, pacs.Limits(instance_bytes=2**20))
    assert server.series not in str(refused.value) and "http" not in str(refused.value)


def test_the_total_is_limited_while_receiving(server: Server, tmp_path: Path):
    with pytest.raises(BadFile, match="larger than"):
        server.pacs().fetch(tmp_path, pacs.Limits(total_bytes=2 * len(server.parts[0]) + 10))
    assert len(list(tmp_path.iterdir())) == 2


def test_the_time_is_limited_too(server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(pacs, "MAX_FETCH_S", -1)
    with pytest.raises(BadFile, match="needs longer"):
        server.pacs().fetch(tmp_path, pacs.Limits())


def test_a_pacs_that_is_not_there_is_said_so(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    address = pacs.parse_address(f"dicomweb+http://127.0.0.1:9/studies/{UID}/series/{UID}")
    with pytest.raises(BadFile, match="cannot be reached") as refused:
        pacs.Pacs(address).fetch(tmp_path, pacs.Limits())
    assert UID not in str(refused.value) and not caplog.records


def test_a_certificate_that_proves_nothing_is_refused(tmp_path: Path):
    """A TLS server with a certificate of its own making: refused, unless its authority is given."""
    import ssl

    openssl = shutil.which("openssl")
    if openssl is None:
        pytest.skip("making a certificate needs openssl")
    key, certificate = tmp_path / "key.pem", tmp_path / "cert.pem"
    command = [
        openssl,
        "req",
        "-x509",
        "-newkey",
        "rsa:2048",
        "-nodes",
        "-keyout",
        key,
        "-out",
        certificate,
        "-days",
        "1",
    ]
    name = ["-subj", "/CN=localhost", "-addext", "subjectAltName=DNS:localhost"]
    subprocess.run([*command, *name], check=True, capture_output=True)
    state = Server()

    with ThreadingHTTPServer(("127.0.0.1", 0), handler_of(state)) as http:
        http.handle_error = lambda *_: None  # type: ignore[method-assign]
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(certificate, key)
        http.socket = context.wrap_socket(http.socket, server_side=True)
        thread = threading.Thread(target=http.serve_forever, args=(0.02,))
        thread.start()
        try:
            port = http.server_address[1]
            address = pacs.parse_address(
                f"dicomweb://localhost:{port}/studies/{state.study}/series/{state.series}"
            )
            (tmp_path / "series").mkdir()
            with pytest.raises(BadFile, match="cannot prove who it is"):
                pacs.Pacs(address).fetch(tmp_path / "series", pacs.Limits())
            assert (
                pacs.Pacs(address, authority=certificate).fetch(tmp_path / "series", pacs.Limits())
                == 4
            )
        finally:
            http.shutdown()
            thread.join()


def a_file(folder: Path) -> Path:
    path = folder / "result.dcm"
    path.write_bytes(part10(series(1)[0]))
    return path


@pytest.mark.parametrize("silent", [False, True])
def test_what_is_pushed_arrives(server: Server, tmp_path: Path, silent: bool):
    server.silent = silent
    path = a_file(tmp_path)
    server.pacs().push([path])
    assert [one.SOPInstanceUID for one in server.stored] == [dcmread(path).SOPInstanceUID]
    assert server.requests[0][:2] == ("POST", f"/dicom-web/studies/{server.study}")


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda s: setattr(s, "refused", [UID]), "refused 1 of 1"),
        (replies("store", b"", "application/dicom+json"), "did not keep 1 of 1"),
        (replies("store", status=409), "error 409"),
        (replies("store", b"{", "application/dicom+json"), "not DICOMweb"),
    ],
)
def test_what_does_not_arrive_is_an_error(
    server: Server, tmp_path: Path, spoil: Callable, message: str
):
    spoil(server)
    with pytest.raises(BadOutput, match=message):
        server.pacs().push([a_file(tmp_path)])


def test_a_private_folder_is_private_and_gone_afterwards():
    with pytest.raises(KeyError), private_folder() as folder:
        assert stat.S_IMODE(folder.stat().st_mode) == 0o700
        assert re.fullmatch(r"\.medseg-[0-9a-f]{24}", folder.name)
        (folder / "deep").mkdir()
        (folder / "deep" / "file").write_text("x")
        raise KeyError
    assert not folder.exists()


def test_folders_of_killed_processes_are_swept_and_those_in_use_are_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("tempfile.gettempdir", lambda: str(tmp_path))
    left = tmp_path / f"{TEMPORARY}{'0' * 24}"
    left.mkdir()
    (left / "00001.dcm").write_text("x")
    strange = tmp_path / f"{TEMPORARY}mine"
    strange.mkdir()
    with private_folder() as used:
        assert left.exists(), "it may have been made a moment ago"
        assert sweep_folders(tmp_path, min_age_s=0) == 1
        assert used.exists() and strange.exists() and not left.exists()


def leftovers(place: Path) -> list[str]:
    return [path.name for path in place.iterdir() if path.name.startswith(TEMPORARY)]


@pytest.fixture
def temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    place = tmp_path / "temporary"
    place.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(place))
    return place


def test_infer_takes_a_series_from_a_pacs(server: Server, tmp_path: Path, temporary: Path):
    ran = tiny.medseg("infer", server.address, "-o", tmp_path / "out.nii.gz", "--model", "otsu")
    assert ran.code == 0, ran.err
    assert "received 4 instances" in ran.err and leftovers(temporary) == []
    everything = ran.out + ran.err + (tmp_path / "out.json").read_text()
    for secret in (server.series, server.study, "dicomweb", str(temporary), SECRET):
        assert secret not in everything
    assert tiny.volume_of(tmp_path / "out.nii.gz").data.sum() == 4 * 25


def test_infer_pushes_the_result_back(server: Server, tmp_path: Path, temporary: Path):
    ran = tiny.medseg("infer", server.address, "--push", "--also", "rtstruct,sr", "--model", "otsu")
    assert ran.code == 0, ran.err
    result = server.stored[0]
    assert [one.Modality for one in server.stored] == ["SEG", "RTSTRUCT", "SR"]
    assert {str(one.StudyInstanceUID) for one in server.stored} == {server.study}
    assert result.ReferencedSeriesSequence[0].SeriesInstanceUID == server.series
    assert leftovers(temporary) == [] and str(temporary) not in ran.out + ran.err


def test_a_failed_push_is_an_error(server: Server, tmp_path: Path, temporary: Path):
    server.answer["store"] = lambda request: server.send(request, b"", "text/plain", 500)
    ran = tiny.medseg("infer", server.address, "--push", "--model", "otsu")
    assert ran.code == 4 and "error 500" in ran.err and leftovers(temporary) == []


def test_a_series_that_cannot_be_used_is_refused(server: Server, tmp_path: Path, temporary: Path):
    del server.parts[1]
    server.count = 3
    ran = tiny.medseg("infer", server.address, "-o", tmp_path / "out.nii.gz", "--model", "otsu")
    assert ran.code == 3 and str(temporary) not in ran.err and "the series" in ran.err
    assert leftovers(temporary) == [] and not (tmp_path / "out.nii.gz").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["scan.nii.gz", "--push"], "for a scan from a PACS"),
        (["ADDRESS"], "where the result goes"),
        (["ADDRESS", "ADDRESS", "-o", "x"], "one address"),
        (["ADDRESS", "--push", "-o", "x.nii.gz"], "ends in .dcm"),
        (["ADDRESS", "--push", "--deidentify"], "--deidentify out of it; choose"),
        (["ADDRESS", "--push", "--credentials", "nowhere"], "no such file"),
    ],
)
def test_wrong_use_is_said_before_anything_is_sent(
    server: Server, arguments: list[str], message: str
):
    ran = tiny.medseg(
        "infer", *[server.address if a == "ADDRESS" else a for a in arguments], "--model", "otsu"
    )
    assert ran.code in (3, 5) and message in ran.err and not server.requests


def test_a_signal_leaves_no_series_behind(server: Server, tmp_path: Path):
    """SIGTERM in the middle of a retrieval."""
    begun, go_on = threading.Event(), threading.Event()

    def stall(request: BaseHTTPRequestHandler) -> None:
        request.send_response(200)
        request.send_header(
            "Content-Type", 'multipart/related; type="application/dicom"; boundary=x'
        )
        request.send_header("Content-Length", "100000000")
        request.end_headers()
        part = (
            b"--x\r\nContent-Type: application/dicom\r\n\r\n"
            + server.parts[0]
            + bytes(2**20)
            + b"\r\n"
        )
        request.wfile.write(part + part)
        begun.set()
        go_on.wait(20)
        request.close_connection = True

    server.answer["retrieve"] = stall
    environment = tiny.environment() | {"TMPDIR": str(tmp_path)}
    with tiny.start(
        "-m", "medseg", "infer", server.address, "--push", "-m", "otsu", env=environment
    ) as child:
        try:
            assert begun.wait(60)
            end = time.monotonic() + 10
            while not list(tmp_path.glob(f"{TEMPORARY}*/series/*")) and time.monotonic() < end:
                time.sleep(0.02)
            assert list(tmp_path.glob(f"{TEMPORARY}*/series/*"))
            child.send_signal(signal.SIGTERM)
            _, told = child.communicate(timeout=30)
        finally:
            go_on.set()
            child.kill()
    assert child.returncode == 143 and "stopped" in told
    assert leftovers(tmp_path) == []
