"""What the module MedSeg for 3D Slicer does that needs no Slicer: it can be tested anywhere."""
