"""Images good and bad."""
import struct
import zlib

import cv2
import numpy as np
import pytest
from hypothesis import given, settings, strategies as st
from PIL import Image

from leukemia_nb.images import PictureError, as_rgb, read_grey, read_picture, write_picture


@pytest.fixture
def photo() -> np.ndarray:
    y, x = np.mgrid[:48, :64]
    found = np.dstack([200 - y, 120 + x, 220 - x]).astype(np.uint8)
    found[:12, :16] = (200, 30, 60)  # tells every rotation from every other
    return found


def noise(seed: int, height: int = 30, width: int = 40) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


@pytest.mark.parametrize("mode, tolerance", [("RGB", 0), ("RGBA", 0), ("L", 60), ("LA", 60), ("P", 40), ("CMYK", 3), ("1", 255)])
@pytest.mark.parametrize("suffix", [".png", ".tif", ".jpg"])
def test_modes(tmp_path, photo, mode, tolerance, suffix):
    picture = Image.fromarray(photo).convert(mode)
    if (mode, suffix) in [("CMYK", ".png"), ("RGBA", ".jpg"), ("LA", ".jpg"), ("P", ".jpg")]: pytest.skip("no such files")
    picture.save(tmp_path / f"x{suffix}", **({"quality": 95} if suffix == ".jpg" else {}))
    found = read_picture(tmp_path / f"x{suffix}")
    assert found.dtype == np.uint8 and found.shape == photo.shape
    wanted = np.array(picture.convert("RGB")).astype(int)
    assert np.abs(found - wanted).mean() <= (2 if suffix == ".jpg" else 0)
    assert np.abs(wanted - photo).mean() <= tolerance


def test_transparent_is_white(tmp_path, photo):
    alpha = np.full(photo.shape[:2], 255, np.uint8)
    alpha[20:] = 0
    Image.fromarray(np.dstack([photo, alpha])).save(tmp_path / "x.png")
    found = read_picture(tmp_path / "x.png")
    assert (found[20:] == 255).all() and (found[:20] == photo[:20]).all()


@pytest.mark.parametrize("suffix", [".png", ".tif"])
@pytest.mark.parametrize("grey", [False, True])
def test_sixteen_bits(tmp_path, photo, suffix, grey):
    stored = photo[..., ::-1].astype(np.uint16) * 256 + 77
    cv2.imwrite(str(tmp_path / f"x{suffix}"), stored[..., 1] if grey else stored)
    found = read_picture(tmp_path / f"x{suffix}")
    assert found.dtype == np.uint8
    assert (found == (photo[..., 1:2] if grey else photo)).all()


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_rotation(tmp_path, photo, orientation):
    undo = {2: Image.Transpose.FLIP_LEFT_RIGHT, 3: Image.Transpose.ROTATE_180, 4: Image.Transpose.FLIP_TOP_BOTTOM, 5: Image.Transpose.TRANSPOSE,
            6: Image.Transpose.ROTATE_90, 7: Image.Transpose.TRANSVERSE, 8: Image.Transpose.ROTATE_270}.get(orientation)
    stored, exif = Image.fromarray(photo), Image.Exif()
    exif[0x0112] = orientation
    if undo is not None: stored = stored.transpose(undo)
    stored.save(tmp_path / "x.png", exif=exif)
    assert (read_picture(tmp_path / "x.png") == photo).all()


def test_same_values_as_opencv(tmp_path, photo):
    write_picture(tmp_path / "x.jpg", photo)
    assert (read_picture(tmp_path / "x.jpg") == cv2.imread(str(tmp_path / "x.jpg"))[..., ::-1]).all()


@pytest.mark.parametrize("name", ["血液.png", "Größe №7.jpg", "[Malignant] Pre-B (1).png", "a b\tc.png", "кровь.tif"])
def test_names_outside_ascii(tmp_path, photo, name):
    write_picture(tmp_path / "Бласт" / name, photo)
    assert np.abs(read_picture(tmp_path / "Бласт" / name).astype(int) - photo).mean() < 3


def test_empty_file(tmp_path):
    (tmp_path / "x.jpg").touch()
    with pytest.raises(PictureError, match=r"x\.jpg: the file is empty.*remove it"): read_picture(tmp_path / "x.jpg")


def test_missing_file_and_folder(tmp_path):
    with pytest.raises(PictureError, match=r"x\.jpg: there is no such file"): read_picture(tmp_path / "x.jpg")
    with pytest.raises(PictureError, match="cannot be opened"): read_picture(tmp_path)


@pytest.mark.parametrize("content", [b"Dear colleague", b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff\xe0", b"II*\0", b"BM", b"\0" * 500])
def test_not_a_picture(tmp_path, content):
    (tmp_path / "x.png").write_bytes(content)
    with pytest.raises(PictureError, match=r"x\.png: .*(not a picture|damaged)"): read_picture(tmp_path / "x.png")


@settings(max_examples=60, deadline=None)
@given(st.floats(0, 1, exclude_max=True), st.sampled_from([".jpg", ".png", ".bmp", ".webp"]))
def test_cut_off_is_never_half_a_picture(tmp_path_factory, share, suffix):
    folder = tmp_path_factory.mktemp("cut")
    write_picture(folder / f"x{suffix}", noise(1))
    whole, content = read_picture(folder / f"x{suffix}"), (folder / f"x{suffix}").read_bytes()
    (folder / f"x{suffix}").write_bytes(content[:int(share * len(content))])
    try: found = read_picture(folder / f"x{suffix}")
    except PictureError as error: assert f"x{suffix}: " in str(error) and "remove it" in str(error)
    else: assert (found == whole).all()  # only the marks after the last pixel were lost


def test_jpeg_without_its_lower_half(tmp_path):
    write_picture(tmp_path / "x.jpg", noise(1, 200, 200))
    content = (tmp_path / "x.jpg").read_bytes()
    (tmp_path / "x.jpg").write_bytes(content[:len(content) // 2])
    with pytest.raises(PictureError, match=r"x\.jpg: the picture is damaged or cut off.*Copy it again"): read_picture(tmp_path / "x.jpg")


@pytest.mark.parametrize("side", [8_000, 100_000])
def test_enormous_by_its_header(tmp_path, side):
    """The header alone claims the size: nothing is there to be decoded, so the refusal came before."""
    def chunk(kind, content): return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0))
    (tmp_path / "wall.png").write_bytes(b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b""))
    with pytest.raises(PictureError, match=r"wall\.png: too large.*50,000,000 pixels\. Scale it down"): read_picture(tmp_path / "wall.png")


def test_tiny(tmp_path):
    write_picture(tmp_path / "x.png", noise(0, 15, 40))
    with pytest.raises(PictureError, match=r"x\.png: too small, 40 x 15"): read_picture(tmp_path / "x.png")
    write_picture(tmp_path / "x.png", noise(0, 16, 16))
    assert read_picture(tmp_path / "x.png").shape == (16, 16, 3)


def test_numbers_that_are_no_colours(tmp_path):
    Image.fromarray(np.random.default_rng(0).normal(size=(20, 20)).astype(np.float32)).save(tmp_path / "x.tif")
    with pytest.raises(PictureError, match="32-bit"): read_picture(tmp_path / "x.tif")


@settings(max_examples=30, deadline=None)
@given(st.integers(16, 50), st.integers(16, 50), st.integers(0, 99), st.sampled_from([".png", ".bmp", ".tif"]))
def test_round_trip(tmp_path_factory, height, width, seed, suffix):
    path = tmp_path_factory.mktemp("trip") / f"x{suffix}"
    write_picture(path, noise(seed, height, width))
    assert (read_picture(path) == noise(seed, height, width)).all()


@pytest.mark.parametrize("kind", [np.uint8, np.uint16])
def test_masks_keep_their_numbers(tmp_path, kind):
    mask = np.random.default_rng(0).integers(0, np.iinfo(kind).max, (20, 30)).astype(kind)
    write_picture(tmp_path / "m.png", mask)
    found = read_grey(tmp_path / "m.png")
    assert found.dtype == kind and (found == mask).all()


def test_grey_reader_refuses_photographs(tmp_path, photo):
    write_picture(tmp_path / "x.png", photo)
    with pytest.raises(PictureError, match="3 channels"): read_grey(tmp_path / "x.png")
    (tmp_path / "x.png").write_bytes(b"")
    with pytest.raises(PictureError, match="not a picture"): read_grey(tmp_path / "x.png")
    with pytest.raises(PictureError, match="No such file"): read_grey(tmp_path / "y.png")


@pytest.mark.parametrize("wrong", [np.zeros((20, 20, 3)), np.zeros((20, 20, 4), np.uint8), np.zeros(20, np.uint8), np.zeros((20, 20), bool)])
def test_wrong_arrays_are_not_written(tmp_path, wrong):
    with pytest.raises(ValueError, match=r"x\.png: a picture is uint8"): write_picture(tmp_path / "x.png", wrong)
    assert not list(tmp_path.iterdir())


def test_unknown_format(tmp_path, photo):
    with pytest.raises(ValueError, match=r"x\.docx: cannot write"): write_picture(tmp_path / "x.docx", photo)


def test_as_rgb_of_arrays_and_pillow_images(photo):
    assert (as_rgb(photo) == photo).all() and (as_rgb(Image.fromarray(photo)) == photo).all()
    assert (as_rgb(Image.fromarray(photo).convert("RGBA")) == photo).all()
    grey = as_rgb(photo[..., 0])
    assert grey.dtype == np.uint8 and (grey == photo[..., :1]).all()
    assert (as_rgb(Image.fromarray(photo[..., 0])) == grey).all()


@pytest.mark.parametrize("wrong, remedy", [
    (lambda a: a / 255, "0-255"), (lambda a: a.astype(np.float32), "0-255"), (lambda a: a.astype(np.uint16), "0-255"), (lambda a: a.astype(np.int64), "0-255"),
    (lambda a: a > 9, "0-255"), (lambda a: a[..., 0] / 255, "0-255"), (lambda a: np.dstack([a, a[..., :1]]), "alpha"),
    (lambda a: a[..., :2], "alpha"), (lambda a: a[..., :1], r"image\[\.\.\., 0\]"), (lambda a: a.transpose(2, 0, 1), "channels last"),
    (lambda a: a[None], "one by one"), (lambda a: a[:, 0, 0], "shape"), (lambda a: a[0, 0, 0], "not an image"),
    (lambda a: a.tolist(), "not an image"), (lambda a: a[:0], "too small"), (lambda a: a.astype(object), "0-255"),
    (lambda a: Image.fromarray(a[..., 0].astype(np.float32)), "mode F.*32-bit")])
def test_as_rgb_refuses_the_rest_by_shape_and_type(photo, wrong, remedy):
    given = wrong(photo)
    with pytest.raises(PictureError, match=remedy) as error: as_rgb(given)
    assert "\n" not in str(error.value)
    if isinstance(given, np.ndarray): assert f"{given.dtype} array of shape {given.shape}: " in str(error.value)
