"""Fluid told from tissue by intensity: sulci that a coarse model filled are opened, and nothing
else is touched.
"""

import numpy as np
import pytest

from medseg.postprocess.fluid import separate_fluid
from medseg.volume import Volume

TISSUE, OTHER, FLUID = 3, 9, 24


def folded_cortex(tissue_mean, fluid_mean, noise=4.0):
    """Labels whose tissue swallowed a thin sheet of fluid, the truth, and an image of the truth."""
    truth = np.zeros((40, 40, 40), np.uint8)
    truth[2:38, 2:38, 2:8] = FLUID
    truth[2:38, 2:38, 8:30] = TISSUE
    truth[2:38, 2:38, 30:36] = OTHER
    labels = truth.copy()
    truth[2:38, 18:20, 8:26] = FLUID  # the sulcus the model did not see
    rng = np.random.default_rng(0)
    # The other one looks like fluid, too.
    means = {
        0: 0.0,
        FLUID: fluid_mean,
        TISSUE: tissue_mean,
        OTHER: fluid_mean,
    }
    image = sum((truth == value) * mean for value, mean in means.items()) + rng.normal(
        0, noise, truth.shape
    )
    return tuple(Volume(data, np.eye(4)) for data in (labels, truth, image.astype(np.float32)))


@pytest.mark.parametrize(("tissue_mean", "fluid_mean"), [(100.0, 30.0), (30.0, 100.0)])
def test_a_sulcus_filled_with_tissue_is_opened_whichever_is_brighter(tissue_mean, fluid_mean):
    labels, truth, image = folded_cortex(tissue_mean, fluid_mean)

    found = separate_fluid(labels, image, [TISSUE], FLUID)

    assert (found.data != truth.data).mean() < 1e-3
    assert (labels.data != truth.data).mean() > 0.01
    assert found.data.dtype == labels.data.dtype


def test_labels_that_are_not_named_are_never_touched_even_where_they_look_like_fluid():
    labels, _, image = folded_cortex(100.0, 30.0)

    found = separate_fluid(labels, image, [TISSUE], FLUID)

    assert ((found.data == OTHER) == (labels.data == OTHER)).all()
    assert ((found.data == 0) == (labels.data == 0)).all()


def test_tissue_and_fluid_that_look_alike_are_left_as_they_are():
    labels, _, image = folded_cortex(100.0, 97.0, noise=10.0)

    assert (separate_fluid(labels, image, [TISSUE], FLUID).data == labels.data).all()


def test_intensities_away_from_the_fluid_stay_tissue():
    """Bright spots in dark-fluid images (vessels, lesions) are unlike the tissue, but not like the
    fluid either.
    """
    labels, _, image = folded_cortex(100.0, 30.0)
    bright = image.data.copy()
    bright[10, 10, 10] = 500

    assert (
        separate_fluid(labels, image.with_data(bright), [TISSUE], FLUID).data[10, 10, 10] == TISSUE
    )


@pytest.mark.parametrize("missing", [TISSUE, FLUID])
def test_without_tissue_or_fluid_nothing_changes(missing):
    labels, _, image = folded_cortex(100.0, 30.0)
    labels = labels.with_data(np.where(labels.data == missing, 0, labels.data).astype(np.uint8))

    assert (separate_fluid(labels, image, [TISSUE], FLUID).data == labels.data).all()


def test_a_noiseless_image_of_integers_does_not_divide_by_zero():
    labels, truth, image = folded_cortex(100.0, 30.0, noise=0.0)

    found = separate_fluid(labels, image.with_data(image.data.astype(np.int16)), [TISSUE], FLUID)

    assert (found.data == truth.data).all()
