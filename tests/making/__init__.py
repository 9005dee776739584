"""What tests make: networks, scans, data sets, DICOM, pages."""
