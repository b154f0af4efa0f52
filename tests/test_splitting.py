"""Properties of the split: exact counts, duplicates and groups in one subset, refusals that name the images."""

import os
import unicodedata
import warnings
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from leukemia_nb.data.manifest import mark_conflicting_labels, merge_groups
from leukemia_nb.processing.splitting import (
    SplitError,
    check_split,
    _assign_groups,
    image_groups,
    read_groups,
    read_split,
    smallest_class,
    split_pairs,
    stratified_sample,
    _subset_sizes,
)

COUNTS = {"Normal": 512, "Pre-B": 955, "Pro-B": 796}


def example_pairs(counts: dict[str, int]) -> pd.DataFrame:
    names = [(f"{label}/{number:04d}", label) for label, count in counts.items() for number in range(count)]
    table = pd.DataFrame(names, columns=["pair", "class"])
    return table.assign(path=table["pair"], sha256="sha " + table["pair"], pixels="pix " + table["pair"])


@given(st.integers(0, 3000), st.integers(1, 98), st.integers(1, 98))
def test_sizes_are_exact_floors(number, train, test):
    if train + test >= 100:
        return
    sizes = _subset_sizes(number, train / 100, test / 100)
    assert sizes["train"] == train * number // 100 and sizes["test"] == test * number // 100
    assert sum(sizes.values()) == number and min(sizes.values()) >= 0


@pytest.mark.parametrize("train, test", [(0.9, 0.1), (0, 0.1), (0.5, 0), (1.2, -0.3)])
def test_shares_that_cannot_be(train, test):
    with pytest.raises(ValueError, match="must be above 0"):
        _subset_sizes(100, train, test)


@given(st.sampled_from([(0.85, 0.05), (0.6, 0.2), (0.7, 0.29)]))
def test_smallest_class_is_smallest(shares):
    need = smallest_class(*shares)
    assert min(_subset_sizes(need, *shares).values()) >= 1
    assert all(min(_subset_sizes(number, *shares).values()) < 1 for number in range(need))


@pytest.mark.parametrize("seed", range(3))
def test_counts_of_the_original_study(seed):
    split = split_pairs(example_pairs(COUNTS), seed=seed)
    counts = pd.crosstab(split["class"], split["subset"])
    assert counts["test"].to_dict() == {"Normal": 25, "Pre-B": 47, "Pro-B": 39} and counts["test"].sum() == 111
    assert counts["train"].max() == 811
    assert counts["val"].to_dict() == {"Normal": 52, "Pre-B": 97, "Pro-B": 81}


@given(st.data())
@settings(deadline=None, max_examples=15)
def test_duplicates_stay_together_and_counts_stay_exact(data):
    counts = {label: data.draw(st.integers(20, 120)) for label in ("Normal", "Pre-B")}
    table = example_pairs(counts)
    for column in ("sha256", "pixels"):  # copies of some images, at most a third of a class, within one class
        for label in counts:
            rows = np.flatnonzero(table["class"] == label)
            size = data.draw(st.integers(2, 4))
            for start in range(0, data.draw(st.integers(0, len(rows) // 6)), size):
                offset = 0 if column == "sha256" else len(rows) // 6
                table.loc[rows[offset + start : offset + start + size], column] = f"{label} copies {start}"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        split = split_pairs(table, seed=data.draw(st.integers(0, 99)))
    split = split.merge(table[["pair", "pixels"]])
    for column in ("sha256", "pixels", "group"):
        assert split.groupby(column)["subset"].nunique().max() == 1
    for label, rows in split.groupby("class"):
        assert rows["subset"].value_counts().to_dict() == _subset_sizes(counts[label])


def test_split_is_random_and_uniform():
    assigned = [_assign_groups([2, 2] + [1] * 36, _subset_sizes(40), np.random.default_rng(seed)) for seed in range(300)]
    tested = np.mean(np.array(assigned) == "test", axis=0)
    assert tested.min() > 0.01 and tested.max() < 0.12  # 5 % each; no image and no couple is favoured


def test_duplicates_too_many_for_exact_counts():
    table = example_pairs({"Normal": 20})
    table["sha256"] = [f"twin {number // 2}" for number in range(20)]
    with pytest.warns(UserWarning, match="Normal: .* instead of .* because duplicates stay together"):
        split = split_pairs(table)
    assert split.groupby("sha256")["subset"].nunique().max() == 1 and set(split["subset"]) == {"train", "test", "val"}


@given(st.lists(st.tuples(st.integers(0, 8), st.integers(0, 8)), max_size=30))
def test_merge_groups_against_closure(rows):
    table = pd.DataFrame(rows, columns=["a", "b"], dtype=object)
    groups = merge_groups(table, ["a", "b"])
    near = np.array([[x[0] == y[0] or x[1] == y[1] for y in rows] for x in rows], bool).reshape(len(rows), len(rows))
    for _ in rows:
        near = near @ near
    assert (near == (groups[:, None] == groups[None])).all()


def test_empty_cells_tie_nothing():
    assert merge_groups(pd.DataFrame({"a": ["", "", None, np.nan, "x"]}), ["a"]).tolist() == [0, 1, 2, 3, 4]


def test_one_image_under_two_classes_is_left_out():
    table = example_pairs({"Normal": 21, "Pre-B": 21})
    table.loc[[0, 21], "pixels"] = "same"
    with pytest.warns(UserWarning, match="conflicting labels, left out: Normal/0000, Pre-B/0000"):
        split = split_pairs(table)
    assert len(split) == 40


def test_too_few_and_empty_classes():
    with pytest.raises(SplitError, match="class Pro-B has 19 usable images, this split needs 20 of each class"):
        split_pairs(example_pairs({"Normal": 30, "Pro-B": 19}))
    table = example_pairs({"Normal": 30, "Pro-B": 1}).assign(problem=[""] * 30 + ["broken"])
    with pytest.raises(SplitError, match="no usable image of class Pro-B"):
        split_pairs(table)
    assert len(split_pairs(example_pairs({"Normal": 5, "Pro-B": 6}), train_size=0.6, test_size=0.2)) == 11


def test_problem_images_are_left_out():
    table = example_pairs({"Normal": 25}).assign(problem=[""] * 23 + ["truncated", "empty"])
    assert list(split_pairs(table)["pair"]) == list(table["pair"][:23])


@given(st.integers(0, 50), st.integers(2, 9))
@settings(deadline=None, max_examples=4)
def test_grouped_split_parts_no_group(seed, size):
    table = example_pairs({"Normal": 90, "Pre-B": 140}).assign(slide=lambda table: [place // size for place in range(len(table))])
    table.loc[[0, 80], "sha256"] = "same"  # a duplicate on another slide ties the two slides together
    split = split_pairs(table, "grouped", table["slide"], seed=seed)
    slide = table.set_index("pair")["slide"][split["pair"]].to_numpy()
    assert pd.Series(split["subset"].to_numpy()).groupby(slide).nunique().max() == 1
    assert split["subset"][0] == split["subset"][80] and split["group"][0] == split["group"][80]
    proportions = pd.crosstab(split["class"], split["subset"], normalize="index")
    assert (proportions["train"] > 0.7).all() and (proportions["test"] < 0.2).all()
    mixed = table.sample(frac=1, random_state=1)
    pd.testing.assert_frame_equal(split, split_pairs(mixed, "grouped", mixed["slide"], seed=seed))


@pytest.mark.parametrize(("train", "test"), [(0.85, 0.05), (0.5, 0.4), (0.3, 0.6), (0.55, 0.3)])
@pytest.mark.parametrize("groups", [60, 12])
def test_grouped_split_has_the_proportions_that_the_groups_allow(train, test, groups):
    table = example_pairs({"Normal": 180, "Pre-B": 180})
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        split = split_pairs(table, "grouped", [f"{place // 180} {place % groups}" for place in range(360)], train, test)
    found = split.groupby("class")["subset"].value_counts(normalize=True).unstack()
    off = (found - pd.Series({"train": train, "test": test, "val": 1 - train - test})).abs()
    assert off.max(axis=None) < 1 / groups and (
        off.max(axis=None) <= 0.03 or "because groups stay together" in str(caught[0].message)
    )


def test_grouped_split_of_few_groups_warns_and_keeps_one_for_each_subset():
    table = example_pairs({"Normal": 40, "Pre-B": 40})
    with pytest.warns(UserWarning, match="class Normal: .*'test': 10.* instead of .*'test': 2.*because groups stay together"):
        split = split_pairs(table, "grouped", [f"{place // 40} {place % 4}" for place in range(80)])
    with pytest.warns(UserWarning, match="because groups stay together"):
        split = split_pairs(table, "grouped", [f"{place // 40} {place % 3}" for place in range(80)], 0.2, 0.7)
    assert set(split.groupby("class")["subset"].nunique()) == {3}


def test_groups_are_recorded_by_the_random_split_and_parted():
    table = example_pairs({"Normal": 60})
    split = split_pairs(table, groups=[number // 5 for number in range(60)])
    assert split["group"].tolist() == [number // 5 for number in range(60)]
    assert split.groupby("group")["subset"].nunique().max() > 1
    check_split(split)
    with pytest.raises(SplitError, match="same group in several subsets"):
        check_split(split, grouped=True)
    with pytest.raises(SplitError, match="3 groups for 60 pairs"):
        split_pairs(table, groups=[1, 2, 3])
    with pytest.raises(SplitError, match="too few groups"):
        split_pairs(table, "grouped", ["one"] * 60)


@pytest.mark.parametrize("originals", [5, 6, 7, 11])
def test_a_small_class_of_flip_copies_has_images_in_every_subset(originals):
    table = example_pairs({"Normal": 4 * originals})
    table["pixels"] = [f"pixels {number // 4}" for number in range(len(table))]
    for seed in range(4):
        split = split_pairs(table, seed=seed)
        copies = split["pair"].str[-4:].astype(int) // 4
        assert set(split["subset"]) == {"train", "val", "test"} and (split.groupby(copies)["subset"].nunique() == 1).all()
        assert (split["subset"] == "train").sum() >= len(table) // 2


def test_sample_has_the_classes_in_proportion():
    labels = np.repeat(["a", "b", "c"], [60, 30, 2])
    rows = stratified_sample(labels, 31, seed=1)
    assert np.unique(labels[rows], return_counts=True)[1].tolist() == [20, 10, 1] and (np.diff(rows) > 0).all()
    assert np.unique(labels[stratified_sample(labels, 4)], return_counts=True)[1].tolist() == [2, 1, 1]
    assert stratified_sample(labels, 3).size == 3 and stratified_sample(labels, 99).tolist() == list(range(92))
    assert (stratified_sample(labels, 31, 1) != stratified_sample(labels, 31, 2)).any()
    with pytest.raises(ValueError, match="2 images cannot show 3 classes"):
        stratified_sample(labels, 2)


@pytest.mark.parametrize("column, message", [("sha256", "same file"), ("group", "same group")])
def test_check_names_the_images(column, message):
    split = split_pairs(example_pairs({"Normal": 40}))
    first, second = (split.index[split["subset"] == subset][0] for subset in ("train", "test"))
    split.loc[second, column] = split.loc[first, column]
    with pytest.raises(SplitError, match=f"{message} in several subsets") as caught:
        check_split(split, grouped=True)
    for place in (first, second):
        assert f"{split['pair'][place]} ({split['subset'][place]})" in str(caught.value)


def test_check_refuses():
    split = split_pairs(example_pairs({"Normal": 40, "Pre-B": 40}))
    with pytest.raises(SplitError, match="twice in the split: Normal/0000"):
        check_split(pd.concat([split, split[:1]]))
    with pytest.raises(SplitError, match="no such subsets: validation"):
        check_split(split.replace("val", "validation"))
    lacking = split[(split["class"] == "Normal") | (split["subset"] != "test")]
    with pytest.raises(SplitError, match="class Pre-B has no images for test"):
        check_split(lacking)
    with pytest.raises(SplitError, match="same group"):
        check_split(split.assign(group="all"), grouped=True)
    check_split(split.assign(group=""), grouped=True)
    with pytest.raises(SplitError, match="same pixels"):
        check_split(split.assign(pixels="same"))


def test_round_trip_and_comparison(tmp_path):
    table = example_pairs({"Normal": 40, "Pre-B": 40})
    split = split_pairs(table)
    split.to_csv(tmp_path / "split.csv", index=False)
    pd.testing.assert_frame_equal(read_split(tmp_path / "split.csv", table)[split.columns], split, check_dtype=False)
    for other, message in [
        (table[1:], "1 missing here: Normal/0000"),
        (pd.concat([table, example_pairs({"Pro-B": 1})]), "1 not in the split: Pro-B/0000"),
        (table.replace("sha Normal/0003", "edited"), "1 changed: Normal/0003"),
    ]:
        with pytest.raises(SplitError, match=message):
            read_split(tmp_path / "split.csv", other)
    text = (tmp_path / "split.csv").read_text()
    (tmp_path / "split.csv").write_text(text.replace("subset", "part"))
    with pytest.raises(SplitError, match="not a split, it lacks subset"):
        read_split(tmp_path / "split.csv")


IMAGES = ("Pre/Snap_001.jpg", "Pre/Snap_002.jpg", "Pro/Snap_001.jpg", "Pro/Zoë 3.jpg")
GROUPS = ["7", "7", "Müller", "Müller"]


@pytest.fixture
def images(tmp_path):
    for name in IMAGES:
        (tmp_path / "data" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "data" / name).write_bytes(name.encode())
    return [str(tmp_path / "data" / name) for name in IMAGES]


def matched(path, images, data=""):
    "Groups of the images, and the lines that are said."
    said = []
    return image_groups(path, images, data=data, log=said.append), said


@pytest.mark.parametrize("separator", [",", ";", "\t", "|", ";\r"])
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "cp1252", "utf-16"])
def test_groups_out_of_any_spreadsheet(images, tmp_path, separator, encoding):
    separator, end = separator[0], "\r\n" if len(separator) > 1 else "\n"
    rows = [separator.join(row) for row in [("path", "group"), *zip(images, GROUPS)]]
    (tmp_path / "groups.csv").write_bytes((end.join(rows) + end).encode(encoding))
    assert matched(tmp_path / "groups.csv", images) == (GROUPS, [])


@pytest.mark.parametrize("encoding", ["utf-16-le", "utf-16-be"])
def test_utf16_without_its_mark_is_named(tmp_path, encoding):
    (tmp_path / "groups.csv").write_bytes("path,group\na.jpg,1\n".encode(encoding))
    with pytest.raises(SplitError, match="UTF-16 without a byte order mark.*Save the table as CSV"):
        read_groups(tmp_path / "groups.csv")


@pytest.mark.parametrize(
    "header", ["Path,Group", "FILE,Patient", "image,slide", "Image Path,Slide_ID", "file,overlap_group", "\"path\", 'group'"]
)
@pytest.mark.parametrize("order", [1, -1])
def test_groups_under_any_header(images, tmp_path, header, order):
    rows = [header.split(",")[::order], *([image, group][::order] for image, group in zip(images, GROUPS))]
    (tmp_path / "groups.csv").write_text(
        "".join(f"{number},{','.join(row)},note\n" for number, row in enumerate(rows)), encoding="utf-8"
    )
    assert matched(tmp_path / "groups.csv", images)[0] == GROUPS


@pytest.mark.parametrize(
    "spelled",
    [
        lambda image, root: image,
        lambda image, root: f' "{image}" ',
        lambda image, root: f"'{image}'",
        lambda image, root: os.path.relpath(image, root / "lists"),
        lambda image, root: os.path.relpath(image, root / "data"),
        lambda image, root: os.path.relpath(image),
        lambda image, root: os.path.relpath(image, root / "data").replace("/", "\\"),
        lambda image, root: "C:\\Users\\me\\" + os.path.relpath(image, root / "data").replace("/", "\\"),
        lambda image, root: "./" + os.path.relpath(image, root / "data"),
        lambda image, root: unicodedata.normalize("NFD", os.path.relpath(image, root / "data")),
    ],
    ids=[
        "absolute",
        "quoted",
        "single quotes",
        "to the list",
        "to the data",
        "to cwd",
        "backslashes",
        "drive",
        "dot",
        "decomposed",
    ],
)
def test_groups_by_any_kind_of_path(images, tmp_path, spelled):
    (tmp_path / "lists").mkdir()
    rows = [f"{spelled(image, tmp_path)},{group}" for image, group in zip(images, GROUPS)]
    (tmp_path / "lists/groups.csv").write_text("\n".join(["path,group", *rows]), encoding="utf-8")
    assert matched(tmp_path / "lists/groups.csv", images, tmp_path / "data") == (GROUPS, [])


def test_groups_by_file_name_where_only_one_image_has_it(images, tmp_path):
    (tmp_path / "groups.csv").write_text("path,group\nSnap_002.jpg,7\nZoë 3.jpg,8\n", encoding="utf-8")
    assert matched(tmp_path / "groups.csv", images)[0] == ["", "7", "", "8"]
    (tmp_path / "groups.csv").write_text("path,group\nSnap_001.jpg,7\n")
    with pytest.raises(SplitError, match="Snap_001.jpg may mean .*Pre/Snap_001.jpg or .*Pro/Snap_001.jpg"):
        matched(tmp_path / "groups.csv", images)


@pytest.mark.parametrize(
    "name", ["/data/Pre/caf\\xe9.jpg", "/data/Pre/caf\udce9.jpg"], ids=["as tables hold it", "as the disk holds it"]
)
def test_groups_of_an_image_whose_name_is_no_utf8(tmp_path, name):
    (tmp_path / "groups.csv").write_bytes("path,group\nPre/café.jpg,7\n".encode("cp1252"))
    assert matched(tmp_path / "groups.csv", [name]) == (["7"], [])


def test_file_name_in_another_folder_is_trusted_only_where_it_is_unique_and_said(images, tmp_path):
    (tmp_path / "groups.csv").write_text(
        "path,group\npatient 1/Snap_002.jpg,1\npatient 1/Snap_001.jpg,1\npatient 2/Snap_001.jpg,2\n"
    )
    found, said = matched(tmp_path / "groups.csv", images)
    assert found == ["", "1", "", ""]
    assert any("2 rows of no image here: patient 1/Snap_001.jpg, patient 2/Snap_001.jpg" in line for line in said)
    assert any("1 row matched by the file name alone, its folder is another: patient 1/Snap_002.jpg" in line for line in said)


def test_a_file_that_is_there_and_no_image_of_the_study_is_not_taken_for_one(images, tmp_path):
    other = tmp_path / "data/Early/Snap_002.jpg"
    other.parent.mkdir()
    other.write_bytes(b"another")
    for spelled in (other, "Early/Snap_002.jpg"):
        (tmp_path / "groups.csv").write_text(f"path,group\n{images[0]},7\n{spelled},8\n")
        assert matched(tmp_path / "groups.csv", images, tmp_path / "data")[0] == ["7", "", "", ""]


@pytest.mark.parametrize("second", ["Pre/Snap_001.jpg", "data/Pre/Snap_001.jpg", "D:\\x\\Pre\\Snap_001.jpg"])
def test_an_image_in_two_groups_is_refused(images, tmp_path, second):
    (tmp_path / "groups.csv").write_text(f"path,group\n{images[0]},patient 1\n{images[1]},patient 1\n{second},patient 2\n")
    with pytest.raises(SplitError, match="groups.csv: .*Pre/Snap_001.jpg is in two groups, patient 1 and patient 2. Keep one"):
        matched(tmp_path / "groups.csv", images, tmp_path / "data")
    (tmp_path / "groups.csv").write_text(f"path,group\n{images[0]},patient 1\n{second},patient 1\n")
    assert matched(tmp_path / "groups.csv", images, tmp_path / "data")[0][0] == "patient 1"


def test_images_without_a_group_and_rows_without_an_image_are_counted(images, tmp_path):
    (tmp_path / "groups.csv").write_text(
        f"path,group\n{images[0]},7\n{images[1]},\nPre/gone.jpg,7\nPre/lost.jpg,8\n\n;\n".replace(";", ",")
    )
    found, said = matched(tmp_path / "groups.csv", images)
    assert found == ["7", "", "", ""]
    assert any("3 images without a group, each a group of its own: " + images[1] in line for line in said)
    assert any("2 rows of no image here: Pre/gone.jpg, Pre/lost.jpg" in line for line in said)
    (tmp_path / "groups.csv").write_text("path,group\nPre/gone.jpg,7\n")
    with pytest.raises(SplitError, match="none of its 1 path is an image of this data .Pre/gone.jpg; .*Expected is"):
        matched(tmp_path / "groups.csv", images)


@pytest.mark.parametrize(
    "content, message",
    [
        (b"", "found: nothing"),
        (b"Pre/a.jpg,7\nPre/b.jpg,7\n", "found: Pre/a.jpg, 7"),
        (b"path,note\na.jpg,7\n", "that can be group"),
        (b"path,patient,slide\na.jpg,7,8\n", "more than one, that can be group"),
        (b"path,group\n", "no rows"),
        (b"path,group\na.jpg,\n", "no row has a group"),
        (b"path,group\n,7\n", "has no path"),
        (b"path,group\na,b.jpg,7\n", "a line does not have 2 columns: 'a,b.jpg,7'"),
        (b'path,group\n"a.jpg,7\nb.jpg,8\n', "close every quotation mark"),
        (b"PK\x03\x04\x14\x00\x06\x00\x08\x00", "an Excel workbook"),
        (b"\x81\x8d\x8f\xff", "not a text"),
    ],
)
def test_what_is_no_list_of_groups_is_one_line(tmp_path, content, message):
    (tmp_path / "groups.csv").write_bytes(content)
    with pytest.raises(SplitError, match="groups.csv: ") as caught:
        read_groups(tmp_path / "groups.csv")
    assert message in str(caught.value) and "\n" not in str(caught.value)
    if message.startswith(("found", "that", "more", "no rows")):
        assert "path,group" in str(caught.value) and "patient 7" in str(caught.value)


def test_a_list_of_groups_that_is_not_there(tmp_path):
    with pytest.raises(SplitError, match="No such file"):
        read_groups(tmp_path / "groups.csv")
    with pytest.raises(SplitError, match="directory"):
        read_groups(tmp_path)


@pytest.mark.parametrize("separator", [",", ";", "\t"])
@pytest.mark.parametrize("encoding", ["utf-8-sig", "cp1252", "utf-16"])
def test_split_file_out_of_any_spreadsheet(tmp_path, separator, encoding):
    table = example_pairs({"Normal": 40, "Prä-B": 40})
    split = split_pairs(table)
    text = split.rename(columns=str.title).to_csv(index=False, sep=separator, quoting=1, lineterminator="\r\n")
    (tmp_path / "split.csv").write_bytes((f"sep={separator}\r\n" + text).encode(encoding))
    pd.testing.assert_frame_equal(read_split(tmp_path / "split.csv", table)[split.columns], split, check_dtype=False)


def test_split_file_that_puts_an_image_into_two_subsets_is_named(tmp_path):
    split = split_pairs(example_pairs({"Normal": 40}))
    pd.concat([split, split[:1].assign(subset="test")]).to_csv(tmp_path / "split.csv", index=False)
    with pytest.raises(SplitError, match="split.csv: twice in the split: Normal/0000"):
        read_split(tmp_path / "split.csv")


def test_copies_under_two_classes_get_a_problem_that_names_the_other():
    table = example_pairs({"Normal": 3, "Pre-B": 3}).assign(path=list("abcdef"), problem=["", "", "broken", "", "", ""])
    table.loc[[0, 3], "pixels"] = "same"
    found = mark_conflicting_labels(table, copies=[0, 1, 2, 3, 1, 2])  # c is broken, so its copy f stays
    assert found["problem"][0] == "a: the same image lies under another class: d. Remove the wrong one."
    assert list(found["pair"][found["problem"] == ""]) == ["Pre-B/0002"] and list(found.columns) == list(table.columns)


def test_real_images(shared_data):
    from leukemia_nb.data.files import file_sha256
    from leukemia_nb.data.classes import read_class_map

    table = pd.read_csv(shared_data / "taleqani_fields.csv").rename(columns={"file": "path", "overlap_group": "field"})
    class_map = read_class_map()
    table["class"] = [class_map.class_of(Path(path).parts[0]) for path in table["path"]]
    table = table[table["class"].isin(COUNTS)].reset_index(drop=True)
    table = table.assign(pair=table["path"], sha256=[file_sha256(shared_data / "taleqani" / path) for path in table["path"]])
    random, grouped = (split_pairs(table, method, table["field"]) for method in ("random", "grouped"))
    for _, rows in random.groupby("class"):
        assert rows["subset"].value_counts().to_dict() == _subset_sizes(len(rows))
    with pytest.raises(SplitError, match="same group"):
        check_split(random, grouped=True)
    shares = pd.crosstab(grouped["class"], grouped["subset"], normalize="index")
    assert (shares["test"] - 0.05).abs().max() < 0.01 and (shares["train"] - 0.85).abs().max() < 0.03


@pytest.fixture(scope="module")
def split_step(tmp_path_factory):
    """The split step on smears with one of each bad kind: its run folder, and what it printed for a list of patients."""
    papermill = pytest.importorskip("papermill")
    from leukemia_nb.data.manifest import CLASSES, build_manifest
    from leukemia_nb.data.images import read_image, write_image
    from leukemia_nb.processing.dataset import prepare_pairs
    from leukemia_nb.study.settings import Run
    from leukemia_nb.data.synthetic import write_smears

    folder = tmp_path_factory.mktemp("split step")
    data = folder / "data"
    write_smears(data, 24, seed=1, height=120, width=160)
    normal, pre = sorted((data / "Normal").glob("*.png")), sorted((data / "Pre-B").glob("*.png"))
    (data / "Normal/empty.png").write_bytes(b"")
    (data / "Normal/text.jpg").write_text("no image")
    (data / "Normal/torn.png").write_bytes(normal[0].read_bytes()[:500])
    (data / "Pre-B/same file.png").write_bytes(normal[1].read_bytes())
    write_image(data / "Pre-B/flipped.png", read_image(normal[2])[:, ::-1])
    write_image(data / "Pre-B/saved again.jpg", read_image(normal[3]), quality=85)
    write_image(data / "Pre-B/zoom.jpg", read_image(pre[5]), quality=85)  # a near-duplicate in its own class
    rows = [f"Pre-B\\{pre[5].name};patient 1", "Pre-B\\zoom.jpg;patient 2"]
    rows += [f"Pro-B\\{file.name};patient 3" for file in sorted((data / "Pro-B").glob("*.png"))[:4]] + [
        "Pro-B\\gone.png;patient 4"
    ]
    (folder / "patients.csv").write_text("\r\n".join(["Image;Patient", *rows]), encoding="utf-16")
    run = Run(folder / "run")
    manifest = build_manifest(data, CLASSES)
    run.write_table(manifest, "manifest.csv")
    pre[9].unlink()  # vanishes before it is prepared
    run.write_table(prepare_pairs(manifest, run.folder / "prepared", size=96), "pairs.csv")
    run.write_json({"data": str(data), "classes": 3}, "study.json")
    notebook = Path(__file__).parents[1] / "nbs/study/15_split.ipynb"
    parameters = {"run": str(run.folder), "split": "grouped", "groups": str(folder / "patients.csv")}
    done = papermill.execute_notebook(
        str(notebook), str(folder / "split.ipynb"), parameters, progress_bar=False, start_timeout=300
    )
    outputs = [output for cell in done.cells for output in cell.get("outputs", [])]
    shown = [output["data"] for output in outputs if "data" in output]
    return run, "\n".join("".join(data.get("text/markdown", data.get("text/plain", ""))) for data in shown)


BAD = {
    "Normal/empty",
    "Normal/text",
    "Normal/torn",
    "Normal/Normal_002",
    "Pre-B/same file",
    "Normal/Normal_003",
    "Pre-B/flipped",
    "Normal/Normal_004",
    "Pre-B/saved again",
    "Pre-B/Pre-B_010",
}


def test_split_step_leaves_out_and_lists_one_of_each_bad_kind(split_step):
    run, said = split_step
    assert set(run.table("left_out.csv").pair) == BAD and (run.table("left_out.csv").problem != "").all()
    for name in ("split.csv", "dataset.csv"):
        assert not BAD & set(run.table(name).pair)
    assert len(run.table("split.csv")) == len(run.table("pairs.csv")) - len(BAD)
    assert f"Images left out: {len(BAD)}." in said


def test_split_step_joins_the_list_with_what_it_finds(split_step):
    run, said = split_step
    split = run.table("split.csv").set_index("pair")
    pairs = {frozenset(pair) for pair in run.table("near_duplicates.csv")[["a", "b"]].to_numpy()}
    assert frozenset(("Pre-B/Pre-B_006", "Pre-B/zoom")) in pairs
    assert split.group["Pre-B/Pre-B_006"] == split.group["Pre-B/zoom"], "listed apart, found together"
    assert split.loc[[f"Pro-B/Pro-B_00{number}" for number in range(1, 5)], "group"].nunique() == 1, "not found, listed together"
    assert split.groupby("group").subset.nunique().max() == 1
    assert "images without a group, each a group of its own" in said and "1 row of no image here: Pro-B" in said


def test_a_cell_that_says_there_is_no_group_is_none(tmp_path):
    cells = ["7", "NA", "NA", "NaN", "n7", "N/A"]
    (tmp_path / "g.csv").write_text("path,patient\n" + "".join(f"{number}.png,{cell}\n" for number, cell in enumerate(cells)))
    assert read_groups(tmp_path / "g.csv")["group"].tolist() == ["7", "n7"]
    lines: list[str] = []
    groups = image_groups(tmp_path / "g.csv", [tmp_path / f"{number}.png" for number in range(6)], log=lines.append)
    assert groups == ["7", "", "", "", "n7", ""] and "4 images without a group" in lines[0]
