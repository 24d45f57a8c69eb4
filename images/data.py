"""The data module: which images, in which order, with which augmentation.

Order and augmentation are functions of (seed, epoch, index of the image), for any number of workers or
processes; the sampler therefore yields keys `(epoch, index, real)`, where `real` is False for a repeated
image that fills up the share of a process and must not be counted (its target becomes -1).
"""

import atexit
import multiprocessing
import resource
import signal
from collections.abc import Iterator
from contextlib import suppress

import pytorch_lightning as pl
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from images.random import generator
from images.sources import load_files, load_noise, load_tensors
from models.say import say
from settings.schema import TENSOR_SETS, DataConf


class KeySampler(Sampler):
    """Keys `(epoch, index, real)` for one process of `world_size`.

    Shuffled ones drop the last few, others fill up. Of the first `epoch`, this process has `done` some. The
    length counts them: Lightning takes it for that of an epoch.
    """

    def __init__(self, indices: Tensor, shuffle: bool, seed: int, rank: int, world_size: int,
                 epoch: int = 0, done: int = 0):
        self.indices, self.shuffle, self.seed = indices, shuffle, seed
        self.rank, self.world_size, self.epoch = rank, world_size, epoch
        self.done = {epoch: done}

    def set_epoch(self, epoch: int) -> None:
        """Called by Lightning before every epoch."""
        self.epoch = epoch

    def __len__(self) -> int:
        n = len(self.indices)
        return n // self.world_size if self.shuffle else -(-n // self.world_size)

    def __iter__(self) -> Iterator[tuple[int, int, bool]]:
        n, order = len(self.indices), self.indices
        if self.shuffle:
            order = order[torch.randperm(n, generator=generator(self.seed, self.epoch))]
        order = order.tolist()
        first = self.rank + self.done.get(self.epoch, 0) * self.world_size
        for position in range(first, len(self) * self.world_size, self.world_size):
            yield self.epoch, order[position % n], position < n


class ImageData(pl.LightningDataModule):
    """Any of the data sets, by `conf.name`.

    Once loaded, `classes` has the names of its classes (None for `data=none`).

    Batches on the device are `(images, targets)`: float `[N, 3, H, W]`, normalised, and int64 `[N]`.

    Args:
        conf: the settings.
        seed: of the run, for order and augmentation.
        first_epoch: where a resumed run goes on; Lightning lets workers fetch ahead before it tells the
            sampler.
        first_batch: of that epoch.
    """

    def __init__(self, conf: DataConf, seed: int, first_epoch: int = 0, first_batch: int = 0):
        super().__init__()
        self.conf, self.seed, self.first_epoch, self.first_batch = conf, seed, first_epoch, first_batch

    def load(self, train: bool) -> None:
        """Find and read the test images, and with `train` the training images; decoded once where small.

        Raises:
            ValueError: if there is no such data, or it is not of the expected form.
        """
        if self.conf.name == "none":
            if train:
                raise ValueError("data=none has nothing to train on; it is for convert.py")
            self.test_set, self.classes = load_noise(self.conf, self.seed), None
            self.test_indices = torch.arange(len(self.test_set))
            return
        read = load_tensors if self.conf.name in TENSOR_SETS else load_files
        self.test_set, self.classes = read(self.conf, self.seed, train=False)
        self.test_indices = self._some(torch.arange(len(self.test_set)))
        if len(self.test_indices) < len(self.test_set):  # a stranger's checkpoint may say so
            say(f"data.max_images={self.conf.max_images}: {len(self.test_indices)} of {len(self.test_set)} "
                "test images are taken")
        if train:
            if self.conf.crop_padding >= self.image_size:
                raise ValueError(f"data.crop_padding={self.conf.crop_padding} must be less than the side of "
                                 f"the images, {self.image_size} pixels: some would have none of their own")
            self.train_set, _ = read(self.conf, self.seed, train=True)
            # The same images are held out whatever the run's seed.
            order = torch.randperm(len(self.train_set), generator=generator(0))
            held = min(self.conf.val_size, len(order))
            self.val_indices, rest = order.split([held, len(order) - held])
            self.train_indices = self._some(rest.sort().values)
            if len(self.train_indices) < self.conf.batch_size:
                knobs = {"data.val_size": self.conf.val_size, "data.max_images": self.conf.max_images}
                fewer = ", ".join(f"{knob}={value}" for knob, value in knobs.items() if value)
                raise ValueError(f"data.batch_size={self.conf.batch_size} is larger than the "
                                 f"{len(self.train_indices)} training images of data={self.conf.name}"
                                 + (f" with {fewer}" if fewer else ""))

    def _some(self, indices: Tensor) -> Tensor:
        """At most `max_images`, spread evenly: they come sorted by class."""
        wanted = min(self.conf.max_images or len(indices), len(indices))
        return indices[torch.arange(wanted) * len(indices) // wanted]

    def check_classes(self, trained: list[str]) -> None:
        """Compare with the classes that a network was trained for.

        Raises:
            ValueError: if the data has others.
        """
        if self.classes is None or self.classes == trained:
            return
        if len(self.classes) != len(trained):
            raise ValueError(f"the checkpoint was trained for {len(trained)} classes, but "
                             f"data={self.conf.name} has {len(self.classes)}")
        ours, theirs = next((a, b) for a, b in zip(self.classes, trained, strict=True) if a != b)
        raise ValueError(f"data={self.conf.name} has other classes than the checkpoint was trained for: "
                         f"{ours} where that has {theirs}; name its folders as in the training")

    @property
    def digests(self) -> dict[str, str | None]:
        """Hashes of all training and test images: of their names, or of their pixels if held in memory."""
        sets = {"image_digest": self.train_set, "test_digest": self.test_set}
        return {key: found.digest for key, found in sets.items()}

    @property
    def image_size(self) -> int:
        """Side of the images in pixels."""
        return self.test_set.image_size

    def train_dataloader(self) -> DataLoader:
        return self._loader(self.train_set, self.train_indices, shuffle=True)

    def val_dataloader(self) -> list[DataLoader]:
        """This process's share of the test split and, with `val_size`, of the held-out training images."""
        loaders = [self._loader(self.test_set, self.test_indices, shuffle=False)]
        if self.conf.val_size:
            plain = self.train_set.without_augmentation()
            loaders.append(self._loader(plain, self.val_indices, shuffle=False))
        return loaders

    def test_dataloader(self) -> DataLoader:
        """The whole test split, in whatever process: the final evaluation runs in one."""
        return self._loader(self.test_set, self.test_indices, shuffle=False, whole=True)

    def held_out_dataloader(self) -> DataLoader:
        """All of the held-out training images, in one process."""
        plain = self.train_set.without_augmentation()
        return self._loader(plain, self.val_indices, shuffle=False, whole=True)

    def calibration_images(self, count: int = 1024) -> Iterator[Tensor]:
        """Normalised training images `[N, 3, H, W]` without augmentation, always the same.

        Of `data=none`, its noise images.
        """
        dataset, indices = self.test_set, self.test_indices
        if self.classes is not None:
            dataset = self.train_set.without_augmentation()
            order = torch.randperm(len(self.train_indices), generator=generator(0))
            indices = self.train_indices[order[:count]]
        for batch in self._loader(dataset, indices, shuffle=False, whole=True):
            yield self.on_after_batch_transfer(batch)[0]

    def _loader(self, dataset: Dataset, indices: Tensor, shuffle: bool, whole: bool = False) -> DataLoader:
        alone = whole or self.trainer is None
        rank, world_size = (0, 1) if alone else (self.trainer.global_rank, self.trainer.world_size)
        if self.conf.batch_size % world_size:
            raise ValueError(f"data.batch_size={self.conf.batch_size} is the batch of all {world_size} "
                             "processes together and must be divisible by their number")
        if self.conf.on_device and self.trainer is not None:
            dataset.images = dataset.images.to(self.trainer.strategy.root_device)
        workers, share = self.conf.num_workers, self.conf.batch_size // world_size
        if workers:
            allow_open_files()
        done = self.first_batch * share if shuffle else 0
        sampler = KeySampler(indices, shuffle, self.seed, rank, world_size, self.first_epoch, done)
        return DataLoader(dataset, share, drop_last=shuffle, sampler=sampler,
                          num_workers=workers, persistent_workers=workers > 0 and shuffle,
                          collate_fn=dataset.collate, worker_init_fn=leave_signals_to_the_run,
                          pin_memory=torch.cuda.is_available() and not self.conf.on_device,
                          generator=torch.Generator())  # its own: the global one is left alone

    def on_after_batch_transfer(self, batch: tuple[Tensor, ...],
                                dataloader_idx: int = 0) -> tuple[Tensor, Tensor]:
        """Augment and normalise a whole batch on the device.

        Args:
            batch: uint8 images `[N, 3, H, W]`, targets `[N]` and, for training on tensors, moves `[N, 3]`.
            dataloader_idx: unused.
        """
        images, targets, *moves = batch
        if moves:
            images = crop_and_flip(images, moves[0], self.conf.crop_padding)
        mean, std = (torch.tensor(values, device=images.device)[:, None, None] * 255
                     for values in (self.conf.mean, self.conf.std))
        return images.float().sub_(mean).div_(std), targets


def leave_signals_to_the_run(worker: int) -> None:
    """Have a process that loads images go on where a whole job is told to stop: the run still needs it.

    Of SIGTERM only the first is left out: by another, torch ends a process that does not end by itself.
    """
    for number in (signal.SIGINT, signal.SIGHUP, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda *_: signal.signal(signal.SIGTERM, signal.SIG_DFL))


def allow_open_files() -> None:
    """Allow this process, and those that load images, as many open files as the system lets them have.

    Of a batch on its way each tensor is one. Beyond the limit PyTorch's loader waits without end.
    """
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    with suppress(ValueError):  # where "unlimited" is none, as on macOS
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))


@atexit.register
def end_loaders() -> None:
    """End the processes that load images where an error ends this one.

    Python sends them one SIGTERM, which they take for a whole job's, and would wait for them without end.
    """
    loaders = [process for process in multiprocessing.active_children() if process.daemon]
    if loaders:
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # torch's handler raises for each that ends
    for process in loaders:
        process.kill()


def crop_and_flip(images: Tensor, moves: Tensor, padding: int) -> Tensor:
    """Pad with black, crop back to the old size, and mirror, each image by its own move, in one gather.

    Args:
        images: `[N, C, H, W]`.
        moves: `[N, 3]`: first row and column of the crop in 0 .. 2 * padding, and whether to mirror.
        padding: pixels on each side.
    """
    n, channels, height, width = images.shape
    padded = torch.nn.functional.pad(images, [padding] * 4)
    rows = moves[:, :1] + torch.arange(height, device=images.device)
    columns = torch.arange(width, device=images.device)
    columns = moves[:, 1:2] + torch.where(moves[:, 2:] > 0, columns.flip(0), columns)
    pixels = rows[:, :, None] * padded.shape[3] + columns[:, None, :]  # [N, H, W], the same in all channels
    pixels = pixels.reshape(n, 1, -1).expand(-1, channels, -1)
    return padded.flatten(2).gather(2, pixels).reshape(images.shape)
