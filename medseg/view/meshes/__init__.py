"""Surfaces of structures: from label maps, smoothed and thinned, and their files."""
