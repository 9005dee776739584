"""Run as a program, in a network namespace of its own: a real Orthanc, filled, queried, and used by
medseg.

    unshare -n python tests/making/orthanc_session.py FOLDER

Prints one JSON object about what happened; `test_orthanc.py` judges it.
"""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.error import URLError
from urllib.request import urlopen

from dicomweb_client import DICOMwebClient
from pydicom.dataset import Dataset
from pydicom.uid import ExplicitVRLittleEndian
from pynetdicom import AE

sys.path.insert(0, str(Path(__file__).parents[1]))
from making import networks as tiny
from making.dicom_series import CT, series

HTTP, DICOM, LISTEN = 18042, 14242, 11112
ROOT = f"127.0.0.1:{HTTP}/dicom-web"
PLUGIN = Path("/usr/share/orthanc/plugins/libOrthancDicomWeb.so")


@contextmanager
def orthanc(folder: Path) -> Iterator[None]:
    """Orthanc with DICOMweb, its storage in `folder`."""
    folder.mkdir()
    settings = {
        "StorageDirectory": str(folder / "storage"),
        "IndexDirectory": str(folder / "index"),
        "HttpPort": HTTP,
        "DicomPort": DICOM,
        "AuthenticationEnabled": False,
        "RemoteAccessAllowed": False,
        "DicomAlwaysAllowStore": True,
        "DicomCheckCalledAet": False,
        "Plugins": [str(PLUGIN)],
        "DicomWeb": {"Enable": True, "Root": "/dicom-web/"},
    }
    (folder / "orthanc.json").write_text(json.dumps(settings))
    log = (folder / "log").open("w")
    with (
        log,
        subprocess.Popen(
            ["Orthanc", str(folder / "orthanc.json")], stdout=log, stderr=log
        ) as child,
    ):
        try:
            wait_for(lambda: answers(f"http://127.0.0.1:{HTTP}/system"), 30)
            yield
        finally:
            child.terminate()
            child.wait(20)


def answers(url: str) -> bool:
    try:
        with urlopen(url, timeout=5) as answer:
            return answer.status == 200
    except (URLError, ConnectionError):
        return False


def wait_for(condition: Any, timeout_s: float) -> Any:
    end = time.monotonic() + timeout_s
    while not (found := condition()):
        if time.monotonic() > end:
            raise TimeoutError
        time.sleep(0.1)
    return found


def store(pieces: list[Dataset], port: int, title: str) -> list[int]:
    """C-STORE a series."""
    entity = AE(ae_title="SENDER")
    entity.add_requested_context(CT, ExplicitVRLittleEndian)
    association = entity.associate("127.0.0.1", port, ae_title=title)
    try:
        return [association.send_c_store(piece).Status for piece in pieces]
    finally:
        association.release()


def found(client: DICOMwebClient, study: str, modality: str) -> list[Dataset]:
    """The instances of a modality that Orthanc has in a study."""
    rows = client.search_for_series(study, search_filters={"Modality": modality})
    uids = [row["0020000E"]["Value"][0] for row in rows]
    return [one for uid in uids for one in client.retrieve_series(study, uid)]


def main(folder: Path) -> None:
    subprocess.run(["ip", "link", "set", "lo", "up"], check=True)
    temporary = folder / "temporary"
    temporary.mkdir()
    environment = tiny.environment() | {"TMPDIR": str(temporary)}
    facts: dict[str, Any] = {}
    with orthanc(folder / "orthanc"):
        client = DICOMwebClient(f"http://{ROOT}")
        first, second = series(5), series(6)
        facts["stored"] = store(first, DICOM, "ORTHANC")
        study, uid = str(first[0].StudyInstanceUID), str(first[0].SeriesInstanceUID)
        facts["queried"] = len(client.search_for_instances(study, uid))
        address = f"dicomweb+http://{ROOT}/studies/{study}/series/{uid}"

        ran = tiny.run_child(
            "-m",
            "medseg",
            "infer",
            address,
            "-m",
            "otsu",
            "-o",
            folder / "kept.nii.gz",
            env=environment,
        )
        facts["retrieved"] = [ran.code, ran.out, ran.err]
        push = ("-m", "medseg", "infer", address, "-m", "otsu", "--push", "--also", "rtstruct,sr")
        ran = tiny.run_child(*push, env=environment)
        facts["pushed"] = [ran.code, ran.out, ran.err]
        for modality in ("SEG", "RTSTRUCT", "SR"):
            objects = found(client, study, modality)
            facts[modality] = len(objects)
            for one in objects:
                one.save_as(folder / f"pushed.{modality.lower()}.dcm", enforce_file_format=True)

        reply = (
            "--reply-to",
            f"127.0.0.1:{DICOM}:ORTHANC",
            "--port",
            LISTEN,
            "--quiet-s",
            1,
            "-m",
            "otsu",
            "--also",
            "sr",
        )
        with tiny.start("-m", "medseg", "listen", *reply, env=environment) as node:
            try:
                assert node.stderr
                told = node.stderr.readline()
                facts["node stored"] = store(second, LISTEN, "MEDSEG")
                other = str(second[0].StudyInstanceUID)
                while not told.endswith("delivered\n") and (line := node.stderr.readline()):
                    told += line
                (result,) = wait_for(lambda: found(client, other, "SEG"), 10)
                result.save_as(folder / "replied.seg.dcm", enforce_file_format=True)
                facts["node seg"] = result.Modality
                facts["node sr"] = len(found(client, other, "SR"))
                node.send_signal(signal.SIGTERM)
                out, err = node.communicate(timeout=20)
                facts["node"] = [node.returncode, out, told + err]
            finally:
                node.kill()
        facts["secrets"] = [study, uid, other, str(second[0].SeriesInstanceUID), "SENTINEL"]
        facts["left"] = [path.name for path in temporary.rglob("*")]
    for name, pieces in (("first", first), ("second", second)):
        (folder / name).mkdir()
        for number, piece in enumerate(pieces):
            piece.save_as(folder / name / f"{number}.dcm", enforce_file_format=True)
    print(json.dumps(facts))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
