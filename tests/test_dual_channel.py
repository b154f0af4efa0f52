"""The two-channel model: one backbone, two images, its head, and photographs without segmented twins."""

import numpy as np
import pytest

from leukemia_nb.models.dual_channel import DualChannel
from leukemia_nb.models.interface import ModelError, Images, load_model, make_model
from leukemia_nb.data.synthetic import smear
from test_transfer import same_weights, tiny_backbone, tiny_weights, trained  # noqa: F401

pytestmark = pytest.mark.filterwarnings("ignore:dual_channel collapsed:RuntimeWarning")


@pytest.fixture()
def pairs():
    def some(per_class, seed):
        labels = [name for name in ("Normal", "Pre-B", "Pro-B") for _ in range(per_class)]
        smears = [smear(name, seed + i, height=48, width=64) for i, name in enumerate(labels)]
        return Images(np.stack([[s.image, s.image * s.nuclei[..., None]] for s in smears]), labels, 32)

    return some(4, 0), some(2, 100)


@pytest.mark.parametrize("settings", [dict(), dict(fine_tune=True), dict(weights="random")])
def test_trains_saves_and_loads(tiny_weights, pairs, tmp_path, settings):  # noqa: F811
    model = trained(pairs, model=DualChannel, epochs=2, **settings)
    again = load_model(model.save(tmp_path / "dual"))
    assert np.array_equal(again.predict_proba(pairs[1]), model.predict_proba(pairs[1]))


def test_cached_and_long_way_end_in_the_same_weights_with_both_dropouts(tiny_weights, pairs):  # noqa: F811
    cached, long = (trained(pairs, cache=cache, model=DualChannel) for cache in (True, False))
    assert same_weights(cached.head_, long.head_)


def test_one_backbone_sees_both_and_original_comes_first(tiny_weights, pairs):  # noqa: F811
    model = trained(pairs, model=DualChannel, epochs=1)
    both = model.features(pairs[1])
    assert both.shape == (6, 16) and same_weights(model.maps_, tiny_weights)
    swapped = model.features(pairs[1][:][:, ::-1])
    assert np.array_equal(both[:, :8], swapped[:, 8:]) and np.array_equal(both[:, 8:], swapped[:, :8])
    assert not np.array_equal(both[:, :8], both[:, 8:])


def test_the_head_is_the_decks(tiny_weights, pairs):  # noqa: F811
    layers = trained(pairs, model=DualChannel, epochs=1).head_.layers
    assert [(type(layer).__name__, getattr(layer, "units", getattr(layer, "rate", None))) for layer in layers] == [
        ("Dense", 512),
        ("Dropout", 0.5),
        ("Dense", 256),
        ("Dropout", 0.5),
        ("Dense", 3),
    ]
    assert [layers[i].activation.__name__ for i in (0, 2, 4)] == ["relu", "relu", "linear"]


@pytest.mark.parametrize("method", ["kmeans", "nucleus"])
def test_photographs_are_segmented_at_full_size_by_the_method_that_made_the_pairs(tiny_weights, pairs, method):  # noqa: F811
    from leukemia_nb.processing.segmentation import apply_mask, segment

    model = trained(pairs, model=DualChannel, epochs=1, method=method)
    photographs = [smear(name, 900, height=192, width=256).image for name in ("Normal", "Pro-B")]
    twins = [np.stack([p, apply_mask(p, segment(p, method))]) for p in photographs]
    assert np.array_equal(model.predict_proba(photographs), model.predict_proba(np.stack(twins)))


def test_settings_are_its_own_and_the_shared_ones(tmp_path):
    assert make_model("dual_channel", method="nucleus", epochs=2).get_params()["method"] == "nucleus"
    with pytest.raises(ModelError, match="unknown setting 'methode'"):
        make_model("dual_channel", methode="nucleus")
