"""Images that Pillow would silently take for others; found by reading files of known pixels."""

import struct
from pathlib import Path

from PIL.BmpImagePlugin import BmpImageFile
from PIL.Image import Image
from PIL.TiffImagePlugin import TiffImageFile

BITS, COMPRESSION, PHOTOMETRIC, FILL_ORDER = 258, 259, 262, 266  # tags of a TIFF
PLANAR, SAMPLE_FORMAT, SUBSAMPLING = 284, 339, 530
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
    return None


def _of_tiff(image: TiffImageFile) -> str | None:
    tags = image.tag_v2
    if image.mode == "I" or {*tags.get(SAMPLE_FORMAT, (1,))} != {1}:  # of 32 bits, or with signs
        return UNKNOWN
    if PHOTOMETRIC not in tags:
        return "nothing says which number is white"
    if tags.get(COMPRESSION, 1) != 1:  # libtiff reads it, and Pillow what is not compressed
        return None
    simple = {*tags.get(BITS, (1,))} == {8} and tags.get(FILL_ORDER, 1) == 1 and not white_is_zero(image)
    if tags.get(PLANAR, 1) != 1 and not simple:
        return "planes of other than 8 bits, not compressed"
    if tags[PHOTOMETRIC] == YCBCR and tags.get(SUBSAMPLING, (2, 2)) != (1, 1):
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


def white_is_zero(image: TiffImageFile) -> bool:
    """Whether 0 is white, which Pillow turns to black in images of up to 8 bits alone."""
    return image.tag_v2.get(PHOTOMETRIC) == WHITE_IS_ZERO
