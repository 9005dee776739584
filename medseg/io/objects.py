"""Scans that a program holds in memory: images of nibabel and SimpleITK, arrays and tensors with an
affine; and what an object is, in words, where it is none of them.

What is certain is taken, and nothing is guessed: of a NIfTI image of nibabel the header is judged
as that of a file is. An array without an affine has no left side, and is refused.
"""

from __future__ import annotations

import io
import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import FunctionType, ModuleType
from typing import TYPE_CHECKING, Any, Protocol, TypeAlias, TypeGuard

import numpy as np
from numpy.typing import NDArray

from medseg.errors import BadConfig, BadFile, BadGeometry
from medseg.io.formats import read
from medseg.io.nifti import place_by_header
from medseg.io.voxels import finite, labels_only, rescale, stored_dtype
from medseg.volume import LPS, Volume

if TYPE_CHECKING:
    import nibabel
    import SimpleITK


class NibabelImage(Protocol):
    """What an image of nibabel has."""

    @property
    def affine(self) -> Any:
        """(4, 4) to RAS+."""

    @property
    def dataobj(self) -> Any:
        """The voxels."""


class SitkImage(Protocol):
    """What an image of SimpleITK has."""

    def GetOrigin(self) -> Any:  # noqa: N802 - its name
        """Of the first voxel, in LPS+ mm."""

    def GetDirection(self) -> Any:  # noqa: N802 - its name
        """Of the axes."""


class PlacedTensor(Protocol):
    """What a tensor of MONAI has that knows its place."""

    @property
    def affine(self) -> Any:
        """(4, 4) to RAS+ mm."""

    def detach(self) -> Any:
        """The numbers alone."""


#: What `as_volume` takes: a path, a `Volume`, an image of nibabel or SimpleITK, a tensor of MONAI
#: that has an affine, or a pair of an array or tensor (I, J, K) and an affine (4, 4) to RAS+ mm.
#: Where several channels are taken: a list of these.
ScanLike: TypeAlias = (
    "str | os.PathLike[str] | Volume | NibabelImage | SitkImage | PlacedTensor | tuple[Any, Any]"
    " | list[Any]"
)
_TAKEN = "give a path, a medseg.Volume, an image of nibabel or SimpleITK, or a pair (array, affine)"


def as_volume(scan: ScanLike) -> Volume:
    """Any form of a scan as a `Volume`; arrays are not copied where that can be avoided.

    Raises `BadConfig` for what is no scan, naming what it is, `BadFile` for one whose place or
    values cannot be relied on.
    """
    volumes = as_volumes(scan)
    if len(volumes) > 1:
        raise BadConfig(f"one scan is expected, and {what_is(scan)} holds {len(volumes)} volumes")
    return volumes[0]


def as_labels(labels: ScanLike) -> Volume:
    """Any form of a label map as a `Volume` of uint8 or uint16. Raises as `as_volume`, and
    `BadFile` for values that are no labels.
    """
    if isinstance(labels, str | os.PathLike):
        from medseg.io.formats import read_labels

        return read_labels(os.fspath(labels))
    return labels_only(f"{what_is(labels)}", as_volume(labels))


def as_volumes(scan: object) -> list[Volume]:
    """`as_volume`, of an image that holds several volumes each, in their order."""
    if isinstance(scan, Volume):
        return [_checked("the volume", scan)]
    if isinstance(scan, str | os.PathLike):
        return [read(os.fspath(scan))]
    for is_one, volumes_of in _KINDS:
        if is_one(scan):
            return [_checked(what_is(scan), one) for one in volumes_of(scan)]
    raise BadConfig(f"{_shown(scan)}{what_is(scan)}{_remedy(scan)}")


def _checked(name: str, volume: Volume) -> Volume:
    """The volume with numbers that are finite. Raises `BadFile`."""
    if not isinstance(volume.data, np.ndarray):
        what = what_is(volume.data)
        raise BadConfig(f"the voxels of a volume are an array of numpy, and this is {what}")
    if volume.data.dtype.kind not in "buif":
        raise BadFile(f"{name} holds {volume.data.dtype}, not numbers; give real grey values")
    if volume.data.dtype.kind == "b":
        return volume.with_data(volume.data.view(np.uint8))
    if volume.data.dtype.kind == "f" and volume.data.dtype.itemsize not in (4, 8):
        volume = volume.with_data(volume.data.astype(np.float32))
    return finite(name, volume)


# What things are ----------------------------------------------------------------------------------


def is_path(scan: object) -> TypeGuard[str | os.PathLike[str]]:
    """Whether something names a file or a folder."""
    return isinstance(scan, str | os.PathLike)


def is_one_scan(scan: object) -> bool:
    """Whether something is one scan, and not several."""
    return isinstance(scan, Volume | str | os.PathLike) or any(is_one(scan) for is_one, _ in _KINDS)


def what_is(thing: object) -> str:
    """What an object is, in words: 'a list of 38 paths'."""
    if thing is None:
        return "nothing (None)"
    if isinstance(thing, type):
        return f"the class {thing.__name__}"
    for kind, words in _WORDS:
        if isinstance(thing, kind):
            return words
    if _is_pair(thing):
        return "a pair of an array and an affine"
    if isinstance(thing, list | tuple):
        return _what_sequence_is(thing)
    if isinstance(thing, Mapping):
        return f"a dict of {len(thing)} entries"
    shape = getattr(thing, "shape", None)
    if isinstance(thing, np.ndarray) or _is_tensor(thing):
        word = "an array" if isinstance(thing, np.ndarray) else "a tensor"
        return f"{word} of shape {tuple(shape or ())}"
    if _is_of("nibabel", "spatialimages.SpatialImage", thing):
        return "an image of nibabel"
    if _is_of("SimpleITK", "Image", thing):
        return "an image of SimpleITK"
    kind = type(thing)
    home = "" if kind.__module__ == "builtins" else f"{kind.__module__.split('.')[0]}."
    name = f"{home}{kind.__qualname__}"
    return f"{'an' if name[0].lower() in 'aeiou' else 'a'} {name}"


#: In this order; a bool is an int.
_WORDS: tuple[tuple[type | tuple[type, ...], str], ...] = (
    (bool, "a truth value"),
    ((int, float, complex, np.number), "a number"),
    (str, "a text"),
    ((bytes, bytearray, memoryview), "bytes"),
    (os.PathLike, "a path"),
    (Volume, "a volume"),
    (FunctionType, "a function"),
    (ModuleType, "a module"),
    (io.IOBase, "an open file"),
    (Iterator, "an iterator"),
)


def _what_sequence_is(things: Sequence[object]) -> str:
    name = "list" if isinstance(things, list) else "tuple"
    if not things:
        return f"an empty {name}"
    kinds = {_in_general(thing) for thing in things}
    kind = kinds.pop() if len(kinds) == 1 else "thing"
    return f"a {name} of {len(things)} {kind}{'' if len(things) == 1 else 's'}"


def _in_general(thing: object) -> str:
    """What an object is, without its article and details."""
    if thing is None:
        return "None"
    if isinstance(thing, str):
        return "path" if any(mark in thing for mark in ("/", os.sep, ".")) else "text"
    words = what_is(thing).removeprefix("a ").removeprefix("an ")
    for word in ("array", "tensor", "image", "list", "tuple", "pair"):
        if words.startswith(word):
            return word
    return words


def _shown(thing: object) -> str:
    """A short text, so that who gave it knows it again."""
    is_short = isinstance(thing, str | int | float) and len(str(thing)) <= 40
    return f"{thing!r} is " if is_short else "a scan is expected, and this is "


def _remedy(scan: object) -> str:
    is_bare = isinstance(scan, np.ndarray) or _is_tensor(scan)
    if is_bare and not hasattr(scan, "affine"):
        return ", which does not say where its voxels lie; give a pair (array, affine)"
    return f"; {_TAKEN}"


def _is_of(package: str, name: str, thing: object) -> bool:
    """Whether something is of a class of a package; who made it has imported that."""
    found: Any = sys.modules.get(package)
    for part in name.split("."):
        found = getattr(found, part, None)
    return isinstance(found, type) and isinstance(thing, found)


def _is_tensor(thing: object) -> bool:
    return _is_of("torch", "Tensor", thing)


def _is_array(thing: object) -> bool:
    return isinstance(thing, np.ndarray) or _is_tensor(thing)


def _is_pair(thing: object) -> bool:
    """Whether something is an array with its affine; two arrays of which the second is 4x4."""
    if not isinstance(thing, list | tuple) or len(thing) != 2 or not _is_array(thing[0]):
        return False
    affine = thing[1]
    if _is_array(affine):
        return tuple(affine.shape) == (4, 4)
    is_rows = isinstance(affine, list | tuple) and len(affine) == 4
    return is_rows and all(isinstance(row, list | tuple) and len(row) == 4 for row in affine)


def _is_broken_pair(thing: object) -> bool:
    """Whether something was meant as a pair, and its affine is none, or comes first."""
    if not isinstance(thing, tuple) or len(thing) != 2 or not _is_array(thing[0]):
        return False
    is_reversed = tuple(thing[0].shape) == (4, 4)
    return not _is_pair(thing) and (
        is_reversed or not (_is_array(thing[1]) and len(thing[1].shape) >= 3)
    )


def _is_meta_tensor(thing: object) -> bool:
    return _is_tensor(thing) and _is_tensor(getattr(thing, "affine", None))


# To volumes ---------------------------------------------------------------------------------------


#: Kinds of tensors that numpy has; it has not those of 8 and of 16 bits with a large range.
_FLOATS_OF_NUMPY = ("torch.float16", "torch.float32", "torch.float64")


def _numbers(data: Any) -> NDArray[Any]:
    """An array of what may be a tensor, on any device and in any precision. Raises `BadFile` for
    one without numbers, or of which some are masked.
    """
    if isinstance(data, np.ma.MaskedArray):
        if np.ma.is_masked(data):
            raise BadFile(
                f"{what_is(data)} hides some of its values, and nothing says what is there; give"
                " array.filled(value)"
            )
        return np.asarray(data.data)
    if not _is_tensor(data):
        return np.asarray(data)
    import torch

    if data.is_meta:
        raise BadFile(f"{what_is(data)} is on the device meta, where there are no numbers")
    data = data.detach()
    if type(data) is not torch.Tensor:  # those of MONAI carry more with them
        data = data.as_subclass(torch.Tensor)
    if data.layout != torch.strided:
        data = data.to_dense()
    data = data.dequantize() if data.is_quantized else data.resolve_conj().resolve_neg()
    is_short = data.is_floating_point() and str(data.dtype) not in _FLOATS_OF_NUMPY
    return np.asarray((data.float() if is_short else data).cpu().numpy())


def _of_pair(pair: Sequence[Any]) -> list[Volume]:
    data = _numbers(pair[0])
    if data.ndim != 3:
        raise BadConfig(
            f"{what_is(pair[0])} has {data.ndim} axes and a scan has 3; of several channels give a"
            " list of pairs (array, affine)"
        )
    return [_volume(what_is(pair[0]), data, _numbers(pair[1]))]


def _of_broken_pair(pair: Sequence[Any]) -> list[Volume]:
    if _is_pair(pair[::-1]):
        raise BadConfig("the array comes first and the affine second; give (array, affine)")
    raise BadConfig(f"an affine is an array of shape (4, 4), and this is {what_is(pair[1])}")


def _volume(name: str, data: NDArray[Any], affine: NDArray[Any]) -> Volume:
    if not data.size:
        raise BadFile(f"{name} holds no voxels; give the scan itself")
    try:
        return Volume(data, np.asarray(affine, np.float64))
    except (BadGeometry, TypeError, ValueError) as error:
        raise BadFile(f"{name} has an affine that places no scan: {error}") from None


def _of_meta_tensor(tensor: Any) -> list[Volume]:
    """MONAI's (docs.monai.io, MetaTensor): a channel first, then the axes of the affine."""
    name, data, affine = what_is(tensor), _numbers(tensor), _numbers(tensor.affine)
    space = str(getattr(tensor, "meta", {}).get("space", "RAS"))
    if space.rpartition(".")[2] not in ("RAS", "LPS"):
        raise BadFile(f"{name} lies in a space called {space}; give it in RAS")
    if space.endswith("LPS"):
        affine = LPS @ affine
    if data.ndim not in (3, 4):
        raise BadConfig(f"{name} has {data.ndim} axes; a scan has 3, or 4 with its channels first")
    return [_volume(name, one, affine) for one in (data if data.ndim == 4 else data[None])]


def _of_nibabel(image: Any) -> list[Volume]:
    name, data = what_is(image), _stored(image)
    while data.ndim > 3 and data.shape[-1] == 1:
        data = data[..., 0]
    if data.ndim not in (3, 4):
        raise BadFile(f"{name} has {data.ndim} axes; give one value per voxel, and 3 axes")
    parts = [data] if data.ndim == 3 else [data[..., n] for n in range(data.shape[3])]
    if _is_of("nibabel", "Nifti1Pair", image):
        volumes = [_placed(name, one, image.header.binaryblock) for one in parts]
        if not np.allclose(_in_units(image), volumes[0].affine, rtol=1e-4, atol=1e-2):
            raise BadFile(
                f"{name} has another affine than its header says; give a pair (array, affine)"
            )
        return volumes
    if image.affine is None or _is_of("nibabel", "AnalyzeImage", image):
        raise BadFile(
            f"{name} does not say which side of it is left; give a pair (array, affine) if you know"
        )
    return [_volume(name, one, image.affine) for one in parts]


def _placed(name: str, data: NDArray[Any], header: bytes) -> Volume:
    """The voxels where their header says. Raises `BadFile`, and what helps of an image, which has
    no file to be read again.
    """
    try:
        return place_by_header(name, data, header)
    except BadFile as error:
        what, found, _ = str(error).partition("--assume-geometry")
        if not found:
            raise
        what = what.rpartition(";")[0]
        raise BadFile(f"{what}; give a pair (array, affine) if you know") from None


def _in_units(image: Any) -> NDArray[np.float64]:
    """The affine in mm, which nibabel gives in the unit of the header."""
    unit = image.header.get_xyzt_units()[0]
    scale = {"meter": 1000.0, "micron": 0.001}.get(unit, 1.0)
    return np.asarray(np.diag([scale, scale, scale, 1.0]) @ image.affine)


def _stored(image: Any) -> NDArray[Any]:
    """The voxels, scaled as when medseg reads the file, in the byte order of this machine."""
    source = image.dataobj
    if hasattr(source, "get_unscaled") and np.ndim(getattr(source, "slope", 1.0)) == 0:
        data = np.asarray(source.get_unscaled())
        data = data.astype(data.dtype.newbyteorder("="), copy=False)
        return rescale(what_is(image), data, float(source.slope), float(source.inter))
    data = np.asarray(source)
    return data.astype(data.dtype.newbyteorder("="), copy=False)


def _of_sitk(image: SimpleITK.Image) -> list[Volume]:
    """ITK's axes run along LPS (ITK Software Guide, 4.1.4); its arrays are indexed (k, j, i)."""
    import SimpleITK

    name = what_is(image)
    if image.GetDimension() != 3:
        raise BadFile(f"{name} has {image.GetDimension()} dimensions, and a scan has 3")
    if image.GetPixelIDTypeAsString().startswith("label of"):  # their array ends the process
        raise BadFile(
            f"{name} holds a LabelMap, which has no voxels; give SimpleITK.Cast(image,"
            " SimpleITK.sitkUInt16)"
        )
    data = SimpleITK.GetArrayFromImage(image)
    affine = np.eye(4)
    affine[:3, :3] = np.reshape(image.GetDirection(), (3, 3)) * image.GetSpacing()
    affine[:3, 3] = image.GetOrigin()
    parts = [data[..., n] for n in range(data.shape[3])] if data.ndim == 4 else [data]
    return [_volume(name, one.transpose(2, 1, 0), LPS @ affine) for one in parts]


_KINDS: tuple[tuple[Callable[[object], bool], Callable[[Any], list[Volume]]], ...] = (
    (_is_pair, _of_pair),
    (_is_broken_pair, _of_broken_pair),
    (_is_meta_tensor, _of_meta_tensor),
    (lambda thing: _is_of("nibabel", "spatialimages.SpatialImage", thing), _of_nibabel),
    (lambda thing: _is_of("SimpleITK", "Image", thing), _of_sitk),
)


# And back -----------------------------------------------------------------------------------------


def _usual(volume: object, call: str) -> NDArray[Any]:
    """The voxels in a type that other libraries have, as files get them. Raises `BadConfig`."""
    if not isinstance(volume, Volume):
        raise BadConfig(f"{call} takes a medseg.Volume, and this is {what_is(volume)}")
    data = _checked("the volume", volume).data
    return data.astype(stored_dtype(data), copy=False)


def to_nibabel(volume: Volume) -> nibabel.Nifti1Image:
    """The volume as an image of nibabel, with its affine as sform and qform."""
    try:
        import nibabel
    except ImportError:
        raise BadConfig("nibabel is not here: pip install nibabel") from None
    data = _usual(volume, "to_nibabel")
    image = nibabel.Nifti1Image(data, volume.affine, dtype=data.dtype)
    image.set_sform(volume.affine, volume.space.sform_code)
    image.set_qform(volume.affine, volume.space.qform_code)
    image.header.set_xyzt_units("mm")
    return image


def to_sitk(volume: Volume) -> SimpleITK.Image:
    """The volume as an image of SimpleITK (a copy), at the same place in LPS+ mm."""
    try:
        import SimpleITK
    except ImportError:
        raise BadConfig("SimpleITK is not here: pip install SimpleITK") from None
    image = SimpleITK.GetImageFromArray(_usual(volume, "to_sitk").transpose(2, 1, 0))
    place = LPS @ volume.affine
    image.SetSpacing(volume.spacing_mm)
    image.SetDirection((place[:3, :3] / volume.spacing_mm).ravel().tolist())
    image.SetOrigin(place[:3, 3].tolist())
    return image


def as_path(path: object, what: str) -> Path:
    """A path of what should be one. Raises `BadConfig` naming what it is."""
    if isinstance(path, str | os.PathLike):
        name = os.fsdecode(path)
        if not name or "\0" in name:
            raise BadConfig(f"{what} is a path, and {name!r} names no file or folder")
        return Path(name)
    raise BadConfig(f"{what} is a path, and this is {what_is(path)}")
