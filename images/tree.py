"""A tree of images on disk: which files and classes it holds, and what is wrong with it."""

import hashlib
import os
from collections import Counter
from functools import cached_property
from pathlib import Path

from torchvision import datasets

from images.reading import is_image
from models.say import say
from settings.cli import printable

SORT_IMAGENET = "https://raw.githubusercontent.com/soumith/imagenetloader.torch/master/valprep.sh"


class Tree(datasets.ImageFolder):
    """An image folder whose classes are those of the training split; prints what it holds and what it skips.

    Raises:
        ValueError: if it has a class that training lacks, holds no images, or a training class is empty.
    """

    def __init__(self, folder: Path, classes: list[str]):
        self.folder, self.known, self.skipped = folder, classes, Counter()
        _walk(folder)
        if loose := _loose_images(folder):
            self.skipped["images in no class's folder"] = len(loose)
        try:
            super().__init__(str(folder), allow_empty=folder.name != "train", is_valid_file=self._take)
        except FileNotFoundError as error:
            raise ValueError(f"{folder}: {error}{self._left_out()}") from error
        if not self.samples:
            raise ValueError(f"{folder} holds no images{self._left_out()}")
        count = len(set(self.targets))
        say(f"{folder}: {len(self.samples)} images of {count} classes{self._left_out()}")

    def _take(self, path: str) -> bool:
        if any(part.startswith(".") for part in Path(path).relative_to(self.folder).parts):
            self.skipped["hidden"] += 1
            return False
        if is_image(path):
            return True
        self.skipped[printable(Path(path).suffix.lower()) or "without an ending"] += 1
        return False

    @cached_property
    def digest(self) -> str:
        """A hash of the names of all images, with those of their classes and the split, in their order."""
        above = f"{self.folder.parent}/"
        names = "\n".join(path.removeprefix(above) for path, _ in self.samples)
        return hashlib.sha256(os.fsencode(names)).hexdigest()

    def _left_out(self) -> str:
        if not self.skipped:
            return ""
        counts = ", ".join(f"{what} {count}" for what, count in self.skipped.most_common())
        return f"; skipped {self.skipped.total()} files: {counts}"

    def find_classes(self, directory: str) -> tuple[list[str], dict[str, int]]:
        """The training classes, in alphabetical order."""
        if new := sorted(set(classes_of(Path(directory))) - set(self.known)):
            raise ValueError(f"{directory} has classes that the training images lack: {', '.join(new[:5])}")
        return self.known, {name: index for index, name in enumerate(self.known)}


def _walk(folder: Path) -> None:
    """Raise a ValueError for what ImageFolder would leave out, unreadable folders, or walk without end."""
    seen = set()
    try:
        for place, _, _ in os.walk(folder, onerror=_refuse_unreadable, followlinks=True):
            status = os.stat(place)
            if (status.st_dev, status.st_ino) in seen:
                raise ValueError(f"{place} is in {folder} twice, by a link: remove the link")
            seen.add((status.st_dev, status.st_ino))
    except RecursionError as error:
        raise ValueError(f"{folder}: its folders are nested too deep") from error


def _refuse_unreadable(error: OSError) -> None:
    raise ValueError(f"the folder {error.filename} cannot be read ({error.strerror})") from error


def classes_of(folder: Path) -> list[str]:
    """The names of a split's classes: its folders.

    Raises:
        ValueError: if there is none, with what to do.
    """
    classes = [entry.name for entry in folder.iterdir() if entry.is_dir() and not entry.name.startswith(".")]
    if classes:
        return sorted(classes)
    loose = _loose_images(folder)
    text = (f"{folder} holds {len(loose)} images and no folder of a class: it must be "
            f"{folder.name}/<class>/<image>")
    if any(name.startswith("ILSVRC2012_val_") for name in loose):
        text += f". Sort ImageNet's validation images by: (cd {folder} && wget -qO- {SORT_IMAGENET} | bash)"
    raise ValueError(text)


def _loose_images(folder: Path) -> list[str]:
    return [entry.name for entry in folder.iterdir() if entry.is_file() and is_image(entry)]
