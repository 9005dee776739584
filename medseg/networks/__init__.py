"""Architectures: torch, and nothing of files."""
