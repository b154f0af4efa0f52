"""Any classes: class maps, names of folders, given splits, groups from folders, two and twenty classes."""

import os
from dataclasses import replace
from pathlib import Path

import pandas as pd
import pytest
from typer.testing import CliRunner

from leukemia_nb.data.classes import (
    CLASSES,
    FOUR_CLASSES,
    ClassMapError,
    folder_classes,
    named_classes,
    read_class_map,
    subset_of,
    write_class_map,
)
from leukemia_nb.data.files import read_table, write_table
from leukemia_nb.data.manifest import ImageError, ImageSearch, build_manifest, resolve_classes, search_images, select_classes
from leukemia_nb.data.synthetic import write_smears
from leukemia_nb.evaluation.metrics import (
    class_table,
    compare_models,
    confusion_figure,
    precision_recall_figure,
    readable_comparison,
    roc_figure,
)
from leukemia_nb.plotting import class_colours
from leukemia_nb.processing.splitting import SplitError, folder_split, folder_subsets, parent_groups
from leukemia_nb.study.command_line import app
from leukemia_nb.study.settings import Run, StudyError, StudySettings, check_study
from leukemia_nb.testing import dummy_predictions

TWO = '[classes.Benign]\nfolders = ["Benign"]\n[classes.Malignant]\nfolders = ["Pre", "Pro-B"]\n'


def touched(folder: Path, *names: str) -> ImageSearch:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()
    return search_images(folder)


# --- class maps


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("classes = 3", "classes in the file is 3; it must be a table"),
        ("[classes", "no valid TOML"),
        ("", "names 0 classes, and at least two are needed"),
        ('[classes.A]\nfolders = ["a"]', "names 1 classes"),
        ("[classes.A]\n[classes.B]\nfolders=['b']", "class A has no folders. Expected is"),
        ("[classes.A]\nfolders = []\n[classes.B]\nfolders=['b']", "class A has no folders"),
        ("[classes.A]\nfolders = 'a'\n[classes.B]\nfolders=['b']", "folders in class A is 'a'; it must be a list"),
        ("[classes.A]\nfolders = [1]\n[classes.B]\nfolders=['b']", "must be a list of folder names"),
        ("[classes.A]\nfolders = ['x/a']\n[classes.B]\nfolders=['b']", "is a path. Give the name of the one folder"),
        ("[classes.A]\nfolder = ['a']\n[classes.B]\nfolders=['b']", "unknown key 'folder' in class A; the keys are folders"),
        ("exclud = []\n" + TWO, "unknown key 'exclud' in the file"),
        (TWO.replace('"Pre"', '"be_nign"'), "'be_nign' stands in class Benign and class Malignant"),
        ("exclude = ['PRO B']\n" + TWO, "stands in class Malignant and exclude"),
        ("negative = 'Normal'\n" + TWO, "negative is 'Normal', which is none of its classes: Benign, Malignant"),
        (TWO.replace("classes.Benign", "classes.'a/b'"), "'a/b' cannot be the name of a class"),
        (TWO.replace("classes.Benign", "classes.malignant"), "a class is named twice"),
        ("classes = {A = 1}", "class A is no table"),
    ],
)
def test_a_bad_class_map_is_one_clear_message(tmp_path, text, message):
    path = tmp_path / "map.toml"
    path.write_text(text)
    with pytest.raises(ClassMapError) as error:
        read_class_map(path)
    assert message in str(error.value) and "map.toml" in str(error.value) and "\n" not in str(error.value)


def test_a_class_map_that_is_not_there():
    with pytest.raises(ClassMapError, match=r"nowhere.toml: cannot be read: No such file"):
        read_class_map("nowhere.toml")


def test_a_class_map_is_read_back_as_it_was_written(tmp_path):
    odd = 'quotes " and \\ and ü'
    text = TWO.replace("folders = [", f"description = '''{odd}'''\nfolders = [", 1)
    (tmp_path / "map.toml").write_text('negative = "Benign"\nexclude = ["Blurred"]\n' + text, encoding="utf-8")
    first = read_class_map(tmp_path / "map.toml")
    write_class_map(tmp_path / "again.toml", first)
    again = read_class_map(tmp_path / "again.toml")
    for name in ("classes", "folders", "descriptions", "negative", "exclude"):
        assert getattr(again, name) == getattr(first, name)
    assert first.descriptions == {"Benign": odd} and first.class_of("blurred") == ""


def test_the_built_in_map_has_the_fourth_class_as_an_option(tmp_path):
    built_in = read_class_map()
    assert built_in.classes == CLASSES and tuple(built_in.folders) == FOUR_CLASSES and built_in.negative == "Normal"
    assert built_in.select(["Pre-B", "Pro-B"]).negative == ""
    write_class_map(tmp_path / "used.toml", built_in)
    used = read_class_map(tmp_path / "used.toml")
    assert used.class_of("Early") == "" and used.class_of("[Malignant] Pro-B") == "Pro-B"


def test_class_names_that_are_numbers_stay_text(tmp_path):
    table = pd.DataFrame({"class": ["0", "1"], "foreground": ["0", None], "predicted": ["01", "NA"]})
    write_table(tmp_path / "table.csv", table)
    found = read_table(tmp_path / "table.csv")
    assert found["class"].tolist() == ["0", "1"] and found["predicted"].tolist() == ["01", "NA"]
    assert found["foreground"][0] == "0" and pd.isna(found["foreground"][1])


def test_names_of_folders_are_compared_without_case_and_dashes_but_with_plus():
    signs = named_classes(["CD19", "CD19+"])
    assert signs.class_of("cd-19") == "CD19" and signs.class_of("[CD19+]") == "CD19+" and signs.class_of("CD20") is None
    two = named_classes(["Normal", "ALL"])
    assert two.class_of("Benign") == "Normal" and two.class_of("Pre") is None


# --- classes by the names of the folders


@pytest.mark.parametrize(
    ("names", "classes"),
    [
        (["all/1.png", "hem/2.png"], ("all", "hem")),
        (["C/fold_0/all/1.png", "C/fold_0/hem/2.png", "C/fold_1/all/3.png"], ("all", "hem")),
        (["train/a/1.png", "valid/a/2.png", "Testing_set/b/3.png", "test/c/4.png"], ("a", "b", "c")),
        (["a/P1/1.png", "a/P2/2.png", "b/P1/S3/3.png"], ("a", "b")),
        (["set/images/a/1.png", "set/images/b/2.png", "set/readme.png"], ("a", "b")),
        (["train/Lymph Node/1.png", "test/lymph_node/2.png", "test/b/1.png"], ("Lymph Node", "b")),
    ],
)
def test_layouts_in_circulation(tmp_path, names, classes):
    search = touched(tmp_path, *names)
    found = resolve_classes(search)
    assert found.classes == classes
    labels = [found.class_of_path(path, tmp_path) for path in search.paths if len(path.relative_to(tmp_path).parts) > 2]
    assert None not in labels


PBC = ("basophil", "eosinophil", "erythroblast", "ig", "lymphocyte", "monocyte", "neutrophil", "platelet")
AML = tuple("BAS EBO EOS KSC LYA LYT MMZ MOB MON MYB MYO NGB NGS PMB PMO".split())


@pytest.mark.parametrize("names", [PBC, AML])
def test_public_sets_of_eight_and_fifteen_classes(tmp_path, names):
    search = touched(tmp_path, *(f"set/{name}/{name}_{number}.jpg" for name in names for number in range(2)))
    found = resolve_classes(search)
    assert found.classes == names and {label for _, label in select_classes(search, found).rows} == set(names)


def test_folders_of_one_class_or_none_are_no_study(tmp_path):
    touched(tmp_path, "a/1.png", "a/2.png")
    with pytest.raises(ClassMapError, match="only in folder a, and a study needs two classes"):
        folder_classes(search_images(tmp_path).paths, tmp_path)
    with pytest.raises(ClassMapError, match="in no folder of a class"):
        folder_classes([tmp_path / "1.png"], tmp_path)


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["Benign/P1/1.png", "Benign/P2/2.png"], "all images lie below one class, Normal"),
        (["P1/Benign/1.png", "P2/Benign/2.png"], "all images lie below one class, Normal"),
        (["P1/ALL/1.png", "P1/HC/2.png", "P2/ALL/3.png", "P2/HC/4.png"], r"the same folders \(ALL, HC\) lie in p1, p2"),
        (["P1/ALL/1.png", "P2/train/HC/2.png", "P3/test/ALL/3.png"], r"the same folders \(ALL, HC\) lie in p1, p2, p3"),
    ],
)
def test_patients_are_not_taken_for_classes(tmp_path, names, message):
    search = touched(tmp_path, *names)
    with pytest.raises(ClassMapError, match=f"{message}.*--class-map"):
        resolve_classes(search)
    top = sorted({Path(name).parts[0] for name in names})
    if len(top) > 1:
        assert resolve_classes(search, classes=top).classes == tuple(top)  # by the user's own word


def test_the_data_folder_is_a_class_only_where_none_lies_in_it(tmp_path):
    touched(
        tmp_path, *(f"pro/{name}/x.png" for name in ("Benign", "Pre", "Pro", "Unsorted")), "pro/x.png", "alone/Pro/slide/x.png"
    )
    found = named_classes(CLASSES)
    labels = {
        name: found.class_of_path(tmp_path / "pro" / name, tmp_path / "pro") for name in ("Pre/x.png", "Unsorted/x.png", "x.png")
    }
    assert labels == {"Pre/x.png": "Pre-B", "Unsorted/x.png": None, "x.png": None}
    folder = tmp_path / "alone/Pro"
    assert found.class_of_path(folder / "slide/x.png", folder) == "Pro-B"
    with pytest.warns(UserWarning, match="images in Unsorted left out"):
        (tmp_path / "pro/x.png").unlink()
        manifest = build_manifest(tmp_path / "pro")
    assert set(manifest["class"]) == set(CLASSES) and len(manifest) == 3


@pytest.mark.skipif(os.name != "posix", reason="names that are no UTF-8")
def test_a_class_whose_name_is_no_utf8_is_refused_and_a_spelling_is_not(tmp_path):
    touched(tmp_path, os.fsdecode(b"ALL\xe9/1.png"), "HC/2.png")
    with pytest.raises(ClassMapError, match="cannot be the name of a class.*Rename it"):
        resolve_classes(search_images(tmp_path))
    search = touched(tmp_path, "ALL/1.png", "ALL/2.png")
    write_class_map(tmp_path / "map.toml", resolve_classes(search))
    labels = [read_class_map(tmp_path / "map.toml").class_of_path(path, tmp_path) for path in search.paths]
    assert labels.count("ALL") == 3 and labels.count("HC") == 1


KAGGLE = ["Benign/1.png", "Early/1.png", "Pre/1.png", "Pro/1.png"]


@pytest.mark.parametrize(
    ("names", "classes", "line"),
    [
        (KAGGLE, CLASSES, "left out, of class Early Pre-B = Early (1)"),
        ([*KAGGLE, "unsorted/2.png", "3.png"], CLASSES, "left out, in folders of no class = no folder (1), unsorted (1)"),
        (["Benign/1.png", "[Malignant] Pre-B/1.png"], ("Normal", "Pre-B"), "Pre-B = [Malignant] Pre-B (1)"),
        (["Benign/1.png", "Malignant/1.png"], ("Benign", "Malignant"), "(of the built-in classes only Normal found):"),
        (
            ["normal/1.png", "pre/1.png", "other/1.png"],
            ("normal", "other", "pre"),
            "(of the built-in classes only Normal, Pre-B found):",
        ),
    ],
)
def test_mixed_names_are_taken_as_a_whole_and_said(tmp_path, names, classes, line):
    search = touched(tmp_path, *names)
    found = resolve_classes(search)
    assert found.classes == classes and line in select_classes(search, found).classes


def test_classes_that_are_named_are_taken_or_refused(tmp_path):
    search = touched(tmp_path, *KAGGLE, "other/2.png")
    assert resolve_classes(search, classes=FOUR_CLASSES).classes == FOUR_CLASSES
    chosen = resolve_classes(search, classes=("other", "Benign"))
    assert chosen.classes == ("other", "Benign") and "of class Pre = Pre (1)" in select_classes(search, chosen).classes
    assert select_classes(search, chosen).classes.startswith("classes by the names of the folders: other = other (1)")
    with pytest.raises(ClassMapError, match="there is no class 'Normal', 'B'; the classes are Benign, Early, Pre, Pro, other"):
        resolve_classes(search, classes=("Normal", "B"))
    (tmp_path / "map.toml").write_text("exclude = ['Early']\n" + TWO)
    merged = resolve_classes(search, tmp_path / "map.toml")
    line = select_classes(search, merged).classes
    assert "Benign = Benign (1); Malignant = Pre (1); left out" in line
    assert "left out, in folders that the class map leaves out = Early (1)" in line and "of no class = Pro (1), other (1)" in line


def test_subsets_by_their_names():
    assert [subset_of(name) for name in ("TRAIN", "valid", "Validation Set", "testing_data", "contest", "trainer", "")] == [
        *("train", "val", "val", "test"),
        *("", "", ""),
    ]


# --- what a study says and does with them


@pytest.fixture(scope="module")
def smears(tmp_path_factory) -> Path:
    """Four images of three classes with other names, of two patients each, in given subsets."""
    folder = tmp_path_factory.mktemp("classes") / "smears"
    names = ("blast", "lymphocyte", "monocyte")
    for seed, subset in enumerate(("train", "valid", "test")):
        write_smears(folder / subset, 4, names, seed=seed, height=48, width=64)
        for name in names:
            for file in sorted((folder / subset / name).iterdir()):
                patient = f"{subset}{int(file.stem[-1]) % 2}"
                (folder / subset / name / patient).mkdir(exist_ok=True)
                file.rename(folder / subset / name / patient / file.name)
        for extra in (folder / subset / "truth").rglob("*"):
            extra.unlink() if extra.is_file() else None
    return folder


def test_check_study_says_what_was_taken_for_what(smears, tmp_path):
    settings = StudySettings(data=str(smears), models=("cells",), weights="random", train_size=0.6, test_size=0.2)
    lines = check_study(settings, Run(tmp_path / "run"))
    assert lines[0].startswith("classes by the names of the folders: blast = blast (12); lymphocyte = ")
    assert "train (12), " in lines[1] and "--split folders takes them as they are" in lines[1] and len(lines) == 2
    lines = check_study(replace(settings, split="folders", groups_from="parent"), Run(tmp_path / "run"))
    assert "6 groups by the folders below" in lines[1] and "6 folders of the same name below several classes" in lines[2]
    with pytest.raises(ImageError, match=r"class blast has 12 images, and the split needs 20.*--class-map"):
        check_study(replace(settings, train_size=0.85, test_size=0.05), Run(tmp_path / "run"))
    with pytest.raises(StudyError, match="audit_images is 2, fewer than the 3 classes"):
        check_study(replace(settings, audit_images=2), Run(tmp_path / "run"))
    part = replace(settings, data=str(smears / "train"), split="folders")
    with pytest.raises(ClassMapError, match="which are the classes, and which patients"):  # two folders in each of three
        check_study(part, Run(tmp_path / "run"))
    with pytest.raises(SplitError, match="in no folder train, val or test"):
        check_study(replace(part, classes=("blast", "lymphocyte", "monocyte")), Run(tmp_path / "run"))


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ({"classes": "Normal"}, "a list of class names is expected"),
        ({"classes": ("Normal",)}, "at least two classes, and classes names only Normal"),
        ({"classes": ("A", "a")}, "named twice"),
        ({"class_map": "/no/such.toml"}, "class_map is not there"),
        ({"class_map": __file__}, "for images of your own"),
        ({"split": "folders"}, "for images of your own"),
        ({"groups_from": "name"}, "groups_from is 'name'; it must be one of parent"),
    ],
)
def test_settings_that_cannot_be(bad, message):
    with pytest.raises(StudyError, match=message):
        StudySettings(**bad)


def test_prepare_merges_and_leaves_out_by_a_class_map(smears, tmp_path):
    path = tmp_path / "map.toml"
    path.write_text('exclude = ["monocyte"]\n' + TWO.replace('"Benign"', '"Lymphocyte"').replace('"Pre"', '"blast"'))
    arguments = ["prepare", str(smears / "train"), "--out", str(tmp_path / "out"), "--size", "32", "--class-map", str(path)]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0 and "left out, in folders that the class map leaves out = monocyte (4)" in result.output
    assert dict(read_table(tmp_path / "out/manifest.csv")["class"].value_counts()) == {"Benign": 4, "Malignant": 4}
    assert read_class_map(tmp_path / "out/class_map.toml").classes == ("Benign", "Malignant")
    result = CliRunner().invoke(app, [*arguments, "--classes", "Malignant,Normal"])
    assert isinstance(result.exception, ClassMapError) and "there is no class 'Normal'" in str(result.exception)


def test_groups_are_the_folders_below_the_class(tmp_path):
    lines: list[str] = []
    images = [
        tmp_path / name for name in ("fold_0/all/P1/1.png", "fold_1/all/P1/2.png", "fold_0/hem/P2/s/3.png", "fold_0/hem/4.png")
    ]
    found = named_classes(["all", "hem"])
    assert parent_groups(images, tmp_path, found, lines.append) == ["P1", "P1", "P2/s", ""]
    assert parent_groups(images, tmp_path / "x" / "..", found, [].append) == ["P1", "P1", "P2/s", ""]
    assert len(lines) == 2 and "1 image in no folder below that of the class" in lines[1]
    with pytest.raises(SplitError, match="Leave out --groups-from parent"):
        parent_groups(images[-1:], tmp_path, found, lines.append)


def test_a_subset_below_the_class_is_no_group(tmp_path):
    names = ["all/train/P1/1.png", "all/test/P1/2.png", "hem/P2/val/3.png", "hem/fold_1/4.png"]
    found, lines = named_classes(["all", "hem"]), list[str]()
    assert parent_groups([tmp_path / name for name in names], tmp_path, found, lines.append) == ["P1", "P1", "P2", ""]
    with pytest.raises(SplitError, match="Leave out --groups-from parent"):
        parent_groups([tmp_path / "all/train/1.png", tmp_path / "hem/test/2.png"], tmp_path, found, lines.append)


def test_a_negative_class_may_be_optional(tmp_path):
    text = 'negative = "Lymph"\n' + "".join(f'[classes.{name}]\nfolders = ["{name}"]\n' for name in ("Blast", "Hem", "Lymph"))
    (tmp_path / "map.toml").write_text(text + "optional = true\n")
    found = read_class_map(tmp_path / "map.toml")
    assert found.select(["Blast", "Lymph"]).negative == "Lymph" and found.select(["Blast", "Hem"]).negative == ""
    write_class_map(tmp_path / "written.toml", found)
    assert read_class_map(tmp_path / "written.toml").classes == ("Blast", "Hem")


def test_a_given_split_is_taken_or_refused(tmp_path):
    names = [f"{subset}/{label}/x.png" for subset in ("Training", "val", "test") for label in "ab"]
    table = pd.DataFrame({"pair": names, "path": names, "class": list("ab") * 3, "sha256": list("uvwxyz")})
    assert list(folder_split(table, tmp_path)["subset"]) == ["train", "train", "val", "val", "test", "test"]
    assert folder_subsets([tmp_path / "a/train/P1/1.png", "/elsewhere/train/1.png"], tmp_path) == ["train", ""]
    assert folder_subsets([tmp_path / "a/train/P1/1.png"], tmp_path / "x" / "..") == ["train"]
    with pytest.raises(SplitError, match="same file in several subsets.*leave out --split folders"):
        folder_split(table.assign(sha256=list("uvuxyz")), tmp_path)
    with pytest.raises(SplitError, match="class a has no images for val"):
        folder_split(table.drop(2), tmp_path)


def test_without_validation_folders_whole_groups_of_training_images_are_for_validation(tmp_path):
    names = [f"{subset}/{label}/{n}.png" for label in "ab" for subset, n in [("test", 0)] + [("train", n) for n in range(40)]]
    table = pd.DataFrame({"pair": names, "path": names, "class": [name.split("/")[1] for name in names]})
    table["group"] = [
        name.split("/")[0] + str(int(Path(name).stem) // 2) + name.split("/")[1] for name in names
    ]  # pairs of images
    split = folder_split(table, tmp_path)
    counts = pd.crosstab(split["class"], split["subset"])
    assert (counts["test"] == 1).all() and counts["val"].between(3, 5).all() and (counts.sum(axis=1) == 41).all()
    assert (split.groupby("group")["subset"].nunique() == 1).all()
    assert split.equals(folder_split(table, tmp_path)) and not split.equals(folder_split(table, tmp_path, seed=1))
    with pytest.raises(SplitError, match="too few groups.*leave out --split folders"):
        folder_split(table.assign(group="one slide"), tmp_path)
    with pytest.raises(SplitError, match="class a has no images for train"):
        folder_split(table[table["path"].str.startswith("test")], tmp_path)
    slides = table["group"].where(table["path"].str.startswith("test"), table["class"] + (table.index % 41 // 14).astype(str))
    with pytest.warns(UserWarning, match=r"of 80 training images \(3\d%\) are for validation instead of a tenth"):
        folder_split(table.assign(group=slides), tmp_path)


def test_copies_stay_together_where_no_groups_are_given(tmp_path):
    names = [f"{subset}/{label}/{n}.png" for label in "ab" for subset, n in [("test", 0)] + [("train", n) for n in range(40)]]
    table = pd.DataFrame({"pair": names, "path": names, "class": [name.split("/")[1] for name in names]})
    table["pixels"] = [f"{label}{subset}{int(Path(name).stem) // 4}" for name in names for subset, label, _ in [name.split("/")]]
    for seed in range(6):
        split = folder_split(table, tmp_path, seed)
        assert (split.groupby("pixels")["subset"].nunique() == 1).all() and set(split["subset"]) == {"train", "val", "test"}


# --- two and twenty classes


@pytest.mark.parametrize("n", [2, 20])
def test_tables_and_figures_of_two_and_twenty_classes(n):
    names = [f"class {place:02}" for place in range(n)]
    predictions = {
        model: dummy_predictions(accuracy, per_class=[6] * n, classes=names, seed=seed)
        for seed, (model, accuracy) in enumerate([("mobilenet_v2", 0.8), ("cells", 0.6)])
    }
    assert len(set(class_colours(names))) == n
    assert list(class_table(predictions["cells"])["class"]) == names
    comparison = compare_models(predictions)
    assert comparison["auc"].between(0.5, 1).all() and "Original study" not in readable_comparison(comparison)
    ticks = [text.get_text() for text in confusion_figure(predictions).axes[0].get_yticklabels()]
    assert ticks == names
    for draw in (roc_figure, precision_recall_figure):
        assert n_curves(draw(predictions)) == n
        assert n_curves(draw(predictions, negative=names[0])) == (1 if n == 2 else n)


def n_curves(figure) -> int:
    return sum(len(line.get_xdata()) > 1 for line in figure.axes[0].lines)
