"""Where images come from: archives and trees that fit into memory, and trees that are read image by image."""

import hashlib
import math
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import torch
from filelock import FileLock
from torch import Tensor
from torch.utils.data import Dataset
from torchvision import datasets
from torchvision.transforms import InterpolationMode, v2
from torchvision.transforms.v2 import functional as TF

from images.random import generator, seed_of
from images.reading import read_header, read_pixels, refuse_long
from images.tree import Tree, classes_of
from models import limits
from models.say import say
from settings.schema import DataConf, is_tree

CLASSES = {"cifar10": 10, "cifar100": 100}
Key = tuple[int, int, bool]  # see images.data


class TensorImages(Dataset):
    """uint8 images `[N, 3, H, W]` in memory; with `augment`, a batch carries a random move for each image."""

    def __init__(self, images: Tensor, targets: Tensor, conf: DataConf, seed: int, augment: bool,
                 digest: str | None = None):
        self.images, self.targets, self.conf, self.seed, self.augment = images, targets, conf, seed, augment
        self.image_size = images.shape[-1]
        self.digest = digest  # of the images as they were read
        self._moves = (-1, images)  # the epoch last drawn for, and its moves

    def __len__(self) -> int:
        return len(self.images)

    def __getitems__(self, keys: list[Key]) -> tuple[Tensor, ...]:
        index = torch.tensor([index for _, index, _ in keys])
        targets = self.targets[index].masked_fill(torch.tensor([not real for _, _, real in keys]), -1)
        if not self.augment:
            return self.images[index], targets
        return self.images[index], targets, self.moves(epoch=keys[0][0])[index]

    def moves(self, epoch: int) -> Tensor:
        """Row, column and mirroring of every image in an epoch, `[N, 3]`."""
        if self._moves[0] == epoch:
            return self._moves[1]
        bounds = [2 * self.conf.crop_padding + 1] * 2 + [1 + self.conf.flip]
        draw = generator(self.seed, epoch, 1)
        moves = [torch.randint(bound, (len(self),), generator=draw) for bound in bounds]
        self._moves = epoch, torch.stack(moves, 1)
        return self._moves[1]

    def without_augmentation(self) -> "TensorImages":
        return TensorImages(self.images, self.targets, self.conf, self.seed, augment=False)

    @staticmethod
    def collate(batch):
        """Batches are made whole by `__getitems__`."""
        return batch


def load_tensors(conf: DataConf, seed: int, train: bool) -> tuple[TensorImages, list[str]]:
    """Read one split of a small data set.

    Returns:
        The images, and the names of the classes.
    """
    images, targets, classes = READERS[conf.name](conf, train)
    digest = hashlib.sha256(images.numpy())  # before they are resized, to which machines may round otherwise
    digest.update(targets.numpy())
    if conf.image_size is not None and conf.image_size != images.shape[-1]:
        taken = 3 * len(images) * conf.image_size**2
        if taken > limits.IMAGES_BYTES:
            raise ValueError(f"data.image_size={conf.image_size}: the {len(images):,} images of "
                             f"data={conf.name} would take {taken / 2**30:.0f} GiB of memory: take a smaller "
                             "size, or data=folder, which reads images one by one")
        mode, at_once = InterpolationMode(conf.interpolation), max(1, 2**24 // conf.image_size**2)
        size = [conf.image_size] * 2
        resized = images.new_empty(*images.shape[:2], *size)  # to join parts would hold all of them twice
        for part, place in zip(images.split(at_once), resized.split(at_once), strict=True):
            place.copy_(TF.resize(part, size, mode, antialias=True))
        images = resized
    return TensorImages(images, targets, conf, seed, train, digest.hexdigest()), classes


def load_noise(conf: DataConf, seed: int) -> TensorImages:
    """64 images of uniform noise, a function of the seed; the targets mean nothing."""
    shape = (64, 3, conf.image_size, conf.image_size)
    images = torch.randint(256, shape, dtype=torch.uint8, generator=generator(seed))
    return TensorImages(images, torch.zeros(64, dtype=torch.int64), conf, seed, augment=False)


def _digits(conf: DataConf, train: bool) -> tuple[Tensor, Tensor, list[str]]:
    """scikit-learn's 1,797 scans of 8x8 pixels: 1,437 to train, 360 to test, stratified, always the same."""
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    pixels, targets = load_digits(return_X_y=True)
    split = train_test_split(pixels, targets, test_size=360, stratify=targets, random_state=0)
    pixels, targets = (split[0], split[2]) if train else (split[1], split[3])
    images = torch.tensor(pixels * (255 / 16)).round().to(torch.uint8).reshape(-1, 1, 8, 8)
    return images.repeat(1, 3, 1, 1), torch.tensor(targets), [str(digit) for digit in range(10)]


def _cifar(conf: DataConf, train: bool) -> tuple[Tensor, Tensor, list[str]]:
    root = _root(conf)
    if is_tree(root):
        images, targets, classes = _tree(conf, root, "train" if train else "test")
    else:
        data = _archive(conf, root, train)
        images, classes = torch.from_numpy(data.data).permute(0, 3, 1, 2), data.classes
        targets = torch.tensor(data.targets)
    if len(classes) != CLASSES[conf.name]:
        raise ValueError(f"data={conf.name} has {CLASSES[conf.name]} classes, but {root} has {len(classes)}; "
                         "data=folder takes any number")
    return images.contiguous(), targets, list(classes)


def _archive(conf: DataConf, root: Path, train: bool) -> datasets.CIFAR10:
    """One split of the official archive: as it lies there, where nothing is written, else downloaded."""
    archive = datasets.CIFAR10 if conf.name == "cifar10" else datasets.CIFAR100
    for place in (root / archive.filename, *(root / archive.base_folder).glob("*")):
        if place.is_file() and place.stat().st_size > limits.PART_BYTES:  # a hole, perhaps
            raise ValueError(f"data.root={root}: {place} is larger than all of {conf.name}: remove it")
    try:
        return archive(str(root), train=train)
    except RuntimeError as error:  # there is none, or it is damaged
        reason = error
    try:
        if conf.download:
            root.mkdir(parents=True, exist_ok=True)
            _refuse_links(root, archive)
            with FileLock(root / ".lock"):  # one process of a job downloads, the others find it
                return archive(str(root), train=train, download=True)
    except (OSError, RuntimeError) as error:  # no network, or a folder that one may not write to
        reason = error
    raise ValueError(
        f"no {conf.name} at data.root={root}, and it could not be downloaded "
        f"({str(reason).splitlines()[0]}). Put the official archive there, or images as train/<class>/*.png "
        "and test/<class>/*.png; or say data.download=true; or try data=digits, which needs no file"
        ) from reason


def _refuse_links(root: Path, archive: type[datasets.CIFAR10]) -> None:
    """Refuse to unpack an archive through links, to files of whoever was given this folder, or into pipes."""
    folder = root / archive.base_folder
    for place in (root / archive.filename, folder, *(folder.iterdir() if folder.is_dir() else ())):
        if place.is_symlink() or place.exists() and not (place.is_file() or place.is_dir()):
            raise ValueError(f"data.root={root}: the archive is damaged or not complete there, and would be "
                             f"written through {place}, which is a link, a pipe or a device: remove that, or "
                             "choose another data.root")


READERS = {"digits": _digits, "cifar10": _cifar, "cifar100": _cifar}


def _tree(conf: DataConf, root: Path, split: str) -> tuple[Tensor, Tensor, list[str]]:
    tree = Tree(root / split, classes_of(root / "train"))
    paths = [path for path, _ in tree.samples]
    _, size = read_header(paths[0])
    taken = 3 * len(paths) * math.prod(size)
    if taken > limits.IMAGES_BYTES:
        raise ValueError(f"{paths[0]} is {size[0]}x{size[1]} pixels; {len(paths):,} such images would take "
                         f"{taken / 2**30:.0f} GiB of memory: take data=folder, which reads them one by one")
    with ThreadPoolExecutor() as pool:  # decoding runs outside Python's lock
        images = list(pool.map(partial(read_pixels, size=size), paths))
    return torch.stack(images), torch.tensor(tree.targets), tree.classes


class FileImages(Dataset):
    """A tree of images, read one by one; batches of uint8 `[N, 3, H, W]`.

    Training: random resized crop and mirroring, and by choice the DBB paper's colour jitter and lighting (the
    authors' train.py: brightness 0.4, saturation 0.4, hue 0.4; lighting 0.1). Otherwise: resize, centre crop.
    """

    def __init__(self, tree: Tree, conf: DataConf, seed: int, augment: bool):
        self.tree, self.conf, self.seed, self.augment = tree, conf, seed, augment
        self.image_size = conf.image_size
        size, mode = conf.image_size, InterpolationMode(conf.interpolation)
        self.resized = resized_side(size, conf.crop_pct)
        steps = [v2.Resize(self.resized, mode), v2.CenterCrop(size)]
        if augment:
            steps = [v2.RandomResizedCrop(size, interpolation=mode)]
            steps += [v2.RandomHorizontalFlip()] if conf.flip else []
            if conf.color_jitter:  # on Pillow's images, twice as fast as on tensors
                jitter = v2.ColorJitter(brightness=0.4, saturation=0.4, hue=0.4)
                steps += [v2.ToPILImage(), jitter, v2.PILToTensor()]
            steps += [v2.TrivialAugmentWide()] if conf.trivial_augment else []
        self.transform = v2.Compose(steps)

    def __len__(self) -> int:
        return len(self.tree.samples)

    def __getitems__(self, keys: list[Key]) -> list[tuple[Tensor, int]]:
        batch = []
        with torch.random.fork_rng(devices=[]):  # once a batch
            for epoch, index, real in keys:
                path, target = self.tree.samples[index]
                # torch.manual_seed is 0.2 ms slower.
                torch.default_generator.manual_seed(seed_of(self.seed, epoch, index))
                image = read_pixels(path)
                if not self.augment:
                    refuse_long(image, self.resized, path)
                image = self.transform(image)
                if self.augment and self.conf.lighting:
                    image = lighting(image)
                batch.append((image, target if real else -1))
        return batch

    @property
    def digest(self) -> str:
        """That of the tree."""
        return self.tree.digest

    def without_augmentation(self) -> "FileImages":
        return FileImages(self.tree, self.conf, self.seed, augment=False)

    collate = staticmethod(torch.utils.data.default_collate)


def resized_side(image_size: int, crop_pct: float) -> int:
    """Length in pixels that the shorter side of a test image is brought to, before the centre crop."""
    return round(image_size / crop_pct)


def lighting(image: Tensor, std: float = 0.1) -> Tensor:
    """Shift the colours of a uint8 image `[3, H, W]` along ImageNet's principal components.

    As in AlexNet, section 4.1.
    """
    values = torch.tensor([0.2175, 0.0188, 0.0045])
    vectors = torch.tensor([[-0.5675, 0.7192, 0.4009],
                            [-0.5808, -0.0045, -0.8140],
                            [-0.5836, -0.6948, 0.4203]])
    shift = vectors @ (values * torch.randn(3) * std) * 255
    return (image + shift[:, None, None]).round().clamp(0, 255).to(torch.uint8)


def load_files(conf: DataConf, seed: int, train: bool) -> tuple[FileImages, list[str]]:
    """Find one split of a tree `train/<class>/`, `val/<class>/` (or `test/<class>/`).

    Returns:
        The images, and the names of the classes.
    """
    root = _root(conf)
    if not (root / "train").is_dir() or not ((root / "val").is_dir() or (root / "test").is_dir()):
        raise ValueError(f"no images at data.root={root}: data={conf.name} expects train/<class>/ and "
                         "val/<class>/ there; data=digits needs no file")
    held_out = root / ("val" if (root / "val").is_dir() else "test")
    if not train and held_out.samefile(root / "train"):
        say(f"{held_out} is a link to train/: the test images are those of the training")
    tree = Tree(root / "train" if train else held_out, classes_of(root / "train"))
    return FileImages(tree, conf, seed, augment=train), tree.classes


def _root(conf: DataConf) -> Path:
    if conf.root is None:
        raise ValueError(f"data.root: data={conf.name} needs the folder that holds its images")
    return Path(conf.root)
