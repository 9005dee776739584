"""What a scan was segmented into: labels, what they mean, and all that a program wants of them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

from medseg.errors import BadConfig
from medseg.inference.tables import Table, make_table
from medseg.inference.untrained import CT_TISSUES
from medseg.labels import LabelTable
from medseg.postprocess import structure_volumes
from medseg.text import counted
from medseg.volume import Volume, describe_grid

if TYPE_CHECKING:
    import nibabel
    import SimpleITK
    from matplotlib.figure import Figure

    from medseg.inference.forecast import Plan

#: Writes a result with all that lies beside it; returns the record.
Writer: TypeAlias = Callable[["Segmentation", Path], dict[str, Any]]
#: Rows of the table in a notebook.
_ROWS = 40


@dataclass(repr=False)
class Segmentation:
    """Labels on the scan's grid, what they mean, and how long each part took in seconds.

    maps: what was asked for beside the labels, on the same grid, float32: 'probability_VALUE',
    'uncertainty' (0 to 1). confidence: of each label found by a network, how probable it held it
    where it chose it, before cleaning up. scan: what was segmented, its first channel. doubts: what
    speaks against the result, a sentence each.
    """

    labels: Volume
    table: LabelTable
    plan: Plan
    seconds: dict[str, float] = field(default_factory=dict)
    maps: dict[str, Volume] = field(default_factory=dict)
    confidence: dict[int, float] = field(default_factory=dict)
    scan: Volume | None = None
    doubts: tuple[str, ...] = ()
    writer: Writer | None = None

    def __repr__(self) -> str:
        there = [row for row in self.structures if row["voxels"]]
        ml = sum(row["ml"] for row in there)
        spent = f" in {sum(self.seconds.values()):.1f} s" if self.seconds else ""
        doubts = f", {counted(len(self.doubts), 'doubt')}" if self.doubts else ""
        found = f"{len(there)} of {counted(len(self.table), 'structure')}"
        return (
            f"<Segmentation by {self.plan.model}{spent}: {found}, {ml:.1f} mL{doubts};"
            f" {describe_grid(self.labels)}>"
        )

    @cached_property
    def structures(self) -> list[dict[str, Any]]:
        """A row for each structure, absent ones too: value, name, voxels, ml; confidence where a
        network says it, and of CT tissues what is measured of them.
        """
        rows = structure_volumes(self.labels, self.table)
        for row in rows:
            if row["voxels"] and row["value"] in self.confidence:
                row["confidence"] = round(self.confidence[row["value"]], 3)
        if self.plan.model == CT_TISSUES and self.scan is not None:
            from medseg.inference.tissues.measures import measure  # here, it is of CT alone

            measure(self.scan, self.labels, rows)
        return rows

    @property
    def volumes(self) -> Table:
        """`structures` as a table: a `pandas.DataFrame` where pandas is installed, else something
        that is read alike: `volumes["ml"]`, `volumes.columns`, `volumes.to_dict("records")`.
        """
        return make_table(self.structures)

    def to_nibabel(self) -> nibabel.Nifti1Image:
        """The labels as an image of nibabel. Raises `BadConfig` where it is not installed."""
        from medseg.io import to_nibabel

        return to_nibabel(self.labels)

    def to_sitk(self) -> SimpleITK.Image:
        """The labels as an image of SimpleITK. Raises `BadConfig` where it is not installed."""
        from medseg.io import to_sitk

        return to_sitk(self.labels)

    def save(self, path: str | Path) -> Path:
        """Write the labels in the format that the suffix names, with the label table and the run
        record beside them as `medseg infer` does; returns the path.

        `.dcm` is for scans that were read from DICOM. Raises `BadOutput`.
        """
        from medseg.io import as_path, write

        place = as_path(path, "what a result is saved as")
        if self.writer is not None:
            self.writer(self, place)
        else:
            write(self.labels, place, table=self.table)
        return place

    def plot(self) -> Figure:
        """The scan in three planes with the labels over it, as a figure of matplotlib: right is on
        the left.
        """
        from medseg.view import draw_figure

        return draw_figure(self._scan_for("plot"), self.labels, self.table)

    def _repr_html_(self) -> str:
        """For notebooks: a picture, and the table."""
        import base64

        from medseg.inference.tables import as_html
        from medseg.view import strip_png

        picture = ""
        if self.scan is not None:
            content = base64.b64encode(strip_png(self.scan, self.labels, self.table)).decode()
            source = f"data:image/png;base64,{content}"
            picture = f'<img alt="slices with labels" style="max-width:100%" src="{source}">'
        there = [row for row in self.structures if row["voxels"]]
        return f"<div>{picture}{as_html(there, title=repr(self), most=_ROWS)}</div>"

    def _scan_for(self, what: str) -> Volume:
        if self.scan is None:
            raise BadConfig(f"this result does not hold its scan, so {what} has nothing to show")
        return self.scan
