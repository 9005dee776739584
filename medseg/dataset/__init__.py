"""Annotated scans as people have them."""
