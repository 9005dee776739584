"""Forms with files (RFC 7578) as clients send them, the files kept under names of ours."""

from __future__ import annotations

import re
import secrets
import shutil
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from medseg.annotation.guard import MAX_PLAIN_BYTES
from medseg.annotation.protocol import Refused
from medseg.io import strip_suffix

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator

    from starlette.datastructures import UploadFile
    from starlette.requests import Request

_MAX_FILES, _MAX_FIELDS = 4, 20
#: Bytes of a body that are looked at, at its beginning and its end.
_HEAD_BYTES, _TAIL_BYTES = 128, 2048
#: What OHIF calls a label map without a header.
RAW = ".bin"


@dataclass(kw_only=True)
class Form:
    """What was sent: texts and files by the names of their fields."""

    texts: dict[str, str] = field(default_factory=dict)
    files: dict[str, Path] = field(default_factory=dict)

    def file(self, name: str) -> Path:
        """A file that has to be there. Raises `Refused`."""
        if name not in self.files:
            raise Refused(400, f"the form holds no file '{name}'")
        return self.files[name]


@asynccontextmanager
async def form_of(request: Request, folder: Path) -> AsyncIterator[Form]:
    """The form of a request, its files in a folder until the block ends, unless they are taken from
    there. Raises `Refused` for what is no whole form.
    """
    form = Form()
    try:
        await _fill(form, request, folder)
        yield form
    finally:
        for path in form.files.values():
            path.unlink(missing_ok=True)


async def _fill(form: Form, request: Request, folder: Path) -> None:
    from python_multipart.multipart import parse_options_header
    from starlette.datastructures import Headers, UploadFile
    from starlette.formparsers import MultiPartException, MultiPartParser

    kind, options = parse_options_header(request.headers.get("content-type", ""))
    declared = options.get(b"boundary", b"") if kind == b"multipart/form-data" else b""
    body = _Whole(request)
    # Once somebody has logged in, MONAI Label's client sends a session's form as being of the type
    # of what it sent before.
    boundary = (await body.boundary(declared)) if request.scope.get("user") else declared
    if not boundary:
        raise Refused(415, "send a form: multipart/form-data with its boundary")
    its_type = f"multipart/form-data; boundary={boundary.decode('latin-1')}"
    parser = MultiPartParser(
        request.headers if boundary == declared else Headers({"content-type": its_type}),
        body.parts(),
        max_files=_MAX_FILES,
        max_fields=_MAX_FIELDS,
        max_part_size=MAX_PLAIN_BYTES,
    )
    try:
        items = (await parser.parse()).multi_items()
    except MultiPartException:
        raise Refused(400, "the form is damaged, or has too many or too large parts") from None
    try:
        if not body.has(b"--" + boundary + b"--"):
            raise Refused(400, "the form is not complete; send it again")
        for name, value in items:
            if isinstance(value, UploadFile):
                await _keep(form, name, value, folder)
            else:
                form.texts[name] = value
    finally:
        for _, value in items:
            if isinstance(value, UploadFile):
                await value.close()


async def _keep(form: Form, name: str, upload: UploadFile, folder: Path) -> None:
    """Write a file of a form under a name of ours."""
    from starlette.concurrency import run_in_threadpool

    if name in form.files:
        raise Refused(400, "the form holds two files of one name; send one")
    path = folder / f"{secrets.token_hex(12)}{suffix_of(upload.filename or '')}"
    form.files[name] = path
    await run_in_threadpool(_copy, upload, path)


def _copy(upload: UploadFile, path: Path) -> None:
    upload.file.seek(0)
    with path.open("xb") as file:
        shutil.copyfileobj(upload.file, file, 1 << 20)


class _Whole:
    """A body while it passes: how it begins and how it ends. A parser takes a form that was cut off
    for whole.
    """

    def __init__(self, request: Request) -> None:
        self._stream = request.stream()
        self._head, self._tail = b"", b""

    async def boundary(self, declared: bytes) -> bytes:
        """The boundary with which it begins; b"" where it does not begin as a form."""
        while len(self._head) < _HEAD_BYTES:
            part = await anext(self._stream, b"")
            self._head += part
            if not part:
                break
        first = self._head.split(b"\r\n", 1)[0]
        if declared and first == b"--" + declared:
            return declared
        match = re.fullmatch(rb"--([0-9A-Za-z'()+_,./:=?-]{1,70})", first)
        return match[1] if match else b""

    async def parts(self) -> AsyncGenerator[bytes, None]:
        """All of it."""
        if self._head:
            self._tail = self._head[-_TAIL_BYTES:]
            yield self._head
        async for part in self._stream:
            self._tail = (self._tail + part)[-_TAIL_BYTES:]
            yield part

    def has(self, mark: bytes) -> bool:
        """Whether it ended with a mark, perhaps with little behind it."""
        return mark in self._tail


def suffix_of(name: str) -> str:
    """The suffix of a file, of a name that may be a whole path of somebody else's machine. Raises
    `Refused` where medseg reads no such file.
    """
    last = re.split(r"[/\\]", name)[-1].lower()
    suffix = last[len(strip_suffix(last)) :]
    if not suffix and last.endswith(RAW):
        return RAW
    if not suffix:
        raise Refused(
            415, "the name of the file has no suffix that medseg reads, such as .nii.gz or .nrrd"
        )
    return suffix
