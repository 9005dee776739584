"""A series fetched from a PACS over DICOMweb, and results sent back to it (DICOM PS3.18: QIDO-RS,
WADO-RS, STOW-RS).

What the PACS sends is counted while it comes and kept in files with names of our own. Certificates
are verified, redirections are not followed, the environment (proxies, .netrc) is not asked.
Addresses, UIDs and what the PACS says never enter a message or a log.
"""

from __future__ import annotations

import logging
import re
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from medseg.errors import BadConfig, BadFile, BadOutput, MedsegError
from medseg.files import MAX_BYTES, open_file, read_text

if TYPE_CHECKING:
    import requests

_UID = r"[0-9](?:[0-9.]{0,62}[0-9])?"
# One slash is enough after the scheme: a `Path` made of an address has lost the other.
_ADDRESS = re.compile(
    rf"(?P<scheme>dicomweb(?:\+http)?):/{{1,2}}(?P<host>[A-Za-z0-9](?:[A-Za-z0-9.-]*[A-Za-z0-9])?)(?::(?P<port>\d{{1,5}}))?"
    rf"(?P<root>(?:/[\w.~-]+)*?)/studies/(?P<study>{_UID})/series/(?P<series>{_UID})/?"
)
_LOOPBACK = re.compile(r"localhost|127(\.\d{1,3}){3}")
#: Most bytes of an answer to a query.
MAX_ANSWER_BYTES = 64 * 2**20
#: Seconds for connecting, and of silence, after which a PACS is given up.
TIMEOUTS_S = (10.0, 60.0)
#: Seconds after which a PACS that sends ever so slowly is given up.
MAX_FETCH_S = 3600.0
_HOW_TO_WRITE = "write dicomweb://HOST[:PORT]/ROOT/studies/UID/series/UID"


@dataclass(frozen=True)
class Limits:
    """What a PACS or a sender may make us take in."""

    instances: int = 10_000
    instance_bytes: int = 2**30
    total_bytes: int = MAX_BYTES


@dataclass(frozen=True)
class Address:
    """One series in a PACS: the root URL of its DICOMweb service, and two UIDs."""

    root: str
    study: str
    series: str
    encrypted: bool
    loopback: bool


@dataclass(frozen=True)
class Access:
    """How to prove who we are: 'Bearer' with a token or 'Basic' with a user and a password."""

    scheme: str
    secret: str

    def __repr__(self) -> str:  # a secret must not get into a traceback or a log
        return f"Access({self.scheme})"


def is_address(text: str | Path) -> bool:
    """Whether this names something in a PACS rather than a file."""
    return re.match(r"dicomweb(\+\w*)?:/", str(text)) is not None


def parse_address(text: str | Path, *, plain_http: bool = False) -> Address:
    """The series that `dicomweb://HOST[:PORT]/ROOT/studies/UID/series/UID` names. Raises
    `BadConfig`.

    https always, but for `dicomweb+http://`, which is for this machine (loopback) or, with
    `plain_http`, for others.
    """
    text = str(text)
    if "@" in text:
        raise BadConfig(
            "an address must not hold a password: leave out what is before the @ and use"
            " --credentials"
        )
    match = _ADDRESS.fullmatch(text)
    if match is None or int(match["port"] or 0) > 65535:
        raise BadConfig(f"the address of the series is not understood; {_HOW_TO_WRITE}")
    encrypted = match["scheme"] == "dicomweb"
    loopback = _LOOPBACK.fullmatch(match["host"]) is not None
    if not (encrypted or loopback or plain_http):
        raise BadConfig(
            "dicomweb+http sends patient data unencrypted, so it is for this machine alone; "
            "use dicomweb:// (https), or add --plain-http if the network between is trusted"
        )
    port = f":{match['port']}" if match["port"] else ""
    root = f"{'https' if encrypted else 'http'}://{match['host']}{port}{match['root']}"
    return Address(root, match["study"], match["series"], encrypted=encrypted, loopback=loopback)


def read_access(path: str | Path) -> Access:
    """Credentials from a file of one line: `Bearer TOKEN` or `Basic USER:PASSWORD`. Raises
    `BadFile`.
    """
    line = read_text(path, max_bytes=2**16).strip()
    scheme, _, secret = line.partition(" ")
    secret = secret.strip()
    basic = scheme.lower() == "basic" and ":" in secret
    if (
        "\n" in line
        or not secret.isprintable()
        or not (basic or (scheme.lower() == "bearer" and secret))
    ):
        raise BadFile(
            f"{path}: holds no credentials; write one line, 'Bearer TOKEN' or 'Basic USER:PASSWORD'"
        )
    return Access(scheme.title(), secret)


class Pacs:
    """A connection to the DICOMweb service of one series. Raises `BadConfig` if credentials would
    travel unencrypted.

    authority: file with the certificates to trust instead of the usual ones.
    """

    def __init__(
        self, address: Address, access: Access | None = None, authority: str | Path | None = None
    ) -> None:
        if access and not (address.encrypted or address.loopback):
            raise BadConfig(
                "credentials are only sent over https; use dicomweb:// or leave out --credentials"
            )
        self.address = address
        self._allowed = MAX_ANSWER_BYTES
        self._until_s = time.monotonic() + MAX_FETCH_S
        self._client = _client(address, _session(access, authority), self._count)

    def fetch(
        self,
        folder: Path,
        limits: Limits,
        progress: Callable[[int, int], None] = lambda done, all_: None,
    ) -> int:
        """Save every instance of the series into `folder`, as 00001.dcm and so on; returns how
        many.

        Raises `BadFile` if the PACS cannot be reached, does not know the series, sends more than
        `limits` allow, or anything else than the instances it said there are.
        """
        self._until_s = time.monotonic() + MAX_FETCH_S
        with _told("the PACS", BadFile):
            expected = self._count_instances(limits)
            total = 0
            self._allowed = limits.instance_bytes
            for count, part in enumerate(
                self._client.series_parts(self.address.study, self.address.series), 1
            ):
                self._allowed = limits.instance_bytes
                total += len(part)
                if count > expected:
                    raise BadFile(
                        f"the PACS sent more than the {expected} instances it said there are; try"
                        " again"
                    )
                if total > limits.total_bytes:
                    raise BadFile(
                        f"the series is larger than the {limits.total_bytes / 2**30:.3g} GB allowed"
                    )
                if part[128:132] != b"DICM":
                    raise BadFile(
                        "the PACS sent something that is not DICOM; ask its administrator"
                    )
                path = folder / f"{count:05d}.dcm"
                path.write_bytes(part)
                self._check_series(path)
                progress(count, expected)
        received = sum(1 for _ in folder.iterdir())
        if received != expected:
            raise BadFile(
                f"the PACS sent {received} of {expected} instances of the series; try again"
            )
        return received

    def push(self, files: Sequence[Path]) -> None:
        """Store DICOM objects in the study of the series, and check that they arrived. Raises
        `BadOutput`.
        """
        import pydicom

        self._until_s = time.monotonic() + MAX_FETCH_S
        with _told("the PACS", BadOutput):
            datasets = [pydicom.dcmread(path) for path in files]
            self._allowed = MAX_ANSWER_BYTES
            answer = self._client.store_instances(datasets, study_instance_uid=self.address.study)
            refusals = len(answer.get("FailedSOPSequence") or ())
            if refusals:
                raise BadOutput(
                    f"the PACS refused {refusals} of {len(files)} results; ask its administrator"
                )
            uids = {
                str(item.get("ReferencedSOPInstanceUID"))
                for item in answer.get("ReferencedSOPSequence") or ()
            }
            missing = [
                d for d in datasets if str(d.SOPInstanceUID) not in uids and not self._has(d)
            ]
            if missing:
                raise BadOutput(
                    f"the PACS did not keep {len(missing)} of {len(files)} results; ask its"
                    " administrator"
                )

    def _count_instances(self, limits: Limits) -> int:
        """How many instances the PACS says the series has."""
        address = self.address
        answer = self._client.search_for_series(
            address.study,
            fields=["NumberOfSeriesRelatedInstances"],
            search_filters={"SeriesInstanceUID": address.series},
        )
        rows = [row for row in answer if _value(row, "0020000E") == address.series]
        if len(rows) != 1:
            raise BadFile("the PACS does not have this series; check the address")
        number = _value(rows[0], "00201209")
        if number is None:  # an optional key
            number = len(
                self._client.search_for_instances(
                    address.study, address.series, limit=limits.instances + 1
                )
            )
        count = int(number)
        if not 1 <= count <= limits.instances:
            raise BadFile(
                f"the series has {count} instances; from 1 to {limits.instances} are allowed"
            )
        return count

    def _has(self, dataset: Any) -> bool:
        """Whether the PACS knows an instance; some answer a store request with nothing."""
        answer = self._client.search_for_instances(
            str(dataset.StudyInstanceUID),
            str(dataset.SeriesInstanceUID),
            search_filters={"SOPInstanceUID": str(dataset.SOPInstanceUID)},
        )
        return any(_value(row, "00080018") == str(dataset.SOPInstanceUID) for row in answer)

    def _check_series(self, path: Path) -> None:
        """Raise `BadFile` unless a file belongs to the series asked for: another one may be another
        patient.
        """
        if uids_of(path)[0] != self.address.series:
            raise BadFile(
                "the PACS sent another series than the one asked for; ask its administrator"
            )

    def _count(self, response: requests.Response, *_: object, **__: object) -> requests.Response:
        """Let the content of a response be read only as far as is allowed at that moment."""
        # May unpack to any size at once.
        if response.headers.get("Content-Encoding", "identity") != "identity":
            raise BadFile(
                "the PACS packs its answers though it was asked not to; ask its administrator"
            )
        original = response.iter_content

        def counted(*arguments: Any, **named: Any) -> Iterator[bytes]:
            for chunk in original(*arguments, **named):
                self._allowed -= len(chunk)
                if self._allowed < 0:
                    raise BadFile(
                        "the PACS sends more than is allowed for one answer; nothing was kept"
                    )
                if time.monotonic() > self._until_s:
                    raise BadFile(
                        f"the PACS needs longer than {MAX_FETCH_S / 60:.0f} minutes; try again"
                        " later"
                    )
                yield chunk

        response.iter_content = counted
        return response


def _client(address: Address, session: requests.Session, hook: Callable) -> Any:
    """A DICOMweb client that also hands out the instances of a series as the bytes they came as.

    dicomweb-client parses what it receives at once; files from strangers are better parsed by our
    own reader.
    """
    from dicomweb_client.web import DICOMwebClient, _Transaction

    class Client(DICOMwebClient):
        def series_parts(self, study: str, series: str) -> Iterator[bytes]:
            url = self._get_series_url(_Transaction.RETRIEVE, study, series)
            kind = 'multipart/related; type="application/dicom"'
            from requests import HTTPError

            try:
                response = self._http_get(url, headers={"Accept": kind}, stream=True)
            except HTTPError as error:  # it cannot unpack the pixels for us: as they are, then
                if error.response.status_code not in (400, 406):
                    raise
                response = self._http_get(
                    url, headers={"Accept": f"{kind}; transfer-syntax=*"}, stream=True
                )
            yield from self._decode_multipart_message(response, stream=True)

    quiet_logs("dicomweb_client", "urllib3", "requests", "retrying", "pydicom")
    client = Client(
        address.root,
        session,
        headers={"Accept": "application/dicom+json", "Accept-Encoding": "identity"},
        callback=hook,
        permissive_uid=True,  # checked by `parse_address`; real ones are not always by the book
        timeout=TIMEOUTS_S,
    )
    # It would also try again after what is no use to try again.
    client.set_http_retry_params(retry=False)
    return client


def _session(access: Access | None, authority: str | Path | None) -> requests.Session:
    try:
        import dicomweb_client  # noqa: F401
        import requests
    except ImportError:
        raise BadConfig(
            'a PACS needs more packages; install them with: pip install "medseg[pacs]"'
        ) from None
    if authority is not None:
        open_file(authority).close()
    session = requests.Session()
    session.trust_env = False
    session.max_redirects = 0
    session.verify = str(authority) if authority is not None else True
    if access and access.scheme == "Basic":
        user, _, password = access.secret.partition(":")
        session.auth = (user.encode(), password.encode())
    elif access:
        session.headers["Authorization"] = f"Bearer {access.secret}"
    return session


def uids_of(path: Path) -> tuple[str, str]:
    """The instance UIDs of series and object of a DICOM file, empty where it has none. Raises
    `BadFile`.
    """
    from medseg.io.dicom import Source, guarded, header_values

    with Source(path) as source:
        header = header_values(source, source.entries[0], ["SeriesInstanceUID", "SOPInstanceUID"])
    names = ("SeriesInstanceUID", "SOPInstanceUID")
    series, instance = guarded(str(path), lambda _: [str(header.get(name) or "") for name in names])
    return series, instance


def quiet_logs(*names: str) -> None:
    """Silence the loggers of libraries, which write URLs, UIDs and header values."""
    for name in names:
        logger = logging.getLogger(name)
        logger.setLevel(logging.CRITICAL + 1)
        logger.propagate = False


def _value(row: dict[str, Any], tag: str) -> Any:
    """The first value of an attribute in DICOM's JSON, or None."""
    values = row.get(tag, {}).get("Value") or [None]
    return values[0]


@contextmanager
def _told(what: str, kind: type[MedsegError]) -> Iterator[None]:
    """Turn everything that can go wrong on the network into one sentence of `kind` without an
    address in it.
    """
    import requests

    try:
        yield
    except requests.HTTPError as error:
        status = error.response.status_code
        reason = {
            401: "wants credentials, or other ones; give them with --credentials",
            403: "does not allow this; ask its administrator",
            404: "does not know this address; check it",
            429: "is too busy; try again later",
            503: "is too busy; try again later",
        }.get(status, f"answered with error {status}; ask its administrator")
        raise kind(f"{what} {reason}") from None
    except requests.exceptions.SSLError:
        raise kind(
            f"{what} cannot prove who it is (its certificate is not valid here); if your"
            " organisation has an authority of its own, give its certificate with --authority"
        ) from None
    except requests.TooManyRedirects:
        raise kind(
            f"{what} redirects to another address, which is not followed; give the final address"
        ) from None
    except requests.Timeout:
        raise kind(f"{what} does not answer; try again later") from None
    except requests.ConnectionError:
        raise kind(
            f"{what} cannot be reached, or broke off; check host and port, and try again"
        ) from None
    except (
        requests.exceptions.InvalidJSONError,
        LookupError,
        TypeError,
        ValueError,
        AttributeError,
        RuntimeError,
    ):
        raise kind(
            f"{what} gives answers that are not DICOMweb; check the root in the address"
        ) from None
    except requests.RequestException:
        raise kind(f"{what} broke off; try again") from None
    except OSError as error:
        raise BadOutput(
            f"what {what} sends cannot be saved: {error.strerror or 'unknown reason'}"
        ) from None
