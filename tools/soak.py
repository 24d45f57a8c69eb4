"""A run of many short epochs: do its memory and its open files stay flat?

    python tools/soak.py [--epochs 2000] [--logger wandb]

Trains ResNet-8 with DBB on 64 digits, in this process, and prints both twenty times. Ten minutes for 2,000
epochs on one core. Linux.
"""

import argparse
import os
import sys
import tempfile
from pathlib import Path

import pytorch_lightning as pl
from hydra import compose, initialize_config_dir

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import train
from settings.command import resolve
from training import steps


class Watch(pl.Callback):
    """Prints, every so many epochs, resident memory in MiB and the number of open files."""

    def __init__(self, every: int):
        self.every = every

    def on_train_epoch_end(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        if trainer.current_epoch % self.every == 0:
            pages = int(Path("/proc/self/statm").read_text().split()[1])
            memory, files = pages * os.sysconf("SC_PAGE_SIZE") / 2**20, len(os.listdir("/proc/self/fd"))
            print(f"soak: epoch {trainer.current_epoch}: {memory:.0f} MiB, {files} open files",
                  file=sys.stderr, flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--epochs", type=int, default=2000)
    parser.add_argument("--logger", default="wandb", choices=("csv", "wandb", "tensorboard"))
    options = parser.parse_args()
    words = ["model=resnet8_dbb", "data=digits", "data.max_images=64", "data.batch_size=32", "optim.lr=0.001",
             "optim.ema_decay=0.9", f"logger={options.logger}", f"trainer.max_epochs={options.epochs}"]
    with initialize_config_dir(str(ROOT / "configs"), version_base="1.3"):
        command = resolve(compose("train", words), words)
    callbacks = steps.make_callbacks
    steps.make_callbacks = lambda *args: [*callbacks(*args), Watch(max(1, options.epochs // 20))]
    with tempfile.TemporaryDirectory() as folder:
        train.train(command, Path(folder))


if __name__ == "__main__":
    main()
