"""What a TIFF says of itself, by tags, and what no honest one says."""

import struct
from pathlib import Path
from typing import NamedTuple

from PIL.TiffImagePlugin import TiffImageFile

from models import limits

SIZES = 279, 325  # the tags of the bytes of each strip, or each tile
TILE = 322, 323  # the tags of the width and height of a tile, which may be larger than the image
TEXT, OF_TEXT = 2, 512  # the kind of values that are letters; tags from there on are mostly texts too
BYTES = {1: 1, 2: 1, 3: 2, 4: 4, 6: 1, 7: 1, 8: 2, 9: 4, 11: 4, 13: 4}  # of a value by its kind; else eight


class Tag(NamedTuple):
    """A tag's number, the kind of its values, and how many they are."""

    number: int
    kind: int
    count: int


def tags_of(path: str) -> list[Tag]:
    """The tags of a TIFF's first image, as libtiff sees them; another file has none.

    Those of kinds that Pillow leaves out are there, too.

    Raises:
        ValueError: if there are too many, they are longer than the file, or readers disagree on them.
    """
    with Path(path).open("rb") as file:
        head = file.read(16)
        if not head.startswith((b"II", b"MM")):
            return []
        order = "<" if head.startswith(b"II") else ">"
        big = struct.unpack_from(f"{order}H", head, 2) == (43,)  # BigTIFF
        if big and order == ">":
            raise ValueError("a BigTIFF in this order of bytes")  # of which Pillow reads something else
        file.seek(*struct.unpack_from("<Q" if big else f"{order}L", head, 8 if big else 4))
        count, = struct.unpack("<Q" if big else f"{order}H", file.read(8 if big else 2))
        if count > limits.TIFF_TAGS:
            raise ValueError("it has too many tags")
        length = 20 if big else 12
        entries = file.read(length * count)
    form = "<HHQ" if big else f"{order}HHL"
    tags = [Tag(*struct.unpack_from(form, entries, start)) for start in range(0, len(entries), length)]
    if any(tag.count > limits.TIFF_VALUES for tag in tags if tag.number < OF_TEXT and tag.kind != TEXT):
        raise ValueError("a tag has too many values")
    if sum(tag.count * BYTES.get(tag.kind, 8) for tag in tags) > Path(path).stat().st_size:
        raise ValueError("its tags share their values")  # of which libtiff makes a copy for each
    return tags


def refuse_parts(image: TiffImageFile, tags: list[Tag]) -> None:
    """Raise a ValueError for strips or tiles that take long to read, or that readers disagree on."""
    known, numbers = image.tag_v2, [tag.number for tag in tags if tag.number < OF_TEXT]
    if any(int(known.get(tag, 1)) > max(limits.TILE, 2 * side)
           for tag, side in zip(TILE, image.size, strict=True)):
        raise ValueError("its tiles are too large")
    if len({*numbers}) < len(numbers) or not {*numbers} <= {*known}:
        raise ValueError("its tags are there twice, or are numbers of another kind")
    sizes = [size for tag in SIZES for size in known.get(tag, ())]
    if not sizes or sum(sizes) > Path(image.filename).stat().st_size:
        raise ValueError("its strips or tiles share their bytes")
