"""Voxels as bytes, whichever way an array lies in memory."""

from __future__ import annotations

import gzip
from itertools import permutations, product

import nibabel as nib
import numpy as np
import pytest
import SimpleITK as sitk  # noqa: N813

from making.notices import notices
from medseg import io
from medseg.errors import BadFile, DataWarning
from medseg.io.voxels import MAX_PADDING, digest, slabs


@pytest.mark.parametrize("dtype", ["u1", "<i2", ">i2", "<f4"])
@pytest.mark.parametrize("shape", [(1, 1, 1), (5, 7, 3), (9, 4, 130), (64, 3, 64), (2, 3, 0)])
def test_slabs_are_the_bytes_with_i_fastest(shape: tuple[int, int, int], dtype: str):
    data = np.random.default_rng(0).integers(0, 200, shape).astype(np.int16)
    wanted = data.astype(dtype).tobytes("F")
    for axes, flips in product(permutations(range(3)), product((1, -1), repeat=3)):
        turns = tuple(slice(None, None, flip) for flip in flips)
        stored = np.ascontiguousarray(data.transpose(axes)[turns])
        same = stored[turns].transpose(np.argsort(axes))
        assert b"".join(slabs(same, np.dtype(dtype))) == wanted


def test_slabs_do_not_copy_what_lies_in_memory_as_in_files():
    data = np.zeros((8, 9, 10), np.int16, order="F")
    pieces = [np.frombuffer(piece, np.int16) for piece in slabs(data, data.dtype)]
    assert all(np.shares_memory(piece, data) for piece in pieces)
    assert sum(piece.size for piece in pieces) == data.size


def test_digest_depends_on_the_voxels_and_not_on_their_order_in_memory():
    data = np.random.default_rng(0).integers(0, 9, (6, 7, 80)).astype(np.uint8)
    assert digest(data, data.dtype) == digest(np.asfortranarray(data), data.dtype)
    assert digest(data, data.dtype) != digest(data[::-1], data.dtype)


# Faces of 60, 70 and 84 bytes.
DATA = np.random.default_rng(0).integers(1, 900, (5, 6, 7)).astype(np.int16)


def save(folder, suffix, data=DATA):
    """A file whose voxels, not packed by the format itself, are its end; made by other programs."""
    path = folder / f"x{suffix}"
    if suffix in (".nii", ".nii.gz", ".img"):
        kind = nib.Nifti1Pair if suffix == ".img" else nib.Nifti1Image
        nib.save(kind(data, np.eye(4), dtype=data.dtype), path)
        return path
    sitk.WriteImage(sitk.GetImageFromArray(data.T), str(path), useCompression=False)
    return path.with_suffix(".raw") if suffix in (".nhdr", ".mhd") else path


def append(path, more):
    content = path.read_bytes()
    if path.suffix == ".gz":
        content = gzip.decompress(content)
    path.write_bytes(gzip.compress(content + more) if path.suffix == ".gz" else content + more)


SUFFIXES = [".nii", ".nii.gz", ".img", ".nrrd", ".nhdr", ".mha", ".mhd"]


@pytest.mark.parametrize("suffix", SUFFIXES)
@pytest.mark.parametrize(
    "more", [bytes(2), bytes(59), bytes(512), bytes(4096), bytes(MAX_PADDING), b"\n", b"\r\n"]
)
def test_zeros_or_a_line_end_behind_the_voxels_are_passed_over_with_a_warning(
    tmp_path, suffix, more
):
    append(save(tmp_path, suffix), more)
    path = tmp_path / f"x{suffix}"

    with pytest.warns(DataWarning, match="voxels") as caught:
        volume = io.read(path)

    assert np.array_equal(volume.data, DATA)
    (sentence,) = notices(caught)
    # And not a data file, whose name nobody gave.
    assert sentence.startswith(f"{path}: ")


@pytest.mark.parametrize("suffix", SUFFIXES)
@pytest.mark.parametrize(
    "more",
    [
        b"x",
        b"\0",  # less than a voxel: all may have moved by a byte
        bytes(9) + b"x",
        b"\n\n",
        b" \n",
        b"\0\n",
        bytes(60),  # as many as one more row of planes would have, whichever axis is the longer one
        bytes(70),
        bytes(84),
        bytes(2 * 84),
        bytes(5 * 60),
        bytes(MAX_PADDING + 1),
    ],
)
def test_what_may_be_voxels_or_is_no_padding_is_refused(tmp_path, suffix, more):
    append(save(tmp_path, suffix), more)

    with pytest.raises(BadFile, match="more data"):
        io.read(tmp_path / f"x{suffix}")


@pytest.mark.parametrize("suffix", [".nii", ".nrrd", ".mha"])
def test_a_file_changed_by_a_transfer_as_text_is_refused_though_it_ends_in_zeros(tmp_path, suffix):
    data = np.full((5, 6, 7), 300, np.int16)
    data[0, 0, :3] = 10  # three bytes that look like line ends
    data[..., 6] = 0
    path = save(tmp_path, suffix, data)
    head = path.read_bytes()[: -data.nbytes]
    path.write_bytes(head + data.tobytes("F").replace(b"\n", b"\r\n"))

    with pytest.raises(BadFile, match="more data"):
        io.read(path)


def test_a_line_end_behind_gzip_data_whose_checksum_is_right_is_passed_over(tmp_path):
    path = save(tmp_path, ".nii.gz")
    packed = path.read_bytes()
    for more in (b"\n", b"\r\n"):
        path.write_bytes(packed + more)
        with pytest.warns(DataWarning, match="line end"):
            assert np.array_equal(io.read(path).data, DATA)
    for more in (b"\nx", b"\n\n", b"x\n"):
        path.write_bytes(packed + more)
        with pytest.raises(BadFile, match="something other"):
            io.read(path)


def test_an_mgz_that_is_not_gzipped_is_read_and_an_mgh_that_is_says_so(tmp_path):
    nib.save(nib.MGHImage(DATA, np.eye(4)), tmp_path / "x.mgh")
    content = (tmp_path / "x.mgh").read_bytes()
    (tmp_path / "y.mgz").write_bytes(content)
    (tmp_path / "z.mgh").write_bytes(gzip.compress(content))

    with pytest.warns(DataWarning, match="not gzipped"):
        volume = io.read(tmp_path / "y.mgz")

    assert np.array_equal(volume.data, DATA)
    with pytest.raises(BadFile, match=r"name it \.mgz"):
        io.read(tmp_path / "z.mgh")
    assert np.array_equal(io.read((tmp_path / "z.mgh").rename(tmp_path / "z.mgz")).data, DATA)
