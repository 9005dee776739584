"""Scans made ready for training: by the run itself, or before it by several jobs into a store."""
