"""Scans and outputs in object stores: in memory, in a folder that counts as one, and on a real S3
server.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest

from making import networks as tiny
from making.cohort import LOCAL_COMMAND, TABLE, a_request, environment, local_stores, make_list
from making.places import ROOT
from medseg.cli.options import parse_place
from medseg.cohort.cases import Case, make_cohort
from medseg.cohort.course import Limits
from medseg.cohort.gather import gather_cohort
from medseg.cohort.part import Choice, Result, plan_part, run_part
from medseg.cohort.stores import Store, check_address, fetch, is_store, states_of
from medseg.errors import BadConfig, BadFile, BadOutput

fsspec = pytest.importorskip("fsspec", reason='pip install "medseg[stores]"')

ALL = Choice()


@pytest.fixture
def memory() -> Iterator[Any]:
    """An empty store in memory."""
    files = fsspec.filesystem("memory")
    files.store.clear()
    yield files
    files.store.clear()


@pytest.fixture
def local(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.chdir(tmp_path)
    with local_stores():
        yield


def run(folder: Path, names: list[str], *, choice: Choice = ALL, **limits: Any) -> Result:
    """One run of the stand-ins, whose output is a folder that counts as a store."""
    limits = {"workers": 1, "case_time_s": 600.0} | limits
    return run_part(
        make_list(folder / "scans", names), "local://bucket/out", a_request(), choice,
        Limits(**limits), TABLE, command=LOCAL_COMMAND,
    )  # fmt: skip


def objects(folder: Path) -> list[str]:
    place = folder / "bucket" / "out"
    return sorted(path.relative_to(place).as_posix() for path in place.rglob("*") if path.is_file())


# Addresses -----------------------------------------------------------------


@pytest.mark.parametrize(
    ("address", "is_one"),
    [
        ("s3://bucket/scan.nii.gz", True),
        ("S3://bucket/scan.nii.gz", True),
        ("gs://bucket/scan", True),
        ("file:///etc/passwd", False),
        ("reference://x", False),
        ("simplecache::s3://bucket/x", False),
        ("https://host/scan.nii.gz", False),
        ("dicomweb://host/studies/1", False),
        ("/data/scan.nii.gz", False),
    ],
)
def test_only_object_stores_are_stores(address: str, is_one: bool):
    assert is_store(address) is is_one


@pytest.mark.parametrize(
    "address",
    [
        "s3://KEY:SECRET@bucket/scan.nii.gz",
        "s3://SECRET@bucket/scan.nii.gz",
        "abfs://me:SECRET@account/x",
        "s3://bucket/scan.nii.gz?X-Amz-Signature=SECRET",
        "s3://bucket/scan.nii.gz#SECRET",
        "s3:///SECRET",
    ],
)
def test_what_may_be_a_secret_does_not_belong_in_an_address(address: str):
    with pytest.raises(BadConfig) as error:
        check_address(address)
    assert "SECRET" not in str(error.value)
    assert "KEY" not in str(error.value)


def test_an_account_of_azure_is_no_secret():
    check_address("abfss://container@account.dfs.core.windows.net/scan.nii.gz")


def test_a_store_whose_library_is_missing_is_named_with_what_to_install():
    with (
        mock.patch.dict(sys.modules, {"gcsfs": None}),
        mock.patch.object(fsspec, "filesystem", side_effect=ImportError("Please install gcsfs")),
        pytest.raises(BadConfig, match=r'pip install "medseg\[stores\]" gcsfs'),
    ):
        Store("gs://bucket/out")


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (FileNotFoundError("SECRET"), "no such bucket"),
        (PermissionError("SECRET"), "denies access"),
        (type("NoCredentialsError", (Exception,), {})("SECRET"), "denies access"),
        (OSError("SECRET"), "does not answer as it should"),
    ],
)
def test_what_a_library_says_is_never_repeated(memory: Any, error: Exception, words: str):
    store = Store("memory://bucket/out")
    with (
        mock.patch.object(type(memory), "pipe_file", side_effect=error),
        pytest.raises(BadOutput, match=words) as told,
    ):
        store.write("a", b"x")
    assert "SECRET" not in str(told.value)


# Scans -----------------------------------------------------------------


def test_a_scan_comes_whole_with_what_belongs_to_it(memory: Any, tmp_path: Path):
    memory.pipe({"/b/one.nii.gz": b"scan", "/b/s/a.dcm": b"1", "/b/s/deep/b.dcm": b"22"})
    memory.pipe({"/b/x.mhd": b"header", "/b/x.raw": b"voxels", "/b/xy.raw": b"other"})
    assert fetch("memory://b/one.nii.gz", tmp_path / "0").read_bytes() == b"scan"
    series = fetch("memory://b/s/", tmp_path / "1")
    assert {one.relative_to(series).as_posix() for one in series.rglob("*.dcm")} == {
        "a.dcm",
        "deep/b.dcm",
    }
    header = fetch("memory://b/x.mhd", tmp_path / "2")
    assert sorted(one.name for one in header.parent.iterdir()) == ["x.mhd", "x.raw"]
    with pytest.raises(BadFile, match=r"memory://b/gone\.nii: there is no such"):
        fetch("memory://b/gone.nii", tmp_path / "3")


def test_names_that_look_like_patterns_are_names(memory: Any):
    store = Store("memory://b/out")
    contents = {"r/a[1].json": b"one", "r/a1.json": b"two", "r/é #x.json": b"three"}
    for name, content in contents.items():
        store.write(name, content)
    assert dict(store.read([*contents, "r/a[2].json", "r/gone"])) == contents
    assert fetch_bytes("memory://b/out/r/a[1].json") == b"one"
    store.remove("r/a[1].json")
    assert sorted(store.names()) == ["r/a1.json", "r/é #x.json"]


def test_the_kind_of_an_address_may_be_in_capitals(memory: Any):
    memory.pipe("/b/out/a.json", b"one")
    assert dict(Store("MEMORY://b/out").read(["a.json"])) == {"a.json": b"one"}
    assert fetch_bytes("Memory://b/out/a.json") == b"one"
    states = states_of(["MEMORY://b/out/a.json", "memory://b/out/a.json"])
    assert len(states) == 2
    assert None not in states.values()


def test_results_that_would_be_gone_with_their_process_are_refused(memory: Any, tmp_path: Path):
    cohort = make_list(tmp_path, ["a"])
    with pytest.raises(BadConfig, match="would be gone"):
        run_part(
            cohort, "memory://b/out", a_request(), ALL, Limits(workers=1), TABLE,
            command=LOCAL_COMMAND,
        )  # fmt: skip
    assert memory.find("/b") == []


def test_an_address_of_another_kind_makes_no_folder(tmp_path: Path):
    for address in ("file:///tmp/out", "s4://bucket/out"):
        with pytest.raises(BadConfig, match="give a folder, or a place in s3"):
            parse_place(address)
    assert parse_place("s3://bucket/out") == "s3://bucket/out"
    assert parse_place("out") == Path("out")


def fetch_bytes(address: str) -> bytes:
    with tempfile.TemporaryDirectory() as folder:
        return fetch(address, Path(folder)).read_bytes()


def test_a_scan_that_comes_short_is_refused(memory: Any, tmp_path: Path):
    memory.pipe("/b/one.nii.gz", b"scan")

    def half(self: Any, path: str, target: str) -> None:
        Path(target).write_bytes(b"sc")

    with (
        mock.patch.object(type(memory), "get_file", half),
        pytest.raises(BadFile, match="sent less"),
    ):
        fetch("memory://b/one.nii.gz", tmp_path)


@pytest.mark.parametrize("verify", [False, True])
def test_another_scan_is_known_by_what_the_store_says_or_by_its_content(memory: Any, verify: bool):
    names = [f"memory://b/{n}.nii" for n in range(60)] + ["memory://b/s", "memory://b/gone.nii"]
    for n in range(60):
        memory.pipe(f"/b/{n}.nii", b"x" * (n + 1))
    memory.pipe("/b/s/a.dcm", b"1")
    before = states_of(names, verify=verify)
    assert before["memory://b/gone.nii"] is None
    assert before == states_of(names, verify=verify)
    memory.pipe("/b/3.nii", b"yyyy")
    memory.pipe("/b/s/b.dcm", b"1")
    after = states_of(names, verify=verify)
    changed = {name for name in names if after[name] != before[name]}
    assert changed == {"memory://b/3.nii", "memory://b/s"}


def test_a_key_depends_on_the_scan_in_the_store(memory: Any):
    memory.pipe("/b/a.nii", b"x")
    case, request = Case(name="a", images=("memory://b/a.nii",)), a_request()
    keys = [request.key(case, "cpu", states_of(case.images))]
    keys.append(request.key(case, "cpu", states_of(case.images)))
    memory.pipe("/b/a.nii", b"xy")
    keys.append(request.key(case, "cpu", states_of(case.images)))
    assert keys[0] == keys[1] != keys[2]


def test_a_dry_run_counts_what_is_in_a_store_and_missing_there(memory: Any):
    memory.pipe("/b/a.nii", b"12345")
    cases = [Case(name=n, images=(f"memory://b/{n}.nii",)) for n in "ab"]
    cohort = make_cohort(Path("list.csv"), "list", cases)
    plan = plan_part(cohort, "memory://b/out", a_request(), Choice())
    assert (plan.input_bytes, plan.missing, len(plan.items)) == (5, 1, 2)
    with pytest.raises(BadConfig, match="lies in the output"):
        plan_part(cohort, "memory://b", a_request(), Choice())


# Outputs -----------------------------------------------------------------


def test_of_two_who_settle_at_once_both_have_the_first_ones(memory: Any):
    store = Store("memory://b/out")
    assert store.write_once("arithmetic.json", b"one") == b"one"
    assert store.write_once("arithmetic.json", b"two") == b"one"
    with mock.patch.object(type(memory), "pipe_file", _without_create(type(memory).pipe_file)):
        assert store.write_once("arithmetic.json", b"three") == b"one"
        assert store.write_once("other.json", b"four") == b"four"


def _without_create(own: Any) -> Any:
    def pipe_file(self: Any, path: str, value: bytes, **more: Any) -> None:
        if more:
            raise TypeError("mode")
        own(self, path, value)

    return pipe_file


def test_a_cohort_goes_into_a_store_and_on_from_there(local: None, tmp_path: Path):
    names = ["a", "b", "bad", "kills", "once"]
    first = run(tmp_path, names)
    assert first.counts == {"done": 3, "failed": 1, "lost": 1, "waiting": 0}
    there = objects(tmp_path)
    assert {"cohort.json", "labels.csv"} <= set(there)
    attempts = [name.rpartition("/")[2] for name in there if name.startswith("attempts/")]
    assert set(attempts) == {"a.1", "b.1", "bad.1", "kills.1", "kills.2", "once.1", "once.2"}
    records = [name for name in there if name.startswith("records/")]
    assert len(records) == 5
    labels = {name.rpartition("/")[2] for name in there if name.startswith("cases/")}
    assert {"a_seg.nii.gz", "b_seg.nii.gz", "once_seg.nii.gz"} <= labels
    assert "kills_seg.nii.gz" not in labels
    assert not [name for name in there if ".medseg-" in name]
    again = run(tmp_path, names)
    assert again.counts == first.counts
    assert [name for name in objects(tmp_path) if "attempts/" in name] == [
        name for name in there if "attempts/" in name
    ]
    run(tmp_path, names, choice=Choice(retry=("failed",)))
    assert _of(objects(tmp_path), "bad.2")


def _of(names: list[str], end: str) -> str:
    (name,) = [one for one in names if one.endswith(f"/{end}")]
    return name


def test_parts_share_a_store(local: None, tmp_path: Path):
    names = [f"c{n}" for n in range(5)]
    for number in range(2):
        assert run(tmp_path, names, choice=Choice(part=(number, 2))).exit_code == 0
    assert run(tmp_path, names).counts["done"] == 5
    assert len([name for name in objects(tmp_path) if name.startswith("attempts/")]) == 5


def test_a_store_that_refuses_stops_the_run_and_the_same_call_goes_on(local: None, tmp_path: Path):
    from medseg.cohort import output

    own = output.StoreOutput.keep_attempt

    def denied(self: Any, path: Path, number: int) -> None:
        if path.name == "b":
            raise BadOutput("the store denies access")
        own(self, path, number)

    with (
        mock.patch.object(output.StoreOutput, "keep_attempt", denied),
        pytest.raises(BadOutput, match="denies access"),
    ):
        run(tmp_path, ["a", "b", "c"])
    assert run(tmp_path, ["a", "b", "c"]).counts["done"] == 3


def test_a_kill_between_files_and_record_leaves_a_case_undone(local: None, tmp_path: Path):
    run(tmp_path, ["a", "b"])
    (tmp_path / "bucket" / "out" / _of(objects(tmp_path), "a.json")).unlink()
    assert run(tmp_path, ["a", "b"]).counts["done"] == 2
    assert _of(objects(tmp_path), "a.2")
    assert not [name for name in objects(tmp_path) if name.endswith("/b.2")]


def test_tables_and_the_report_are_made_in_the_store(local: None, tmp_path: Path):
    names = ["a", "b", "bad"]
    run(tmp_path, names)
    place = "local://bucket/out"
    assert gather_cohort(place).counts == {"done": 2, "failed": 1}
    there = tmp_path / "bucket" / "out"
    digests = [(there / "table.csv").read_bytes(), (there / "report.html").read_bytes()]
    assert b"\na,,done," in digests[0]
    assert (there / "pages" / "1.html").is_file()
    (there / "pages" / "2.html").write_text("of a longer list")
    gather_cohort(place)
    assert [(there / "table.csv").read_bytes(), (there / "report.html").read_bytes()] == digests
    assert not (there / "pages" / "2.html").exists()
    with pytest.raises(BadFile, match=r"bucket/none: holds no cohort\.json"):
        gather_cohort("local://bucket/none")


# A real S3 server -----------------------------------------------------------------


@pytest.fixture(scope="module")
def server() -> Iterator[dict[str, str]]:
    """The variables by which an S3 server on loopback is found; with buckets."""
    pytest.importorskip("s3fs", reason='pip install "medseg[stores]"')
    moto = pytest.importorskip("moto.server", reason='pip install "moto[server]"')
    from urllib.request import Request, urlopen

    own = moto.ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    own.start()
    host, port = own.get_host_and_port()
    address = f"http://{host}:{port}"
    urlopen(Request(f"{address}/bucket", method="PUT"), timeout=600).close()
    yield {
        "AWS_ENDPOINT_URL": address, "AWS_ACCESS_KEY_ID": "AKIAIOSFODNN7EXAMPLE",
        "AWS_SECRET_ACCESS_KEY": "wJalrXUtnFEMI", "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_EC2_METADATA_DISABLED": "true",
    }  # fmt: skip
    own.stop()


def medseg(server: dict[str, str], *arguments: object) -> subprocess.CompletedProcess[str]:
    clean = {name: value for name, value in environment().items() if "PROXY" not in name.upper()}
    return subprocess.run(
        [sys.executable, "-m", "medseg", *map(str, arguments)],
        env=clean | server, cwd=ROOT, capture_output=True, text=True, timeout=600,
    )  # fmt: skip


def put(server: dict[str, str], name: str, content: bytes) -> None:
    from urllib.request import Request, urlopen

    address = f"{server['AWS_ENDPOINT_URL']}/bucket/{name}"
    headers = {"Content-Type": "application/octet-stream"}
    urlopen(Request(address, content, headers, method="PUT"), timeout=120).close()


def get(server: dict[str, str], name: str) -> bytes:
    files = fsspec.filesystem(
        "s3", key=server["AWS_ACCESS_KEY_ID"], secret=server["AWS_SECRET_ACCESS_KEY"],
        endpoint_url=server["AWS_ENDPOINT_URL"], skip_instance_cache=True,
    )  # fmt: skip
    return bytes(files.cat_file(f"bucket/{name}"))


def test_scans_on_an_s3_server_give_the_labels_that_files_give(
    server: dict[str, str], tmp_path: Path
):
    tiny.save_unet(tmp_path / "model")
    rows, local_rows = ["case,image"], ["case,image"]
    for n in range(2):
        data = np.random.default_rng(n).normal(100, 20, (16, 16, 16)).astype(np.float32)
        path = tmp_path / f"scan{n}.nii.gz"
        tiny.save_nifti(path, data, tiny.affine_of())
        put(server, f"in/scan{n}.nii.gz", path.read_bytes())
        rows.append(f"c{n},s3://bucket/in/scan{n}.nii.gz")
        local_rows.append(f"c{n},{path.name}")
    rows.append("gone,s3://bucket/in/gone.nii.gz")
    (tmp_path / "list.csv").write_text("\n".join(rows))
    (tmp_path / "local.csv").write_text("\n".join(local_rows))
    options = ("-m", tmp_path / "model", "--workers", 1)
    ran = medseg(server, "batch", tmp_path / "list.csv", "-o", "s3://bucket/out", *options)
    assert ran.returncode == 3, ran.stderr
    assert "of 3 cases 2 done, 1 failed" in ran.stdout
    assert "gone: failed: the scan: there is no such bucket or object" in ran.stdout
    plain = medseg(server, "batch", tmp_path / "local.csv", "-o", tmp_path / "out", *options)
    assert plain.returncode == 0, plain.stderr
    for labels in (tmp_path / "out" / "cases").glob("*/*/*_seg.nii.gz"):
        name = labels.relative_to(tmp_path).as_posix()
        assert get(server, name) == labels.read_bytes()
        record = get(server, f"out/records/{labels.parts[-3]}/{labels.parent.name}.json")
        assert json.loads(record)["status"] == "done"
        for secret in (server["AWS_SECRET_ACCESS_KEY"], server["AWS_ACCESS_KEY_ID"], "s3://"):
            assert secret.encode() not in record
    again = medseg(server, "batch", tmp_path / "list.csv", "-o", "s3://bucket/out", *options)
    assert "3 cases, 0 to do; 2 done; 1 failed" in again.stderr
    gathered = medseg(server, "gather", "s3://bucket/out")
    assert gathered.returncode == 0, gathered.stderr
    assert b"c1," in get(server, "out/table.csv")
    assert b"c1.png" in get(server, "out/pages/1.html")


def test_a_missing_bucket_is_told_of_in_a_sentence(server: dict[str, str], tmp_path: Path):
    tiny.save_unet(tmp_path / "model")
    (tmp_path / "list.csv").write_text("case,image\na,a.nii.gz\n")
    command = ("batch", tmp_path / "list.csv", "-m", tmp_path / "model")
    ran = medseg(server, *command, "-o", "s3://none/out")
    assert ran.returncode == 4
    assert "s3://none/out: there is no such bucket" in ran.stderr
    keyless = {k: v for k, v in server.items() if "ACCESS" not in k}
    keyless |= {"HOME": str(tmp_path), "AWS_CONFIG_FILE": os.devnull}
    denied = medseg(keyless, *command, "-o", "s3://bucket/denied")
    assert denied.returncode != 0
    assert "denies access" in denied.stderr
    assert "Traceback" not in denied.stderr
