"""What the module MedSeg does with Slicer's scene, and its panels."""
