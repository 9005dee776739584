"""Device and precision settled once for several processes, which may run on different machines."""

from __future__ import annotations

from collections.abc import Mapping

from medseg.errors import BadConfig
from medseg.inference.settings import Model, Settings, as_list, is_set
from medseg.machine import convolves_bfloat16

#: How precisions are called in records, and as PyTorch's types.
_KINDS = ("float32", "bfloat16", "float16")


def settle_auto(model: Model, settings: Settings, known: Mapping[str, str]) -> dict[str, str]:
    """What 'auto' means: {"device": ..., "precision": ...}, as it is known or else as found here.

    Where PyTorch tries what is faster, so that machines differ. Raises `BadConfig` if this machine
    cannot do what others do.
    """
    if isinstance(model, str):
        return {"device": "cpu", "precision": "float32"} | dict(known)
    from medseg.inference.backends.predictor import choose_device
    from medseg.inference.backends.pytorch import choose_precision

    device_name = settings.device if settings.device != "auto" else known.get("device", "auto")
    device = choose_device(device_name)
    trained = None if is_set(model) else as_list(model)[0].spec.trained_precision
    auto = choose_precision("auto", device, trained)
    precision = known.get("precision") or str(auto).partition(".")[2]
    can = precision != "bfloat16" or device.type == "cuda" or convolves_bfloat16()
    if not can or precision not in _KINDS:
        raise BadConfig(
            f"the cohort is computed in {precision}, which this processor does not do; run this "
            "part elsewhere, or begin anew with --precision fp32"
        )
    return {"device": device.type, "precision": precision}


def use_settled(settled: Mapping[str, str]) -> None:
    """Let 'auto' mean in this process what `settle_auto` found."""
    import torch

    from medseg.inference.backends.pytorch import settle_precision

    if settled.get("precision") in _KINDS:
        settle_precision(getattr(torch, settled["precision"]))


def limit_threads(count: int) -> None:
    """Let this process compute on so many threads, as where several share a machine's cores."""
    import torch

    from medseg.kernels.threads import limit_threads as limit_loops

    limit_loops(count)
    torch.set_num_threads(count)
