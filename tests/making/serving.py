"""Servers of MONAI Label's protocol for tests: a data set, models whose answer is known, and who
asks.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from making import networks as tiny
from medseg.annotation import (
    Login,
    Rules,
    Server,
    ServerOptions,
    Service,
    Store,
    open_studies,
    serve_models,
)
from medseg.labels import Label, LabelTable
from medseg.models.folder import save_checkpoint

#: What FreeSurfer calls the hippocampi, with its values.
HIPPOCAMPI = LabelTable(
    (
        Label(17, "Left-Hippocampus", (220, 216, 20)),
        Label(53, "Right-Hippocampus", (220, 216, 21)),
    )
)

_RULES = Rules()


def save_nearest(folder: Path, table: LabelTable = HIPPOCAMPI, **changes: Any) -> Path:
    """A model that gives a phantom's body the table's first value, and its bright part the second;
    it needs the networks of `tiny.KNOWN`.
    """
    classes = (0, *table.values)
    spec = {
        "name": folder.name, "architecture": "nearest", "classes": classes, "patch": (16, 16, 16),
        "spacing_mm": 2.0,
    }  # fmt: skip
    save_checkpoint(folder, spec | changes, tiny.Nearest(1, len(classes)).state_dict(), table)
    return folder


def save_scans(folder: Path, *names: str) -> Path:
    """A folder of phantoms, no two alike."""
    folder.mkdir(parents=True, exist_ok=True)
    for number, name in enumerate(names):
        tiny.save_scan(folder / f"{name}.nii.gz", seed=number + 1)
    return folder


@dataclass(kw_only=True)
class Served:
    """A server that is not asked over the network."""

    service: Service
    server: Server
    store: Store
    client: Any
    told: list[str]

    def infer(self, model: str, address: str, **params: Any) -> Any:
        """The answer to a request for labels."""
        return self.client.post(
            f"/infer/{model}?{address}", files={"params": (None, json.dumps(params))}
        )

    def save_label(
        self, image: str, path: Path, names: list[str], *, tag: str = "", **params: Any
    ) -> Any:
        """The answer to a label that comes back; `idx` as 3D Slicer sends it, which is no use."""
        info = [{"name": name, "idx": place + 7} for place, name in enumerate(names)]
        form = {"params": (None, json.dumps({"label_info": info, **params}))}
        with path.open("rb") as file:
            form |= {"label": (f"/home/DOE^JANE/{path.name}", file)}
            return self.client.put(
                f"/datastore/label?image={image}" + (f"&tag={tag}" if tag else ""), files=form
            )


@contextmanager
def served(
    folder: Path,
    *models: str | Path,
    rules: Rules = _RULES,
    login: Mapping[str, str] | None = None,
    address: str = "http://127.0.0.1:8000",
) -> Iterator[Served]:
    """A server of the scans in `folder/studies`, which may be missing."""
    from starlette.testclient import TestClient

    studies, private = folder / "studies", folder / "private"
    studies.mkdir(exist_ok=True)
    private.mkdir()
    told: list[str] = []
    store = open_studies(studies)
    service = Service(
        store, serve_models([str(one) for one in models]), private,
        max_bytes=rules.max_bytes, say=told.append,
    )  # fmt: skip
    options = ServerOptions(port=0, rules=rules, login=Login(login) if login else None)
    server = Server(service, options)
    client = TestClient(server.app(), base_url=address)
    try:
        yield Served(service=service, server=server, store=store, client=client, told=told)
    finally:
        server.close()


@contextmanager
def listening(server: Server) -> Iterator[int]:
    """The server in a thread of its own; gives its port."""
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    try:
        assert server.listening.wait(60)
        yield server.port
    finally:
        server.stop()
        thread.join(60)
        assert not thread.is_alive()


@dataclass(kw_only=True)
class Parts:
    """The parts of a multipart answer, taken apart here and not by what is tested."""

    params: dict[str, Any] = field(default_factory=dict)
    name: str = ""
    content: bytes = b""


def parts_of(answer: Any) -> Parts:
    """Of an answer of `params` and `image`, by Python's own reader of mail."""
    from email import message_from_bytes

    head = f"Content-Type: {answer.headers['content-type']}\r\n\r\n".encode()
    parts = Parts()
    for part in message_from_bytes(head + answer.content).get_payload():
        content = part.get_payload(decode=True)
        if part.get_param("name", header="content-disposition") == "params":
            assert part.get_filename() is None
            parts.params = json.loads(content)
        else:
            parts.name, parts.content = part.get_filename(), content
    return parts


def read_nrrd(content: bytes) -> tuple[dict[str, str], np.ndarray]:
    """Fields and voxels of an NRRD file of bytes."""
    import gzip

    head, _, body = content.partition(b"\n\n")
    lines = [line for line in head.decode().splitlines()[1:] if not line.startswith("#")]
    fields = dict(line.split(": ", 1) for line in lines if ": " in line)
    if fields["encoding"] == "gzip":
        body = gzip.decompress(body)
    shape = [int(one) for one in fields["sizes"].split()]
    assert fields["type"] in ("uint8", "unsigned char")
    return fields, np.frombuffer(body, np.uint8).reshape(shape, order="F")
