"""What a client of MONAI Label's protocol asks in a user's order, and what it gets."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock
from urllib.parse import quote

import nibabel as nib
import numpy as np
import pytest

from making import networks as tiny
from making.serving import (
    HIPPOCAMPI,
    Served,
    parts_of,
    read_nrrd,
    save_nearest,
    save_scans,
    served,
)
from medseg.annotation import Rules, serve_models, service
from medseg.dataset import check_dataset, load_case, read_dataset
from medseg.errors import BadConfig
from medseg.labels import Label, LabelTable

pytestmark = pytest.mark.usefixtures("known_networks", "one_thread")
LEFT, RIGHT = "Left-Hippocampus", "Right-Hippocampus"


@pytest.fixture
def here(tmp_path: Path) -> Iterator[Served]:
    """Two scans, a model with FreeSurfer's values, and one without weights."""
    save_scans(tmp_path / "studies", "a", "b")
    with served(tmp_path, save_nearest(tmp_path / "hippo"), "otsu") as one:
        yield one


def test_info_has_every_key_that_the_plug_ins_read(here: Served):
    info = here.client.get("/info/").json()
    assert {
        "name", "description", "version", "labels", "models", "trainers", "strategies", "scoring",
        "train_stats", "datastore",
    } <= info.keys()  # fmt: skip
    assert "config" not in info  # the extension would ask for an upgrade
    assert info["labels"] == [LEFT, RIGHT, "foreground"]
    assert info["models"]["hippo"]["labels"] == {"background": 0, LEFT: 1, RIGHT: 2}
    assert info["models"]["hippo"]["type"] == "segmentation"
    assert info["models"]["hippo"]["dimension"] == 3
    for config in (one["config"] for one in info["models"].values()):
        for value in config.values():
            assert isinstance(value, bool | int | float | str | list)
            assert not isinstance(value, list) or all(isinstance(one, str) for one in value)
    assert info["datastore"] == {"total": 2, "completed": 0, "label_tags": {}}
    assert here.client.get("/auth/").json() == {"enabled": False}


def test_values_17_and_53_arrive_as_1_and_2_with_their_names(here: Served):
    answer = here.infer("hippo", "image=a", result_extension=".nrrd", result_dtype="uint8")
    assert answer.status_code == 200
    parts = parts_of(answer)
    assert parts.params["label_names"] == {LEFT: 1, RIGHT: 2}
    assert parts.name and "/" not in parts.name and parts.name.endswith(".nrrd")
    fields, labels = read_nrrd(parts.content)
    scan = nib.load(here.store.case("a").images[0])
    truth = np.digitize(scan.get_fdata(), [250, 750])
    assert np.array_equal(labels, truth)
    assert set(np.unique(labels)) == {0, 1, 2}
    directions = [[float(x) for x in one.strip("()").split(",")]
                  for one in fields["space directions"].split()]  # fmt: skip
    assert np.allclose(np.diag([-1, -1, 1]) @ scan.affine[:3, :3], np.transpose(directions))


def test_a_scan_that_is_sent_and_one_of_a_session_get_the_same_labels(here: Served):
    content = here.store.case("a").images[0].read_bytes()
    by_id = read_nrrd(parts_of(here.infer("hippo", "image=a")).content)[1]
    upload = {"file": ("C:\\scans\\DOE JANE\\a.NII.GZ", content), "params": (None, "{}")}
    by_file = here.client.post("/infer/hippo?image=a", files=upload)
    assert np.array_equal(read_nrrd(parts_of(by_file).content)[1], by_id)
    started = here.client.put(
        "/session/", files={"files": ("a.nii.gz", content)}, data={"client_id": "me"}
    ).json()
    name = started["session_id"]
    assert name and here.client.get(f"/session/{name}").status_code == 200
    by_session = here.infer("hippo", f"image=whatever&session_id={name}")
    assert np.array_equal(read_nrrd(parts_of(by_session).content)[1], by_id)
    assert here.client.delete(f"/session/{name}").status_code == 200
    assert here.client.get(f"/session/{name}").status_code == 404
    assert here.infer("hippo", f"image=a&session_id={name}").status_code == 404
    assert list(here.service.folder.iterdir()) == []  # nothing that was sent is left


def test_ohif_gets_the_bare_file_uncompressed(here: Served):
    answer = here.infer("hippo", "image=a&output=image", result_compress=False,
                        restore_label_idx=False)  # fmt: skip
    assert answer.headers["content-type"] == "application/octet-stream"
    assert answer.content.startswith(b"NRRD")
    fields, labels = read_nrrd(answer.content)
    assert fields["encoding"] == "raw"
    assert set(np.unique(labels)) == {0, 1, 2}
    said = here.infer("hippo", "image=a&output=json")
    assert said.json()["label_names"] == {LEFT: 1, RIGHT: 2}


def test_an_answer_can_be_nifti(here: Served, tmp_path: Path):
    parts = parts_of(here.infer("hippo", "image=a", result_extension=".nii.gz"))
    (tmp_path / "x.nii.gz").write_bytes(parts.content)
    image = nib.load(tmp_path / "x.nii.gz")
    assert parts.name.endswith(".nii.gz") and image.get_data_dtype() == np.uint8
    assert set(np.unique(np.asanyarray(image.dataobj))) == {0, 1, 2}


def test_what_a_request_may_say_is_checked(here: Served):
    assert here.infer("hippo", "image=a", device="abacus").status_code == 400
    assert here.infer("hippo", "image=a", cleanup="yes").status_code == 400
    assert here.infer("hippo", "image=a", result_extension=".exe").status_code == 400
    assert here.infer("none", "image=a").status_code == 404
    assert here.infer("hippo", "image=none").status_code == 404
    assert here.infer("hippo", "").status_code == 400
    scribbles = {"label": ("s.nii.gz", b"x"), "params": (None, "{}")}
    assert here.client.post("/infer/hippo?image=a", files=scribbles).status_code == 400


def test_a_model_of_more_labels_than_a_byte_holds_is_refused(tmp_path: Path):
    many = LabelTable.from_values(range(1, 257))
    model = save_nearest(tmp_path / "many", many)
    with pytest.raises(BadConfig, match="256 labels, and clients take 255 at most"):
        serve_models([str(model)])


# Labels that come back ----------------------------------------------------------------------------


def label_file(here: Served, path: Path, *values: int) -> Path:
    """Blocks of these values on the grid of scan a."""
    scan = nib.load(here.store.case("a").images[0])
    data = np.zeros(scan.shape, np.uint8)
    for number, value in enumerate(values):
        data[2 + 5 * number : 6 + 5 * number, 4:12, 4:12] = value
    return tiny.save_nifti(path, data, scan.affine)


def test_a_label_with_skipped_segments_trains_the_right_classes(here: Served, tmp_path: Path):
    """Slicer's values are places among the exported segments; the second one is empty."""
    path = label_file(here, tmp_path / "label.nii.gz", 1, 3)
    answer = here.save_label("a", path, [RIGHT, "vessel", LEFT], model="hippo")
    assert answer.status_code == 200, answer.text
    assert (answer.json()["image"], answer.json()["new_labels"]) == ("a", {})
    dataset = read_dataset(here.store.folder)
    assert [finding.message for finding in check_dataset(dataset).findings] == []
    _, labels = load_case(dataset, dataset["a"])
    assert dataset.table.names == HIPPOCAMPI.names
    assert labels.data[3, 5, 5] == 53 and labels.data[8, 5, 5] == 17
    assert set(np.unique(labels.data)) == {0, 17, 53}
    final = here.store.case("a").labels["final"].relative_to(here.store.folder)
    assert final.as_posix() == "labels/final/a.nii.gz"


def test_a_structure_nobody_knew_gets_the_next_free_value(here: Served, tmp_path: Path):
    path = label_file(here, tmp_path / "label.nii.gz", 1, 2)
    answer = here.save_label("a", path, ["Tumour of DOE^JANE", LEFT], model="hippo").json()
    assert answer["new_labels"] == {"Tumour of DOE^JANE": 54}
    assert here.store.table.names == {17: LEFT, 54: "Tumour of DOE^JANE"}
    assert "1 of them new (value 54)" in here.told[-1]
    assert not any("DOE" in line for line in [*here.told, *here.service.lines])


def test_what_is_sent_back_is_numbered_as_its_names_say(here: Served, tmp_path: Path):
    path = label_file(here, tmp_path / "label.nii.gz", 1)
    assert here.save_label("a", path, [RIGHT], model="hippo").status_code == 200
    info = here.client.get("/datastore/?output=all").json()["objects"]["a"]["labels"]["final"]
    assert info["info"]["params"]["label_names"] == {LEFT: 1, RIGHT: 2}
    answer = here.client.get("/datastore/label?label=a&tag=final")
    assert answer.headers["content-disposition"].endswith('filename="label.nii.gz"')
    (tmp_path / "back.nii.gz").write_bytes(answer.content)
    back = np.asanyarray(nib.load(tmp_path / "back.nii.gz").dataobj)
    assert set(np.unique(back)) == {0, 2} and back[3, 5, 5] == 2
    assert here.client.get("/datastore/label?label=a&tag=original").status_code == 404
    assert here.client.get("/info/").json()["datastore"]["completed"] == 1


def test_a_value_without_a_name_and_a_name_twice_are_refused(here: Served, tmp_path: Path):
    path = label_file(here, tmp_path / "label.nii.gz", 1, 2)
    for names, words in (
        ([LEFT], "holds the value 2, and 1 segment is named"),
        ([], "holds the value 1, and 0 segments are named"),
        ([LEFT, "left hippocampus"], "the same structure"),
        ([LEFT, " "], "no name"),
    ):
        answer = here.save_label("a", path, names)
        assert answer.status_code == 400 and words in answer.json()["detail"]
    assert here.store.case("a").labels == {}


def test_segments_that_only_the_extension_needs_are_background(here: Served, tmp_path: Path):
    path = label_file(here, tmp_path / "label.nii.gz", 1, 2)
    assert here.save_label("a", path, ["background_scribbles", LEFT]).status_code == 200
    labels, table = here.store.read_label("a")
    assert set(np.unique(labels.data)) == {0, 17} and labels.data[3, 5, 5] == 0
    assert table.names == {17: LEFT}


def test_a_segmentation_is_read_as_one(here: Served, tmp_path: Path):
    from medseg.io import read, write

    path = label_file(here, tmp_path / "label.nii.gz", 4, 9)
    table = LabelTable((Label(4, RIGHT, (1, 2, 3)), Label(9, LEFT, (4, 5, 6))))
    write(read(path), tmp_path / "label.seg.nrrd", table=table)
    answer = here.save_label("a", tmp_path / "label.seg.nrrd", ["something else"])
    assert answer.status_code == 200, answer.text
    labels, _ = here.store.read_label("a")
    assert labels.data[3, 5, 5] == 53 and labels.data[8, 5, 5] == 17


def test_segments_that_overlap_are_refused_with_what_to_do(here: Served, tmp_path: Path):
    from medseg.io import read, write_segments

    grid = read(here.store.case("a").images[0])
    mask = grid.with_data(np.ones(grid.shape, np.uint8))
    write_segments([(label, mask) for label in HIPPOCAMPI.labels], tmp_path / "label.seg.nrrd")
    answer = here.save_label("a", tmp_path / "label.seg.nrrd", [])
    assert answer.status_code == 400 and "segments overlap" in answer.json()["detail"]
    assert here.store.case("a").labels == {}


def test_ohif_sends_voxels_without_a_header(here: Served, tmp_path: Path):
    scan = nib.load(here.store.case("a").images[0])
    data = np.zeros(scan.shape, np.uint8)
    data[3, 4, 5] = 1
    (tmp_path / "label.bin").write_bytes(data.tobytes(order="F"))
    assert here.save_label("a", tmp_path / "label.bin", [RIGHT]).status_code == 200
    labels, _ = here.store.read_label("a")
    assert np.argwhere(labels.data).tolist() == [[3, 4, 5]] and labels.data[3, 4, 5] == 53
    (tmp_path / "label.bin").write_bytes(data.tobytes()[:-1])
    assert here.save_label("a", tmp_path / "label.bin", [RIGHT]).status_code == 400


def test_a_label_on_another_grid_changes_nothing(here: Served, tmp_path: Path):
    path = tiny.save_nifti(tmp_path / "l.nii.gz", np.ones((5, 5, 5), np.uint8), np.eye(4))
    answer = here.save_label("a", path, [LEFT])
    assert answer.status_code == 400
    assert str(tmp_path) not in answer.text
    assert here.store.case("a").labels == {}


def test_what_is_sent_is_measured_before_it_is_counted(
    here: Served, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """A megabyte may be a label of a billion voxels, and counting takes eight bytes of each."""

    def returned(*arguments: Any) -> Any:
        raise AssertionError("counted")

    monkeypatch.setattr(service, "returned", returned)
    path = tmp_path / "label.nii.gz"
    nib.save(nib.Nifti1Image(np.ones((64, 64, 64), np.uint8), np.eye(4)), path)
    answer = here.save_label("a", path, [LEFT])
    assert answer.status_code == 400 and "64 x 64 x 64 voxels" in answer.json()["detail"]


def test_labels_under_another_tag_do_not_count(here: Served, tmp_path: Path):
    path = label_file(here, tmp_path / "label.nii.gz", 1)
    assert here.save_label("a", path, [LEFT], tag="original").status_code == 200
    assert here.client.get("/info/").json()["datastore"]["completed"] == 0
    listed = here.client.get("/datastore/?output=all").json()["objects"]["a"]["labels"]
    assert listed["original"]["info"]["params"]["label_names"] == {LEFT: 1}
    answer = here.client.get("/datastore/label?label=a&tag=original")
    (tmp_path / "back.nii.gz").write_bytes(answer.content)
    assert np.asanyarray(nib.load(tmp_path / "back.nii.gz").dataobj)[3, 5, 5] == 1


# Scans --------------------------------------------------------------------------------------------


def test_the_next_scan_is_one_without_a_label(here: Served, tmp_path: Path):
    for strategy in here.client.get("/info/").json()["strategies"]:
        sample = here.client.post(f"/activelearning/{strategy}", json={"client_id": "me"}).json()
        assert sample["id"] in ("a", "b")
        content = here.client.get(f"/datastore/image?image={sample['id']}").content
        assert sample["checksum"] == f"SHA256:{hashlib.sha256(content).hexdigest()}"
        assert sample["name"] == f"{sample['id']}.nii.gz" and "path" not in sample
    path = label_file(here, tmp_path / "label.nii.gz", 1)
    assert here.save_label("a", path, [LEFT]).status_code == 200
    assert here.client.post("/activelearning/first", json={}).json()["id"] == "b"
    assert here.save_label("b", path, [LEFT]).status_code == 200
    assert here.client.post("/activelearning/first", json={}).json() == {}
    assert here.client.post("/activelearning/none", json={}).status_code == 404


def test_two_people_do_not_get_the_same_scan(here: Served):
    ids = [here.client.post("/activelearning/first", json={"client_id": who}).json()["id"]
           for who in ("anna", "ben", "anna")]  # fmt: skip
    assert ids == ["a", "b", "a"]


def test_a_scan_is_added_once_and_never_replaced(here: Served, tmp_path: Path):
    scan = here.store.case("a").images[0].read_bytes()

    def put(identity: str, content: bytes) -> Any:
        return here.client.put(
            "/datastore/", params={"image": identity},
            files={"file": ("/x/y.nii.gz", content), "params": (None, "{}")},
        )  # fmt: skip

    assert put("uploaded scan", scan).json() == {"image": "uploaded scan"}
    assert put("uploaded scan", scan).status_code == 200
    assert put("uploaded scan", here.store.case("b").images[0].read_bytes()).status_code == 409
    assert put("c", scan[:100]).status_code == 400
    for identity in ("../evil", "/etc/evil", "..", "a/b", "a\0b", "", "a\\b", ".", "a\nb"):
        assert put(identity, scan).status_code == 400, identity
    objects = here.client.get("/datastore/?output=all").json()["objects"]
    assert list(objects) == ["a", "b", "uploaded scan"]
    assert not list(tmp_path.rglob("*evil*"))


def test_scans_are_kept_whatever_slicer_calls_them(here: Served, tmp_path: Path):
    scan = here.store.case("a").images[0].read_bytes()
    path = label_file(here, tmp_path / "label.nii.gz", 1)
    ids = set()
    for name in ("2: Head^T1 (1)", "2; Head^T1 (1)", ".hidden", "x" * 300, "Kopf ä"):
        form = {"file": ("y.nii.gz", scan), "params": (None, "{}")}
        answer = here.client.put("/datastore/", params={"image": name}, files=form)
        assert answer.status_code == 200, answer.text
        ids.add(answer.json()["image"])
        kept = here.save_label(quote(name), path, [LEFT]).json()
        assert kept["image"] == answer.json()["image"]
    assert len(ids) == 5 and "Kopf ä" in ids
    assert {path.parent.name for path in here.store.folder.rglob("*.nii.gz")} == {
        "studies", "images", "final",
    }  # fmt: skip


def test_no_line_and_no_answer_names_a_place_or_what_was_sent(here: Served, tmp_path: Path):
    content = b"not a scan"
    upload = {"file": ("/home/DOE^JANE/DOE.nii.gz", content), "params": (None, "{}")}
    answers = [
        here.client.post("/infer/hippo?image=a", files=upload),
        here.client.put("/datastore/?image=DOEX", files=upload),
        here.client.put("/session/", files={"files": ("/home/DOE/DOE.dcm", b"DOE")}),
        here.infer("hippo", "image=DOE"),
        here.client.get("/info/"),
        here.client.post("/activelearning/first", json={"client_id": "DOE"}),
        here.client.get("/logs/"),
    ]
    here.store.case("a").images[0].write_bytes(content)
    answers.append(here.infer("hippo", "image=a"))
    assert answers[-1].status_code == 400
    for answer in answers:
        assert "DOE" not in answer.text and str(tmp_path) not in answer.text
        assert "/tmp" not in answer.text and "private" not in answer.text
    assert "DOE" not in "".join([*here.told, *here.service.lines])
    assert str(tmp_path) not in "".join([*here.told, *here.service.lines])


def test_too_many_who_wait_are_told_so(here: Served):
    with mock.patch("medseg.annotation.server.MAX_WAITING", 0):
        answer = here.infer("otsu", "image=a")
    assert answer.status_code == 429 and "try again later" in answer.json()["detail"]
    assert here.infer("otsu", "image=a").status_code == 200


# Who may ask --------------------------------------------------------------------------------------


def test_a_login_stands_before_everything_but_itself(tmp_path: Path):
    save_scans(tmp_path / "studies", "a")
    with served(tmp_path, "otsu", login={"anna": "a long password"}) as here:
        client = here.client
        assert client.get("/auth/").json() == {"enabled": True}
        for method, path in (
            ("GET", "/info/"), ("GET", "/auth/token/valid"), ("DELETE", "/train/"),
            ("GET", "/datastore/image?image=a"), ("GET", "/nothing"), ("GET", "/logs/"),
        ):  # fmt: skip
            assert client.request(method, path).status_code == 401, path
        form = {"username": "anna", "password": "a long password", "grant_type": "password"}
        wrong = client.post("/auth/token", data=form | {"password": "a wrong password"})
        assert wrong.status_code == 401
        token = client.post("/auth/token", data=form).json()
        assert token["token_type"] == "bearer"
        headers = {"Authorization": f"{token['token_type']} {token['access_token']}"}
        assert client.get("/auth/token/valid", headers=headers).status_code == 200
        assert client.get("/info/", headers=headers).status_code == 200
        # As MONAI Label's client does once it has sent something with a token.
        stale = headers | {"Content-Length": "99999999999", "Content-Type": "multipart/form-data"}
        assert client.get("/info/", headers=stale).status_code == 200
        assert client.get("/info/", headers={"Authorization": "bearer x"}).status_code == 401
        assert "anna" not in "".join(here.told)


@pytest.mark.parametrize(
    "kind", ["application/json", "multipart/form-data; boundary=----other$", "text/plain"]
)
def test_the_client_that_confuses_types_once_it_has_logged_in_is_understood(
    tmp_path: Path, kind: str
):
    """MONAI Label's client keeps headers of what it sent before with its token."""
    save_scans(tmp_path / "studies", "a")
    scan = (tmp_path / "studies" / "a.nii.gz").read_bytes()
    about = b'--x y\r\nContent-Disposition: form-data; name="files"; filename="a.nii.gz"\r\n\r\n'
    form = about.replace(b"x y", b"xy") + scan + b"\r\n--xy--\r\n"
    with served(tmp_path, "otsu", login={"anna": "a long password"}) as here:
        login = {"username": "anna", "password": "a long password"}
        token = here.client.post("/auth/token", data=login).json()["access_token"]
        headers = {"Authorization": f"bearer {token}", "Content-Type": kind}
        started = here.client.put("/session/", content=form, headers=headers)
        assert started.status_code == 200, started.text
        name = started.json()["session_id"]
        headers["Content-Type"] = 'multipart/form-data; boundary="x y"'
        spaced = about + scan + b"\r\n--x y--\r\n"
        assert here.client.put("/session/", content=spaced, headers=headers).status_code == 200
        for broken in (b"", b"--", form[:-6], b"xy" + form):
            answer = here.client.put("/session/", content=broken, headers=headers)
            assert answer.status_code in (400, 415)
        params = {"params": (None, "{}")}
        answer = here.client.post(
            f"/infer/otsu?session_id={name}", files=params,
            headers={"Authorization": f"Bearer {token}"},
        )  # fmt: skip
        assert answer.status_code == 200


@pytest.mark.parametrize(
    ("address", "host", "status"),
    [
        ("http://127.0.0.1:8000", "127.0.0.1:8000", 200),
        ("http://127.0.0.1:8000", "localhost:9000", 200),  # through a tunnel
        ("http://127.0.0.1:8000", "LOCALHOST", 200),
        ("http://127.0.0.1:8000", "evil.example:8000", 421),
        ("http://127.0.0.1:8000", "127.0.0.1.evil.example", 421),
        ("http://127.0.0.1:8000", "10.0.0.9:8000", 421),
        ("http://127.0.0.1:8000", "", 421),
        ("http://127.0.0.1:8000", "127.0.0.1@evil.example", 421),
        ("http://10.0.0.9:8000", "10.0.0.9:8000", 200),
        ("http://10.0.0.9:8000", "localhost:8000", 421),
        ("http://10.0.0.9:8000", "gpu.example.org:8000", 200),
    ],
)
def test_a_server_answers_to_its_own_names(tmp_path: Path, address: str, host: str, status: int):
    with served(tmp_path, "otsu", rules=Rules(names=("gpu.example.org",)), address=address) as here:
        assert here.client.get("/info/", headers={"Host": host}).status_code == status


def test_pages_from_elsewhere_may_not_ask(tmp_path: Path):
    with served(tmp_path, "otsu", rules=Rules(origins=("http://ohif.example:3000",))) as here:
        evil = {"Origin": "http://evil.example"}
        assert here.client.post("/train/otsu", headers=evil).status_code == 403
        assert here.client.get("/info/", headers={"Origin": "null"}).status_code == 403
        own = here.client.get("/info/", headers={"Origin": "http://127.0.0.1:8000"})
        assert own.status_code == 200 and "access-control-allow-origin" not in own.headers
        ohif = {"Origin": "http://ohif.example:3000"}
        answer = here.client.get("/info/", headers=ohif)
        assert answer.headers["access-control-allow-origin"] == "http://ohif.example:3000"
        asked = here.client.options(
            "/infer/otsu", headers=ohif | {"Access-Control-Request-Method": "POST"}
        )
        assert asked.status_code == 204
        assert "POST" in asked.headers["access-control-allow-methods"]
    assert not any("evil" in line for line in here.told)


def test_without_origins_there_is_no_word_of_cors(here: Served):
    for answer in (here.client.get("/info/"), here.client.options("/info/")):
        assert not [name for name in answer.headers if name.startswith("access-control")]


def test_too_much_is_refused_before_it_is_kept(tmp_path: Path):
    save_scans(tmp_path / "studies", "a")
    with served(tmp_path, "otsu", rules=Rules(max_bytes=10_000)) as here:
        big = {"files": ("a.nii.gz", bytes(20_000))}
        answer = here.client.put("/session/", files=big)
        assert answer.status_code == 413 and "the limit" in answer.json()["detail"]

        def pieces() -> Iterator[bytes]:  # without a length
            yield from (bytes(1000) for _ in range(20))

        streamed = here.client.put(
            "/session/", content=pieces(),
            headers={"Content-Type": "multipart/form-data; boundary=x"},
        )  # fmt: skip
        assert streamed.status_code in (400, 413)
        deep = json.dumps({"x": "y" * 2_000_000})
        assert here.client.post("/activelearning/first", content=deep).status_code == 413
        assert list(here.service.folder.iterdir()) == []
