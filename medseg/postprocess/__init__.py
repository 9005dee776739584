"""What can be done to a label map, and what can be read off one."""

from typing import TYPE_CHECKING

from medseg import door

if TYPE_CHECKING:
    from medseg.postprocess import anatomy as anatomy, face as face
    from medseg.postprocess.cleanup import (
        check_steps as check_steps,
        clean as clean,
        keep_largest as keep_largest,
        keep_largest_together as keep_largest_together,
        steps_of as steps_of,
    )
    from medseg.postprocess.components import (
        Components as Components,
        connected_components as connected_components,
        contiguous as contiguous,
        is_reversed as is_reversed,
        look_up as look_up,
    )
    from medseg.postprocess.fluid import separate_fluid as separate_fluid
    from medseg.postprocess.levels import areas_at as areas_at, slices_at as slices_at
    from medseg.postprocess.volumes import structure_volumes as structure_volumes

__getattr__, __dir__ = door(
    __name__,
    {
        "": ("anatomy", "face"),
        "cleanup": ("check_steps", "clean", "keep_largest", "keep_largest_together", "steps_of"),
        "components": (
            "Components",
            "connected_components",
            "contiguous",
            "is_reversed",
            "look_up",
        ),
        "fluid": ("separate_fluid",),
        "levels": ("areas_at", "slices_at"),
        "volumes": ("structure_volumes",),
    },
)
