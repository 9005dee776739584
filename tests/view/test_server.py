"""The server of a page: three resources under a random path, on the loopback address, for nobody
else.
"""

from __future__ import annotations

import http.client
import re
import signal
import threading
import time
from collections.abc import Iterator
from urllib.parse import urlsplit

import nibabel as nib
import numpy as np
import pytest

from making import heads, networks as tiny
from medseg.errors import BadOutput
from medseg.view.page import prepare
from medseg.view.server import PageServer


@pytest.fixture(scope="module")
def server() -> Iterator[PageServer]:
    made = PageServer(prepare(*heads.head(), heads.TABLE, max_voxels=None))
    thread = threading.Thread(target=made.serve, daemon=True)
    thread.start()
    yield made
    made.stop()
    made.close()
    thread.join(5)
    assert not thread.is_alive()


def ask(
    server: PageServer, path: str, method: str = "GET", **headers: str
) -> tuple[int, dict[str, str], bytes]:
    """Status, headers and body."""
    parts = urlsplit(server.address)
    connection = http.client.HTTPConnection(parts.hostname, parts.port, timeout=10)
    connection.putrequest(method, path, skip_host="Host" in headers)
    for name, value in headers.items():
        connection.putheader(name, value)
    connection.endheaders()
    answer = connection.getresponse()
    body = answer.read()
    connection.close()
    return answer.status, dict(answer.getheaders()), body


def home(server: PageServer) -> str:
    return urlsplit(server.address).path


def test_it_serves_the_page_and_its_two_volumes(server):
    status, headers, body = ask(server, home(server))
    assert status == 200
    assert headers["Content-Type"] == "text/html; charset=utf-8"
    assert b"<!doctype html>" in body
    scan, labels = heads.head("RAS")
    for name, volume in (("scan", scan), ("labels", labels)):
        status, _, body = ask(server, f"{home(server)}{name}.nii")
        assert status == 200
        image = nib.Nifti1Image.from_bytes(body)
        assert np.array_equal(np.asanyarray(image.dataobj) > 0, volume.data > 0)
        assert np.allclose(image.affine, volume.affine, atol=1e-5)


def test_the_address_is_this_machine_s_and_cannot_be_guessed(server):
    parts = urlsplit(server.address)
    assert parts.hostname == "127.0.0.1"
    assert re.fullmatch(r"/[\w-]{32}/", parts.path)
    other = PageServer(prepare(*heads.head()))
    assert urlsplit(other.address).path != parts.path
    other.close()


@pytest.mark.parametrize(
    "path",
    [
        "/",
        "",
        "/x/",
        "/{}x/",
        "/{}/..",
        "/{}/../x",
        "/{}/etc/passwd",
        "/{}/scan.nii.gz",
        "/{}//",
        "/{}",
        "/%2e/{}/",
    ],
)
def test_nothing_else_is_there(server, path):
    status, headers, body = ask(server, path.format(home(server).strip("/")) or "/")
    assert status == 404
    assert body == b"not here\n"
    assert "Server" not in headers or "Python" not in headers["Server"]


@pytest.mark.parametrize("host", ["evil.example", "localhost", "127.0.0.1", "127.0.0.1:1", ""])
def test_a_page_from_elsewhere_that_points_its_name_here_gets_nothing(server, host):
    assert ask(server, home(server), Host=host)[0] == 404


@pytest.mark.parametrize("method", ["POST", "PUT", "DELETE", "OPTIONS"])
def test_it_only_gives(server, method):
    assert ask(server, home(server), method)[0] == 501


def test_head_gives_no_body(server):
    status, headers, body = ask(server, home(server), "HEAD")
    assert (status, body) == (200, b"")
    assert int(headers["Content-Length"]) > 1_000_000


def test_browsers_are_told_to_keep_nothing_and_load_nothing(server):
    _, headers, body = ask(server, home(server))
    assert headers["Cache-Control"] == "no-store"
    assert headers["Referrer-Policy"] == "no-referrer"
    assert headers["Cross-Origin-Resource-Policy"] == "same-origin"
    assert "connect-src 'self'" in headers["Content-Security-Policy"]
    assert "frame-ancestors 'none'" in headers["Content-Security-Policy"]
    assert headers["Content-Security-Policy"].split(";")[0] in body.decode()


def test_nothing_is_logged(server, capfd):
    ask(server, home(server))
    ask(server, "/secret")
    assert capfd.readouterr() == ("", "")


def test_a_taken_port_is_one_sentence(server):
    port = urlsplit(server.address).port
    with pytest.raises(BadOutput, match=f"port {port} .* is taken"):
        PageServer(prepare(*heads.head()), port)


def test_ctrl_c_ends_the_command(tmp_path):
    scan = tiny.save_scan(tmp_path / "scan.nii.gz")
    tiny.save_nifti(
        tmp_path / "scan_seg.nii.gz", (tiny.phantom() > 700).astype(np.uint8), tiny.affine_of()
    )
    with tiny.start("-m", "medseg", "view", scan, "--serve") as child:
        address = child.stdout.readline().strip()
        assert re.fullmatch(r"http://127\.0\.0\.1:\d+/[\w-]{32}/", address)
        child.send_signal(signal.SIGINT)
        end = time.monotonic() + 20
        while child.poll() is None and time.monotonic() < end:
            time.sleep(0.05)
        err = child.stderr.read()
        child.kill()
    assert child.returncode == 0, err
    assert "Traceback" not in err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["scan.nii.gz", "scan_seg.nii.gz"]
