"""What this machine's processor is good at."""

from __future__ import annotations


def has_matrix_units() -> bool:
    """Whether this CPU has AMX tiles, with which oneDNN convolves bfloat16 several times faster than float32."""
    import torch

    asked = getattr(torch.cpu, "_is_amx_tile_supported", None)  # private, so it may go
    return bool(asked is not None and asked())
