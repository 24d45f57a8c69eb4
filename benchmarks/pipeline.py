"""What surrounds the network: images per second of the input pipelines, and what Lightning adds to a step.

    python benchmarks/pipeline.py [--imagenet data/imagenet] [--rounds 7]

One thread for the pipelines; medians, what is compared is interleaved. Writes all numbers to
benchmarks/results/.
"""

import argparse
import csv
import platform
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import pytorch_lightning as pl
import torch
import torchvision
from hydra import compose, initialize_config_dir
from PIL import Image
from pytorch_lightning.callbacks import Callback
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset
from torchvision import transforms

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from images.data import ImageData
from images.sources import TensorImages, load_files
from runs.folder import RunFolder
from settings.command import resolve
from settings.schema import Settings
from training.callbacks import make_callbacks
from training.loggers import make_loggers
from training.module import Classifier


def settings_of(*overrides: str) -> Settings:
    """Compose settings as the command line does."""
    with initialize_config_dir(str(ROOT / "configs"), version_base="1.3"):
        return resolve(compose("train", list(overrides)), list(overrides))


def rates(runs: dict[str, Callable[[], int]], rounds: int) -> dict[str, float]:
    """Items per second of functions that return how many items they went through, interleaved."""
    seconds = {name: [] for name in runs}
    for round_ in range(rounds + 1):
        for name, run in runs.items():
            start = time.perf_counter()
            count = run()
            if round_:  # the first one warms up
                seconds[name].append((time.perf_counter() - start) / count)
    return {name: 1 / statistics.median(values) for name, values in seconds.items()}


class PerImage(Dataset):
    """CIFAR as torchvision serves it: one image at a time, through Pillow and the usual transforms."""

    def __init__(self, images: torch.Tensor, targets: torch.Tensor, settings: Settings):
        self.images = images.permute(0, 2, 3, 1).contiguous().numpy()
        self.targets = targets.tolist()
        self.transform = transforms.Compose([
            transforms.RandomCrop(32, 4), transforms.RandomHorizontalFlip(), transforms.ToTensor(),
            transforms.Normalize(settings.data.mean, settings.data.std)])

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int):
        return self.transform(Image.fromarray(self.images[index])), self.targets[index]


def cifar(rounds: int) -> dict[str, float]:
    """Images per second of a CIFAR epoch: torchvision's way, ours; and of ResNet-20's training step."""
    settings = settings_of("model=resnet20", "data=cifar10")
    images = torch.randint(256, (8192, 3, 32, 32), dtype=torch.uint8)
    targets = torch.randint(10, (8192,))
    data = ImageData(settings.data, 0)
    data.train_set = TensorImages(images, targets, settings.data, 0, augment=True)
    data.train_indices = torch.arange(8192)
    theirs = DataLoader(PerImage(images, targets, settings), 128, shuffle=True)
    model = Classifier(settings, [str(i) for i in range(10)], 32).train()
    batch = data.on_after_batch_transfer(next(iter(data.train_dataloader())))

    def step() -> int:
        F.cross_entropy(model(batch[0]), batch[1]).backward()
        return len(batch[0])

    def ours() -> int:
        return sum(len(data.on_after_batch_transfer(batch)[0]) for batch in data.train_dataloader())

    return rates({"torchvision": lambda: sum(len(x) for x, _ in theirs), "ours": ours, "resnet20 step": step},
                 rounds)


def imagenet(root: str, rounds: int) -> dict[str, float]:
    """Images per second: decoding alone, by Pillow and by torchvision; our training and test pipelines."""
    settings = settings_of("model=resnet18", "data=imagenet", f"data.root={Path(root).resolve()}")
    train, test = (load_files(settings.data, 0, train)[0] for train in (True, False))
    test.tree = train.tree  # the same files
    paths = [path for path, _ in train.tree.samples[:128]]
    keys = [(0, index, True) for index in range(len(paths))]

    def decode(read) -> int:
        for path in paths:
            read(path)
        return len(paths)

    def pillow(path: str) -> Image.Image:
        return Image.open(path).convert("RGB")

    def by_torchvision(path: str) -> torch.Tensor:
        return torchvision.io.decode_image(path, torchvision.io.ImageReadMode.RGB)

    return rates({"Pillow": lambda: decode(pillow), "torchvision.io": lambda: decode(by_torchvision),
                  "ours, training": lambda: len(train.__getitems__(keys)),
                  "ours, test": lambda: len(test.__getitems__(keys))}, rounds)


class Times(Callback):
    """When each training step of an epoch ended."""

    def __init__(self):
        self.steps = []

    def on_train_epoch_start(self, *_):
        self.last = None

    def on_train_batch_end(self, *_):
        now = time.perf_counter()
        if self.last is not None:
            self.steps.append(now - self.last)
        self.last = now


def lightning(rounds: int) -> dict[str, float]:
    """Milliseconds of a ResNet-20 step (batch 128, 32x32): bare, and by train.py's trainer with callbacks."""
    settings = settings_of("model=resnet20", "data=digits", "data.image_size=32", "data.batch_size=128",
                           "logger=csv", "trainer.max_epochs=1", "trainer.limit_val_batches=0",
                           "trainer.enable_progress_bar=false")
    data = ImageData(settings.data, 0)
    data.load(train=True)
    bare, steps = [], Times()
    for _ in range(rounds):
        model = Classifier(settings, data.classes, 32).train()
        optimizer, last = torch.optim.SGD(model.parameters(), 0.1, 0.9, weight_decay=1e-4), None
        data.trainer = None
        for batch in data.train_dataloader():
            images, targets = data.on_after_batch_transfer(batch)
            optimizer.zero_grad()
            F.cross_entropy(model(images), targets).backward()
            optimizer.step()
            now = time.perf_counter()
            bare += [] if last is None else [now - last]
            last = now
        with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model = Classifier(settings, data.classes, 32)
            callbacks = [steps, *make_callbacks(settings, Path(folder))]
            options = asdict(settings.trainer) | {"sync_batchnorm": False, "enable_progress_bar": False}
            trainer = pl.Trainer(**options, default_root_dir=folder, callbacks=callbacks,
                                 logger=make_loggers(settings, RunFolder(folder)),
                                 enable_model_summary=False, use_distributed_sampler=False,
                                 num_sanity_val_steps=0)
            trainer.fit(model, data)
    return {"bare loop": 1e3 * statistics.median(bare), "trainer": 1e3 * statistics.median(steps.steps)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--imagenet", help="a tree train/<class>/*.jpg and val/<class>/*.jpg")
    parser.add_argument("--rounds", type=int, default=7)
    options = parser.parse_args()
    threads, numbers = torch.get_num_threads(), []
    print(f"torch {torch.__version__}, torchvision {torchvision.__version__}, {platform.machine()} CPU, "
          f"{options.rounds} rounds, medians\n")

    def report(what: str, values: dict[str, float], unit: str, base: str) -> None:
        for name, value in values.items():
            print(f"| {what} | {name} | {value:,.1f} {unit} | {value / values[base]:.3f} |", flush=True)
            numbers.append({"what": what, "name": name, "value": f"{value:.2f}", "unit": unit})

    print("| | | | ratio |\n|---|---|---|---|")
    step = lightning(options.rounds)
    report(f"ResNet-20 step, batch 128, {threads} threads", step, "ms", "bare loop")
    torch.set_num_threads(1)
    report("CIFAR, one thread", cifar(options.rounds), "images/s", "torchvision")
    if options.imagenet:
        report("ImageNet files, one thread", imagenet(options.imagenet, options.rounds), "images/s", "Pillow")
    version = torch.__version__.split("+")[0]
    path = ROOT / "benchmarks" / "results" / f"pipeline_torch{version}_cpu_{threads}threads.csv"
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(numbers[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(numbers)


if __name__ == "__main__":
    main()
