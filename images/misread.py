"""Images that Pillow would silently take for others; found by reading files of known pixels."""

import os
import struct
from pathlib import Path

from PIL.BmpImagePlugin import BmpImageFile
from PIL.GifImagePlugin import GifImageFile
from PIL.Image import Image
from PIL.TiffImagePlugin import TiffImageFile

COMPRESSION, PHOTOMETRIC, PLANAR, SAMPLE_FORMAT, SUBSAMPLING = 259, 262, 284, 339, 530  # tags of a TIFF
UNKNOWN = "numbers of an unknown range"
WHITE_IS_ZERO, YCBCR = 0, 6  # photometric interpretations


def misread(image: Image) -> str | None:
    """Why the pixels of an image that was opened, and not read, would be others; None if they would not."""
    if image.mode == "F":
        return UNKNOWN
    if isinstance(image, TiffImageFile):
        return _of_tiff(image)
    if isinstance(image, BmpImageFile):
        return _of_bmp(image)
    return _of_gif(image) if isinstance(image, GifImageFile) else None


def _of_tiff(image: TiffImageFile) -> str | None:
    tags = image.tag_v2
    if image.mode == "I" or {*tags.get(SAMPLE_FORMAT, (1,))} != {1}:  # of 32 bits, or with signs
        return UNKNOWN
    if PHOTOMETRIC not in tags:
        return "nothing says which number is white"
    if tags.get(PLANAR, 1) != 1:
        return "a plane for each colour"
    full = tags[PHOTOMETRIC] != YCBCR or tags.get(SUBSAMPLING, (2, 2)) == (1, 1)
    if tags.get(COMPRESSION, 1) == 1 and not full:  # libtiff reads what is compressed
        return "colours of fewer pixels, not compressed"
    return None


def _of_bmp(image: BmpImageFile) -> str | None:
    start = 0 if image.format == "DIB" else 14
    with Path(image.filename).open("rb") as file:
        head = file.read(30)[start:]
    bits, = struct.unpack_from("<H", head, 10 if head[0] == 12 else 14)
    if bits != {"1": 1, "L": 8}.get(image.mode, bits):
        return f"a palette of greys, and {bits} bits a pixel"
    return None


def _of_gif(image: GifImageFile) -> str | None:
    with Path(image.filename).open("rb") as file:
        of_all = file.read(13)[10]
        file.seek(_table_size(of_all), os.SEEK_CUR)
        while (sign := file.read(1)) not in (b"", b","):  # a frame begins with the latter
            if sign == b"!":  # blocks of text, say, each behind its length
                file.seek(1, os.SEEK_CUR)
                while length := int.from_bytes(file.read(1)):
                    file.seek(length, os.SEEK_CUR)
        of_frame = file.read(9)[8:] or b"\0"
        table = file.read(_table_size(of_frame[0]))
    greys = bytes(level for level in range(len(table) // 3) for _ in range(3))
    return "two palettes, one of greys" if _table_size(of_all) and table and table == greys else None


def _table_size(flags: int) -> int:
    """Bytes of a GIF's palette, by the byte that tells of it."""
    return 3 * 2 ** (flags % 8 + 1) if flags >= 128 else 0


def white_is_zero(image: TiffImageFile) -> bool:
    """Whether 0 is white, which Pillow turns to black in images of up to 8 bits alone."""
    return image.tag_v2.get(PHOTOMETRIC) == WHITE_IS_ZERO
