"""Requests that make no sense, made by code and sent as bytes: each is answered by one sentence,
and nothing is written, nothing lost, and the server goes on.
"""

from __future__ import annotations

import json
import re
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import pytest

from making.serving import Served, listening, save_scans, served
from medseg.annotation import Rules

MAX_BYTES = 50_000
HOST = "127.0.0.1"


@pytest.fixture(scope="module")
def here(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Served, int, Path]]:
    """A server on the network, its port, and the folder around it."""
    folder = tmp_path_factory.mktemp("around")
    save_scans(folder / "studies", "a")
    (folder / "secret.nii.gz").write_bytes((folder / "studies" / "a.nii.gz").read_bytes())
    with (
        mock.patch("medseg.annotation.guard.DRAIN_SILENT_S", 0.2),
        mock.patch("medseg.annotation.guard.SILENT_S", 0.3),
        served(folder, "otsu", rules=Rules(max_bytes=MAX_BYTES)) as one,
        listening(one.server) as port,
    ):
        yield one, port, folder


def send(port: int, content: bytes, *, end: bool = False) -> tuple[int, Any]:
    """Status and JSON of what is answered to bytes."""
    with socket.create_connection((HOST, port), timeout=60) as connection:
        try:
            connection.sendall(content)
            if end:
                connection.shutdown(socket.SHUT_WR)
        except (BrokenPipeError, ConnectionResetError):
            pass  # it was answered before all was sent
        answer = b""
        try:
            while part := connection.recv(65536):
                answer += part
                head, _, body = answer.partition(b"\r\n\r\n")
                length = re.search(rb"(?i)content-length: (\d+)", head)
                if length and len(body) >= int(length[1]):
                    break
        except ConnectionResetError:
            pass
    head, _, body = answer.partition(b"\r\n\r\n")
    if b"transfer-encoding: chunked" in head.lower():
        body = re.sub(rb"(?m)^[0-9a-fA-F]+\r\n|\r\n", b"", body)
    return int(head.split()[1]), json.loads(body)


def request(
    method: str,
    path: str,
    body: bytes = b"",
    *,
    host: str | None = "127.0.0.1",
    kind: str = "",
    length: str | None = None,
    more: str = "",
) -> bytes:
    """The bytes of a request."""
    lines = [f"{method} {path} HTTP/1.1"]
    lines += [] if host is None else [f"Host: {host}"]
    lines += [f"Content-Type: {kind}"] if kind else []
    if length != "":
        lines.append(f"Content-Length: {len(body) if length is None else length}")
    return ("\r\n".join(lines) + f"\r\n{more}\r\n").encode("latin-1") + body


FORM = "multipart/form-data; boundary=b"


def part(name: str, content: bytes, file: str | None = None) -> bytes:
    about = f'form-data; name="{name}"' + (f'; filename="{file}"' if file is not None else "")
    return b"--b\r\nContent-Disposition: " + about.encode() + b"\r\n\r\n" + content + b"\r\n"


END = b"--b--\r\n"
#: Where forms go, and what they call the file.
FORMS = {
    "/session/": ("PUT", "files"),
    "/datastore/?image=new": ("PUT", "file"),
    "/datastore/label?image=a": ("PUT", "label"),
    "/infer/otsu?image=a": ("POST", "file"),
}
TRICKS = [
    "../secret", "..%2Fsecret", "%2e%2e/secret", "..%5Csecret", "/etc/hostname",
    "%2Fetc%2Fhostname",
    "a%00", "a%00.nii.gz", "....//secret", "..%252Fsecret", ".", "..", "~", "file:///etc/hostname",
    "a/../../secret", "a%0A", "%FF%FE", "C:%5Cx", "x" * 3000, "%F0%9F%92%A9", "a%E2%80%AEb",
]  # fmt: skip


def wrong_methods() -> Iterator[bytes]:
    allowed = {
        "/": "GET", "/logs/": "GET", "/info/": "GET", "/auth/": "GET", "/auth/token": "POST",
        "/auth/token/valid": "GET", "/session/": "PUT", "/session/x": "GET DELETE",
        "/activelearning/first": "POST", "/datastore/": "GET PUT", "/datastore/image": "GET PUT",
        "/datastore/label": "GET PUT", "/infer/otsu": "POST", "/train/otsu": "POST",
    }  # fmt: skip
    for path, methods in allowed.items():
        for method in ("GET", "PUT", "POST", "DELETE", "PATCH", "TRACE", "BREW"):
            if method not in methods.split():
                yield request(method, path)
    for path in ("/nothing", "/info/x", "/infer/", "/infer/a/b", "//info/", "/../info/", "/%2e"):
        yield request("GET", path)
    yield request("CONNECT", "example.org:443")


def broken_forms() -> Iterator[bytes]:
    for path, (method, name) in FORMS.items():
        whole = part(name, b"some", "x.nii.gz")
        for body in (
            b"", b"nothing", END, b"--b", b"--b\r\n", whole, whole[:-3], whole + b"--b",
            whole + b"--c--\r\n", part("params", b"{}") + END[:-4],
            b"--b\r\n\r\nno name\r\n" + END,
            b"--b\r\nContent-Disposition: form-data\r\n\r\nx\r\n" + END,
            b"--b\r\n" + b"X: y\r\n" * 5000 + b"\r\nx\r\n" + END,
            b"--b\r\n" + b"X" * 20_000 + b": y\r\n\r\nx\r\n" + END,
            part(name, b"x", "x.nii.gz") * 2 + END, part(name, b"x", "x.nii.gz") * 40 + END,
            part("params", b"{}") * 40 + whole + END,
            part(name, b"some", "x") + END, part(name, b"some", "") + END,
            part(name, b"some", "../../x.exe") + END,
            part("params", b"{}") + part(name, bytes(MAX_BYTES), "x.nii.gz") + END,
        ):  # fmt: skip
            if path == "/infer/otsu?image=a" and body in (END,):
                continue  # params may be left out
            yield request(method, path, body, kind=FORM)
        for kind in ("", "text/plain", "multipart/form-data", "multipart/form-data; boundary=",
                     "application/json", "multipart/mixed; boundary=b"):  # fmt: skip
            yield request(method, path, whole + END, kind=kind)


def broken_json() -> Iterator[bytes]:
    deep = b"[" * 100_000
    texts = (
        b"{", b"[]", b"1", b'"x"', b"null", b"{'a': 1}", b'{"a": ' + deep, deep,
        b'{"a":' * 100 + b"1" + b"}" * 100, b'{"a": 1' + b"0" * 5000 + b"}", b'{"a": 1, "a": 2}',
        b"\xff\xfe{}", b"{}x",
    )  # fmt: skip
    for text in texts:
        yield request("POST", "/activelearning/first", text, kind="application/json")
        yield request("POST", "/train/otsu", text, kind="application/json")
        if len(text) < MAX_BYTES and text.isascii():
            form = part("params", text) + END
            yield request("POST", "/infer/otsu?image=a", form, kind=FORM)
    scan = part("label", b"some", "x.nii.gz")
    for params in ('{"label_info": 1}', '{"label_info": [1]}', '{"label_info": [{}]}',
                   '{"label_info": [{"name": 5}]}', '{"label_info": {"name": "x"}}',
                   '{"label_info": [{"name": "' + "x" * 1000 + '"}]}'):  # fmt: skip
        body = part("params", params.encode()) + scan + END
        yield request("PUT", "/datastore/label?image=a", body, kind=FORM)


def wrong_lengths() -> Iterator[bytes]:
    for length in ("1000000000000", "9" * 30, "-1", "x", "1, 2", "0x10", "+5", "1e3"):
        yield request("PUT", "/session/", b"some", kind=FORM, length=length)
    yield request("PUT", "/session/", b"some", kind=FORM, length="500")  # and then silence
    yield request("PUT", "/session/", b"ff", kind=FORM, more="Content-Length: 3\r\n")
    chunked = "Transfer-Encoding: chunked\r\n"
    for body in (b"zz\r\nxx\r\n", b"ffffffffffffffffffffff\r\n", b"-5\r\nxx\r\n"):
        yield request("PUT", "/session/", body, kind=FORM, length="", more=chunked)
    piece = b"4000\r\n" + bytes(0x4000) + b"\r\n"
    yield request("PUT", "/session/", piece * 8 + b"0\r\n\r\n", kind=FORM, length="", more=chunked)
    yield request("POST", "/train/otsu", b"{}", length="", more="Transfer-Encoding: gzip\r\n")
    yield request("POST", "/activelearning/first", b"x" * 2_000_000)


def wrong_hosts() -> Iterator[bytes]:
    for host in (None, "", "evil.example", "evil.example:8000", "127.0.0.1.evil.example", "[::1",
                 "127.0.0.1:x", "127.0.0.1@evil.example", "user@127.0.0.1", "127.0.0.1 evil", "*",
                 "0.0.0.0", "127.0.0.1,evil.example", "http://127.0.0.1"):  # fmt: skip
        yield request("GET", "/info/", host=host)
        yield request("POST", "/train/otsu", b"{}", host=host)
    yield request("GET", "/info/", more="Host: evil.example\r\n")
    for origin in ("http://evil.example", "null", "http://127.0.0.1.evil.example", "file://"):
        yield request("POST", "/train/otsu", b"{}", more=f"Origin: {origin}\r\n")


def wrong_places() -> Iterator[bytes]:
    form = part("params", b"{}") + part("file", b"some", "x.nii.gz") + END
    label = part("params", b"{}") + part("label", b"some", "x.nii.gz") + END
    alone = part("params", b"{}") + END
    for trick in TRICKS:
        yield request("GET", f"/datastore/image?image={trick}")
        yield request("GET", f"/datastore/label?label={trick}&tag=final")
        yield request("GET", f"/datastore/label?label=a&tag={trick}")
        yield request("PUT", f"/datastore/?image={trick}", form, kind=FORM)
        yield request("PUT", f"/datastore/label?image={trick}", label, kind=FORM)
        yield request("PUT", f"/datastore/label?image=a&tag={trick}", label, kind=FORM)
        yield request("POST", f"/infer/otsu?image={trick}", alone, kind=FORM)
        yield request("POST", f"/infer/otsu?session_id={trick}", alone, kind=FORM)
        yield request("POST", f"/infer/{trick}?image=a", alone, kind=FORM)
        yield request("GET", f"/session/{trick}x")
        yield request("POST", f"/activelearning/{trick}", b"{}")
        yield request("POST", f"/train/{trick}x", b"{}")


def no_http() -> Iterator[bytes]:
    yield b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(50) + b"\r\n\r\n"
    yield b"hello\r\n\r\n"
    yield b"GET\r\n\r\n"
    yield b"GET /info/ HTTP/9.9\r\nHost: 127.0.0.1\r\n\r\n"
    yield b"GET /info/\x00 HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n"
    yield b"GET /info/ HTTP/1.1\r\nHost: 127.0.0.1\r\nBad Header: 1\r\n\r\n"
    yield b"GET /info/ HTTP/1.1\r\nHost: 127.0.0.1\r\nX: " + b"y" * 200_000 + b"\r\n\r\n"
    yield b"GET /" + b"x" * 200_000 + b" HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n"
    yield b"\xff" * 100_000
    yield b"PUT /session/ HTTP/1.1\r\nHost: 127.0.0.1\r\nHost: 127.0.0.1\r\n\r\n"


def files_in(folder: Path) -> dict[str, bytes]:
    paths = (path for path in folder.rglob("*") if path.is_file() and path.name != ".lock")
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in paths}


KINDS = {
    maker.__name__: maker
    for maker in (
        wrong_methods, broken_forms, broken_json, wrong_lengths, wrong_hosts, wrong_places, no_http,
    )
}  # fmt: skip


def test_there_are_many_of_them():
    assert sum(len(list(maker())) for maker in KINDS.values()) > 500


@pytest.mark.parametrize("kind", KINDS)
def test_what_makes_no_sense_is_answered_by_a_sentence(kind: str, here: tuple[Served, int, Path]):
    one, port, folder = here
    before = files_in(folder)
    for number, content in enumerate(KINDS[kind]()):
        status, body = send(port, content)
        where = f"{kind} {number}: {content[:150]!r}: {status} {body}"
        assert 400 <= status < 500, where
        assert list(body) == ["detail"] and body["detail"] and "\n" not in body["detail"], where
        assert len(body["detail"]) < 300 and str(folder) not in body["detail"], where
    assert files_in(folder) == before  # nothing of the private folder either
    assert one.client.get("/info/").status_code == 200
    assert send(port, request("GET", "/info/"))[0] == 200
    told = "".join([*one.told, *one.service.lines])
    assert "secret" not in told and "evil" not in told


def test_who_goes_away_in_the_middle_leaves_nothing(here: tuple[Served, int, Path]):
    one, port, folder = here
    before = files_in(folder)
    scan = (folder / "studies" / "a.nii.gz").read_bytes()
    form = part("params", b"{}") + part("file", scan, "x.nii.gz") + END
    whole = request("PUT", "/datastore/?image=new", form, kind=FORM)
    infer = request("POST", "/infer/otsu?image=a", form, kind=FORM)
    for content in (whole, infer):
        for size in (1, 30, 120, len(content) // 2, len(content) - 1):
            with socket.create_connection((HOST, port), timeout=60) as connection:
                connection.sendall(content[:size])
    with socket.create_connection((HOST, port), timeout=60) as connection:
        connection.sendall(infer)  # and does not wait for the labels
    assert send(port, request("GET", "/info/"))[0] == 200
    assert send(port, request("POST", "/activelearning/first", b"{}"))[0] == 200
    assert one.infer("otsu", "image=a").status_code == 200  # after what waits before it
    for _ in range(600):  # what was begun ends in its own time
        if files_in(folder) == before:
            break
        time.sleep(0.1)
    assert files_in(folder) == before
    assert [case.id for case in one.store.cases()] == ["a"]


def test_an_upload_over_the_limit_is_told_so_even_to_who_closes_after_it(
    here: tuple[Served, int, Path],
):
    """Python's urllib does not listen before all is sent."""
    _, port, folder = here
    before = files_in(folder)
    form = part("files", bytes(40 * MAX_BYTES), "x.nii.gz") + END
    more = "Connection: close\r\n"
    status, body = send(port, request("PUT", "/session/", form, kind=FORM, more=more))
    assert status == 413 and "the limit" in body["detail"]
    assert files_in(folder) == before
