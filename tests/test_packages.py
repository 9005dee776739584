"""What installed packages add is looked up late, comes after medseg's own, and is held to the same.

A package that is really installed is tested in `tests/api/test_outside.py`.
"""

from __future__ import annotations

import importlib.metadata
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import numpy as np
import pytest

import medseg
from making import networks as tiny
from medseg import packages
from medseg.errors import BadConfig, BadFile, BadModel, BadOutput
from medseg.io import added
from medseg.networks.zoo import build_network, known_networks, small, training_of

Adding = Callable[..., None]
VOLUME = medseg.Volume(np.ones((3, 4, 5), np.uint8), np.eye(4))


class Point:
    """An entry point of a package."""

    def __init__(self, group: str, name: str, thing: Any, package: str) -> None:
        self.group, self.name, self.value = group, name, f"{package}:{name}"
        self.dist = SimpleNamespace(name=package)
        self._thing = thing

    def load(self) -> Any:
        """What it leads to; an error is raised."""
        if isinstance(self._thing, Exception):
            raise self._thing
        return self._thing


def forget() -> None:
    for one in (packages._points, packages.load, added._made):
        one.cache_clear()


@pytest.fixture
def add() -> Iterator[Adding]:
    """Called with a group, a name and a thing, as if a package added it."""
    points: list[Point] = []

    def adding(group: str, name: str, thing: Any, package: str = "other-package") -> None:
        points.append(Point(group, name, thing, package))
        forget()

    usual = importlib.metadata.entry_points

    def entry_points(**chosen: str) -> Any:
        if not chosen.get("group", "").startswith("medseg."):
            return usual(**chosen)  # others have theirs
        return [one for one in points if one.group == chosen["group"]]

    forget()
    with mock.patch.object(importlib.metadata, "entry_points", entry_points):
        yield adding
    forget()


def test_nothing_is_looked_up_for_what_is_medseg_s_own(tmp_path: Path):
    forget()
    with mock.patch.object(importlib.metadata, "entry_points", side_effect=AssertionError):
        medseg.write(VOLUME, tmp_path / "own.nii.gz")
        medseg.read(tmp_path / "own.nii.gz")
        build_network("unet", 1, 2, **tiny.UNET_OPTIONS)
        medseg.load("brain")


def test_medseg_s_own_comes_first(add: Adding, tmp_path: Path):
    for group, name in (
        (packages.READERS, ".nii.gz"),
        (packages.WRITERS, ".nii.gz"),
        (packages.NETWORKS, "unet"),
        (packages.MODELS, "brain"),
    ):
        add(group, name, AssertionError("was loaded"))
    medseg.write(VOLUME, tmp_path / "own.nii.gz")
    assert (medseg.read(tmp_path / "own.nii.gz").data == 1).all()
    build_network("unet", 1, 2, **tiny.UNET_OPTIONS)
    assert medseg.load("brain").name == "brain"


def test_a_scan_of_an_added_format_is_a_scan_everywhere(add: Adding, tmp_path: Path):
    folder = tmp_path / "scans"
    folder.mkdir()
    scan = medseg.Volume(tiny.phantom(), tiny.affine_of())
    add(packages.READERS, ".other", lambda path, **options: scan)
    add(packages.WRITERS, ".other", lambda volume, path, table: Path(path).write_text("x"))
    (folder / "one.OTHER").write_text("x", encoding="utf-8")
    ran = tiny.medseg("infer", folder, "-m", "otsu", "-o", tmp_path / "out/")
    assert ran.code == 0 and (tmp_path / "out" / "one_seg.nii.gz").is_file()
    ran = tiny.medseg("infer", folder, "-m", "otsu", "-o", tmp_path / "labels.other")
    assert ran.code == 0 and (tmp_path / "labels.other").is_file()
    assert medseg.convert(folder / "one.OTHER", tmp_path / "one.nrrd").is_file()


def failing(path: str | Path, **options: Any) -> medseg.Volume:
    raise ValueError("JOHN DOE")


@pytest.mark.parametrize(
    ("reader", "says"),
    [
        (failing, "a.other: the reader of other-package stopped with ValueError"),
        (lambda path, **options: VOLUME.data, "gave ndarray and no medseg.Volume"),
        (
            lambda path, **options: medseg.Volume(np.zeros((2, 2, 2), complex), np.eye(4)),
            "gave complex128, not numbers",
        ),
        (
            lambda path, **options: medseg.Volume(np.zeros((2, 2, 0)), np.eye(4)),
            r"a\.other",
        ),
    ],
)
def test_a_reader_that_gives_no_scan_is_a_bad_file(
    reader: Any, says: str, add: Adding, tmp_path: Path
):
    (tmp_path / "a.other").write_text("x", encoding="utf-8")
    add(packages.READERS, ".other", reader)
    with pytest.raises(BadFile, match=says) as caught:
        medseg.read(tmp_path / "a.other")
    assert "JOHN" not in str(caught.value)


def test_voxels_of_an_added_format_are_made_finite_as_all_are(add: Adding, tmp_path: Path):
    data = np.ones((3, 4, 5), np.float32)
    data[0, 0, 0] = np.inf
    data[0, 0, 1] = 2
    (tmp_path / "a.other").write_text("x", encoding="utf-8")
    add(packages.READERS, ".other", lambda path, **options: medseg.Volume(data, np.eye(4)))
    with pytest.warns(medseg.DataWarning, match="1 of 60 voxels are not finite"):
        assert medseg.read(tmp_path / "a.other").data[0, 0, 0] == 2


def test_a_writer_that_fails_is_a_bad_output(add: Adding, tmp_path: Path):
    add(packages.WRITERS, ".other", mock.Mock(side_effect=OSError("JOHN DOE")))
    with pytest.raises(BadOutput, match="the writer of other-package stopped with OSError"):
        medseg.write(VOLUME, tmp_path / "a.other")
    with pytest.raises(BadOutput, match=r"does not write this format; use one of .*\.other"):
        medseg.write(VOLUME, tmp_path / "a.none")


def test_what_cannot_be_loaded_names_its_package(add: Adding):
    add(packages.NETWORKS, "new", ImportError("no module"))
    with pytest.raises(BadConfig, match=r"package other-package adds 'new' .*ImportError; mend"):
        build_network("new", 1, 2)


def test_two_packages_that_add_one_name_are_refused(add: Adding):
    for package in ("one-package", "two-package"):
        add(packages.NETWORKS, "new", dict, package)
    with pytest.raises(BadConfig, match="one-package and two-package both add 'new'"):
        build_network("new", 1, 2)


def test_an_added_network_is_built_and_planned_with_what_it_says(add: Adding):
    def new(channels: int, classes: int, *, width: int) -> Any:
        return tiny.Nearest(channels, classes + width)

    new.training = {"learning_rate": 0.5}  # type: ignore[attr-defined]
    new.small = {"width": 3}  # type: ignore[attr-defined]
    add(packages.NETWORKS, "new", new)
    assert "new" in known_networks()
    assert small("new", (16, 16, 16)) == {"width": 3}
    assert training_of("new")["learning_rate"] == 0.5 and "optimizer" in training_of("new")
    assert len(build_network("new", 1, 2, **small("new", (8, 8, 8))).brightness) == 5
    with pytest.raises(BadModel, match="the architecture 'new' cannot be built"):
        build_network("new", 1, 2, depth=3)
    with pytest.raises(BadModel, match=r"there is no architecture 'newer'; medseg has .*new"):
        build_network("newer", 1, 2)


@pytest.mark.parametrize("as_function", [True, False])
def test_an_added_model_is_meant_by_its_name(as_function: bool, add: Adding, tmp_path: Path):
    folder = tiny.save_unet(tmp_path / "model")
    add(packages.MODELS, "theirs", (lambda: folder) if as_function else str(folder))
    assert medseg.load("theirs").name == "tiny"
    scan = tiny.save_scan(tmp_path / "scan.nii.gz")
    assert tiny.medseg("infer", scan, "-m", "theirs", "-q").code == 0
    with pytest.raises(BadModel, match=r"comes with medseg .*theirs"):
        medseg.load("nobody's")


def test_an_added_model_without_a_folder_is_refused(add: Adding):
    add(packages.MODELS, "theirs", 3)
    with pytest.raises(BadModel, match="other-package adds the model 'theirs' and names no folder"):
        medseg.load("theirs")


def test_whatever_a_package_does_wrong_is_its_own_fault(add: Adding):
    def broken(*given: Any, **named: Any) -> Any:
        raise KeyError("theirs")

    add(packages.MODELS, "theirs", broken)
    with pytest.raises(
        BadModel, match="other-package adds the model 'theirs' and stopped with Key"
    ):
        medseg.load("theirs")
    add(packages.NETWORKS, "new", broken)
    with pytest.raises(BadModel, match="the architecture 'new' cannot be built"):
        build_network("new", 1, 2)


def test_a_suffix_is_meant_in_any_case(add: Adding, tmp_path: Path):
    add(packages.READERS, ".Plain", lambda path, **options: VOLUME)
    (tmp_path / "scan.pLAIN").write_bytes(b"x")
    assert medseg.read(tmp_path / "scan.pLAIN").shape == VOLUME.shape
