"""Prepared scans as compressed chunks: the same numbers as raw, to the bit, of which only what a
patch shows is read.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch

from making import networks as tiny, phantoms
from medseg.config import make_config
from medseg.dataset.reading import read_dataset
from medseg.errors import BadConfig, BadFile
from medseg.training.prepared import formats
from medseg.training.prepared.reading import open_prepared
from medseg.training.scans import ScanSource

pytestmark = pytest.mark.usefixtures("one_thread")
ZARR = "needs the extra zarr: pip install medseg[zarr]"
CPU = torch.device("cpu")


def tree(folder: Path) -> dict[str, bytes]:
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
    }


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Scans of more than a chunk along two axes, of two channels."""
    folder = tmp_path_factory.mktemp("formats") / "data"
    return phantoms.dataset(folder, 3, modalities=("T1", "T2"), shape=(22, 70, 66))


@pytest.fixture(scope="module")
def packed(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("zarr", reason=ZARR)
    store = tmp_path_factory.mktemp("packed") / "store"
    ran = tiny.medseg("prepare", data, "-o", store, "--format", "zarr", "--quiet")
    assert ran.code == 0, ran.err
    return store


def source_of(data: Path, store: Path, **augment: Any) -> ScanSource:
    dataset, prepared = read_dataset(data), open_prepared(store)
    config = make_config(
        {
            "name": "x",
            "data": str(data),
            "model": {"name": "unet", "options": {"features": [4, 8]}, "patch": [16, 16, 16]}
            | {key.removeprefix("model."): one for key, one in prepared.settings.items()},
            "augment": augment,
            "train": {"steps": 10, "batch": 2},
        },
        "test",
    )
    names = [case.name for case in dataset.cases]
    return ScanSource(config, dataset, names, [], store, prepared=prepared)


@pytest.mark.parametrize(
    "augment",
    [
        {"rotation_share": 0, "scaling_share": 0},
        {"rotation_share": 1, "elastic_share": 1, "elastic_mm": [2, 4], "mirror": [0, 2]},
    ],
    ids=["plain", "bent"],
)
def test_batches_are_those_of_raw_arrays_to_the_bit(
    augment: dict[str, Any], data: Path, packed: Path, tmp_path: Path
):
    assert tiny.medseg("prepare", data, "-o", tmp_path / "raw", "--quiet").code == 0
    raw, chunked = source_of(data, tmp_path / "raw", **augment), source_of(data, packed, **augment)
    for step in range(12):
        seeds, samples = [2 * step, 2 * step + 1], range(2 * step, 2 * step + 2)
        one, other = (source.batch(step, seeds, samples, CPU) for source in (raw, chunked))
        assert torch.equal(one.images, other.images)
        assert torch.equal(one.labels, other.labels)
        assert one.images.std() > 0


def test_a_patch_reads_the_chunks_that_it_touches_and_no_others(data: Path, packed: Path):
    import zarr

    source = source_of(data, packed, rotation_share=0, scaling_share=0)
    whole = source._array(0, "image").nbytes
    asked: list[int] = []
    read = zarr.Array.__getitem__

    def counted(array: Any, box: Any) -> Any:
        part = read(array, box)
        asked.append(part.nbytes)
        return part

    with mock.patch.object(zarr.Array, "__getitem__", counted):
        source.batch(0, [1], range(1), CPU)
    patch = 16**3
    assert sum(asked) == patch * (2 * 4 + 1), "two channels of float32, and labels"
    assert sum(asked) < whole / 10
    content = json.loads(next(packed.rglob("image.zarr/zarr.json")).read_text())
    (shards,) = content["codecs"]
    assert shards["name"] == "sharding_indexed"
    assert shards["configuration"]["chunk_shape"] == [2, 22, 64, 64]


def test_several_jobs_pack_the_same_bytes(data: Path, packed: Path, tmp_path: Path):
    for _ in range(2):
        for part in ("1/2", "0/2"):
            options = ("--format", "zarr", "--shard", part, "--workers", "2")
            tiny.medseg("prepare", data, "-o", tmp_path / "store", "--quiet", *options)
    assert tree(tmp_path / "store") == tree(packed)
    raw = tiny.medseg("prepare", data, "-o", tmp_path / "store")
    assert raw.code == 5 and "begun with other arrays" in raw.err


@pytest.mark.parametrize("how", ["gone", "cut", "changed"])
def test_chunks_that_are_damaged_are_refused_and_are_no_zeros(
    how: str, data: Path, packed: Path, tmp_path: Path
):
    arrays = {
        "image": np.random.default_rng(0).normal(size=(1, 70, 20, 20)).astype(np.float32),
        "labels": np.zeros((70, 20, 20), np.int8),
        "points": np.zeros((0, 4), np.int16),
    }
    form = formats.Zarr()
    form.write(tmp_path, arrays)
    stored = form.open(tmp_path, "image")
    assert torch.equal(stored[...], torch.from_numpy(arrays["image"]))
    assert not form.open(tmp_path, "labels")[3:9].any()
    file = tmp_path / form.files["image"]
    content = bytearray(file.read_bytes())
    if how == "gone":
        file.unlink()
    elif how == "cut":
        file.write_bytes(content[: len(content) // 2])
    else:
        content[1000] ^= 1
        file.write_bytes(content)
    with pytest.raises(BadFile, match=r"image\.zarr/c/0/0/0/0: is missing or damaged"):
        stored[...]


def test_an_array_that_would_be_unpickled_is_not_opened(tmp_path: Path):
    zarr = pytest.importorskip("zarr", reason=ZARR)
    zarr.create_array(tmp_path / "image.zarr", shape=(2, 2, 2, 2), dtype="f4", zarr_format=2)
    path = tmp_path / "image.zarr" / ".zarray"
    content = json.loads(path.read_text()) | {"dtype": "|O", "filters": [{"id": "pickle"}]}
    path.write_text(json.dumps(content))
    with pytest.raises(BadFile, match="is missing or damaged"):
        formats.Zarr().open(tmp_path, "image")


def test_without_the_package_a_sentence_says_what_to_install(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setitem(sys.modules, "zarr", None)
    ran = tiny.medseg("prepare", data, "-o", tmp_path / "store", "--format", "zarr")
    assert ran.code == 5
    assert 'pip install "medseg[zarr]"' in ran.err
    assert not (tmp_path / "store").exists()
    with pytest.raises(BadConfig, match="it is npy or zarr"):
        import medseg

        medseg.prepare(data, tmp_path / "store", format="hdf5")


def test_every_format_names_the_files_it_writes(tmp_path: Path):
    pytest.importorskip("zarr", reason=ZARR)
    arrays = {
        "image": np.ones((2, 3, 4, 5), np.float32),
        "labels": np.zeros((3, 4, 5), np.int16),
        "points": np.zeros((1, 4), np.int16),
    }
    for name, form in formats.FORMATS.items():
        (tmp_path / name).mkdir()
        form().write(tmp_path / name, arrays)
        assert tree(tmp_path / name).keys() == set(form.files.values())
