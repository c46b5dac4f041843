import io
import pickle
import struct
import warnings
import zlib

import numpy as np
import pytest
import torch
from PIL import Image

from mmssl.types import Rejected
from modalities.vision.data import COLUMNS, SUFFIXES, decode, raw


def encoded(image: Image.Image, format: str = "PNG", **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format, **options)
    return buffer.getvalue()


def png_header(width: int, height: int) -> bytes:
    """A PNG that declares a size and holds no pixels."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)) + chunk(b"IDAT", b"")


def photo(width: int = 64, height: int = 48) -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (height, width, 3), np.uint8))


def rejection(value) -> str:
    with pytest.raises(Rejected) as caught:
        decode(value)
    return caught.value.kind


def test_every_way_to_name_an_image_gives_the_same_pixels(tmp_path):
    image, file = photo(), tmp_path / "a.png"
    image.save(file)
    for value in (str(file), file, file.read_bytes(), {"bytes": file.read_bytes(), "path": None}, {"path": str(file)}, image):
        assert decode(value).mode == "RGB"
        np.testing.assert_array_equal(np.asarray(decode(value)), np.asarray(image))


@pytest.mark.parametrize(
    ("image", "expected"),
    [
        (Image.new("L", (2, 1), 77), (77, 77, 77)),
        (Image.new("1", (2, 1), 1), (255, 255, 255)),
        (Image.new("RGBA", (2, 1), (255, 0, 0, 0)), (255, 255, 255)),  # transparent: the white behind
        (Image.new("RGBA", (2, 1), (255, 0, 0, 51)), (255, 204, 204)),  # a fifth of red on white
        (Image.new("LA", (2, 1), (0, 51)), (204, 204, 204)),
    ],
)
def test_modes(image, expected):
    assert decode(encoded(image)).getpixel((1, 0)) == expected


def test_palette_with_a_transparent_colour():
    image = Image.new("P", (2, 1))
    image.putpalette([10, 20, 30, 200, 100, 50])
    image.putpixel((1, 0), 1)
    assert [decode(encoded(image)).getpixel((x, 0)) for x in (0, 1)] == [(10, 20, 30), (200, 100, 50)]
    seen = decode(encoded(image, transparency=1))
    assert [seen.getpixel((x, 0)) for x in (0, 1)] == [(10, 20, 30), (255, 255, 255)]


def test_cmyk_is_ink_not_light():
    red, green, blue = decode(encoded(Image.new("CMYK", (16, 16), (0, 255, 255, 0)), "JPEG", quality=95)).getpixel((8, 8))
    assert red > 240
    assert max(green, blue) < 15


def test_sixteen_bit_grey_is_scaled_not_clipped():
    values = np.array([[0, 257, 32896, 65535]], np.uint16)  # n * 257 is n in 8 bits
    for format in ("PNG", "TIFF"):
        seen = np.asarray(decode(encoded(Image.fromarray(values), format)))
        assert seen[0, :, 0].tolist() == [0, 1, 128, 255]


def test_float_and_integer_grey():
    unit = np.array([[0.0, 0.2, 1.0]], np.float32)
    assert np.asarray(decode(encoded(Image.fromarray(unit), "TIFF")))[0, :, 0].tolist() == [0, 51, 255]
    wide = np.array([[-1000, 0, 1000]], np.int32)
    assert np.asarray(decode(encoded(Image.fromarray(wide), "TIFF")))[0, :, 0].tolist() == [0, 128, 255]
    assert rejection(encoded(Image.fromarray(np.array([[0, np.nan]], np.float32)), "TIFF")) == "non_finite"


def test_first_frame_of_an_animation():
    frames = [Image.new("RGB", (4, 4), colour) for colour in ("red", "blue")]
    for format in ("GIF", "PNG", "WEBP"):
        data = encoded(frames[0], format, save_all=True, append_images=frames[1:], lossless=True)
        assert decode(data).getpixel((0, 0)) == (255, 0, 0)


def test_exif_rotation():
    image = Image.new("RGB", (3, 2), "black")
    image.putpixel((0, 0), (255, 255, 255))
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was turned: show the picture turned clockwise by a quarter
    upright = decode(encoded(image, exif=exif))
    assert upright.size == (2, 3)
    assert upright.getpixel((1, 0)) == (255, 255, 255)


def test_broken_exif_costs_only_the_rotation():
    assert decode(encoded(photo(), "JPEG", exif=b"Exif\x00\x00II*\x00\xff\xff\xff\x7f")).size == (64, 48)


@pytest.mark.parametrize("format", ["PNG", "JPEG", "GIF", "BMP", "TIFF", "PPM", "WEBP"])
@pytest.mark.parametrize("share", [0.4, 0.9])
def test_truncated(format, share):
    data = encoded(photo(), format)
    expected = "unreadable" if format == "WEBP" else "truncated"  # WebP's decoder tells no more
    assert rejection(data[: int(len(data) * share)]) == expected


def test_not_images(tmp_path):
    (tmp_path / "text.png").write_text("I am no image.")
    (tmp_path / "empty.png").touch()
    assert rejection(str(tmp_path / "text.png")) == "unreadable"
    assert rejection(str(tmp_path / "absent.png")) == "unreadable"
    assert rejection(str(tmp_path)) == "unreadable"
    assert rejection(str(tmp_path / "empty.png")) == rejection(b"") == "empty"
    assert rejection(17) == rejection({"bytes": None, "path": None}) == "wrong_type"
    postscript = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\n"
    assert rejection(postscript) == "unreadable"  # never handed to an interpreter


@pytest.mark.parametrize("size", [(9000, 9000), (12_000, 12_000), (30_000, 30_000), (40_000, 1)])
def test_huge_images_are_refused_by_their_header(size, monkeypatch):
    def load(*_):
        raise AssertionError("pixels were read")

    monkeypatch.setattr(Image.Image, "load", load)
    monkeypatch.setattr("PIL.ImageFile.ImageFile.load", load)
    with warnings.catch_warnings(record=True) as shown:
        warnings.simplefilter("always")
        assert rejection(png_header(*size)) == "too_large"
    assert not shown


def test_an_image_at_the_limit_is_not_refused():
    with pytest.raises(Rejected) as caught:
        decode(png_header(8000, 8000))
    assert caught.value.kind != "too_large"


def test_rejections_survive_pickling():
    again = pickle.loads(pickle.dumps(Rejected("truncated", "three bytes")))
    assert (again.kind, again.reason, str(again)) == ("truncated", "three bytes", "truncated: three bytes")


def test_raw_pixels():
    image = Image.new("RGB", (50, 20), (255, 0, 51))
    pixels = raw(image)
    assert pixels.shape == (3 * 32 * 32,)
    assert pixels.dtype == torch.float32
    torch.testing.assert_close(pixels.view(-1, 3), torch.tensor([1.0, 0.0, 0.2]).expand(1024, 3))
    assert raw(image, 8).shape == (192,)


def test_names():
    assert "image" in COLUMNS
    assert {".png", ".jpg", ".jpeg"} <= set(SUFFIXES)
    assert all(suffix == suffix.lower() and suffix.startswith(".") for suffix in SUFFIXES)
