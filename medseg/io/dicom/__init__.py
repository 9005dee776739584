"""DICOM: series become volumes; label maps become segmentations, structure sets and reports."""
