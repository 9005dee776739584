"""What the module MedSeg for 3D Slicer does that needs no Slicer and no Qt: it is tested anywhere.

Slicer's own Python runs it, which is 3.9 in Slicer 5.2 to 5.8, with nothing but the standard
library.
"""
