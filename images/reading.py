"""One image file as RGB pixels; which endings images have."""

import struct
from pathlib import Path

import numpy as np
from PIL import Image
from torch import Tensor
from torchvision.datasets.folder import IMG_EXTENSIONS
from torchvision.io import ImageReadMode, decode_jpeg, read_file
from torchvision.transforms.v2 import functional as TF

from images.misread import misread, white_is_zero
from images.tiff import refuse_parts, tags_of
from models import limits

IMAGE_ENDINGS = (*IMG_EXTENSIONS, ".apng", ".dib", ".gif", ".jfif", ".jpe", ".mpo", ".pbm", ".pnm",
                 ".sgi", ".tga")
# Those of these endings, whatever a file is called: PostScript, say, would be run by another program; a
# JPEG 2000 of a kilobyte may take eight gigabytes, an AVIF of ten minutes, and Pillow reads DDS and QOI pixel
# by pixel.
Image.init()
FORMATS = [kind for kind in ("BMP", "DIB", "GIF", "JPEG", "MPO", "PNG", "PPM", "SGI", "TGA", "TIFF", "WEBP")
           if kind in Image.OPEN]
UNREADABLE = (OSError, RuntimeError, SyntaxError, ValueError, MemoryError, EOFError,
              TypeError, KeyError, IndexError, AttributeError, OverflowError, ZeroDivisionError,
              struct.error, Image.DecompressionBombError)  # what Pillow's readers raise


def is_image(path: str | Path) -> bool:
    """Whether a file's name ends as that of an image does, in small letters or capitals."""
    return Path(path).suffix.lower() in IMAGE_ENDINGS


def read_pixels(path: str, size: tuple[int, int] | None = None) -> Tensor:
    """Read one image as RGB, uint8 `[3, H, W]`.

    Raises:
        ValueError: with the path, if it cannot be read, or its width and height are not `size`.
    """
    kind, found = read_header(path)
    _refuse_other(path, found, size)
    if kind in ("JPEG", "MPO"):
        try:  # faster than Pillow, to the same pixels (benchmarks/README.md)
            return decode_jpeg(read_file(path), ImageReadMode.RGB)
        except RuntimeError:
            pass
    image = read_image(path)
    _refuse_other(path, image.size, size)  # Pillow may turn a TIFF, by what it says of its orientation
    return TF.pil_to_tensor(image)


def _refuse_other(path: str, found: tuple[int, int], size: tuple[int, int] | None) -> None:
    if size not in (None, found):
        raise ValueError(f"{path} is {found[0]}x{found[1]} pixels, but others are {size[0]}x{size[1]}; "
                         "data=folder takes any sizes")


def refuse_long(image: Tensor, side: int, path: str) -> None:
    """Raise a ValueError for an image `[3, H, W]` that is too large once its shorter side is resized."""
    short, long = sorted(image.shape[1:])
    if side**2 * long > limits.IMAGE_PIXELS * short:
        raise ValueError(f"{path} has sides of {short} and {long} pixels: resized to {side}, it would have "
                         f"more than {limits.IMAGE_PIXELS:,}")


def read_header(path: str) -> tuple[str, tuple[int, int]]:
    """An image's format, and its width and height.

    Raises:
        ValueError: with the path, if it cannot be read, or its pixels would fill the memory.
    """
    try:
        if not Path(path).is_file():
            raise ValueError("there is no file (a pipe or a device is none)")
        if Path(path).stat().st_size > limits.IMAGE_BYTES:
            raise ValueError("the file is too large")
        _refuse_many_parts(path)
        tags = tags_of(path)
        with Image.open(path, formats=FORMATS) as image:
            (width, height), kind = image.size, image.format
            if kind == "TIFF":
                refuse_parts(image, tags)
    except UNREADABLE as error:
        raise ValueError(f"unreadable image: {path} ({str(error) or type(error).__name__})") from error
    most = limits.PPM_PIXELS if kind == "PPM" else limits.IMAGE_PIXELS
    if width * height > most or max(width, height) > limits.IMAGE_SIDES * min(width, height):
        raise ValueError(f"unreadable image: {path} ({width} x {height} pixels: it is too large or too long)")
    return kind, (width, height)


def _refuse_many_parts(path: str) -> None:
    """Raise a ValueError for a file of so many parts that its size, or its pixels, take minutes to read."""
    with Path(path).open("rb") as file:
        start = file.read(2)
        content = file.read() if start in (b"\xff\xd8", b"P1", b"P2", b"P3") else b""
    jpeg = start == b"\xff\xd8"
    if jpeg and content.count(b"Exif\0\0") > limits.EXIF_PARTS:
        raise ValueError("its Exif data has too many parts")
    if jpeg and content.count(b"\xff\xda") > limits.SCANS:
        raise ValueError("it has too many scans")
    if not jpeg and content.count(b"#") > limits.COMMENTS:
        raise ValueError("it has too many comments")


def read_image(path: str) -> Image.Image:
    """Read one image as RGB.

    Raises:
        ValueError: with the path, if it cannot be read.
    """
    try:
        with Image.open(path, formats=FORMATS) as image:
            if why := misread(image):
                raise ValueError(why)
            if image.mode.startswith("I"):  # 16 bits a pixel, which Pillow would cut off at 255
                darkest, brightest = image.getextrema()
                if not 0 <= darkest <= brightest < 2**16:
                    raise ValueError("more than 16 bits a pixel")
                values = np.asarray(image) // 256
                if image.format == "TIFF" and white_is_zero(image):
                    values = 255 - values
                image = Image.fromarray(values.astype(np.uint8))
            return image.convert("RGB")
    except UNREADABLE as error:
        raise ValueError(f"unreadable image: {path} ({str(error) or type(error).__name__})") from error
