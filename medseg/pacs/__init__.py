"""PACS: studies and series over DICOMweb, and a node that receives, segments and replies."""
