"""The table, label image and GeoJSON of single cells: one number a cell, areas to the pixel, polygons that redraw the mask."""

import json

import cv2
import numpy as np
import pandas as pd
import pytest
from hypothesis import given, strategies
from hypothesis.extra.numpy import arrays
from skimage.measure import label, regionprops_table

from leukemia_nb.data.images import read_image, write_image
from leukemia_nb.data.synthetic import make_smear
from leukemia_nb.processing.cells import find_cells, find_cells_and_nuclei
from leukemia_nb.processing.measurements import _cells_geojson, _mask_polygon, measure_cells, _read_cells, write_cells
from leukemia_nb.processing.quality_control import segment_folder

MASKS = arrays(bool, strategies.tuples(strategies.integers(1, 9), strategies.integers(1, 9)), elements=strategies.booleans())


def polygons(geometry):
    return [geometry["coordinates"]] if geometry["type"] == "Polygon" else geometry["coordinates"]


def fill(geometry, shape):
    """The pixels whose centre lies in a geometry."""
    filled = np.zeros(shape, bool)
    for rings in polygons(geometry):
        for ring in rings:  # even-odd rule
            double = cv2.fillPoly(np.zeros((2 * shape[0], 2 * shape[1]), np.uint8), [2 * np.array(ring)], 1)
            filled ^= double[1::2, 1::2] > 0
    return filled


def twice_the_area(ring):
    """Positive where the ring runs counter-clockwise."""
    x, y = np.array(ring).T
    return int((x[:-1] * y[1:] - x[1:] * y[:-1]).sum())


@given(MASKS)
def test_polygons_redraw_any_mask_and_have_its_area(mask):
    if not mask.any():
        return
    geometry = _mask_polygon(mask, (0, 0))
    assert (fill(geometry, mask.shape) == mask).all()
    rings = [ring for rings in polygons(geometry) for ring in rings]
    assert sum(map(twice_the_area, rings)) == 2 * mask.sum()
    for outer, *holes in polygons(geometry):
        assert twice_the_area(outer) > 0 and all(twice_the_area(hole) < 0 for hole in holes)
    for ring in rings:
        assert ring[0] == ring[-1] and len(ring) >= 5 and len(set(map(tuple, ring[:-1]))) == len(ring) - 1
    assert len(polygons(geometry)) == label(mask, connectivity=1).max()


@given(MASKS)
def test_polygons_are_valid_for_a_library_of_geometry(mask):
    shapely = pytest.importorskip("shapely.geometry", exc_type=ImportError)
    if mask.any():
        shape = shapely.shape(_mask_polygon(mask))
        assert shape.is_valid and shape.area == mask.sum()


def test_columns_are_those_of_regionprops_table():
    image = make_smear("Pre-B", seed=2).image
    cells, nuclei = find_cells_and_nuclei(image)
    assert (cells == find_cells(image)).all() and set(np.unique(nuclei)) <= set(np.unique(cells))
    table = measure_cells(image, cells, nuclei)
    names = ("label", "centroid", "bbox", "area", "perimeter", "eccentricity", "solidity", "intensity_mean")
    expected = pd.DataFrame(regionprops_table(cells, image, properties=names))
    pd.testing.assert_frame_equal(table[expected.columns], expected, atol=1e-4, check_exact=False)
    assert (table["nc_ratio"].between(0, 1, inclusive="right")).all()
    assert table["nucleus_area"].tolist() == [int((nuclei == number).sum()) for number in table["label"]]
    assert measure_cells(image, cells)["nc_ratio"].isna().all()


def test_cells_at_the_border_are_flagged():
    cells = np.zeros((20, 30), np.int32)
    for number, window in enumerate([(0, 9, 9, 14), (8, 12, 0, 4), (15, 20, 9, 14), (8, 12, 26, 30), (8, 12, 9, 14)], 1):
        cells[window[0] : window[1], window[2] : window[3]] = number
    table = measure_cells(np.zeros((20, 30, 3), np.uint8), cells)
    assert table["touches_border"].tolist() == [True, True, True, True, False]


def test_an_image_without_cells_and_a_grey_one_have_tables():
    empty = measure_cells(np.zeros((20, 30), np.uint8), np.zeros((20, 30), np.int32))
    assert len(empty) == 0 and "nc_ratio" in empty
    assert _cells_geojson(empty, np.zeros((20, 30), np.int32)) == {"type": "FeatureCollection", "features": []}
    with pytest.raises(ValueError, match="one size"):
        measure_cells(np.zeros((20, 30), np.uint8), np.zeros((30, 20), np.int32))


def test_a_label_image_of_too_many_cells_is_refused(tmp_path):
    cells = np.arange(70_000, dtype=np.int32).reshape(100, 700)
    with pytest.raises(ValueError, match="65,535"):
        write_cells((tmp_path / "a.png", tmp_path / "a.geojson"), pd.DataFrame(), cells)


@pytest.fixture(scope="module", params=["kmeans", "nucleus"])
def segmented(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp(request.param)
    for number, name in enumerate(("a.png", "Pre/=b.jpg")):
        write_image(folder / "in" / name, make_smear("Pre-B", number, 192, 256).image)
    (folder / "in" / "broken.png").write_bytes(b"")
    segment_folder(folder / "in", folder / "out", request.param)
    return folder / "out", request.param


def test_table_label_images_and_polygons_of_a_folder_agree(segmented):
    out, method = segmented
    qc, table = pd.read_csv(out / "qc.csv", keep_default_na=False), pd.read_csv(out / "cells.csv")
    assert set(table["path"]) == {"a.png", "Pre/=b.jpg"} and "broken.png" in set(qc["path"])
    for row in qc[qc["problem"] == ""].itertuples():
        labels, rows = cv2.imread(str(out / row.labels), cv2.IMREAD_UNCHANGED), table[table["path"] == row.path]
        assert labels.dtype == np.uint16 and rows["label"].tolist() == list(range(1, int(row.n_cells) + 1))
        assert ((labels > 0) == (read_image(out / row.mask)[..., 0] > 0)).all()
        features = json.loads((out / row.geojson).read_text())["features"]
        assert rows["area"].tolist() == np.bincount(labels.ravel())[1:].tolist()
        for feature, number in zip(features, rows["label"], strict=True):
            assert (fill(feature["geometry"], labels.shape) == (labels == number)).all()
            assert feature["properties"]["objectType"] == ("cell" if method == "nucleus" else "detection")
            assert ("nucleusGeometry" in feature) == (method == "nucleus")
            assert all(isinstance(value, float) for value in feature["properties"]["measurements"].values())  # as QuPath
            assert set(feature["properties"]["classification"]) == {"name", "color"}
    assert table["nc_ratio"].isna().all() == (method == "kmeans")


def test_the_table_stays_when_the_folder_is_segmented_again(segmented):
    out, method = segmented
    before = (out / "cells.csv").read_bytes()
    file = next((out / "geojson").rglob("*.geojson"))
    file.write_text("{}")
    segment_folder(out.parent / "in", out, method)
    assert (out / "cells.csv").read_bytes() == before and len(_read_cells(file)) > 0
