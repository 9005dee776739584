"""How nnU-Net's plans resample scans, labels and logits: three functions, option by option.

An option that is not known here, or a value of one that medseg does not compute, is refused by its
name. What holds without an option is what the functions themselves have (nnunetv2 2.8.1,
`preprocessing/resampling`).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from medseg.errors import BadModel
from medseg.models.recipe import Resampling

#: nnU-Net's name of a resampling -> how it computes.
RESAMPLINGS: dict[str, Literal["spline", "linear", "none"]] = {
    "resample_data_or_seg_to_shape": "spline",
    "resample_torch_fornnunet": "linear",
    "no_resampling_hack": "none",
}
#: Any value will do.
_ANY = object()
#: How a resampling computes -> its options, and the values of each with which medseg does the same.
_OPTIONS: dict[str, dict[str, tuple[Any, ...]]] = {
    "spline": {
        "is_seg": (_ANY,),
        "order": (_ANY,),
        "order_z": (_ANY,),
        "force_separate_z": (_ANY,),
        "separate_z_anisotropy_threshold": (3,),
    },
    "linear": {
        "is_seg": (_ANY,),
        "force_separate_z": (_ANY,),
        "num_threads": (_ANY,),
        "device": (_ANY,),
        "memefficient_seg_resampling": (False,),
        "separate_z_anisotropy_threshold": (3,),
        "mode": ("linear",),
        "aniso_axis_mode": ("nearest-exact",),
    },
    "none": {},
}


def read_resampling(raw: Mapping[str, Any], what: str, order: int, where: str) -> Resampling:
    """How 'data', 'seg' or 'probabilities' are resampled; order: nnU-Net's usual one.

    Raises `BadModel` naming `where` and the option that medseg does not know.
    """
    name = raw.get(f"resampling_fn_{what}", "resample_data_or_seg_to_shape")
    if not isinstance(name, str) or name not in RESAMPLINGS:
        raise BadModel(f"{where}: resamples by {name!r:.80}, which medseg does not have")
    scheme, options = RESAMPLINGS[name], raw.get(f"resampling_fn_{what}_kwargs")
    if options is not None and not isinstance(options, dict):
        raise BadModel(f"{where}: resampling_fn_{what}_kwargs is not a set of options")
    _check_options(options or {}, scheme, what, where, cascade=bool(raw.get("previous_stage")))
    if options is None:
        return Resampling(scheme=scheme, order=order)
    # What the functions themselves take where a set of options leaves one out.
    across, separate = 0, options.get("force_separate_z", False if scheme == "spline" else None)
    if scheme == "spline":
        order, across = options.get("order", 3), options.get("order_z", 0)
    numbers = all(type(one) is int and 0 <= one <= 5 for one in (order, across))
    if not numbers or (separate is not None and type(separate) is not bool):
        raise BadModel(
            f"{where}: resamples {what} by options that are not nnU-Net's"
            f" ({(order, across, separate)!r:.80})"
        )
    return Resampling(scheme=scheme, order=order, order_across=across, separate=separate)


def _check_options(
    options: Mapping[str, Any], scheme: str, what: str, where: str, *, cascade: bool
) -> None:
    """Raise `BadModel` for an option with which medseg does not compute the same."""
    for option, value in options.items():
        known = _OPTIONS[scheme].get(option, ())
        if option == "is_seg" and what != "seg":
            known = (False,)
        if option == "memefficient_seg_resampling" and not (cascade and what == "seg"):
            known = (_ANY,)  # only a cascade resamples labels
        if not (_ANY in known or any(value == one for one in known)):
            raise BadModel(
                f"{where}: resamples {what} with {option!s:.40} = {value!r:.60}, which medseg does"
                " not have"
            )
