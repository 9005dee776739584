"""Pixels of DICOM: transfer syntaxes, signs, padding, inverted values, and decoders that fail or
are fooled.
"""

from __future__ import annotations

import copy
import io as bytes_io
import random
import subprocess
import time
import tracemalloc
import warnings
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pydicom
import pydicom.data
import pytest
from pydicom.dataset import Dataset
from pydicom.encaps import encapsulate, encapsulate_extended
from pydicom.uid import (
    JPEG2000,
    DeflatedExplicitVRLittleEndian,
    ExplicitVRBigEndian,
    ExplicitVRLittleEndian,
    ImplicitVRLittleEndian,
    JPEG2000Lossless,
    JPEGLSLossless,
    JPEGLSNearLossless,
    RLELossless,
)  # fmt: skip

from making.dicom import (
    ENHANCED_MR,
    NAME,
    PT,
    change,
    content_of,
    enhanced,
    rewritten,
    save,
    series,
    truth,
)
from making.fuzzing import mutated
from medseg import io
from medseg.errors import BadFile, DataWarning
from medseg.io.dicom import pixels as dicom_pixels

LOSSLESS = [RLELossless, JPEGLSLossless, JPEG2000Lossless]


def compressed(pieces: list[Dataset], syntax: str) -> list[Dataset]:
    pieces = copy.deepcopy(pieces)
    for piece in pieces:
        piece.compress(syntax, generate_instance_uid=False)
    return pieces


@pytest.mark.parametrize(
    "syntax",
    [
        ImplicitVRLittleEndian,
        ExplicitVRLittleEndian,
        ExplicitVRBigEndian,
        DeflatedExplicitVRLittleEndian,
    ],
)
@pytest.mark.parametrize("bits", [8, 16])
def test_native_transfer_syntaxes(tmp_path, syntax, bits):
    pieces = series()
    expected = truth(pieces).data
    if bits == 8:
        for piece in pieces:
            piece.BitsAllocated, piece.BitsStored, piece.HighBit, piece.PixelRepresentation = (
                8,
                8,
                7,
                0,
            )
            piece.PixelData = piece.PixelData[::2]
        raw = [np.frombuffer(piece.PixelData, np.uint8).reshape(4, 3).T for piece in pieces]
        expected = np.stack(raw, axis=2).astype(np.int16) - 1024
    for n, piece in enumerate(pieces):
        (tmp_path / f"{n}.dcm").write_bytes(rewritten(piece, syntax))

    assert np.array_equal(io.read(tmp_path).data, expected)


@pytest.mark.parametrize("syntax", LOSSLESS, ids=lambda syntax: syntax.name[:12])
@pytest.mark.parametrize("signed", [0, 1])
def test_compressed_transfer_syntaxes(tmp_path, syntax, signed):
    pieces = series(5, 40, 50)
    for piece in pieces:
        values = np.frombuffer(piece.PixelData, np.int16)
        piece.PixelData = (values if signed else values + 1000).astype(np.int16).tobytes()
        piece.PixelRepresentation, piece.BitsStored, piece.HighBit = signed, 13, 12
    expected = truth(pieces).data

    assert np.array_equal(io.read(save(compressed(pieces, syntax), tmp_path / "s")).data, expected)


def jpeg(path: Path, kind: str) -> None:
    """Compress a file in place with GDCM, in whose names a kind of JPEG is given."""
    import gdcm

    reader, change_, writer = (
        gdcm.ImageReader(),
        gdcm.ImageChangeTransferSyntax(),
        gdcm.ImageWriter(),
    )
    reader.SetFileName(str(path))
    assert reader.Read()
    change_.SetTransferSyntax(gdcm.TransferSyntax(getattr(gdcm.TransferSyntax, kind)))
    change_.SetInput(reader.GetImage())
    assert change_.Change()
    writer.SetFile(reader.GetFile())
    writer.SetImage(change_.GetOutput())
    writer.SetFileName(str(path))
    assert writer.Write()


@pytest.mark.parametrize("kind", ["JPEGLosslessProcess14", "JPEGLosslessProcess14_1"])
@pytest.mark.parametrize(("bits", "signed"), [(12, 0), (16, 0), (16, 1)])
def test_lossless_jpeg(tmp_path, kind, bits, signed):
    pytest.importorskip("gdcm", reason="GDCM is in the extra dicom-codecs")
    pieces = change(
        series(3, 40, 50), PixelRepresentation=signed, BitsStored=bits, HighBit=bits - 1
    )
    for piece in pieces:
        values = np.frombuffer(piece.PixelData, np.int16)
        piece.PixelData = (values if signed else values + 1000).astype(np.int16).tobytes()
    expected = truth(pieces).data
    folder = save(pieces, tmp_path / "s")
    for file in folder.iterdir():
        jpeg(file, kind)

    assert np.array_equal(io.read(folder).data, expected)


def test_baseline_jpeg_stays_close(tmp_path):
    pytest.importorskip("gdcm", reason="GDCM is in the extra dicom-codecs")
    smooth = (np.add.outer(np.arange(32), np.arange(48)) * 2).astype(np.uint8)
    pieces = change(
        series(3, 32, 48), BitsAllocated=8, BitsStored=8, HighBit=7, PixelRepresentation=0
    )
    for piece in change(pieces, RescaleIntercept=0):
        piece.PixelData = smooth.tobytes()
    folder = save(pieces, tmp_path / "s")
    for file in folder.iterdir():
        jpeg(file, "JPEGBaselineProcess1")

    volume = io.read(folder)

    assert np.abs(volume.data[..., 1].astype(int) - smooth.T).max() <= 6


def test_jpeg_that_no_free_decoder_reads_is_refused_with_the_remedy(tmp_path):
    """JPEG Extended of 12 bits: the file comes with pydicom."""
    source = pydicom.dcmread(pydicom.data.get_testdata_file("JPEG-lossy.dcm", download=False))
    pieces = series(3)
    for piece in pieces:
        for tag in (
            "Rows",
            "Columns",
            "BitsAllocated",
            "BitsStored",
            "HighBit",
            "PixelRepresentation",
            "PixelData",
        ):
            setattr(piece, tag, source.get(tag))
        piece["PixelData"].VR, piece["PixelData"].is_undefined_length = "OB", True
        piece.file_meta.TransferSyntaxUID = source.file_meta.TransferSyntaxUID

    with pytest.raises(BadFile, match=r"no installed decoder reads.*dcmdjpeg"):
        io.read(save(pieces, tmp_path / "s"))


@pytest.mark.parametrize("syntax", [JPEGLSNearLossless, JPEG2000])
def test_lossy_transfer_syntaxes_stay_close(tmp_path, syntax):
    pieces = series(3, 32, 32)
    smooth = np.add.outer(np.arange(32), np.arange(32)).astype(np.int16) * 20
    for piece in pieces:
        piece.PixelData = smooth.tobytes()
        options = {"jls_error": 2} if syntax == JPEGLSNearLossless else {"j2k_cr": [4]}
        piece.compress(syntax, generate_instance_uid=False, **options)

    volume = io.read(save(pieces, tmp_path / "s"))

    assert np.abs(volume.data[..., 1] - (smooth.T - 1024)).max() <= 12


@pytest.mark.parametrize("table", ["basic", "none", "extended"])
@pytest.mark.parametrize("pieces_per_frame", [1, 3])
def test_frames_of_compressed_multi_frame_files(tmp_path, table, pieces_per_frame):
    pieces = series(5, 20, 30)
    whole = enhanced([pieces], ENHANCED_MR)
    frames = [
        compressed([pieces[g.FrameContentSequence[0].InStackPositionNumber - 1]], RLELossless)[0]
        for g in whole.PerFrameFunctionalGroupsSequence
    ]
    packed = [
        next(pydicom.encaps.generate_frames(frame.PixelData, number_of_frames=1))
        for frame in frames
    ]
    whole.file_meta.TransferSyntaxUID = RLELossless
    if table == "extended":
        content, offsets, lengths = encapsulate_extended(packed)
        whole.PixelData, whole.ExtendedOffsetTable, whole.ExtendedOffsetTableLengths = (
            content,
            offsets,
            lengths,
        )
    else:
        whole.PixelData = encapsulate(
            packed, fragments_per_frame=pieces_per_frame, has_bot=table == "basic"
        )
    whole["PixelData"].is_undefined_length = True
    whole.save_as(tmp_path / "x.dcm", enforce_file_format=True)

    if table == "none" and pieces_per_frame > 1:
        with pytest.raises(BadFile, match="which of its compressed pieces"):
            io.read(tmp_path / "x.dcm")
    else:
        assert np.array_equal(io.read(tmp_path / "x.dcm").data, truth(pieces).data)


@pytest.mark.parametrize(("bits", "signed"), [(12, 0), (12, 1), (16, 0), (16, 1), (8, 0)])
def test_inverted_values_are_turned_over_and_that_is_said(tmp_path, bits, signed):
    pieces = change(series(), PhotometricInterpretation="MONOCHROME1", RescaleIntercept=0)
    low, high = (-(1 << (bits - 1)), (1 << (bits - 1)) - 1) if signed else (0, (1 << bits) - 1)
    values = np.random.default_rng(2).integers(low, high + 1, (5, 4, 3))
    values[0, 0, :2] = low, high
    for n, piece in enumerate(pieces):
        piece.BitsAllocated = 8 if bits == 8 else 16
        piece.BitsStored, piece.HighBit, piece.PixelRepresentation = bits, bits - 1, signed
        piece.PixelData = values[n].astype(np.uint8 if bits == 8 else np.uint16).tobytes()

    with pytest.warns(DataWarning, match=r"stored inverted \(MONOCHROME1\) and were turned over"):
        volume = io.read(save(pieces, tmp_path / "s"))

    assert np.array_equal(volume.data, (low + high - values).transpose(2, 1, 0))


def test_inverted_values_agree_with_simpleitk(tmp_path):
    import SimpleITK as sitk  # noqa: N813

    pieces = change(
        series(),
        PhotometricInterpretation="MONOCHROME1",
        PixelRepresentation=0,
        BitsStored=12,
        HighBit=11,
    )
    for piece in pieces:
        piece.PixelData = (
            (np.frombuffer(piece.PixelData, np.int16) + 1000).astype(np.uint16).tobytes()
        )
    folder = save(pieces, tmp_path / "s")
    reader = sitk.ImageSeriesReader()
    reader.SetFileNames(reader.GetGDCMSeriesFileNames(str(folder)))

    with pytest.warns(DataWarning, match="inverted"):
        volume = io.read(folder)

    assert np.array_equal(volume.data, sitk.GetArrayFromImage(reader.Execute()).T)


@pytest.mark.parametrize(
    ("padding", "limit", "gone"),
    [
        (-2000, None, True),
        (63536, None, True),
        (-2000, -1500, True),
        (-1500, -2000, True),
        (0, None, False),
    ],
)
def test_padding_becomes_the_lowest_value_of_the_rest(tmp_path, padding, limit, gone):
    pieces = series()
    expected = truth(pieces).data.copy()
    for piece in pieces:
        values = np.frombuffer(piece.PixelData, np.int16).copy()
        values[[0, 5]] = -2000 if gone else 0
        values[11] = -1700 if limit else 5
        piece.PixelData = values.tobytes()
        piece.add_new("PixelPaddingValue", "US" if padding > 32767 else "SS", padding)
        if limit:
            piece.add_new("PixelPaddingRangeLimit", "SS", limit)
    plain = truth(pieces).data
    outside = (plain + 1024 == -2000) | ((plain + 1024 == -1700) if limit else False)
    expected = np.where(outside, plain[~outside].min(), plain) if gone else plain

    volume = io.read(save(pieces, tmp_path / "s"))

    assert np.array_equal(volume.data, expected)
    assert not gone or volume.data.min() > -2500


def test_each_slice_of_pet_keeps_its_scale_with_padding(tmp_path):
    pieces = change(series(), SOPClassUID=PT, RescaleIntercept=0)
    for n, piece in enumerate(pieces):
        piece.RescaleSlope = f"{n + 0.5}"
        values = np.frombuffer(piece.PixelData, np.int16).copy()
        values[0] = -32768
        piece.PixelData = values.tobytes()
        piece.add_new("PixelPaddingValue", "SS", -32768)

    data = io.read(save(pieces, tmp_path / "s")).data

    assert data.min() >= -1000 * 4.5
    assert np.allclose(data[0, 0], data.min())


def _cut_end(content: bytes) -> bytes:
    return content[:-9]


def _no_delimiter(content: bytes) -> bytes:
    return content[: content.rfind(b"\xfe\xff\xdd\xe0")]


def _long_fragment(content: bytes) -> bytes:
    place = content.rfind(b"\xfe\xff\x00\xe0") + 4
    return content[:place] + b"\xff\xff\xff\x7f" + content[place + 4 :]


def _spoilt_fragment(content: bytes) -> bytes:
    place = content.rfind(b"\xfe\xff\x00\xe0") + 8
    return content[:place] + bytes(64) + content[place + 64 :]


@pytest.mark.parametrize("spoil", [_cut_end, _no_delimiter, _long_fragment, _spoilt_fragment])
@pytest.mark.parametrize("syntax", LOSSLESS, ids=lambda syntax: syntax.name[:12])
def test_spoilt_compressed_pixels_are_refused(tmp_path, spoil, syntax):
    folder = save(compressed(series(3, 40, 50), syntax), tmp_path / "s")
    victim = min(folder.iterdir())
    victim.write_bytes(spoil(victim.read_bytes()))

    with pytest.raises(BadFile, match=victim.name):
        io.read(folder)


def test_a_codestream_that_ends_early_is_refused(tmp_path):
    pieces = compressed(series(3, 64, 64), JPEG2000Lossless)
    frame = next(pydicom.encaps.generate_frames(pieces[1].PixelData, number_of_frames=1))
    pieces[1].PixelData = encapsulate([frame[: len(frame) // 2]])

    with pytest.raises(BadFile, match="end early"):
        io.read(save(pieces, tmp_path / "s"))


@pytest.mark.parametrize(
    ("rows", "columns"), [(21, 30), (20, 31), (10, 60), (2000, 3000), (60000, 60000)]
)
def test_compressed_pixels_of_another_size_are_refused(tmp_path, rows, columns):
    pieces = compressed(series(3, 20, 30), JPEGLSLossless)
    change(pieces, Rows=rows, Columns=columns)

    tracemalloc.start()
    with pytest.raises(BadFile):
        io.read(save(pieces, tmp_path / "s"))
    tracemalloc.stop()


def children() -> str:
    """The processes that this one started and that still run."""
    return "".join(path.read_text() for path in Path("/proc/self/task").glob("*/children"))


def child_of(action: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the decoding child do something bad with the first frame it gets."""
    script = tmp_path / "child.py"
    script.write_text(
        f"import os, sys, time, signal, resource\nsys.stdin.buffer.read(16)\n{action}\n"
    )
    monkeypatch.setattr(dicom_pixels, "_DECODER", script)


@pytest.mark.parametrize(
    "action",
    [
        "os.kill(os.getpid(), signal.SIGSEGV)", "os.kill(os.getpid(), signal.SIGFPE)",
        "sys.exit(1)", "os.abort()",
        "sys.stdout.write('x' * 100)", "sys.stdout.buffer.write(b'\\xff' * 8)", "time.sleep(100)",
        "sys.stdout.buffer.write((24).to_bytes(8, 'little') + b'short')",
    ],
)  # fmt: skip
def test_a_decoder_that_crashes_hangs_or_lies_is_a_bad_file(tmp_path, monkeypatch, action):
    folder = save(compressed(series(), RLELossless), tmp_path / "s")
    child_of(action, tmp_path, monkeypatch)
    monkeypatch.setattr(dicom_pixels, "FRAME_SECONDS", 0.5)
    start = time.perf_counter()

    with pytest.raises(BadFile, match="compressed pixels are damaged"):
        io.read(folder)

    assert time.perf_counter() - start < 5
    assert not children()


def test_one_child_serves_a_series_and_none_an_uncompressed_one(tmp_path, monkeypatch):
    started = []
    original = subprocess.Popen
    monkeypatch.setattr(
        dicom_pixels.subprocess, "Popen", lambda *a, **k: started.append(1) or original(*a, **k)
    )

    io.read(save(series(), tmp_path / "native"))
    assert not started
    io.read(save(compressed(series(12), RLELossless), tmp_path / "rle"))
    assert len(started) == 1
    assert not children()


def test_the_child_may_not_take_much_memory():
    """The limit is checked on the program itself, with a frame whose description asks for more."""
    import json
    import struct
    import sys

    about = {
        "syntax": str(RLELossless), "photometric": "MONOCHROME2", "rows": 60000, "columns": 60000,
        "bits_allocated": 16, "bits_stored": 16, "pixel_representation": 0, "dtype": "<u2",
    }  # fmt: skip
    text, frame = (
        json.dumps(about).encode(),
        struct.pack("<16I", 2, 64, 70, *([0] * 13)) + bytes(20),
    )
    request = struct.pack("<QQ", len(text), len(frame)) + text + frame
    command = [sys.executable, "-P", str(dicom_pixels._DECODER), str(200 << 20)]

    answer = subprocess.run(
        command, input=request, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, timeout=30
    )

    assert answer.stdout == bytes(8)


def test_a_missing_decoder_is_named(tmp_path, monkeypatch):
    folder = save(compressed(series(), RLELossless), tmp_path / "s")
    monkeypatch.setattr(pydicom.pixels.decoders.base.Decoder, "is_available", False)

    with pytest.raises(BadFile, match=r'RLE.*pip install "medseg\[dicom-codecs\]"'):
        io.read(folder)


def test_unknown_packing_is_refused_without_quoting_it(tmp_path):
    other = b"1.2.840.99999.1.2.5"
    for n, piece in enumerate(compressed(series(), RLELossless)):
        (tmp_path / f"{n}.dcm").write_bytes(content_of(piece).replace(RLELossless.encode(), other))

    with pytest.raises(BadFile, match="not known") as caught:
        io.read(tmp_path)
    assert other.decode() not in str(caught.value)


def test_a_deflated_bomb_takes_little_memory(tmp_path):
    piece = series()[0]
    piece.file_meta.TransferSyntaxUID = DeflatedExplicitVRLittleEndian
    content = content_of(piece)
    meta = pydicom.dcmread(bytes_io.BytesIO(content)).file_meta
    start = 132 + 12 + meta.FileMetaInformationGroupLength
    inner = zlib.decompress(content[start:], -15)
    packer = zlib.compressobj(9, zlib.DEFLATED, -15)
    bomb = packer.compress(inner[: -len(piece.PixelData)])
    bomb += b"".join(packer.compress(bytes(1 << 20)) for _ in range(200)) + packer.flush()
    for n in range(3):
        (tmp_path / f"{n}.dcm").write_bytes(content[:start] + bomb)

    tracemalloc.start()
    with pytest.raises(BadFile):
        io.read(tmp_path)
    assert tracemalloc.get_traced_memory()[1] < 50 << 20
    tracemalloc.stop()


def _native(pieces: list[Dataset]) -> list[bytes]:
    return [content_of(piece) for piece in pieces]


def _packed(syntax: str) -> Callable[[list[Dataset]], list[bytes]]:
    return lambda pieces: _native(compressed(pieces, syntax))


def _deflated(pieces: list[Dataset]) -> list[bytes]:
    return [rewritten(piece, DeflatedExplicitVRLittleEndian) for piece in pieces]


def _enhanced(pieces: list[Dataset]) -> list[bytes]:
    return _native([enhanced([pieces])])


@pytest.mark.parametrize(
    ("made", "count"),
    [
        (_native, 80), (_deflated, 40), (_enhanced, 40), (_packed(RLELossless), 20),
        (_packed(JPEGLSLossless), 20),
        (_packed(JPEG2000Lossless), 20),
    ],
    ids=["native", "deflated", "enhanced", "RLE", "JPEG-LS", "JPEG 2000"],
)  # fmt: skip
def test_mutated_and_truncated_files_give_a_bad_file_or_the_volume_in_its_place(
    tmp_path, made, count
):
    pieces = series(4, 40, 50)
    expected = truth(pieces)
    contents = made(pieces)
    for n, content in enumerate(contents[::-1]):
        (tmp_path / f"{n}.dcm").write_bytes(content)
    victim = tmp_path / "0.dcm"  # the last slice: nothing after it would show a gap
    chance = random.Random(5)
    refused = 0
    for turn in range(count):
        cut = turn % 2
        content = contents[-1]
        victim.write_bytes(
            content[: chance.randrange(len(content))] if cut else mutated(content, chance, 900)
        )
        with warnings.catch_warnings(record=True) as caught:
            # Pydicom's warnings quote the header, so none may come through.
            warnings.simplefilter("error")
            warnings.simplefilter("always", DataWarning)
            try:
                volume = io.read(tmp_path)
            except BadFile as error:
                refused += 1
                assert NAME not in str(error)
                continue
        if made is _enhanced:  # there one number can move everything, and nothing contradicts it
            assert not cut
            continue
        lost = volume.shape[2] == 3  # what is no DICOM any more is passed over, and that is said
        assert lost == bool(caught)
        assert not cut or lost
        assert lost or volume.shape == expected.shape
        assert np.allclose(volume.spacing_mm, expected.spacing_mm, rtol=0.02)
        assert np.array_equal(volume.data[..., :3], expected.data[..., :3])
    assert refused >= count // 2
