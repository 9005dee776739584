"""A scan or a label map on its grid: `Volume`, and what can be done to it without knowing files or
models.

Arrays are indexed (i, j, k); `affine` maps voxel indices to RAS+ millimetres, as nibabel does.
Spacing, orientation and extent are derived from the affine and never stored. This module holds the
one constant by which RAS and LPS differ.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import permutations, product

import numpy as np
from numpy.typing import ArrayLike, NDArray

from medseg.errors import BadFile, BadGeometry

#: RAS+ to LPS+ millimetres and back: x and y change sign (DICOM PS3.3 C.7.6.2.1.1; NRRD, MetaImage
#: and Slicer follow).
LPS = np.diag([-1.0, -1.0, 1.0, 1.0])
#: Largest cosine between two voxel axes that still counts as rounding rather than shear.
MAX_SHEAR = 1e-3
#: Spacings outside this range in mm are not a scan of a person.
SPACING_RANGE_MM = (1e-3, 1e3)


@dataclass(frozen=True, kw_only=True)
class Space:
    """Which space an affine leads to, in the two codes by which NIfTI says it (nifti1.h, "QFORM AND
    SFORM CODES").

    NIfTI may name two spaces for one affine, each with a code: 0 none, 1 the scanner's, 2 that of
    another scan, 3 Talairach's, 4 MNI 152, 5 another template. Raises `BadGeometry` for other
    codes, and if neither names a space.

    A volume carries its space because labels on the grid of a scan in template space lie in
    template space, and whoever writes them has no other way to know: headers never enter a
    `Volume`. Two small numbers out of six are no header: they say nothing about a person, and no
    text can leave through them. Only NIfTI has this notion; what comes from other formats is the
    scanner's, and their writers pass it over.
    """

    qform_code: int = 1
    sform_code: int = 1

    def __post_init__(self) -> None:
        codes = (self.qform_code, self.sform_code)
        if not all(0 <= code <= 5 for code in codes) or codes == (0, 0):
            raise BadGeometry(
                f"qform code {self.qform_code} with sform code {self.sform_code} names no space"
            )


#: What a scan lies in unless its file says otherwise.
SCANNER = Space()


@dataclass(frozen=True, eq=False)
class Volume:
    """One 3-D grid of voxels in space.

    data: array (I, J, K) of any numeric dtype; label maps are volumes of integer dtype. affine: (4,
    4) float64, voxel index to RAS+ mm. Raises `BadGeometry` if it is not finite, singular or
    sheared. space: what these millimetres are measured in. header_spacing_mm: along (i, j, k),
    where a file's header states it beside the affine, which rounds it.
    """

    data: NDArray
    affine: NDArray[np.float64]
    space: Space = SCANNER
    header_spacing_mm: tuple[float, float, float] | None = None

    def __post_init__(self) -> None:
        if not hasattr(self.data, "ndim"):
            raise BadGeometry(
                "the voxels of a volume are an array, and this is of type"
                f" {type(self.data).__name__}"
            )
        if self.data.ndim != 3:
            raise BadGeometry(f"a volume has 3 dimensions, not {self.data.ndim}")
        object.__setattr__(self, "affine", check_affine(self.affine))

    def __repr__(self) -> str:
        return f"<Volume of {self.data.dtype}: {describe_grid(self)}>"

    @property
    def shape(self) -> tuple[int, int, int]:
        """Voxels along (i, j, k)."""
        i, j, k = self.data.shape
        return int(i), int(j), int(k)

    @property
    def spacing_mm(self) -> tuple[float, float, float]:
        """Edge lengths of a voxel in mm along (i, j, k)."""
        return spacing_of(self.affine)

    @property
    def stated_spacing_mm(self) -> tuple[float, float, float]:
        """The header's own numbers where it has them, else `spacing_mm`; they differ by rounding at
        most.

        A rule that asks whether a spacing is more than three times another has to ask the header's:
        of 0.7 and 2.1 mm in float32 the columns of an oblique affine may make more, and the header
        less.
        """
        return self.spacing_mm if self.header_spacing_mm is None else self.header_spacing_mm

    @property
    def voxel_mm3(self) -> float:
        """Volume of one voxel in mm³."""
        return float(abs(np.linalg.det(self.affine[:3, :3])))

    @property
    def orientation(self) -> str:
        """The direction each voxel axis runs to, e.g. 'RAS' or 'LIA': the closest anatomical axis
        of each.
        """
        return orientation_of(self.affine)

    def with_data(self, data: NDArray) -> Volume:
        """The same grid with other voxels of the same shape."""
        if data.shape != self.data.shape:
            raise BadGeometry(f"shape {data.shape} does not fit a grid of {self.data.shape}")
        return Volume(data, self.affine, self.space, header_spacing_mm=self.header_spacing_mm)


def check_affine(affine: ArrayLike) -> NDArray[np.float64]:
    """A read-only float64 copy of a (4, 4) affine. Raises `BadGeometry` if it cannot be the
    geometry of a scan.
    """
    matrix = np.array(affine, dtype=np.float64)
    if matrix.shape != (4, 4):
        raise BadGeometry(f"an affine is 4x4, not {matrix.shape}")
    if not np.isfinite(matrix).all():
        raise BadGeometry("the affine holds values that are not finite")
    if np.abs(matrix[3] - (0, 0, 0, 1)).max() > 1e-6:
        raise BadGeometry("the last row of the affine is not 0 0 0 1")
    with np.errstate(over="ignore"):
        spacing = np.sqrt((matrix[:3, :3] ** 2).sum(axis=0))
    low, high = SPACING_RANGE_MM
    if not ((spacing >= low) & (spacing <= high)).all():
        raise BadGeometry(
            f"the voxel spacing {_plain(spacing)} mm is outside {low:g} to {high:g} mm"
        )
    directions = matrix[:3, :3] / spacing
    cosines = directions.T @ directions - np.eye(3)
    if np.abs(cosines).max() > MAX_SHEAR:
        raise BadGeometry("the voxel axes are sheared (not at right angles)")
    matrix.flags.writeable = False
    return matrix


def spacing_of(affine: NDArray) -> tuple[float, float, float]:
    """Edge lengths in mm of a voxel of a (4, 4) affine."""
    x, y, z = np.sqrt((affine[:3, :3] ** 2).sum(axis=0))
    return float(x), float(y), float(z)


def orientation_of(affine: NDArray) -> str:
    """The anatomical letters of a (4, 4) affine's voxel axes, each world axis used once, closest
    match first.

    Where two matches are equally close, the choice depends on the directions alone, not on the
    order of the axes.
    """
    directions = affine[:3, :3] / np.sqrt((affine[:3, :3] ** 2).sum(axis=0))

    def closeness(rows: tuple[int, ...]) -> tuple[float, ...]:
        along = [
            directions[:, rows.index(row)] * np.sign(directions[row, rows.index(row)])
            for row in range(3)
        ]
        total = sum(abs(directions[row, axis]) for axis, row in enumerate(rows))
        return (round(float(total), 9), *np.round(along, 6).ravel().tolist())

    best = max(permutations(range(3)), key=closeness)
    return "".join(
        ("LR", "PA", "IS")[row][int(directions[row, axis] > 0)] for axis, row in enumerate(best)
    )


def orientation_axis_by_axis(affine: NDArray) -> str:
    """The anatomical letters of a (4, 4) affine's voxel axes as nibabel's `io_orientation` finds
    them, and SimpleITK, and with these MONAI, nnU-Net and TotalSegmentator.

    Of the matrix without its shear the axis that lies closest to one of the world's takes that
    first, and so on: in very oblique scans `orientation_of`, which looks at all three together,
    chooses otherwise.
    """
    left, _, right = np.linalg.svd(affine[:3, :3] / np.sqrt((affine[:3, :3] ** 2).sum(axis=0)))
    rotation, letters = left @ right, [""] * 3
    for axis in np.argsort(np.min(-(rotation**2), axis=0), kind="stable"):
        row = int(np.argmax(np.abs(rotation[:, axis])))
        letters[axis] = ("LR", "PA", "IS")[row][int(rotation[row, axis] > 0)]
        rotation[row] = 0
    return "".join(letters)


#: All 48 ways an array can be stored: which world axis each voxel axis follows, and in which
#: direction.
ORIENTATIONS = tuple(
    "".join(letters) for axes in permutations(("LR", "PA", "IS")) for letters in product(*axes)
)


_OPPOSITE = dict(zip("LRPAIS", "RLAPSI"))


def reorient(volume: Volume, orientation: str = "RAS") -> Volume:
    """The same voxels with axes permuted and flipped so that they run to `orientation`; no
    interpolation.

    The data is a view where possible. Raises `BadGeometry` for letters that are not an orientation.
    """
    if orientation not in ORIENTATIONS:
        raise BadGeometry(f"'{orientation}' is not an orientation such as RAS or LPS")
    order, flips = _turns(volume.orientation, orientation)
    step = np.zeros((4, 4))
    step[3, 3] = 1
    for new, (old, flip) in enumerate(zip(order, flips, strict=True)):
        step[old, new] = -1 if flip else 1
        step[old, 3] = volume.data.shape[old] - 1 if flip else 0
    slices = tuple(slice(None, None, -1) if flip else slice(None) for flip in flips)
    data = volume.data.transpose(order)[slices]
    spacing_mm = volume.header_spacing_mm
    if spacing_mm is not None:
        spacing_mm = (spacing_mm[order[0]], spacing_mm[order[1]], spacing_mm[order[2]])
    return Volume(data, volume.affine @ step, volume.space, header_spacing_mm=spacing_mm)


def reorient_axis_by_axis(volume: Volume, orientation: str = "RAS") -> Volume:
    """As `reorient`, but of axes that are named by `orientation_axis_by_axis`."""
    if orientation not in ORIENTATIONS:
        raise BadGeometry(f"'{orientation}' is not an orientation such as RAS or LPS")
    letters = volume.orientation
    order, flips = _turns(orientation_axis_by_axis(volume.affine), orientation)
    turned = [_OPPOSITE[letters[a]] if flip else letters[a] for a, flip in zip(order, flips)]
    return reorient(volume, "".join(turned))


def _turns(now: str, wanted: str) -> tuple[list[int], list[bool]]:
    """For each axis of the wanted orientation, which axis it is now, and whether it runs the other
    way.
    """
    order = [now.index(letter if letter in now else _OPPOSITE[letter]) for letter in wanted]
    return order, [now[axis] != letter for axis, letter in zip(order, wanted, strict=True)]


def same_grid(a: Volume, b: Volume, tolerance_mm: float = 1e-3) -> bool:
    """Whether two volumes have the same shape and every voxel at the same place within
    `tolerance_mm`.
    """
    return a.shape == b.shape and grid_distance_mm(a, b) <= tolerance_mm


def grid_distance_mm(a: Volume, b: Volume) -> float:
    """Largest distance in mm between equal voxel indices of two grids, over the corners of the
    first.
    """
    corners = np.array([(*corner, 1.0) for corner in product(*((0, n - 1) for n in a.shape))])
    return float(np.sqrt((((a.affine - b.affine) @ corners.T)[:3] ** 2).sum(axis=0)).max())


def tolerance_mm(grid: Volume) -> float:
    """How far apart the voxels of equal grids may lie: a hundredth of a voxel is rounding in
    somebody's header.
    """
    return max(1e-3, 0.01 * min(grid.spacing_mm))


def turned_onto(volume: Volume, grid: Volume) -> Volume | None:
    """The volume in the order of `grid`'s voxels, where it has the same grid stored along other
    axes; else None.

    Nothing is lost: axes are exchanged and turned round. The affine stays the volume's own, which
    may differ from the grid's by `tolerance_mm`.
    """
    if same_grid(grid, volume, tolerance_mm(grid)):
        return volume
    along_grid = reorient(volume, grid.orientation)
    return along_grid if same_grid(grid, along_grid, tolerance_mm(grid)) else None


def describe_grid(volume: Volume) -> str:
    """Shape, spacing, orientation and origin of a grid, for people."""
    shape = " x ".join(str(n) for n in volume.shape)
    spacing = " x ".join(f"{x:.4g}" for x in volume.spacing_mm)
    origin = ", ".join(f"{x:.4g}" for x in volume.affine[:3, 3])
    return f"{shape} voxels of {spacing} mm from ({origin}) as {volume.orientation}"


def resample(
    volume: Volume,
    affine: NDArray,
    shape: tuple[int, int, int],
    *,
    order: int = 1,
    outside: float = 0,
    points: tuple[int, int, int] = (1, 1, 1),
) -> Volume:
    """Volume interpolated on another grid: order 0 (nearest, for labels), 1 (trilinear) or 3 (cubic
    spline).

    Points outside the scan become `outside`. There is no smoothing before down-sampling, but with
    `points` every voxel is the mean of so many points along each axis. The result lies in memory in
    the order in which the scan does.
    """
    from medseg.resampling import interpolate  # here, because it compiles

    step = np.linalg.inv(volume.affine) @ affine
    data = interpolate(volume.data, step, shape, order=order, outside=outside, points=points)
    return Volume(data, affine, volume.space)


#: Largest values of scans with which float32 computes as it is: their squares, and parts of them,
#: are normal numbers.
_COMPUTABLE = (2.0**-20, 2.0**40)
#: Least number of steps from 0 to the largest value of a scan.
_LEVELS = 4096
#: Values below this part of the largest are too near to the smallest float32.
_VANISHING = 2.0**-110


def computable(volume: Volume) -> Volume:
    """The volume times a power of two, with which float32 can compute; itself where it already can
    (no copy then).

    Maps in SI units hold 1e-9 (diffusivity in m2/s), others 1e30. Squares and products of such
    values leave the range of float32 and of fixed tolerances. A power of two changes no digit, so
    results are those of the scan in a usual unit. Raises `BadFile` where digits are lost already:
    values as small as the type can hold, or one voxel beside which all others vanish.
    """
    data = volume.data
    if data.dtype.kind != "f" or not data.size:
        return volume
    largest = max(abs(float(data.min())), abs(float(data.max())))
    if not 0 < largest < np.inf or _COMPUTABLE[0] <= largest < _COMPUTABLE[1]:
        return volume
    if largest / float(np.finfo(data.dtype).smallest_subnormal) < _LEVELS:
        raise BadFile(
            f"its values (at most {largest:.2g}) are too small for {data.dtype}; save it in a"
            " larger unit"
        )
    usual = float(np.percentile(np.abs(data), 99.5))
    if 0 < usual < largest * _VANISHING:
        raise BadFile(
            f"a voxel of {largest:.2g} makes all others (up to {usual:.2g}) vanish; it is damaged,"
            " mend it"
        )
    return volume.with_data(np.ldexp(data, -int(np.frexp(largest)[1])))


def crop(volume: Volume, start: tuple[int, int, int], shape: tuple[int, int, int]) -> Volume:
    """The block of `shape` voxels beginning at voxel `start`, at its place in space (a view)."""
    slices = tuple(slice(s, s + n) for s, n in zip(start, shape, strict=True))
    affine = volume.affine.copy()
    affine[:3, 3] = (volume.affine @ (*start, 1.0))[:3]
    return Volume(
        volume.data[slices], affine, volume.space, header_spacing_mm=volume.header_spacing_mm
    )


def plane_of(data: NDArray, axis: int, at: int) -> NDArray:
    """A plane of an array across an axis, as a view.

    `numpy.take` copies an array whole first, if it does not lie in memory in the order of its axes.
    """
    return np.moveaxis(data, axis, 0)[at]


def value_counts(labels: NDArray, length: int = 0) -> NDArray[np.int64]:
    """How many voxels have each value from 0 on, of `length` values at least.

    A plane at a time: counting makes eight bytes of every voxel. Planes are those that lie in
    memory in one piece, if there are such.
    """
    counts = np.zeros(length, np.int64)
    for plane in np.moveaxis(labels, int(np.argmax(np.abs(labels.strides))), 0):
        more = np.bincount(plane.ravel(order="K"), minlength=len(counts))
        more[: len(counts)] += counts
        counts = more
    return counts


def _plain(numbers: ArrayLike) -> str:
    return " x ".join(f"{n:.4g}" for n in np.asarray(numbers).ravel())
