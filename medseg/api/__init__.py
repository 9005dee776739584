"""What `import medseg` hands out beside its types: one call for each command."""

from typing import TYPE_CHECKING

from medseg import door

if TYPE_CHECKING:
    from medseg.api.cohorts import batch as batch
    from medseg.api.converting import convert as convert
    from medseg.api.exporting import export as export
    from medseg.api.scoring import clean as clean, compare as compare, evaluate as evaluate
    from medseg.api.segmenting import Segmenter as Segmenter, load as load, segment as segment
    from medseg.api.teaching import check as check, prepare as prepare, train as train
    from medseg.api.viewing import view as view

__getattr__, __dir__ = door(
    __name__,
    {
        "cohorts": ("batch",),
        "converting": ("convert",),
        "exporting": ("export",),
        "scoring": ("clean", "compare", "evaluate"),
        "segmenting": ("Segmenter", "load", "segment"),
        "teaching": ("check", "prepare", "train"),
        "viewing": ("view",),
    },
)
