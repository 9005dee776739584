"""Trained networks with all that is needed to use them."""

from typing import TYPE_CHECKING

from medseg import door

if TYPE_CHECKING:
    from medseg.models.bundle_own import own_network as own_network
    from medseg.models.bundle_writing import (
        bundle_metadata as bundle_metadata,
        bundle_notes as bundle_notes,
        bundle_recipe as bundle_recipe,
        inference_config as inference_config,
    )
    from medseg.models.card import model_card as model_card
    from medseg.models.coarse import plain_name as plain_name
    from medseg.models.conversion import (
        facts_of as facts_of,
        first_line as first_line,
        write_models as write_models,
    )
    from medseg.models.encoder import (
        EncoderWeights as EncoderWeights,
        is_encoder as is_encoder,
        load_encoder as load_encoder,
    )
    from medseg.models.folder import (
        Checkpoint as Checkpoint,
        bundled_models as bundled_models,
        change_spec as change_spec,
        known_models as known_models,
        load_checkpoint as load_checkpoint,
        save_checkpoint as save_checkpoint,
    )
    from medseg.models.loading import (
        is_model as is_model,
        list_models as list_models,
        load_models as load_models,
        load_single as load_single,
    )
    from medseg.models.monai_steps import monai_recipe as monai_recipe
    from medseg.models.recipe import (
        ChannelScale as ChannelScale,
        Recipe as Recipe,
        Resampling as Resampling,
    )
    from medseg.models.sets import ModelSet as ModelSet
    from medseg.models.spec import (
        FixedScale as FixedScale,
        GridKind as GridKind,
        IntensitySpec as IntensitySpec,
        ModelSpec as ModelSpec,
        PercentileScale as PercentileScale,
        ZScore as ZScore,
    )
    from medseg.models.steps import (
        Crop as Crop,
        Curve as Curve,
        Ending as Ending,
        Extent as Extent,
        Range as Range,
        Space as Space,
        Standard as Standard,
        StepRecipe as StepRecipe,
        Turn as Turn,
    )
    from medseg.models.weights import load_plain as load_plain

__getattr__, __dir__ = door(
    __name__,
    {
        "bundle_own": ("own_network",),
        "bundle_writing": (
            "inference_config",
            "bundle_metadata",
            "bundle_notes",
            "bundle_recipe",
        ),
        "card": ("model_card",),
        "coarse": ("plain_name",),
        "conversion": ("facts_of", "first_line", "write_models"),
        "encoder": ("EncoderWeights", "is_encoder", "load_encoder"),
        "folder": (
            "Checkpoint",
            "bundled_models",
            "change_spec",
            "known_models",
            "load_checkpoint",
            "save_checkpoint",
        ),
        "loading": ("is_model", "list_models", "load_models", "load_single"),
        "monai_steps": ("monai_recipe",),
        "recipe": ("ChannelScale", "Recipe", "Resampling"),
        "sets": ("ModelSet",),
        "weights": ("load_plain",),
        "steps": (
            "Crop",
            "Curve",
            "Ending",
            "Extent",
            "Range",
            "Space",
            "Standard",
            "StepRecipe",
            "Turn",
        ),
        "spec": (
            "FixedScale",
            "GridKind",
            "IntensitySpec",
            "ModelSpec",
            "PercentileScale",
            "ZScore",
        ),
    },
)
