"""The original study's method equals cv2.kmeans, the second finds cells better; on synthetic and, where they are, real images."""

import time

import cv2
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from skimage.morphology import convex_hull_image
from skimage.segmentation import watershed

from leukemia_nb.data.images import read_image
from leukemia_nb.data.synthetic import make_smear
from leukemia_nb.processing import cells as cells_module
from leukemia_nb.processing.cells import (
    FEATURE_NAMES,
    cell_crops,
    cell_features,
    cell_table,
    count_quality,
    find_cells,
    label_cells,
    _refine_mask,
    typical_area,
)
from leukemia_nb.processing.segmentation import (
    SEGMENTATION_METHODS,
    _smallest_area,
    _kmeans_mask,
    a_channel,
    apply_mask,
    check_mask,
    clean_mask,
    _cluster_overlay,
    drop_small,
    draw_outlines,
    mask_quality,
    segment,
    segmentation_steps,
    original_study_mask,
    otsu_threshold,
)

sizes = st.tuples(st.integers(1, 40), st.integers(1, 40))


@pytest.fixture(scope="module")
def smears():
    "Three smears of each class, 384 x 512."
    return [make_smear(label, seed, 384, 512) for label in ("Normal", "Pre-B", "Pro-B") for seed in range(3)]


def left_over(values, threshold):
    parts = values[values <= threshold].astype(float), values[values > threshold].astype(float)
    return sum(((part - part.mean()) ** 2).sum() for part in parts if part.size)


@given(arrays(np.uint8, st.integers(1, 60), elements=st.integers(0, 255) | st.integers(100, 104)))
def test_otsu_threshold_is_the_best_of_all_thresholds(values):
    threshold = otsu_threshold(values)
    scores = [left_over(values, t) for t in range(256)]
    assert left_over(values, threshold) == pytest.approx(min(scores), abs=1e-6)
    assert threshold in values and (threshold < values.max() or values.min() == values.max())


@given(arrays(np.uint8, st.integers(2, 40), elements=st.integers(0, 5)))
def test_otsu_threshold_takes_the_lowest_of_equal_thresholds(values):
    threshold = otsu_threshold(values)
    best = left_over(values, threshold)
    assert all(left_over(values, t) > best + 1e-9 for t in np.unique(values) if t < threshold)


def test_otsu_threshold_of_constant_and_unusable_values():
    assert otsu_threshold(np.full((3, 4), 9, np.uint8)) == 9
    with pytest.raises(ValueError, match="at least one"):
        otsu_threshold(np.zeros(0, np.uint8))
    with pytest.raises(ValueError, match="expected uint8"):
        otsu_threshold(np.zeros(3))


def test_study_mask_equals_kmeans_on_smears(smears):
    for drawn in smears:
        small = np.ascontiguousarray(drawn.image[::2, ::2])
        slow = drop_small(clean_mask(_kmeans_mask(a_channel(small))))
        assert mask_quality(original_study_mask(small), slow)["iou"] > 0.98


@settings(max_examples=40, deadline=None)
@given(sizes, st.integers(0, 2**32 - 1), st.sampled_from(sorted(SEGMENTATION_METHODS)))
def test_any_size_grey_and_noise(size, seed, method):
    noise = np.random.default_rng(seed).integers(0, 256, (*size, 3)).astype(np.uint8)
    for image in (noise, noise[..., ::-1], noise[..., 0], np.full_like(noise, seed % 256)):
        mask = segment(image, method)
        assert mask.dtype == bool and mask.shape == size
        assert check_mask(mask) or mask.any()
    assert not segment(noise[..., 0], method).any()


@pytest.mark.parametrize("method", SEGMENTATION_METHODS)
def test_image_is_not_changed_and_result_repeats(method, smears):
    image = smears[0].image
    before = image.copy()
    first = segment(image, method)
    assert (segment(image, method) == first).all() and (image == before).all()


def test_unusable_images_and_methods():
    for wrong in (np.zeros((4, 4, 4), np.uint8), np.zeros((4, 4, 3)), np.zeros(4, np.uint8)):
        with pytest.raises(ValueError, match="must be uint8 RGB"):
            segment(wrong)
        with pytest.raises(ValueError, match="must be uint8 RGB"):
            segment(wrong, "nucleus")
    with pytest.raises(ValueError, match="choose one of kmeans, nucleus"):
        segment(np.zeros((4, 4, 3), np.uint8), "Kmeans")


def test_cleaning_is_opencvs_open_then_close():
    random = np.random.default_rng(1).random((80, 90)) < 0.5

    def ellipse(size):
        return cv2.getStructuringElement(cv2.MORPH_ELLIPSE, (size, size))

    opened = cv2.dilate(cv2.erode(random.astype(np.uint8), ellipse(3)), ellipse(3))
    assert (clean_mask(random) == (cv2.morphologyEx(opened, cv2.MORPH_CLOSE, ellipse(7)) > 0)).all()


@given(arrays(bool, sizes), st.floats(0, 4e5))
def test_dropping_small_components(mask, min_area):
    number, labels = cv2.connectedComponents(mask.astype(np.uint8))
    areas = np.bincount(labels.ravel(), minlength=number)
    keep = areas >= _smallest_area(mask.shape, min_area)
    keep[0] = False
    assert (drop_small(mask, min_area) == keep[labels]).all()


def test_smallest_area_is_a_proportion():
    assert _smallest_area((768, 1024), 500) == 500
    assert _smallest_area((1536, 2048), 500) == 2000
    assert _smallest_area((224, 224), 500) == pytest.approx(31.9, abs=0.01)


@given(arrays(bool, (6, 7)), arrays(bool, (6, 7)))
def test_mask_quality_properties(one, two):
    quality, other = mask_quality(one, two), mask_quality(two, one)
    assert quality["iou"] == other["iou"] and quality["precision"] == other["recall"]
    assert quality["dice"] == pytest.approx(2 * quality["iou"] / (1 + quality["iou"]))
    assert mask_quality(one, one)["iou"] == 1


def test_apply_mask_is_the_bitwise_and(smears):
    image, mask = smears[0].image, smears[0].cells > 0
    assert (apply_mask(image, mask) == image * mask[..., None]).all()
    sizes = rf"image \({mask.shape[0]}, {mask.shape[1]}\) and mask \({mask.shape[0] - 1}, {mask.shape[1]}\) differ in size"
    with pytest.raises(ValueError, match=sizes):
        apply_mask(image, mask[:-1])


def test_touching_cells_are_separated():
    for gap, distance in ((0, 46), (3, 50)):
        mask = np.zeros((120, 200), np.uint8)
        cv2.circle(mask, (60, 60), 25, 1, -1)
        cv2.circle(mask, (60 + distance + gap, 60), 25, 1, -1)
        labels = label_cells(mask > 0)
        assert labels.dtype == np.int32 and labels.max() == 2 and ((labels > 0) == (mask > 0)).all()
    oval = cv2.ellipse(np.zeros((120, 200), np.uint8), (100, 60), (60, 35), 20, 0, 360, 1, -1) > 0
    assert label_cells(oval).max() == 1


@given(arrays(bool, sizes))
@settings(deadline=None, max_examples=50)
def test_labels_cover_the_mask(mask):
    labels = label_cells(mask)
    assert ((labels > 0) == mask).all()
    assert (np.unique(labels[mask]) == np.arange(1, labels.max() + 1)).all()


def test_nucleus_beats_kmeans_and_counts_on_smears(smears):
    deck = np.mean([mask_quality(segment(drawn.image), drawn.cells > 0)["iou"] for drawn in smears])
    found = [find_cells(drawn.image) for drawn in smears]
    seeded = np.mean([mask_quality(cells > 0, drawn.cells > 0)["iou"] for cells, drawn in zip(found, smears)])
    assert seeded > 0.85 and seeded > deck
    counts = [count_quality(cells, drawn.cells) for cells, drawn in zip(found, smears)]
    assert sum(count["matched"] for count in counts) >= 0.9 * sum(count["true"] for count in counts)
    assert sum(count["false"] for count in counts) <= 0.15 * sum(count["true"] for count in counts)
    for cells in found:
        assert (np.unique(cells) == np.arange(cells.max() + 1)).all()


def test_nucleus_is_robust_to_the_lamp(smears):
    image = smears[4].image
    yellow = (image * [1, 0.97, 0.7]).astype(np.uint8)
    assert mask_quality(segment(yellow, "nucleus"), segment(image, "nucleus"))["iou"] > 0.9
    assert np.median(cells_module._whiten_background(yellow).reshape(-1, 3), axis=0).min() > 200


def test_outlines_stay_at_the_edge():
    labels = np.zeros((40, 40), np.int32)
    labels[5:20, 5:20] = 1
    labels[20:35, 5:20] = 2
    drawn = draw_outlines(np.zeros((40, 40, 3), np.uint8), labels, (9, 8, 7), width=1)
    assert (drawn[5, 5:20] == (9, 8, 7)).all() and (drawn[19, 5:20] == (9, 8, 7)).all() and not drawn[10, 10].any()


def test_flags():
    mask = np.zeros((100, 100), bool)
    assert check_mask(mask) == "empty"
    mask[40:60, 40:60] = True
    assert check_mask(mask) == ""
    assert "of the border" in check_mask(~mask) and "covers 96% of the image" in check_mask(~mask)


def test_golden_values_by_hand():
    assert otsu_threshold(np.uint8([1, 2, 9, 10])) == 2
    assert otsu_threshold(np.uint8([0, 0, 0, 4, 10])) == 4
    assert typical_area(np.int32([[1, 1, 1, 0], [2, 0, 0, 0]])) == (9 + 1) / 4
    one, two = np.array([[1, 1, 1, 0, 0]], bool), np.array([[0, 0, 1, 1, 0]], bool)
    assert mask_quality(one, two) == {"iou": 1 / 4, "dice": 2 / 5, "precision": 1 / 3, "recall": 1 / 2}
    assert mask_quality(one & False, two) == {"iou": 0, "dice": 0, "precision": 0, "recall": 0}
    found, truth = np.int32([[1, 1, 1, 0, 2, 2]]), np.int32([[7, 7, 0, 0, 0, 8]])
    assert count_quality(found, truth) == {"true": 2, "found": 2, "matched": 2, "missed": 0, "false": 0, "count_error": 0}
    assert count_quality(found, truth, 0.6)["matched"] == 1 and count_quality(found, truth, 2 / 3)["matched"] == 1
    tinted = _cluster_overlay(np.full((1, 2, 3), 100, np.uint8), np.array([[True, False]]), strength=0.5)
    assert tinted.tolist() == [[[165, 70, 70], [70, 135, 85]]]


def test_limits_of_the_flags():
    mask = np.zeros((100, 100), bool)
    mask[1, 1:20] = True
    assert check_mask(mask) == "covers 0.19% of the image"
    mask[1, 20] = True
    assert check_mask(mask) == ""
    mask[:] = False
    mask[5:45] = True  # 40 % in one component
    assert check_mask(mask) == ""
    mask[45] = True
    assert check_mask(mask) == "one component of 41%"
    mask[46:50], mask[51:65] = True, True  # 59 % in two components
    assert check_mask(mask) == "one component of 45%"
    mask[66:68] = True
    assert check_mask(mask) == "covers 61% of the image; one component of 45%"


def test_masks_on_which_two_methods_disagree_are_flagged():
    mask, other = np.zeros((100, 100), bool), np.zeros((100, 100), bool)
    mask[:, :60] = other[:, :42] = True
    assert check_mask(mask, other) == ""  # IoU 42 / 60, and no limit of size applies
    other[0, 41] = False
    assert check_mask(mask, other) == "IoU with the other method 0.70"
    assert check_mask(mask, ~mask) == check_mask(mask, np.zeros_like(mask)) == "IoU with the other method 0.00"
    assert check_mask(np.zeros_like(mask), other) == "empty"


def test_steps_end_in_the_masked_image(smears):
    image = smears[1].image
    steps = segmentation_steps(image)
    assert list(steps) == ["A channel", "two clusters", "higher mean A", "cleaned", "masked"]
    assert (steps["cleaned"] == original_study_mask(image)).all() and (
        steps["masked"] == apply_mask(image, original_study_mask(image))
    ).all()


def disc(radius: int, colour: tuple[int, int, int]) -> tuple[np.ndarray, np.ndarray]:
    "A disc on a pale window, and its mask."
    mask = np.hypot(*(np.mgrid[:48, :48] - 24)) <= radius
    crop = np.full((48, 48, 3), 235, np.uint8)
    crop[mask] = colour
    return crop, mask


def test_features_of_a_disc():
    crop, mask = disc(15, (120, 60, 160))
    features = dict(zip(FEATURE_NAMES, cell_features(crop, mask)))
    assert len(features) == 39 and features["log area"] == pytest.approx(np.log(mask.sum()))
    assert features["axis ratio"] == pytest.approx(1, abs=0.01) and features["major axis length"] == pytest.approx(30, abs=1)
    assert features["extent"] == pytest.approx(mask.sum() / 31**2, abs=0.001) and features["solidity"] == 1
    assert features["SD L"] == 0 and features["mean A"] == cv2.cvtColor(crop, cv2.COLOR_RGB2LAB)[24, 24, 1]


@given(arrays(bool, (48, 48), elements=st.booleans(), fill=st.just(False)), st.integers(3, 12))
@settings(max_examples=30, deadline=None)
def test_solidity_is_the_area_over_that_of_the_convex_hull(noise, radius):
    mask = disc(radius, (0, 0, 0))[1] | noise
    found = dict(zip(FEATURE_NAMES, cell_features(np.full((48, 48, 3), 90, np.uint8), mask)))["solidity"]
    assert 0 < found <= 1
    assert found == pytest.approx(mask.sum() / convex_hull_image(mask, offset_coordinates=False).sum(), rel=1e-5)


def test_features_depend_on_nothing_outside_the_mask_and_not_on_mirroring():
    random = np.random.default_rng(0)
    crop, mask = disc(14, (120, 60, 160))
    crop[mask] = random.integers(60, 160, (mask.sum(), 3))
    changed = np.where(mask[..., None], crop, random.integers(0, 256, crop.shape, dtype=np.uint8))
    np.testing.assert_array_equal(cell_features(crop, mask), cell_features(changed, mask))
    mirrored = cell_features(crop[:, ::-1].copy(), mask[:, ::-1].copy())
    np.testing.assert_allclose(cell_features(crop, mask), mirrored, rtol=1e-3, atol=1e-2)


def test_refined_mask_drops_a_pale_rim_and_never_everything():
    crop, mask = disc(12, (120, 60, 160))
    wide = np.hypot(*(np.mgrid[:48, :48] - 24)) <= 18
    refined = _refine_mask(crop, wide)
    assert mask_quality(refined, mask)["iou"] > 0.9
    flat = np.full_like(crop, 200)
    assert (_refine_mask(flat, mask) == mask).all() and not _refine_mask(flat, mask & False).any()


def test_cells_of_a_smear_one_row_each():
    image = cv2.resize(make_smear("Pre-B", 3, 384, 512).image, (224, 224), interpolation=cv2.INTER_AREA)
    cells = find_cells(image)
    crops, masks = cell_crops(image, cells)
    table = cell_table(image, cells)
    assert crops.shape == (len(table), 48, 48, 3) and masks.shape == crops.shape[:3] and len(table) > 1
    assert table["cell"].is_unique and set(table["cell"]) <= set(range(1, cells.max() + 1))
    np.testing.assert_allclose(table[list(FEATURE_NAMES)].iloc[0], cell_features(crops[0], masks[0]), rtol=1e-6)
    assert len(cell_crops(image, cells, max_cells=2)[0]) == 2
    assert cell_table(np.full((224, 224, 3), 240, np.uint8), np.zeros((224, 224), np.int32)).empty
    corner = np.zeros((224, 224), np.int32)
    corner[195:215, 180:210] = 1  # under the scale bar
    assert cell_table(image, corner).empty


# ---- real images


@pytest.mark.parametrize(("row", "column", "whole"), [(0, 60, False), (60, 0, False), (1, 60, True), (60, 1, True)])
def test_a_cell_is_cut_where_it_reaches_the_first_row_or_column(row, column, whole):
    cells = np.zeros((224, 224), np.int32)
    cells[100:120, 100:120], cells[row : row + 20, column : column + 20] = 1, 2
    assert len(cell_crops(np.full((224, 224, 3), 150, np.uint8), cells)[0]) == 1 + whole


@pytest.mark.parametrize(("end", "whole"), [(224, False), (223, True)])
def test_a_cell_is_cut_where_it_reaches_the_last_row_or_column(end, whole):
    for box in ((slice(end - 20, end), slice(60, 80)), (slice(60, 80), slice(end - 20, end))):
        cells = np.zeros((224, 224), np.int32)
        cells[100:120, 100:120], cells[box] = 1, 2
        assert len(cell_crops(np.full((224, 224, 3), 150, np.uint8), cells)[0]) == 1 + whole


def masks(shared_data, rest):
    "Image and true whole cell of every second image of wbc_masks (rest 1: odd numbers, for development)."
    for path in sorted((shared_data / "wbc_masks").glob("*.bmp")):
        if int(path.stem) % 2 == rest:
            yield read_image(path), cv2.imread(str(path.with_suffix(".png")), cv2.IMREAD_GRAYSCALE) > 0


def test_study_mask_equals_kmeans_on_real_images(shared_data):
    same, lowest = [], 1.0
    for path in sorted((shared_data / "taleqani").glob("*/*.jpg"))[::100]:
        channel = a_channel(read_image(path))
        exact, attempts = channel > otsu_threshold(channel), _kmeans_mask(channel)
        same.append((exact == attempts).all())
        lowest = min(lowest, mask_quality(exact, attempts)["iou"])
    assert len(same) >= 20 and np.mean(same) >= 0.9 and lowest > 0.95


def test_second_method_on_masks_held_back(shared_data):
    quality = {
        method: np.mean([mask_quality(segment(image, method), truth)["iou"] for image, truth in masks(shared_data, 0)])
        for method in SEGMENTATION_METHODS
    }
    assert quality["kmeans"] == pytest.approx(0.81, abs=0.01)
    assert quality["nucleus"] > 0.88


def test_second_method_leaves_the_scale_bar(shared_data):
    corner = {method: 0 for method in SEGMENTATION_METHODS}
    for path in sorted((shared_data / "taleqani" / "Early").glob("*.jpg"))[::20]:
        image = read_image(path)
        for method in SEGMENTATION_METHODS:
            corner[method] += segment(image, method)[208:216, 195:220].any()
    assert corner["nucleus"] <= corner["kmeans"] / 2


def test_distances_inside_a_cell_are_the_same_at_every_call():
    """OpenCV's exact distance transform differs in the last bit with the place in memory; watersheds follow ties."""
    mask = np.hypot(*np.mgrid[-26:27, -17:18]) < 16
    mask |= np.hypot(*np.mgrid[-40:13, -17:18]) < 12
    random, kept = np.random.default_rng(0), []
    first = cells_module._h_maxima(mask, 0.1)
    for _ in range(60):
        kept.append(np.zeros(random.integers(1, 3000)))  # moves the next array in memory
        again = cells_module._h_maxima(mask.copy(), 0.1)
        assert again[0] == first[0]
        np.testing.assert_array_equal(again[1], first[1])
        np.testing.assert_array_equal(again[2], first[2])


def slow_label_cells(mask, depth=0.1):
    """Parts of one component: h-maxima peak by peak, as they are defined, then the watershed."""
    distance = cv2.distanceTransform(np.pad(mask, 1).astype(np.uint8), cv2.DIST_L2, cv2.DIST_MASK_PRECISE)[1:-1, 1:-1]
    distance = np.sqrt(np.rint(np.square(distance, dtype=np.float64)))
    distance = cv2.GaussianBlur(distance, (0, 0), max(0.5, 0.04 * distance.max())).astype(np.float32) * mask
    level, maxima = distance * (1 - depth), np.zeros(mask.shape, bool)
    for peak in np.flatnonzero((distance == cv2.dilate(distance, None)) & mask):
        labels = cv2.connectedComponents((distance >= level.flat[peak]).view(np.uint8))[1]
        around = labels == labels.flat[peak]
        maxima |= around & (distance[around].max() == distance.flat[peak])  # unless it is the shoulder of a higher one
    return watershed(-distance, cv2.connectedComponents(maxima.view(np.uint8))[1], connectivity=2, mask=mask)


@pytest.mark.parametrize("seed", range(8))
def test_touching_cells_are_separated_as_peak_by_peak(seed):
    random, drawn = np.random.default_rng(seed), np.zeros((140, 160), np.uint8)
    for x, y, radius in zip(random.integers(30, 130, 14), random.integers(30, 110, 14), random.integers(6, 18, 14)):
        cv2.circle(drawn, (int(x), int(y)), int(radius), 1, -1)
    mask = cv2.connectedComponents(drawn)[1] == 1
    rows, columns = (slice(places.min(), places.max() + 1) for places in np.nonzero(mask))
    found = label_cells(mask, min_solidity=2)  # no component is left whole
    np.testing.assert_array_equal(found[rows, columns], slow_label_cells(mask[rows, columns]))
    assert label_cells(mask).max() in (1, found.max())


def test_cells_of_a_grainy_field_are_counted_in_one_pass():
    """Its mask is one ragged component of a thousand peaks, each of which once cost a pass of its own."""
    grain = cv2.GaussianBlur(np.random.default_rng(0).normal(size=(800, 800)), (0, 0), 3)
    start = time.process_time()
    assert label_cells(grain > grain.mean()).max() > 800
    assert time.process_time() - start < 4
