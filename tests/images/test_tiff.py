"""TIFFs that are read otherwise than others, and those whose tags would fill a memory."""

import struct

import numpy as np
import pytest
from PIL import Image

from images.reading import read_header, read_pixels

BASE = {256: 16, 257: 16, 258: 8, 259: 1, 262: 1, 277: 1, 278: 16}  # 16x16 pixels of 8 bits, black is 0


def write_tiff(path, pixels, *more, **changed):
    """A TIFF of one strip, with `more` entries of (tag, kind, count, value).

    `changed` are values of other tags than in BASE, None of those left out.
    """
    content = pixels.tobytes()
    base = BASE | {279: len(content)} | {int(tag[1:]): value for tag, value in changed.items()}
    entries = [(tag, 4, 1, value) for tag, value in base.items() if value is not None]
    entries += [(273, 4, 1, 8), *more]
    end = struct.pack("<H", len(entries))
    end += b"".join(struct.pack("<HHII", *entry) for entry in sorted(entries))
    path.write_bytes(struct.pack("<2sHI", b"II", 42, 8 + len(content)) + content + end + bytes(4))
    return str(path)


GREY = np.arange(256, dtype="u1").reshape(16, 16)


@pytest.mark.parametrize(("bits", "pixels"), [(8, GREY), (16, GREY.astype("<u2") * 256 + 7)])
@pytest.mark.parametrize("white_is_zero", [False, True])
def test_which_is_white(tmp_path, bits, pixels, white_is_zero):
    file = write_tiff(tmp_path / "a.tif", pixels, t258=bits, t262=0 if white_is_zero else 1)
    expected = 255 - GREY if white_is_zero else GREY
    assert np.abs(read_pixels(file)[0].numpy().astype(int) - expected).max() == 0


@pytest.mark.parametrize(("changed", "message"), [
    ({"t284": 2}, "a plane for each colour"), ({"t262": None}, "nothing says which number is white"),
    ({"t262": 6, "t277": 3}, "colours of fewer pixels, not compressed")])
def test_what_pillow_would_take_for_other_pixels(tmp_path, changed, message):
    file = write_tiff(tmp_path / "a.tif", np.zeros(10**4, "u1"), **changed)
    with pytest.raises(ValueError, match=message):
        read_pixels(file)


@pytest.mark.parametrize("bits", [8, 16])
def test_numbers_with_signs(tmp_path, bits):
    file = write_tiff(tmp_path / "a.tif", GREY.astype(f"<i{bits // 8}"), t258=bits, t339=2)
    with pytest.raises(ValueError, match="numbers of an unknown range"):
        read_pixels(file)


def test_an_image_that_is_turned_when_it_is_read(tmp_path):
    """By words in the place of its tag, of which its header's size knows nothing."""
    words = b'<x:xmpmeta tiff:Orientation="6"/>'
    pixels = np.frombuffer(bytes(16 * 32) + words, "u1")
    file = write_tiff(tmp_path / "a.tif", pixels, (700, 1, len(words), 8 + 16 * 32), t257=32, t278=32)
    assert read_header(file) == ("TIFF", (16, 32))
    assert read_pixels(file).shape == (3, 16, 32)
    with pytest.raises(ValueError, match=r"a.tif is 32x16 pixels, but others are 16x32"):
        read_pixels(file, (16, 32))


def test_tags_that_share_their_values(tmp_path):
    """Each is a copy in libtiff's memory: 16 GB of a file of 4 MB."""
    pixels = np.zeros(10**4, "u1")
    one = [(600, 7, 9000, 8)]
    assert read_pixels(write_tiff(tmp_path / "a.tif", pixels, *one)).shape == (3, 16, 16)
    with pytest.raises(ValueError, match="its tags share their values"):
        read_pixels(write_tiff(tmp_path / "a.tif", pixels, *one, (601, 7, 9000, 8)))
    with pytest.raises(ValueError, match="too many tags"):
        read_pixels(write_tiff(tmp_path / "a.tif", pixels, *[(600 + i, 7, 1, 8) for i in range(1100)]))


def test_strips_that_share_their_bytes(tmp_path):
    """Each is decompressed: two minutes for 2 MB."""
    count = 16
    tables = np.array([8] * count + [10**4] * count, "<u4").view("u1")
    content = np.concatenate([np.zeros(10**4, "u1"), tables])
    at = 8 + 10**4
    image = Image.effect_noise((16, 16), 90)
    image.save(tmp_path / "good.tif", compression="tiff_lzw", tiffinfo={278: 4})
    assert (read_pixels(str(tmp_path / "good.tif"))[0].numpy() == np.asarray(image)).all()
    file = write_tiff(tmp_path / "a.tif", content, t259=5, t278=1)
    blocks = bytearray((tmp_path / "a.tif").read_bytes())
    for tag, place in ((273, at), (279, at + 4 * count)):
        start = blocks.index(struct.pack("<HH", tag, 4), len(content))
        blocks[start:start + 12] = struct.pack("<HHII", tag, 4, count, place)
    (tmp_path / "a.tif").write_bytes(blocks)
    with pytest.raises(ValueError, match="its strips or tiles share their bytes"):
        read_pixels(file)
    with pytest.raises(ValueError, match="its strips or tiles share their bytes"):  # libtiff would guess
        read_pixels(write_tiff(tmp_path / "b.tif", GREY, t259=5, t279=None))


def test_another_reader_would_find_other_tags(tmp_path):
    """Pillow takes a BigTIFF of this order of bytes for a TIFF; libtiff does not."""
    content = (tmp_path / "a.tif").write_bytes
    content(b"MM\0+" + struct.pack(">HHQ", 8, 0, 16) + struct.pack(">Q", 0) + bytes(400))
    with pytest.raises(ValueError, match="a BigTIFF in this order of bytes"):
        read_pixels(str(tmp_path / "a.tif"))


def test_tiles_of_a_small_image(tmp_path):
    """464 bytes whose tiles would take 1.5 GB each."""
    tags = [(256, 16), (257, 16), (258, 8), (259, 1), (262, 1), (277, 1), (322, 40_000), (323, 40_000),
            (324, 400), (325, 64)]
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags)
    head = struct.pack("<2sHIH", b"II", 42, 8, len(tags)) + entries + bytes(4)
    (tmp_path / "a.tif").write_bytes(head.ljust(400, b"\0") + bytes(64))
    with pytest.raises(ValueError, match="a.tif .its tiles are too large"):
        read_pixels(str(tmp_path / "a.tif"))


def test_tiles_that_only_one_reader_sees(tmp_path):
    """Pillow leaves out numbers of a type that it does not know, which libtiff reads."""
    tags = [(256, 4, 16), (257, 4, 16), (258, 3, 8), (259, 3, 1), (262, 3, 1), (277, 3, 1), (322, 17, 8),
            (322, 4, 16), (323, 17, 8), (323, 4, 16), (324, 4, 8), (325, 4, 256)]
    entries = b"".join(struct.pack("<HHII", tag, kind, 1, value) for tag, kind, value in tags)
    content = struct.pack("<2sHIq", b"II", 42, 264, 46_000).ljust(264, b"\0")
    (tmp_path / "a.tif").write_bytes(content + struct.pack("<H", len(tags)) + entries + bytes(4))
    with pytest.raises(ValueError, match="its tags are there twice"):
        read_pixels(str(tmp_path / "a.tif"))


@pytest.mark.parametrize("big", [False, True])
def test_a_tiff_of_millions_of_strips(tmp_path, big):
    """Pillow makes a number of Python's of each, before it knows how large the image is."""
    count, entry, head = 3 * 10**5, "<HHII", struct.pack("<2sHIH", b"II", 42, 8, 9)
    if big:
        entry, head = "<HHQQ", struct.pack("<2sHHHQQ", b"II", 43, 8, 0, 16, 9)
    tags = [(256, 3, 1, 64), (257, 3, 1, 64), (258, 3, 1, 8), (259, 3, 1, 1), (262, 3, 1, 1),
            (273, 1, count, 300), (277, 3, 1, 1), (278, 3, 1, 1), (279, 4, 1, 64)]
    content = head + b"".join(struct.pack(entry, *tag) for tag in tags)
    (tmp_path / "a.tif").write_bytes(content.ljust(300, b"\0") + b"\x08" * count)
    with pytest.raises(ValueError, match="a.tif .a tag has too many values"):
        read_pixels(str(tmp_path / "a.tif"))
