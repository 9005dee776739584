"""Files of volumes: what is read and written, by format."""

from typing import TYPE_CHECKING

from medseg import door

if TYPE_CHECKING:
    from medseg.io.added import Reader as Reader, Writer as Writer
    from medseg.io.contents import (
        describe_no_dicom as describe_no_dicom,
        example_folder as example_folder,
    )
    from medseg.io.conversion import check_target as check_target, convert_file as convert_file
    from medseg.io.formats import (
        READERS as READERS,
        WRITERS as WRITERS,
        DicomOptions as DicomOptions,
        Overlap as Overlap,
        Paths as Paths,
        SeveralVolumes as SeveralVolumes,
        data_files as data_files,
        embedded_table as embedded_table,
        holds_names as holds_names,
        is_dicom_source as is_dicom_source,
        is_readable_name as is_readable_name,
        is_slicer_segmentation as is_slicer_segmentation,
        label_kind as label_kind,
        list_volumes as list_volumes,
        read as read,
        read_as_stored as read_as_stored,
        read_labels as read_labels,
        read_masks as read_masks,
        strip_suffix as strip_suffix,
        write as write,
        written_suffixes as written_suffixes,
    )
    from medseg.io.nifti import stored_sizes as stored_sizes
    from medseg.io.nifti_writing import write_nifti as write_nifti
    from medseg.io.nrrd import write_nrrd as write_nrrd
    from medseg.io.objects import (
        ScanLike as ScanLike,
        as_labels as as_labels,
        as_path as as_path,
        as_volume as as_volume,
        as_volumes as as_volumes,
        is_one_scan as is_one_scan,
        is_path as is_path,
        to_nibabel as to_nibabel,
        to_sitk as to_sitk,
        what_is as what_is,
    )
    from medseg.io.slicer import (
        read_table as read_table,
        write_seg_nrrd as write_seg_nrrd,
        write_segments as write_segments,
    )
    from medseg.io.voxels import digest as digest

__getattr__, __dir__ = door(
    __name__,
    {
        "added": ("Reader", "Writer"),
        "contents": ("describe_no_dicom", "example_folder"),
        "conversion": ("check_target", "convert_file"),
        "formats": (
            "DicomOptions",
            "Overlap",
            "Paths",
            "READERS",
            "SeveralVolumes",
            "WRITERS",
            "data_files",
            "embedded_table",
            "holds_names",
            "is_dicom_source",
            "is_readable_name",
            "is_slicer_segmentation",
            "label_kind",
            "list_volumes",
            "read",
            "read_as_stored",
            "read_labels",
            "read_masks",
            "strip_suffix",
            "write",
            "written_suffixes",
        ),
        "nifti": ("stored_sizes",),
        "nifti_writing": ("write_nifti",),
        "nrrd": ("write_nrrd",),
        "objects": (
            "ScanLike",
            "as_labels",
            "as_path",
            "as_volume",
            "as_volumes",
            "is_one_scan",
            "is_path",
            "to_nibabel",
            "to_sitk",
            "what_is",
        ),
        "slicer": ("read_table", "write_seg_nrrd", "write_segments"),
        "voxels": ("digest",),
    },
)
