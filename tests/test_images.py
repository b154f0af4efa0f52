"""Images good and bad."""

import io
import itertools
import os
import subprocess
import struct
import sys
import zlib
from pathlib import Path

import cv2
import numpy as np
import pytest
import tifffile
from hypothesis import given, settings, strategies as st
from PIL import Image, ImageCms

from leukemia_nb.data.files import OutputError
from leukemia_nb.data.images import SUFFIXES, ImageError, as_rgb, read_image, resize_square, write_image


def noise(seed: int, height: int = 30, width: int = 40) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


@pytest.mark.parametrize("mode, tolerance", [("RGB", 0), ("RGBA", 0), ("L", 60), ("LA", 60), ("P", 40), ("CMYK", 3), ("1", 255)])
@pytest.mark.parametrize("suffix", [".png", ".tif", ".jpg"])
def test_modes(tmp_path, photo, mode, tolerance, suffix):
    image = Image.fromarray(photo).convert(mode)
    if (mode, suffix) in [("CMYK", ".png"), ("RGBA", ".jpg"), ("LA", ".jpg"), ("P", ".jpg")]:
        pytest.skip("no such files")
    image.save(tmp_path / f"x{suffix}", **({"quality": 95} if suffix == ".jpg" else {}))
    found = read_image(tmp_path / f"x{suffix}")
    assert found.dtype == np.uint8 and found.shape == photo.shape
    wanted = np.array(image.convert("RGB")).astype(int)
    assert np.abs(found - wanted).mean() <= (2 if suffix == ".jpg" else 0)
    assert np.abs(wanted - photo).mean() <= tolerance


def test_transparent_is_white(tmp_path, photo):
    alpha = np.full(photo.shape[:2], 255, np.uint8)
    alpha[20:] = 0
    Image.fromarray(np.dstack([photo, alpha])).save(tmp_path / "x.png")
    found = read_image(tmp_path / "x.png")
    assert (found[20:] == 255).all() and (found[:20] == photo[:20]).all()


@pytest.mark.parametrize("suffix", [".png", ".tif"])
@pytest.mark.parametrize("grey", [False, True])
def test_sixteen_bits(tmp_path, photo, suffix, grey):
    stored = photo[..., ::-1].astype(np.uint16) * 256 + 77
    cv2.imwrite(str(tmp_path / f"x{suffix}"), stored[..., 1] if grey else stored)
    found = read_image(tmp_path / f"x{suffix}")
    assert found.dtype == np.uint8
    assert (found == (photo[..., 1:2] if grey else photo)).all()


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_rotation(tmp_path, photo, orientation):
    undo = {
        2: Image.Transpose.FLIP_LEFT_RIGHT,
        3: Image.Transpose.ROTATE_180,
        4: Image.Transpose.FLIP_TOP_BOTTOM,
        5: Image.Transpose.TRANSPOSE,
        6: Image.Transpose.ROTATE_90,
        7: Image.Transpose.TRANSVERSE,
        8: Image.Transpose.ROTATE_270,
    }.get(orientation)
    stored, exif = Image.fromarray(photo), Image.Exif()
    exif[0x0112] = orientation
    if undo is not None:
        stored = stored.transpose(undo)
    stored.save(tmp_path / "x.png", exif=exif)
    assert (read_image(tmp_path / "x.png") == photo).all()


def test_same_values_as_opencv(tmp_path, photo):
    write_image(tmp_path / "x.jpg", photo)
    assert (read_image(tmp_path / "x.jpg") == cv2.imread(str(tmp_path / "x.jpg"))[..., ::-1]).all()


@pytest.mark.parametrize("name", ["血液.png", "Größe №7.jpg", "[Malignant] Pre-B (1).png", "a b\tc.png", "кровь.tif"])
def test_names_outside_ascii(tmp_path, photo, name):
    write_image(tmp_path / "Бласт" / name, photo)
    assert np.abs(read_image(tmp_path / "Бласт" / name).astype(int) - photo).mean() < 3


def test_empty_file(tmp_path):
    (tmp_path / "x.jpg").touch()
    with pytest.raises(ImageError, match=r"x\.jpg: the file is empty.*remove it"):
        read_image(tmp_path / "x.jpg")


def test_missing_file_and_folder(tmp_path):
    with pytest.raises(ImageError, match=r"x\.jpg: there is no such file"):
        read_image(tmp_path / "x.jpg")
    with pytest.raises(ImageError, match="cannot be opened"):
        read_image(tmp_path)


@pytest.mark.parametrize("content", [b"Dear colleague", b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff\xe0", b"II*\0", b"BM", b"\0" * 500])
def test_not_a_image(tmp_path, content):
    (tmp_path / "x.png").write_bytes(content)
    with pytest.raises(ImageError, match=r"x\.png: .*(not an image|damaged)"):
        read_image(tmp_path / "x.png")


@settings(max_examples=60, deadline=None)
@given(st.floats(0, 1, exclude_max=True), st.sampled_from([".jpg", ".png", ".bmp", ".tif", ".webp"]))
def test_cut_off_is_never_half_a_image(tmp_path_factory, share, suffix):
    folder = tmp_path_factory.mktemp("cut")
    write_image(folder / f"x{suffix}", noise(1))
    whole, content = read_image(folder / f"x{suffix}"), (folder / f"x{suffix}").read_bytes()
    (folder / f"x{suffix}").write_bytes(content[: int(share * len(content))])
    try:
        found = read_image(folder / f"x{suffix}")
    except ImageError as error:
        assert f"x{suffix}: " in str(error) and "remove it" in str(error)
    else:
        assert (found == whole).all()  # only the marks after the last pixel were lost


def test_jpeg_without_its_lower_half(tmp_path):
    write_image(tmp_path / "x.jpg", noise(1, 200, 200))
    content = (tmp_path / "x.jpg").read_bytes()
    (tmp_path / "x.jpg").write_bytes(content[: len(content) // 2])
    with pytest.raises(ImageError, match=r"x\.jpg: the image is damaged or cut off.*Copy it again"):
        read_image(tmp_path / "x.jpg")


@pytest.mark.parametrize("side", [8_000, 100_000])
def test_enormous_by_its_header(tmp_path, side):
    """The header alone claims the size: nothing is there to be decoded, so the refusal came before."""

    def chunk(kind, content):
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0))
    (tmp_path / "wall.png").write_bytes(b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b""))
    with pytest.raises(ImageError, match=r"wall\.png: too large.*50,000,000 pixels\. Scale it down"):
        read_image(tmp_path / "wall.png")


def test_tiny(tmp_path):
    write_image(tmp_path / "x.png", noise(0, 15, 40))
    with pytest.raises(ImageError, match=r"x\.png: too small, 40 x 15"):
        read_image(tmp_path / "x.png")
    write_image(tmp_path / "x.png", noise(0, 16, 16))
    assert read_image(tmp_path / "x.png").shape == (16, 16, 3)


def test_numbers_that_are_no_colours(tmp_path):
    Image.fromarray(np.random.default_rng(0).normal(size=(20, 20)).astype(np.float32)).save(tmp_path / "x.tif")
    with pytest.raises(ImageError, match="32-bit"):
        read_image(tmp_path / "x.tif")


@settings(max_examples=30, deadline=None)
@given(st.integers(16, 50), st.integers(16, 50), st.integers(0, 99), st.sampled_from([".png", ".bmp", ".tif"]))
def test_round_trip(tmp_path_factory, height, width, seed, suffix):
    path = tmp_path_factory.mktemp("trip") / f"x{suffix}"
    write_image(path, noise(seed, height, width))
    assert (read_image(path) == noise(seed, height, width)).all()


@pytest.mark.parametrize("kind", [np.uint8, np.uint16])
def test_masks_keep_their_numbers(tmp_path, kind):
    mask = np.random.default_rng(0).integers(0, np.iinfo(kind).max, (20, 30)).astype(kind)
    write_image(tmp_path / "m.png", mask)
    found = cv2.imread(str(tmp_path / "m.png"), cv2.IMREAD_UNCHANGED)
    assert found.dtype == kind and (found == mask).all()


@pytest.mark.parametrize(
    "wrong", [np.zeros((20, 20, 3)), np.zeros((20, 20, 4), np.uint8), np.zeros(20, np.uint8), np.zeros((20, 20), bool)]
)
def test_wrong_arrays_are_not_written(tmp_path, wrong):
    with pytest.raises(ValueError, match=r"x\.png: an image is uint8"):
        write_image(tmp_path / "x.png", wrong)
    assert not list(tmp_path.iterdir())


def test_unknown_format(tmp_path, photo):
    with pytest.raises(ValueError, match=r"x\.docx: cannot write"):
        write_image(tmp_path / "x.docx", photo)


def test_as_rgb_of_arrays_and_pillow_images(photo):
    assert (as_rgb(photo) == photo).all() and (as_rgb(Image.fromarray(photo)) == photo).all()
    assert (as_rgb(Image.fromarray(photo).convert("RGBA")) == photo).all()
    grey = as_rgb(photo[..., 0])
    assert grey.dtype == np.uint8 and (grey == photo[..., :1]).all()
    assert (as_rgb(Image.fromarray(photo[..., 0])) == grey).all()


@pytest.mark.parametrize(
    "wrong, remedy",
    [
        (lambda a: a / 255, "0-255"),
        (lambda a: a.astype(np.float32), "0-255"),
        (lambda a: a.astype(np.uint16), "0-255"),
        (lambda a: a.astype(np.int64), "0-255"),
        (lambda a: a > 9, "0-255"),
        (lambda a: a[..., 0] / 255, "0-255"),
        (lambda a: np.dstack([a, a[..., :1]]), "alpha"),
        (lambda a: a[..., :2], "alpha"),
        (lambda a: a[..., :1], "alpha channel"),
        (lambda a: a.transpose(2, 0, 1), "channels last"),
        (lambda a: a[None], "one by one"),
        (lambda a: a[:, 0, 0], "shape"),
        (lambda a: a[0, 0, 0], "not an image"),
        (lambda a: a.tolist(), "not an image"),
        (lambda a: a[:0], "too small"),
        (lambda a: a.astype(object), "0-255"),
        (lambda a: Image.fromarray(a[..., 0].astype(np.float32)), "mode F.*32-bit"),
    ],
)
def test_as_rgb_refuses_the_rest_by_shape_and_type(photo, wrong, remedy):
    given = wrong(photo)
    with pytest.raises(ImageError, match=remedy) as error:
        as_rgb(given)
    assert "\n" not in str(error.value)
    if isinstance(given, np.ndarray):
        assert f"{given.dtype} array of shape {given.shape}: " in str(error.value)


# Decoders believed: the true image is known, so what is read must be it, and what is refused must say why.


def outcome(path: Path, content: bytes, true: np.ndarray, tolerance: float = 0) -> str:
    """'read' (and right) or the refusal (one line that names the file, with a remedy); anything else fails the test."""
    path.write_bytes(content)
    try:
        found = read_image(path)
    except ImageError as error:
        assert str(error).startswith(f"{path}: ") and "\n" not in str(error), str(error)
        assert any(word in str(error) for word in ("Save ", "Copy it again", "remove it", "Cut out", "Scale it", "Remove it")), (
            str(error)
        )
        return str(error).removeprefix(f"{path}: ")
    assert found.dtype == np.uint8 and found.shape == true.shape, (path.name, found.shape)
    assert np.abs(found.astype(int) - true).max() <= tolerance, (path.name, "is read as another image")
    return "read"


def tiff(values: np.ndarray, **options) -> bytes:
    stream = io.BytesIO()
    tifffile.imwrite(stream, values, **{"photometric": "rgb", "metadata": None} | options)
    return stream.getvalue()


def saved(image: Image.Image, kind: str, **options) -> bytes:
    stream = io.BytesIO()
    image.save(stream, kind, **options)
    return stream.getvalue()


def chunk(kind: bytes, content: bytes, wrong: int = 0) -> bytes:
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content) ^ wrong)


def png(values: np.ndarray, *chunks: bytes) -> bytes:
    """Of any kind with 8 or 16 bits; chunks go before the pixels."""
    kind = {1: 0, 2: 4, 3: 2, 4: 6}[values.shape[2] if values.ndim == 3 else 1]
    rows = b"".join(b"\0" + row.astype(values.dtype.newbyteorder(">")).tobytes() for row in values)
    header = struct.pack(">IIBBBBB", values.shape[1], values.shape[0], values.itemsize * 8, kind, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", header)
        + b"".join(chunks)
        + chunk(b"IDAT", zlib.compress(rows))
        + chunk(b"IEND", b"")
    )


def bmp32(photo: np.ndarray, alpha: int) -> bytes:
    """32 bits with an alpha mask, as capture programs write it."""
    pixels = np.dstack([photo[..., ::-1], np.full(photo.shape[:2], alpha, np.uint8)])[::-1].tobytes()
    header = struct.pack("<IiiHHIIiiII", 124, photo.shape[1], photo.shape[0], 1, 32, 3, len(pixels), 2835, 2835, 0, 0)
    header += struct.pack("<IIII", 0xFF0000, 0xFF00, 0xFF, 0xFF000000) + b"BGRs" + bytes(64)
    return b"BM" + struct.pack("<IHHI", 14 + len(header) + len(pixels), 0, 0, 14 + len(header)) + header + pixels


def with_alpha(photo: np.ndarray, alpha: int) -> np.ndarray:
    return np.dstack([photo, np.full(photo.shape[:2], alpha, photo.dtype)])


@pytest.mark.parametrize("shape", [(40, 40, 4), (40, 40, 2), (40, 40, 1), (2, 40, 40, 3), (40,)])
def test_only_grey_and_rgb_are_resized(shape):
    with pytest.raises(ImageError, match="must be uint8 RGB"):
        resize_square(np.zeros(shape, np.uint8), 16)


@pytest.mark.parametrize("height", [100, 200, 224, 300])
def test_a_strip_is_averaged_where_it_shrinks(height):
    strip = np.zeros((height, 2000, 3), np.uint8)
    strip[:, ::9] = 250
    for image in (strip, strip.transpose(1, 0, 2)):
        found = resize_square(np.ascontiguousarray(image), 224)
        assert found.shape == (224, 224, 3) and found.max() - found.min() < 8


def test_every_layout_of_tiff(tmp_path, photo):
    """Bits, channels, layout, compression, tiles, byte order, predictor: read right or refused, nearly all of them read."""
    outcomes = {}
    layouts = itertools.product(
        (8, 16), (1, 2, 3, 4), ("contig", "separate"), (None, "zlib"), (None, (16, 32)), "<>", (False, True), (False, True)
    )
    for bits, channels, planar, compression, tile, order, predictor, big in layouts:
        if (channels == 1 and planar == "separate") or (predictor and not compression):
            continue
        values = with_alpha(photo, 255)[..., {1: [1], 2: [1, 3], 3: [0, 1, 2], 4: [0, 1, 2, 3]}[channels]]
        true = np.repeat(values[..., :1], 3, axis=2) if channels < 3 else photo
        if bits == 16:
            values = values.astype(np.uint16) * 256 + 77
        if channels in (2, 4):
            values[..., -1] = 2**bits - 1
        extra = {"extrasamples": ["unassalpha"]} if channels in (2, 4) else {}
        content = tiff(
            np.moveaxis(values, 2, 0) if planar == "separate" else values.squeeze(),
            photometric="rgb" if channels > 2 else "minisblack",
            planarconfig=planar if channels > 1 else None,
            compression=compression,
            tile=tile,
            byteorder=order,
            predictor=predictor or None,
            bigtiff=big,
            **extra,
        )
        key = bits, channels, planar, compression, tile, order, predictor, big
        outcomes[key] = outcome(tmp_path / "x.tif", content, true)
    refused = {key for key, found in outcomes.items() if found != "read"}
    known = {
        key
        for key in outcomes
        if (key[5] == ">" and key[7]) or (key[1] == 2 and key[3] and (key[0] == 16 or key[2] == "separate"))
    }
    assert len(outcomes) > 150 and refused <= known, sorted(refused - known, key=str)


@pytest.mark.parametrize("compression, tile", [(None, None), (None, (16, 32)), ("zlib", None), ("zlib", (16, 32))])
def test_every_meaning_of_tiff_channels(tmp_path, photo, compression, tile):
    """Photometric interpretation and extra samples: read right or refused."""
    inks = np.asarray(Image.fromarray(photo).convert("CMYK"))
    colours = {
        "minisblack": (photo[..., 1:2], np.repeat(photo[..., 1:2], 3, axis=2)),
        "miniswhite": (255 - photo[..., 1:2], np.repeat(photo[..., 1:2], 3, axis=2)),
        "rgb": (photo, photo),
        "separated": (inks, np.asarray(Image.fromarray(inks, "CMYK").convert("RGB"))),
    }
    reads = 0
    for (kind, (values, true)), extra, planar, wide in itertools.product(
        colours.items(), (None, "unspecified", "assocalpha", "unassalpha"), ("contig", "separate"), (False, True)
    ):
        if extra:
            values = np.dstack([values, noise(3, 48, 64)[..., 0] if extra == "unspecified" else np.full((48, 64), 255, np.uint8)])
        if values.shape[2] == 1 and planar == "separate":
            continue
        stored = values.astype(np.uint16) * 257 if wide else values
        content = tiff(
            np.moveaxis(stored, 2, 0) if planar == "separate" else stored.squeeze(),
            photometric=kind,
            compression=compression,
            tile=tile,
            planarconfig=planar if values.shape[2] > 1 else None,
            extrasamples=[extra] if extra else None,
        )
        found = outcome(tmp_path / f"{kind} {extra} {planar} {wide}.tif", content, true)
        reads += found == "read"
        assert found == "read" or kind != "rgb", (kind, extra, planar, wide, found)
    assert reads >= 24


@pytest.mark.parametrize(
    "kind, options, modes",
    [
        ("JPEG", {"quality": 98, "subsampling": 0}, ("RGB", "L", "CMYK", "YCbCr")),
        ("JPEG", {"quality": 98, "progressive": True, "subsampling": 0}, ("RGB", "L")),
        ("PNG", {}, ("RGB", "RGBA", "L", "LA", "P", "1")),
        ("BMP", {}, ("RGB", "RGBA", "L", "P", "1")),
        ("GIF", {}, ("P", "L")),
        ("WEBP", {"lossless": True}, ("RGB", "RGBA")),
        *[
            ("TIFF", {"compression": name}, ("RGB", "RGBA", "L", "LA", "P", "CMYK", "1"))
            for name in ("raw", "tiff_lzw", "tiff_adobe_deflate", "packbits", "zstd")
        ],
        ("TIFF", {"compression": "jpeg", "quality": 98}, ("RGB", "L", "CMYK")),
    ],
)
def test_every_mode_of_every_format(tmp_path, photo, kind, options, modes):
    for mode in modes:
        image = Image.fromarray(photo).convert(mode)
        lossy = kind == "JPEG" or options.get("compression") == "jpeg"
        found = outcome(
            tmp_path / f"{mode}.bin", saved(image, kind, **options), np.array(image.convert("RGB")), 12 if lossy else 0
        )
        assert found == "read", (mode, found)


@pytest.mark.parametrize(
    "kind, word",
    [
        (lambda a: tiff(a.view(np.int8)), "8-bit signed"),
        (lambda a: tiff((a.astype(np.uint16) * 257).view(np.int16)), "16-bit signed"),
        (lambda a: tiff((a / 255).astype(np.float32)), "32-bit floating"),
        (lambda a: tiff((a / 255).astype(np.float16)), "16-bit floating"),
        (lambda a: tiff(a.astype(np.float64)), "64-bit floating"),
        (lambda a: tiff(a.astype(np.uint32) << 24), "32-bit"),
        (lambda a: tiff(a, photometric="cielab"), "photometric"),
        (lambda a: tiff(a, photometric="ycbcr"), "photometric"),
        (lambda a: tiff(np.dstack([a, a[..., :2]]), extrasamples=["unspecified"] * 2), "5 channels"),
        (lambda a: saved(Image.fromarray(a), "PDF"), "unknown kind"),
        (lambda a: saved(Image.fromarray(a), "PPM"), "unknown kind"),
        (lambda a: saved(Image.fromarray(a), "JPEG2000"), "unknown kind"),
        (lambda a: saved(Image.fromarray(a), "TGA"), "not"),
    ],
)
def test_kinds_that_are_not_read_are_named(tmp_path, photo, kind, word):
    assert word in outcome(tmp_path / "x.jpg", kind(photo), photo)


def test_grey_whose_zero_is_white(tmp_path, photo):
    grey, true = photo[..., 1], np.repeat(photo[..., 1:2], 3, axis=2)
    assert outcome(tmp_path / "8.tif", tiff(255 - grey, photometric="miniswhite"), true) == "read"
    for compression in (None, "zlib"):
        stored = 65535 - (grey.astype(np.uint16) * 257)
        assert outcome(tmp_path / "16.tif", tiff(stored, photometric="miniswhite", compression=compression), true) == "read"


@pytest.mark.parametrize("depth", [10, 12, 14])
@pytest.mark.parametrize("scale_bar", [False, True])
def test_camera_bits_in_16_that_are_not_declared(tmp_path, photo, depth, scale_bar):
    """The upper eight bits would be black; a burned-in scale bar does not hide that."""
    stored = photo.astype(np.uint16) << (depth - 8)
    if scale_bar:
        stored[40:44, 50:60] = 65535
    full = np.full((*photo.shape[:2], 1), 65535, np.uint16)
    contents = {
        "contiguous.tif": tiff(stored),
        "planar.tif": tiff(np.moveaxis(stored, 2, 0), planarconfig="separate"),
        "compressed.tif": tiff(stored, compression="zlib"),
        "grey.tif": tiff(stored[..., 1], photometric="minisblack"),
        "rgb.png": png(stored),
        "grey.png": png(stored[..., 1]),
        "grey alpha.png": png(np.dstack([stored[..., 1:2], full])),
        "rgb alpha.png": png(np.dstack([stored, full])),
        "sbit.png": png(stored, chunk(b"sBIT", bytes([depth] * 3))),
    }
    for name, content in contents.items():
        assert "16-bit samples use less than a quarter" in outcome(tmp_path / name, content, photo), name


@pytest.mark.parametrize(("grey", "proportion", "read"), [(64, 0.05, True), (63, 1, False), (64, 0, False)])
def test_what_a_quarter_of_the_range_is(tmp_path, grey, proportion, read):
    """From 64 of 256 on, in at least 5 % of the samples."""
    true = np.zeros((20, 20, 3), np.uint8)
    true[: round(20 * proportion)] = grey  # in whole rows, a twentieth each
    found = outcome(tmp_path / "x.tif", tiff(true.astype(np.uint16) << 8), true)
    assert found == "read" if read else "less than a quarter" in found


@pytest.mark.parametrize("depth", [9, 10, 12, 14, 15])
def test_camera_bits_declared_by_max_sample_value(tmp_path, photo, depth):
    stored, true = photo.astype(np.uint16) << (depth - 8), np.repeat(photo[..., 1:2], 3, axis=2)
    most = {"extratags": [(281, 3, 3, (2**depth - 1,) * 3, True)]}
    assert outcome(tmp_path / "c.tif", tiff(stored, **most), photo) == "read"
    assert outcome(tmp_path / "p.tif", tiff(np.moveaxis(stored, 2, 0), planarconfig="separate", **most), photo) == "read"
    one = {"extratags": [(281, 3, 1, 2**depth - 1, True)], "photometric": "minisblack"}
    for compression in (None, "zlib"):
        assert outcome(tmp_path / "g.tif", tiff(stored[..., 1], compression=compression, **one), true) == "read"
    assert outcome(tmp_path / "z.tif", tiff(stored, compression="zlib", **most), photo) == "read"
    assert "bits are declared" in outcome(tmp_path / "over.tif", tiff(photo.astype(np.uint16) * 257, **most), photo)


def test_max_sample_value_that_declares_nothing(tmp_path, photo):
    """Some write the largest value of the image: nothing is known from that."""
    stored = photo.astype(np.uint16) << 4
    assert "16-bit samples" in outcome(tmp_path / "x.tif", tiff(stored, extratags=[(281, 3, 1, int(stored.max()), True)]), photo)
    assert "16-bit samples" in outcome(tmp_path / "x.tif", tiff(stored, extratags=[(281, 3, 1, 65535, True)]), photo)
    assert outcome(tmp_path / "x.tif", tiff(photo.astype(np.uint16) * 257, extratags=[(281, 3, 1, 60000, True)]), photo) == "read"


def test_no_opaque_pixel(tmp_path, photo):
    """In a BMP the fourth byte is padding; elsewhere nothing can be known of the colours."""
    for alpha in (0, 255):
        assert outcome(tmp_path / "x.bmp", bmp32(photo, alpha), photo) == "read"
    wide = photo.astype(np.uint16) * 257
    for alpha in (0, 1, 100):
        clear = Image.fromarray(with_alpha(photo, alpha))
        contents = {
            "8.png": saved(clear, "PNG"),
            "16.png": png(with_alpha(wide, alpha * 257)),
            "8.tif": saved(clear, "TIFF"),
            "lzw.tif": saved(clear, "TIFF", compression="tiff_lzw"),
            "16.tif": tiff(with_alpha(wide, alpha * 257), extrasamples=["unassalpha"]),
            "associated.tif": tiff(with_alpha(photo, alpha), extrasamples=["assocalpha"]),
            "x.webp": saved(clear, "WEBP", lossless=True),
            "grey.png": saved(clear.convert("LA"), "PNG"),
        }
        for name, content in contents.items():
            assert "none of its pixels is opaque" in outcome(tmp_path / name, content, photo), name
    with pytest.raises(ImageError, match="none of its pixels is opaque"):
        as_rgb(Image.fromarray(with_alpha(photo, 0)))
    channel = tiff(with_alpha(photo, 0), extrasamples=["unspecified"])  # by its tag the fourth channel is not transparency
    assert outcome(tmp_path / "x.tif", channel, photo) == "read"


def pages(*images: tuple[np.ndarray, int]) -> bytes:
    stream = io.BytesIO()
    with tifffile.TiffWriter(stream) as writer:
        for values, kind in images:
            writer.write(values, photometric="rgb", subfiletype=kind, metadata=None)
    return stream.getvalue()


def test_several_images_in_one_file(tmp_path, photo):
    small, image, other = photo[::2, ::2], Image.fromarray(photo), Image.fromarray(photo[::-1])
    assert "first page is marked as a thumbnail" in outcome(tmp_path / "x.tif", pages((small, 1), (photo, 0)), photo)
    assert "first page is marked as a thumbnail" in outcome(tmp_path / "x.tif", pages((small, 1)), photo)
    assert outcome(tmp_path / "x.tif", pages((photo, 0), (small, 1), (small, 1)), photo) == "read"
    assert outcome(tmp_path / "x.tif", pages((photo, 2)), photo) == "read"
    stack = np.stack([photo] * 3)
    several = {
        "two.tif": pages((photo, 0), (photo, 0)),
        "pages.tif": pages((photo, 2), (photo, 2)),
        "small.tif": pages((small, 0), (photo, 0)),
        "imagej.tif": tiff(stack, imagej=True),
        "one directory.tif": tiff(stack[..., 0], photometric="minisblack", imagej=True, metadata={}, truncate=True),
        "volume.tif": tiff(np.stack([photo] * 16), volumetric=True, tile=(16, 16, 16)),
        **{
            f"x.{kind.lower()}": saved(image, kind, save_all=True, append_images=[other], duration=99)
            for kind in ("GIF", "WEBP", "PNG", "TIFF")
        },
    }
    for name, content in several.items():
        assert "several images" in outcome(tmp_path / name, content, photo), name
    first = saved(image, "MPO", save_all=True, append_images=[other], quality=98, subsampling=0)  # cameras add a preview
    assert outcome(tmp_path / "x.jpg", first, photo, 12) == "read"


def profile(space: str, gamma: float = 2.19921875) -> bytes:
    """A small ICC profile: RGB with the primaries of Adobe RGB, GRAY, or CMYK with a table of 2 x 2 x 2 x 2 colours."""

    def fixed(*numbers: float) -> bytes:
        return b"".join(struct.pack(">i", round(number * 65536)) for number in numbers)

    white, curve = b"XYZ \0\0\0\0" + fixed(0.9642, 1, 0.8249), b"curv\0\0\0\0" + struct.pack(">IHxx", 1, round(gamma * 256))
    tags = {
        b"wtpt": white,
        b"cprt": b"text\0\0\0\0none\0",
        b"desc": b"desc\0\0\0\0" + struct.pack(">I", 5) + b"test\0" + bytes(78),
    }
    primaries = {b"r": (0.60974, 0.31111, 0.01947), b"g": (0.20528, 0.62567, 0.06087), b"b": (0.14919, 0.06322, 0.74457)}
    if space == "RGB ":
        tags |= {name + b"TRC": curve for name in primaries} | {
            name + b"XYZ": b"XYZ \0\0\0\0" + fixed(*each) for name, each in primaries.items()
        }
    if space == "GRAY":
        tags[b"kTRC"] = curve
    if space == "CMYK":
        colours = [
            (int(235 * (1 - k) * (1 - 0.3 * c - 0.3 * m - 0.1 * y)), 128 - 30 * c + 60 * m, 128 - 30 * c + 70 * y)
            for c, m, y, k in itertools.product((0, 1), repeat=4)
        ]
        tags[b"A2B0"] = (
            b"mft1\0\0\0\0"
            + bytes([4, 3, 2, 0])
            + fixed(1, 0, 0, 0, 1, 0, 0, 0, 1)
            + bytes(range(256)) * 4
            + bytes(value for colour in colours for value in colour)
            + bytes(range(256)) * 3
        )
    table, body, at = struct.pack(">I", len(tags)), b"", 132 + 12 * len(tags)
    for name, content in tags.items():
        content += bytes(-len(content) % 4)
        table += struct.pack(">4sII", name, at + len(body), len(content))
        body += content
    header = struct.pack(
        ">I4xI4s4s4s12x4s28xI",
        0,
        0x02400000,
        b"prtr" if space == "CMYK" else b"mntr",
        space.encode(),
        b"Lab " if space == "CMYK" else b"XYZ ",
        b"acsp",
        0,
    ) + fixed(0.9642, 1, 0.8249)
    whole = header + bytes(128 - len(header)) + table + body
    return struct.pack(">I", len(whole)) + whole[4:]


def srgb_to_adobe(photo: np.ndarray) -> np.ndarray:
    """The numbers that an image in Adobe RGB has for the colours of this one; from the definitions, without a colour library."""
    level = photo / 255
    light = np.where(level <= 0.04045, level / 12.92, ((level + 0.055) / 1.055) ** 2.4)
    srgb = np.array([[0.4360, 0.3851, 0.1431], [0.2225, 0.7169, 0.0606], [0.0139, 0.0971, 0.7141]])
    adobe = np.array([[0.60974, 0.20528, 0.14919], [0.31111, 0.62567, 0.06322], [0.01947, 0.06087, 0.74457]])
    return (np.clip(light @ (np.linalg.inv(adobe) @ srgb).T, 0, 1) ** (1 / 2.19921875) * 255).round().astype(np.uint8)


def test_colour_profiles_are_converted_to_srgb(tmp_path, photo):
    stored, adobe = srgb_to_adobe(photo), profile("RGB ")
    assert np.abs(stored.astype(int) - photo).max() > 20
    image = Image.fromarray(stored)
    for kind, options in [("PNG", {}), ("TIFF", {}), ("TIFF", {"compression": "tiff_lzw"}), ("WEBP", {"lossless": True})]:
        assert outcome(tmp_path / f"x.{kind}", saved(image, kind, icc_profile=adobe, **options), photo, 3) == "read"
        assert (
            outcome(tmp_path / f"a.{kind}", saved(image.convert("RGBA"), kind, icc_profile=adobe, **options), photo, 3) == "read"
        )
    jpeg = saved(image, "JPEG", icc_profile=adobe, quality=98, subsampling=0)
    assert outcome(tmp_path / "x.jpg", jpeg, photo, 15) == "read"
    assert np.abs(read_image(tmp_path / "x.jpg").astype(int) - photo).mean() < 1.5
    for planar in ("contig", "separate"):
        wide = stored.astype(np.uint16) * 257
        content = tiff(wide if planar == "contig" else np.moveaxis(wide, 2, 0), planarconfig=planar, iccprofile=adobe)
        assert outcome(tmp_path / "16.tif", content, photo, 3) == "read"
    assert np.abs(as_rgb(Image.open(tmp_path / "x.PNG")).astype(int) - photo).max() <= 3


def test_grey_and_cmyk_profiles(tmp_path, photo):
    grey = Image.fromarray(photo[..., 1])
    light = (np.asarray(grey) / 255) ** 1.0
    true = np.where(light <= 0.0031308, light * 12.92, 1.055 * light ** (1 / 2.4) - 0.055) * 255
    true = np.repeat(true.round().astype(np.uint8)[..., None], 3, axis=2)
    for kind in ("PNG", "TIFF"):
        assert outcome(tmp_path / f"g.{kind}", saved(grey, kind, icc_profile=profile("GRAY", 1.0)), true, 2) == "read"
        assert (
            outcome(tmp_path / f"la.{kind}", saved(grey.convert("LA"), kind, icc_profile=profile("GRAY", 1.0)), true, 2) == "read"
        )
    inks = Image.fromarray(photo).convert("CMYK")
    converted = ImageCms.profileToProfile(inks, io.BytesIO(profile("CMYK")), ImageCms.createProfile("sRGB"), outputMode="RGB")
    assert np.abs(np.asarray(converted).astype(int) - np.asarray(inks.convert("RGB"))).max() > 20
    assert outcome(tmp_path / "k.tif", saved(inks, "TIFF", icc_profile=profile("CMYK")), np.asarray(converted)) == "read"
    assert (
        outcome(tmp_path / "k.jpg", saved(inks, "JPEG", icc_profile=profile("CMYK"), quality=98), np.asarray(converted), 12)
        == "read"
    )


def test_profiles_that_change_nothing(tmp_path, photo):
    """sRGB itself leaves every value as it is; one that is broken or of another colour model is ignored."""
    srgb = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    for found in (srgb, b"junk", profile("RGB ")[:200], profile("GRAY"), profile("CMYK"), b"\0" * 3000):
        for kind in ("PNG", "TIFF"):
            assert outcome(tmp_path / f"x.{kind}", saved(Image.fromarray(photo), kind, icc_profile=found), photo) == "read"
    grey = np.repeat(photo[..., 1:2], 3, axis=2)
    assert outcome(tmp_path / "g.png", saved(Image.fromarray(photo[..., 1]), "PNG", icc_profile=srgb), grey) == "read"
    plain, tagged = (saved(Image.fromarray(photo), "JPEG", quality=95, icc_profile=each) for each in (None, srgb))
    (tmp_path / "a.jpg").write_bytes(plain)
    assert outcome(tmp_path / "b.jpg", tagged, read_image(tmp_path / "a.jpg")) == "read"


def test_cmyk_jpeg_that_may_be_a_negative(tmp_path, photo):
    content = saved(Image.fromarray(photo).convert("CMYK"), "JPEG")
    at = content.index(b"\xff\xee")
    exclude = content[:at] + content[at + 2 + int.from_bytes(content[at + 2 : at + 4], "big") :]
    assert "CMYK" in outcome(tmp_path / "x.jpg", exclude, photo)


# Metadata are not pixels


def before(content: bytes, *chunks: bytes, mark: bytes = b"IDAT") -> bytes:
    at = content.index(mark) - 4
    return content[:at] + b"".join(chunks) + content[at:]


@pytest.mark.parametrize("where", [b"IDAT", b"IEND"])
@pytest.mark.parametrize(
    "made",
    [
        lambda: chunk(b"tEXt", b"Comment\0hello", wrong=1),
        lambda: chunk(b"iTXt", b"Comment\0\0\0\0\0hello", wrong=1),
        lambda: chunk(b"tIME", b"?"),
        lambda: chunk(b"tEXt", b"Comment\0" + b"x" * 1_500_000),
        lambda: chunk(b"zTXt", b"Comment\0\0" + zlib.compress(b"x" * 1_500_000)),
        lambda: chunk(b"iTXt", b"Comment\0\1\0\0\0" + zlib.compress(b"x" * 1_500_000)),
        lambda: chunk(b"zTXt", b"Comment\0\0" + zlib.compress(bytes(90_000_000))),
        lambda: b"".join(chunk(b"zTXt", b"Comment\0\0" + zlib.compress(bytes(1_000_000))) for _ in range(70)),
        lambda: chunk(b"eXIf", b"junk"),
        lambda: chunk(b"pHYs", b"?"),
        lambda: chunk(b"gAMA", b""),
        lambda: chunk(b"quIz", b"?"),
    ],
)
def test_png_with_damaged_or_huge_remarks(tmp_path, photo, made, where):
    assert outcome(tmp_path / "x.png", before(png(photo), made(), mark=where), photo) == "read"


def test_png_remarks_do_not_cost_the_orientation(tmp_path, photo):
    turned = Image.Exif()
    turned[0x0112] = 3
    content = saved(Image.fromarray(photo[::-1, ::-1]), "PNG", exif=turned)
    assert outcome(tmp_path / "x.png", before(content, chunk(b"tEXt", b"Comment\0hello", wrong=1)), photo) == "read"


@pytest.mark.parametrize("kind", [b"IHDR", b"IDAT"])
def test_png_with_a_wrong_checksum_of_pixels(tmp_path, photo, kind):
    content = bytearray(png(photo))
    content[content.index(kind) + 4 + int.from_bytes(content[content.index(kind) - 4 : content.index(kind)], "big")] ^= 1
    assert f"damaged or cut off (wrong checksum in {kind.decode()}" in outcome(tmp_path / "x.png", bytes(content), photo)


@pytest.mark.parametrize("share", [0.001, 0.2, 0.9])
def test_png_that_ends_early_is_refused_in_words(tmp_path, photo, share):
    content = png(photo)
    refusal = outcome(tmp_path / "x.png", content[: 33 + int(share * (len(content) - 33))], photo)  # 33: signature and IHDR
    assert "damaged or cut off" in refusal and "unpack" not in refusal


def test_exif_with_text_where_a_number_belongs(tmp_path, photo):
    def exif(*entries: tuple[int, int, int, bytes]) -> bytes:
        body = b"".join(struct.pack(">HHI", tag, kind, count) + value.ljust(4, b"\0") for tag, kind, count, value in entries)
        return b"MM\0*\0\0\0\x08" + struct.pack(">H", len(entries)) + body + bytes(4)

    upside_down = (0x0112, 3, 1, struct.pack(">H", 3))
    for others in (
        [(0x011A, 2, 4, b"abc\0")],
        [(0x0128, 2, 4, b"two\0"), (0x9999, 5, 900, b"\xff\xff\xff\xff")],
        [(0x8769, 2, 4, b"abc\0")],
        [(0x011A, 5, 1, b"\xff\xff\xff\xf0")],
    ):
        content = b"Exif\0\0" + exif(*sorted([upside_down, *others]))
        for kind, options in [("JPEG", {"quality": 98, "subsampling": 0}), ("PNG", {}), ("WEBP", {"lossless": True})]:
            found = saved(Image.fromarray(photo[::-1, ::-1]), kind, exif=content, **options)
            assert outcome(tmp_path / f"x.{kind}", found, photo, 12 if kind == "JPEG" else 0) == "read", (kind, others)
    text = b"Exif\0\0" + exif((0x0112, 2, 4, b"six\0"))
    assert outcome(tmp_path / "x.png", saved(Image.fromarray(photo), "PNG", exif=text), photo) == "read"
    odd = tiff(
        photo,
        extratags=[
            (296, 3, 1, 3, True),
            (282, 2, 4, "abc", True),
            (34665, 4, 1, 4_000_000_000, True),
            (305, 2, 3, b"\xff\xfe", True),
        ],
    )
    assert outcome(tmp_path / "x.tif", odd, photo) == "read"


@pytest.mark.parametrize("share", [0.5, 0.9, 0.99])
@pytest.mark.parametrize(
    "made",
    [
        tiff,
        lambda a: tiff(a.astype(np.uint16) * 257),
        lambda a: tiff(a, compression="zlib", rowsperstrip=8),
        lambda a: tiff(a, rowsperstrip=8),
        lambda a: tiff(np.moveaxis(a, 2, 0), planarconfig="separate"),
        lambda a: tiff(a, tile=(16, 16)),
    ],
)
def test_tiff_that_ends_early(tmp_path, photo, made, share):
    """tifffile writes the tags first, so only pixels are missing."""
    content = made(photo)
    assert "damaged or cut off" in outcome(tmp_path / "x.tif", content[: int(share * len(content))], photo)


# Bombs


def run(code: str, *arguments: str, **environment: str) -> str:
    found = subprocess.run(
        [sys.executable, "-c", code, *arguments], capture_output=True, text=True, timeout=300, env=os.environ | environment
    )
    assert found.returncode == 0, found.stderr
    return found.stdout


READ_WITH_LITTLE_MEMORY = """
import resource, sys
from leukemia_nb.data.images import ImageError, read_image
import PIL.ImageCms, tifffile
used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + int(sys.argv[1]), -1))
for path in sys.argv[2:]:
    try: print("read", read_image(path).shape)
    except ImageError as error: print(str(error))
"""
linux = pytest.mark.skipif(sys.platform != "linux", reason="limits of memory are set by Linux")


def strips(bits: int, sample_format: int, side: int, rows: int) -> bytes:
    """A TIFF whose strips are all the same few bytes."""
    strip = zlib.compress(bytes(side * rows * 3 * bits // 8), 9)
    count = -(-side // rows)
    tags = [
        (256, 4, 1, side),
        (257, 4, 1, side),
        (258, 3, 1, bits),
        (259, 3, 1, 8),
        (262, 3, 1, 2),
        (273, 4, count, 8 + len(strip)),
        (277, 3, 1, 3),
        (278, 4, 1, rows),
        (279, 4, count, 8 + len(strip) + 4 * count),
        (339, 3, 1, sample_format),
    ]
    directory = struct.pack("<H", len(tags)) + b"".join(struct.pack("<HHII", *tag) for tag in tags) + bytes(4)
    places = struct.pack("<I", 8) * count + struct.pack("<I", len(strip)) * count
    return b"II*\0" + struct.pack("<I", 8 + len(strip) + len(places)) + strip + places + directory


@linux
@pytest.mark.parametrize("bits, sample_format", [(8, 1), (8, 2), (16, 1), (16, 2), (16, 3)])
def test_tiff_of_gigabytes_is_refused_by_its_tags(tmp_path, bits, sample_format):
    (tmp_path / "x.tif").write_bytes(strips(bits, sample_format, 30_000, 500))
    assert (tmp_path / "x.tif").stat().st_size < 200_000
    found = run(READ_WITH_LITTLE_MEMORY, str(200_000_000), str(tmp_path / "x.tif"))
    assert "x.tif: too large, 30000 x 30000" in found


@linux
def test_short_memory_is_not_damage(tmp_path):
    image = Image.new("RGB", (5000, 4000), (200, 150, 180))
    names = []
    for name, options in {"a.png": {}, "a.jpg": {}, "a.bmp": {}, "raw.tif": {}, "lzw.tif": {"compression": "tiff_lzw"}}.items():
        image.save(tmp_path / name, **options)
        names.append(str(tmp_path / name))
    (tmp_path / "16.tif").write_bytes(tiff(np.full((4000, 5000, 3), 50000, np.uint16), compression=None))
    found = run(READ_WITH_LITTLE_MEMORY, str(30_000_000), *names, str(tmp_path / "16.tif")).splitlines()
    assert len(found) == 6
    for line in found:
        assert "not enough memory" in line and "damaged" not in line and "remove" not in line, line


@pytest.mark.skipif(os.name == "nt", reason="the program is a shell script")
def test_postscript_is_never_run(tmp_path):
    """Ghostscript would be called by Pillow for an EPS, whatever its suffix."""
    (tmp_path / "gs").write_text(f"#!/bin/sh\ntouch '{tmp_path / 'called'}'\n")
    (tmp_path / "gs").chmod(0o755)
    eps = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 100 100\n%%EndComments\nshowpage\n%%EOF\n"
    for name in ("x.jpg", "x.eps", "x.png"):
        (tmp_path / name).write_bytes(eps)
    code = "import sys\nfrom leukemia_nb.data.images import ImageError, read_image\nfor path in sys.argv[1:]:\n try: read_image(path)\n except ImageError as e: print(e)"
    found = run(
        code, *[str(tmp_path / name) for name in ("x.jpg", "x.eps", "x.png")], PATH=f"{tmp_path}{os.pathsep}{os.environ['PATH']}"
    )
    assert found.count("unknown kind") == 3 and not (tmp_path / "called").exists()


@pytest.mark.parametrize("width, height", [(70144, 100), (100, 70144), (32_001, 16)])
def test_sides_that_no_later_step_could_take(tmp_path, width, height):
    for kind in ("PNG", "TIFF", "BMP"):
        found = outcome(tmp_path / f"x.{kind}", saved(Image.new("RGB", (width, height)), kind), np.zeros((1, 1, 3)))
        assert f"too large, {width} x {height}; 32,000 pixels a side" in found
    with pytest.raises(ImageError, match="a side at most"):
        as_rgb(np.zeros((height, width, 3), np.uint8))


def test_widest_image_can_be_resized_and_written(tmp_path):
    write_image(tmp_path / "x.png", np.full((16, 32_000, 3), 200, np.uint8))
    found = read_image(tmp_path / "x.png")
    grid = np.zeros((8, 32_000), np.float32)
    assert cv2.resize(found, (224, 224)).shape == (224, 224, 3) and cv2.remap(found, grid, grid, cv2.INTER_LINEAR).shape == (
        8,
        32_000,
        3,
    )
    write_image(tmp_path / "x.jpg", found)
    with pytest.raises(ValueError, match=r"x\.webp: .*cannot be written as \.webp; use \.png"):
        write_image(tmp_path / "x.webp", found)


def test_what_a_format_cannot_hold_is_an_error(tmp_path):
    wide, deep = np.zeros((2, 70_000, 3), np.uint8), np.full((20, 20), 40_000, np.uint16)
    with pytest.raises(ValueError, match=r"x\.jpg: .*cannot be written as \.jpg; use \.png"):
        write_image(tmp_path / "x.jpg", wide)
    with pytest.raises(ValueError, match=r"x\.png: .*cannot be written"):
        write_image(tmp_path / "x.png", wide[:0])
    for suffix in (".jpg", ".bmp", ".webp"):
        with pytest.raises(ValueError, match="holds 8 bits"):
            write_image(tmp_path / f"x{suffix}", deep)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("suffix", [".jfif", ".jpe", ".JPG", ".tiff"])
def test_other_suffixes(tmp_path, photo, suffix):
    assert suffix.lower() in SUFFIXES
    write_image(tmp_path / f"x{suffix}", photo)
    assert np.abs(read_image(tmp_path / f"x{suffix}").astype(int) - photo).mean() < 3


def test_pipes_and_links_are_no_images(tmp_path):
    os.mkfifo(tmp_path / "pipe.png")
    (tmp_path / "loop.png").symlink_to("loop.png")
    (tmp_path / "dangling.png").symlink_to("nothing.png")
    for name, word in {
        "pipe.png": "cannot be opened",
        "loop.png": "cannot be opened",
        "dangling.png": "no such file",
        "a\0b.png": "cannot be opened",
        "x" * 300: "cannot be opened",
    }.items():
        with pytest.raises(ImageError, match=word):
            read_image(tmp_path / name)


def test_full_disk_is_one_error(tmp_path):
    """A file system of one megabyte; the image that was there stays as it was."""
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(disk)], capture_output=True).returncode:
        pytest.skip("cannot mount")
    try:
        write_image(disk / "x.png", noise(0))
        before_it = (disk / "x.png").read_bytes()
        for suffix in (".png", ".bmp", ".tif", ".jpg"):
            with pytest.raises(OutputError, match=rf"{suffix}: cannot be written: No space left on device\. Free some space"):
                write_image(disk / f"x{suffix}", noise(1, 1500, 1500), quality=100)
        assert [each.name for each in disk.iterdir()] == ["x.png"] and (disk / "x.png").read_bytes() == before_it
    finally:
        subprocess.run(["umount", str(disk)], check=True)


def test_small_files_that_take_long_to_decode_are_refused_before(tmp_path, photo):
    """A colour profile that expands to gigabytes, and thousands of scans."""
    large = chunk(b"iCCP", b"x\0\0" + zlib.compress(bytes(200_000_000)))
    png = saved(Image.fromarray(photo), "PNG")
    assert len(large) < 300_000 and "its colour profile has over 1,048,576 bytes" in message(
        tmp_path / "x.png", png[:33] + large + png[33:]
    )
    broken = chunk(b"iCCP", b"x\0\0" + zlib.compress(bytes(500))[:-8])
    assert outcome(tmp_path / "y.png", png[:33] + broken + png[33:], photo) == "read"  # ignored, as any other unreadable profile
    jpeg = saved(Image.fromarray(photo), "JPEG", progressive=True, quality=98, subsampling=0)
    at = [place for place in range(len(jpeg) - 1) if jpeg[place : place + 2] == b"\xff\xda"]
    assert 5 < len(at) <= 20 and outcome(tmp_path / "x.jpg", jpeg, photo, 12) == "read"
    again = jpeg[at[-1] : -2]
    assert outcome(tmp_path / "y.jpg", jpeg + b"\xff\xda\0\x02" * 300, photo, 12) == "read"  # behind the end, as a film's bytes
    found = outcome(tmp_path / "z.jpg", jpeg[:-2] + 300 * again + jpeg[-2:], photo)
    assert found == f"{len(at) + 300} progressive scans, more than the limit of 100. Save it as 8-bit RGB PNG."


def message(path: Path, content: bytes) -> str:
    path.write_bytes(content)
    with pytest.raises(ImageError) as refused:
        read_image(path)
    return str(refused.value)
