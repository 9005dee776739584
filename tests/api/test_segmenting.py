"""`medseg.segment` and `medseg.load`: the model that is meant, settings, results."""

from __future__ import annotations

import json
import pickle
import sys
import threading
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest

import medseg
from making import networks as tiny
from making.ct import grid, trunk
from medseg.api.segmenting import Changes
from medseg.errors import BadConfig, BadFile, BadModel, BadOutput, DataWarning
from medseg.inference import Segmentation, make_table
from medseg.inference.look import Head
from medseg.inference.tables import PlainTable


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.save_unet(tmp_path_factory.mktemp("model") / "tiny")


@pytest.fixture
def scan(tmp_path: Path) -> Path:
    return tiny.save_scan(tmp_path / "scan.nii.gz")


def ct() -> medseg.Volume:
    affine, shape = grid(low_mm=(-190, -150, -60), high_mm=(190, 140, 60), spacing_mm=(6, 6, 6))
    return trunk(affine, shape, noise=15).scan


def test_without_a_model_ct_gets_that_of_ct():
    assert medseg.segment(ct()).plan.model == "ct-tissues"


def test_where_no_model_suits_python_is_told_in_its_own_words():
    noise = np.random.default_rng(0).normal(100, 20, (16, 18, 20)).astype(np.float32)
    with pytest.raises(BadConfig, match="choose one with model="):
        medseg.segment((noise, np.eye(4)))


def test_the_model_of_the_brain_is_refused_for_ct_unless_it_is_forced():
    with pytest.raises(BadConfig, match=r"this is CT.* or give force=True to compute all the same"):
        medseg.segment(ct(), "brain-fast")
    with pytest.warns(DataWarning) as heard:
        result = medseg.segment(ct(), "brain-fast", force=True, overlap=0.0)
    assert result.doubts[0].startswith("computed by force: this is CT")
    assert [str(one.message) for one in heard if one.category is DataWarning] == [*result.doubts]


def test_who_names_structures_means_the_model_that_has_them(model: Path, scan: Path):
    head = Head(is_brain=True, is_likely=True, is_none=False, doubts=())
    with (
        mock.patch("medseg.inference.look.look_for_head", return_value=head),
        pytest.raises(BadConfig, match="roi: the model: there is no structure 'heart'"),
    ):
        medseg.segment(scan, roi=["heart"])
    by_name = medseg.segment(scan, model, roi=["Left Body"], probabilities=["right body"])
    by_value = medseg.segment(scan, model, roi=[2], probabilities=[41])
    assert np.array_equal(by_name.labels.data, by_value.labels.data)
    assert list(by_name.maps) == list(by_value.maps) == ["probability_41"]


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"device": "gpu"}, "there is no device 'gpu'"),
        ({"device": 0}, "there is no device '0'"),
        ({"precision": "half"}, "there is no precision 'half'"),
        ({"backend": "onnx"}, "there is no backend 'onnx'"),
        ({"overlap": 0.95}, "overlap is a share from 0 to 0.9, and 0.95"),
        ({"overlap": "0.5"}, "overlap is a share"),
        ({"overlap": float("nan")}, "overlap is a share"),
        ({"batch": -1}, "batch is a number of windows"),
        ({"batch": 1.5}, "batch is a number of windows"),
        ({"batch": True}, "batch is a number of windows"),
        ({"max_memory_bytes": "4GB"}, "max_memory_bytes is a number of bytes"),
        ({"max_memory_bytes": 0}, "max_memory_bytes is a number of bytes"),
        ({"cleanup": "no"}, "cleanup is True or False"),
        ({"tta": 1}, "tta is True or False"),
        ({"probabilities": "17,53"}, "probabilities"),
        ({"roi": [2.5]}, "roi"),
    ],
)
def test_settings_are_refused_alike_everywhere(settings: dict[str, Any], says: str, model: Path):
    volume = medseg.Volume(np.zeros((4, 4, 4), np.float32), np.eye(4))
    loaded = medseg.load(model)
    calls = (
        lambda: medseg.Settings(**settings),
        lambda: medseg.segment(volume, model, **settings),
        lambda: medseg.load(model, **settings),
        lambda: loaded(volume, **settings),
        lambda: medseg.batch("list.csv", "out", model, **settings),
    )
    for call in calls:
        with pytest.raises(BadConfig, match=says):
            call()


def test_the_names_of_settings_are_those_of_settings():
    from dataclasses import fields

    internal = {"from_dicom", "region", "every_output"}
    assert (
        Changes.__annotations__.keys() == {one.name for one in fields(medseg.Settings)} - internal
    )
    with pytest.raises(TypeError, match=r"no setting 'overlapp'; did you mean overlap\?"):
        medseg.segment("scan.nii", overlapp=0.5)  # type: ignore[call-arg]


def test_a_value_that_no_structure_has_is_refused_however_it_is_given(model: Path, scan: Path):
    for settings in (None, medseg.Settings(roi=(999,))):
        changes: Any = {} if settings else {"roi": [999]}
        with pytest.raises(BadConfig, match="roi: the model: there is no structure '999'"):
            medseg.segment(scan, model, settings, **changes)
        with pytest.raises(BadConfig, match="roi: the model: there is no structure '999'"):
            medseg.load(model, settings=settings, **changes)


def test_what_holds_several_scans_says_how_one_is_chosen(model: Path, tmp_path: Path):
    for name in ("one", "two"):
        tiny.save_scan(tmp_path / f"{name}.nii.gz")
    with pytest.raises(BadFile, match=r"is a folder of 2 scans; .* to medseg\.batch"):
        medseg.segment(tmp_path, model)
    several = np.stack([tiny.phantom(), tiny.phantom(seed=1)], -1)
    path = tiny.save_nifti(tmp_path / "four.nii", several, tiny.affine_of())
    with pytest.raises(BadFile, match=r"choose one with medseg\.read\(path, volume_index=N\)"):
        medseg.segment(path, model)
    assert (
        medseg.segment(medseg.read(path, volume_index=1), model).labels.shape == several.shape[:3]
    )


def test_numbers_of_numpy_are_settings():
    settings = medseg.Settings(probabilities=[np.int64(3)], max_memory_bytes=4e9)  # type: ignore[arg-type]
    assert settings.probabilities == (3,) and settings.max_memory_bytes == 4_000_000_000
    assert repr(medseg.Settings(device="cpu")) == "Settings(device='cpu')"


@pytest.mark.parametrize(
    ("wrong", "error", "says"),
    [
        (3, BadConfig, "this is a number"),
        ([], BadConfig, "this is an empty list"),
        ("brein", BadModel, "there is no model 'brein'"),
    ],
)
def test_what_is_no_model_is_named(wrong: Any, error: type[Exception], says: str, scan: Path):
    with pytest.raises(error, match=says):
        medseg.segment(scan, wrong)


def test_a_file_that_is_not_there_is_named_with_what_it_may_mean():
    with pytest.raises(BadFile, match=r"'otsu' is a text .*segment\(scan, 'otsu'\)"):
        medseg.segment("otsu", "otsu")
    with pytest.raises(BadFile, match=r"'scna\.nii' is a text that names no file or folder; check"):
        medseg.segment("scna.nii", "otsu")


def test_a_loaded_model_is_opened_once(model: Path, scan: Path):
    from medseg.models import Checkpoint

    loaded = medseg.load(model, device="cpu")
    assert loaded.name == "tiny" and loaded.channels == ("",) and len(loaded.table) == 2
    with mock.patch.object(
        Checkpoint, "network", autospec=True, side_effect=Checkpoint.network
    ) as n:
        first, second = loaded(scan), loaded(medseg.read(scan))
        assert n.call_count == 1
        medseg.segment(scan, model)
        assert n.call_count == 2
    assert np.array_equal(first.labels.data, second.labels.data)
    again = medseg.load(loaded, overlap=0.25)
    assert again.settings == medseg.Settings(device="cpu", overlap=0.25)


def test_calls_of_several_threads_wait_for_each_other(model: Path, scan: Path):
    inside, most = 0, 0
    lock = threading.Lock()

    def watch(plan: object) -> None:
        nonlocal inside, most
        with lock:
            inside += 1
            most = max(most, inside)

    def leave(what: str, done: int, total: int) -> None:
        nonlocal inside
        with lock:
            inside = 0

    volume, loaded = medseg.read(scan), medseg.load(model)
    ways = (loaded, lambda one, **named: medseg.segment(one, "otsu", **named)) * 2
    results: list[Segmentation] = []
    threads = [
        threading.Thread(
            target=lambda way=way: results.append(way(volume, announce=watch, progress=leave))
        )
        for way in ways
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(results) == 4
    assert len({one.labels.data.tobytes() for one in results}) == 2


def test_the_saved_result_is_what_infer_writes(model: Path, scan: Path, tmp_path: Path):
    assert tiny.medseg("infer", scan, "-m", model, "-o", tmp_path / "cli.nii.gz", "-q").code == 0
    saved = medseg.segment(scan, model).save(tmp_path / "python.nii.gz")
    for ending in (".nii.gz", ".labels.csv"):
        ours, theirs = tmp_path / f"python{ending}", tmp_path / f"cli{ending}"
        assert ours.read_bytes() == theirs.read_bytes()
    records = [json.loads((tmp_path / f"{name}.json").read_text()) for name in ("python", "cli")]
    for key in ("input", "model", "settings", "structures", "files_sha256", "versions"):
        assert records[0][key] == records[1][key], key
    assert saved == tmp_path / "python.nii.gz"


def test_what_is_said_of_the_data_is_heard_and_stands_in_the_record(model: Path, tmp_path: Path):
    data = tiny.phantom()
    data[0, 0, 0] = np.nan
    scan = tiny.save_nifti(tmp_path / "named.nii.gz", data, tiny.affine_of())
    for one, begins in ((scan, "the scan: 1 of"), ((data, tiny.affine_of()), "a pair of an array")):
        with pytest.warns(DataWarning, match="are not finite") as heard:
            result = medseg.segment(one, model)
        assert heard[0].filename == __file__
        result.save(tmp_path / "labels.nii.gz")
        record = json.loads((tmp_path / "labels.json").read_text(encoding="utf-8"))
        assert [text[: len(begins)] for text in record["warnings"]] == [begins]


def test_a_result_can_be_sent_to_another_process(model: Path, scan: Path, tmp_path: Path):
    result = pickle.loads(pickle.dumps(medseg.segment(scan, model)))
    assert result.save(tmp_path / "labels.nii.gz").is_file()


def test_dicom_is_written_only_of_dicom(model: Path, scan: Path, tmp_path: Path):
    for one in (scan, medseg.read(scan)):
        with pytest.raises(BadOutput, match="refers to the DICOM images it was made from"):
            medseg.segment(one, model).save(tmp_path / "labels.dcm")


def test_a_result_of_dicom_is_saved_as_dicom(model: Path, tmp_path: Path):
    pytest.importorskip("highdicom", reason="needs highdicom: pip install medseg[dicom]")
    from making import dicom

    folder = dicom.save(dicom.as_mr(dicom.series()), tmp_path / "series")
    result = medseg.segment(folder, model)
    again = medseg.read_labels(result.save(tmp_path / "labels.dcm"))
    assert sorted(np.unique(again.data)) == sorted(np.unique(result.labels.data))
    assert (again.data > 0).sum() == (result.labels.data > 0).sum()


def test_volumes_are_a_table_with_pandas_and_without(model: Path, scan: Path):
    result = medseg.segment(scan, model)
    plain = PlainTable(result.structures)
    with mock.patch.dict(sys.modules, {"pandas": None}):
        assert isinstance(result.volumes, PlainTable)
    assert plain.columns == ["value", "name", "voxels", "ml", "confidence"]
    assert plain["name"] == ["left body", "right body"]
    assert plain.to_dict("records") == result.structures
    assert sum(plain["voxels"]) == int((result.labels.data > 0).sum())
    pandas = pytest.importorskip("pandas", reason="needs pandas: pip install medseg[dev]")
    table = make_table(result.structures)
    assert isinstance(table, pandas.DataFrame)
    for orient in ("records", "list", "dict"):
        assert table.to_dict(orient) == plain.to_dict(orient)
    assert list(table.columns) == plain.columns == list(plain)


def test_texts_of_objects_are_short(model: Path, scan: Path):
    from medseg.models import load_checkpoint

    result = medseg.segment(scan, model)
    brain = load_checkpoint("brain")
    for one in (result, result.labels, result.scan, result.table, brain, brain.spec, brain.table):
        assert len(repr(one).splitlines()) <= 3 and len(repr(one)) < 300, repr(one)
    assert repr(medseg.load("brain")).startswith("<Segmenter brain: one scan")
    assert str(brain.spec) == repr(brain.spec)


def test_a_notebook_is_shown_no_markup_of_a_table(scan: Path):
    volume = medseg.read(scan)
    label = medseg.Label(1, "<script>alert(1)</script>", (1, 2, 3))
    labels = volume.with_data((volume.data > 500).astype(np.uint8))
    plan = medseg.segment(volume, "otsu").plan
    table = medseg.LabelTable((label,))
    html = Segmentation(labels, table, plan, scan=volume)._repr_html_()
    assert "<script>" not in html and "&lt;script&gt;" in html
    without = Segmentation(labels, table, plan)
    assert "<img" not in without._repr_html_()
    with pytest.raises(BadConfig, match="does not hold its scan"):
        without.plot()


def test_what_is_missing_is_said_in_one_sentence(scan: Path):
    result = medseg.segment(scan, "otsu")
    for package, call in (
        ("nibabel", result.to_nibabel),
        ("SimpleITK", result.to_sitk),
    ):
        with (
            mock.patch.dict(sys.modules, {package: None}),
            pytest.raises(BadConfig, match="pip install"),
        ):
            call()


def test_a_plot_has_right_on_the_left_and_names_what_is_there(scan: Path):
    result = medseg.segment(scan, "otsu")
    figure = result.plot()
    assert [one.get_title() for one in figure.axes] == ["axial", "coronal", "sagittal"]
    assert figure.axes[0].xaxis_inverted() and not figure.axes[0].yaxis_inverted()
    assert [text.get_text() for text in figure.axes[0].texts] == ["R", "L", "A", "P"]
    named = [text.get_text() for text in figure.legends[0].get_texts()]
    assert set(named) == {row["name"] for row in result.structures if row["voxels"]}
    assert figure._repr_png_()[:4] == b"\x89PNG"  # type: ignore[attr-defined]


def test_a_result_never_replaces_its_scan(scan: Path, monkeypatch: pytest.MonkeyPatch):
    nibabel = pytest.importorskip("nibabel", reason="needs nibabel: pip install medseg[dev]")
    content = scan.read_bytes()
    monkeypatch.chdir(scan.parent)
    volume = medseg.read(scan)
    for one in (scan, str(scan), [scan], nibabel.load(scan), volume, (volume.data, volume.affine)):
        result = medseg.segment(one, "otsu")
        for name in (scan, scan.name):
            with pytest.raises(BadOutput, match="is the scan and would be overwritten"):
                result.save(name)
    assert scan.read_bytes() == content
    for _ in range(2):  # what was written before is replaced
        medseg.segment(volume, "otsu").save("labels.nii.gz")


def test_numbers_and_devices_of_other_libraries_are_settings():
    import torch

    settings = medseg.Settings(
        device=torch.device("cpu"),  # type: ignore[arg-type]
        batch=np.int64(2),  # type: ignore[arg-type]
        overlap=np.float32(0.25),  # type: ignore[arg-type]
        tta=np.bool_(True),  # type: ignore[arg-type]
        cleanup=np.bool_(False),  # type: ignore[arg-type]
        max_memory_bytes=np.int32(10**9),  # type: ignore[arg-type]
    )
    plain = medseg.Settings(
        device="cpu", batch=2, overlap=0.25, tta=True, cleanup=False, max_memory_bytes=10**9
    )
    assert settings == plain and repr(settings) == repr(plain)
    for wrong in (float("inf"), np.inf):
        with pytest.raises(BadConfig, match="max_memory_bytes is a number of bytes"):
            medseg.Settings(max_memory_bytes=wrong)  # type: ignore[arg-type]


@pytest.mark.parametrize("kind", [list, tuple, np.array, set, iter])
def test_structures_are_named_in_any_collection(kind: Any, model: Path):
    with pytest.raises(BadConfig, match="a list of names or values, and this is a dict"):
        medseg.load(model, roi={"left body": 1})
    assert medseg.load(model, roi=kind(["left body"])).settings.roi == (2,)
    assert medseg.load(model, roi=kind([2])).settings.roi == (2,)


def test_a_list_that_names_no_structure_asks_for_nothing(model: Path, scan: Path):
    for names in ([""], [" "]):
        with pytest.raises(BadConfig, match="roi: no structure is named"):
            medseg.segment(scan, model, roi=names)
    ran = tiny.medseg("infer", scan, "-m", model, "--roi", ",")
    assert ran.code == 5 and "--roi: no structure is named" in ran.err


def test_an_empty_path_is_not_the_folder_one_is_in(scan: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(scan.parent)
    for name in ("", "a" * 5000):
        with pytest.raises(BadFile, match="names no file or folder"):
            medseg.segment(name, "otsu")
    with pytest.raises(BadConfig, match="names no file or folder"):
        medseg.segment(scan, "otsu").save("")


def test_what_is_wrong_with_voxels_is_said_of_the_scan():
    with pytest.raises(BadFile, match=r"^the scan: has one intensity everywhere"):
        medseg.segment((np.ones((5, 6, 7)), np.eye(4)), "otsu")


@pytest.mark.usefixtures("known_networks")
def test_too_few_channels_are_asked_for_in_a_list(tmp_path: Path, scan: Path):
    model = medseg.load(tiny.save_two_channels(tmp_path / "model"))
    with pytest.raises(BadConfig, match=r"T1, FLAIR.*and a volume is given; give a list of them"):
        model(medseg.read(scan))
    with pytest.raises(BadConfig, match=r"a list of 3 volumes is given; call it for each"):
        model([medseg.read(scan)] * 3)


@pytest.mark.parametrize("name", ["progress", "announce", "force"])
def test_what_is_no_function_and_no_truth_value_is_named(name: str, scan: Path):
    model = medseg.load("otsu")
    for call in (
        lambda: medseg.segment(scan, "otsu", **{name: "no"}),
        lambda: model(scan, **{name: "no"}),
    ):
        with pytest.raises(BadConfig, match=f"{name} is .*, and this is a text"):
            call()


def test_who_names_a_tissue_means_the_model_that_has_it():
    for names in (["left lung"], ["Bone", "left_lung"], np.array(["muscle"])):
        result = medseg.segment(ct(), roi=names)
        assert result.plan.model == "ct-tissues" and len(result.table) == len(names)


@pytest.mark.parametrize("name", ["uncertainty", "exact", "tta", "postprocess"])
def test_what_only_a_network_gives_is_refused_of_rules(name: str, tmp_path: Path):
    for model in (None, "ct-tissues", "otsu"):
        with pytest.raises(BadConfig, match=f"^{name} is for networks, and .* is none"):
            medseg.segment(ct(), model, **{name: True})
    with pytest.raises(BadConfig, match="probabilities is for networks"):
        medseg.segment(ct(), probabilities=["bone"])
    medseg.write(ct(), tmp_path / "ct.nii.gz")
    for words in (["--folds", "0"], ["--checkpoint", "best", "-m", "otsu"]):
        ran = tiny.medseg("infer", tmp_path / "ct.nii.gz", *words)
        assert ran.code == 5 and "--folds and --checkpoint are for models of nnU-Net" in ran.err
    assert [path.name for path in tmp_path.iterdir()] == ["ct.nii.gz"]
