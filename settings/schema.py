"""The schema behind `configs/`: what a run is. Its values are stored in the run's checkpoint.

Every knob is a typed field, so that a misspelt name and a value of the wrong type fail at once; its limit
stands beside it.
"""

import os
from dataclasses import asdict, dataclass, field, fields, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from omegaconf import MISSING

from settings.values import at_least, check_name, check_numbers, seconds

# What a run may change and be the same.
NOT_OF_THE_RUN = ("logger", "checkpoint", "data.num_workers", "data.download", "trainer.max_time",
                  "trainer.enable_progress_bar", "trainer.log_every_n_steps", "trainer.profiler")
PATHS = ("data.root", "model.weights")
MOST_BRANCHES = 64  # in a block
FILE_SETS = ("imagenet", "folder")  # data sets that are read image by image
# All others of configs/data/ are held in memory, and augmented as whole batches.
TENSOR_SETS = tuple(sorted({path.stem for path in Path(__file__).parents[1].glob("configs/data/*.yaml")}
                           - {*FILE_SETS, "none"}))


def same_everywhere(data: str | None, root: str | None) -> bool:
    """Whether a data set has the same images in every place, as the official archive has; a tree may not."""
    return data in TENSOR_SETS and not (isinstance(root, str) and is_tree(root))


def is_tree(root: str | Path) -> bool:
    """Whether a CIFAR lies there as images in folders, not as the official archive."""
    return all(os.path.isdir(os.path.join(os.path.expanduser(root), split)) for split in ("train", "test"))


@dataclass
class ModelConf:
    """The backbone. A warm start: `pretrained` fetches timm's weights, `weights` reads a file."""

    name: str = MISSING
    pretrained: bool = False
    weights: str | None = None
    channels_last: bool = False
    compile: bool | str = False

    def check(self) -> None:
        """Check what a type cannot say; this and the like below raise a ValueError."""
        if self.compile not in (True, False, "reduce-overhead"):
            raise ValueError(f"model.compile={self.compile} is unknown: true, false or reduce-overhead "
                             "(CUDA graphs)")
        if self.pretrained and self.weights is not None:
            raise ValueError(f"model.pretrained=true and model.weights={self.weights}: a network "
                             "starts from one of them")


@dataclass
class LayersConf:
    """Other branches for the layers whose module name matches a glob pattern; none leaves them plain."""

    modules: str = MISSING
    branches: list[str] = MISSING


@dataclass
class BlockConf:
    """What K x K convolutions become; see configs/block/dbb.yaml."""

    name: str = "none"
    branches: list[str] = field(default_factory=list)
    depthwise: list[str] | None = None
    copies: int = at_least(1, 1, most=64)
    mode: str = "exact"
    positions: int | None = at_least(4, None)
    # Stored by name. None, in old files, is what "auto" was: "ones", with trained weights "single".
    init: str | None = "auto"
    kernel_sizes: list[int] = field(default_factory=lambda: [2, 3, 4, 5, 6])
    include: list[str] | None = None
    exclude: list[str] | None = None
    layers: list[LayersConf] = field(default_factory=list)
    without_norm: bool = False
    sgs_every_n_epochs: int | None = at_least(1, None)
    sgs_batches: int = at_least(1, 2, most=10**4)

    def check(self) -> None:
        """Check names, sizes, and that there are branches to which the rest belongs."""
        if not self.name.isprintable():
            raise ValueError(f"block.name={self.name!r} must be of signs that can be printed")
        from dbb import BRANCHES, INITS, MODES  # and PyTorch, which takes seconds
        for knob, names in (("branches", self.branches), ("depthwise", self.depthwise or []),
                            *(("layers", layers.branches) for layers in self.layers)):
            count = len(names) + names.count("kxk") * (self.copies - 1)
            if count > MOST_BRANCHES:
                raise ValueError(f"block.{knob} has {count} branches (block.copies={self.copies}); "
                                 f"{MOST_BRANCHES} are the most")
            for name in names:
                check_name(f"block.{knob}", name, list(BRANCHES))
        check_name("block.mode", self.mode, list(MODES))
        if self.init is not None:
            check_name("block.init", self.init, ["auto", *INITS])
        if not self.kernel_sizes:
            raise ValueError("block.kernel_sizes=[] would make no blocks: name one size or more, or choose "
                             "block=none")
        if min(self.kernel_sizes) < 1:
            raise ValueError(f"block.kernel_sizes={min(self.kernel_sizes)} must be at least 1")
        if self.sgs_every_n_epochs is not None:
            self._check_sgs()
        elif not (self.branches or self.layers) and replace(self, init="auto") != BlockConf():
            raise ValueError("block.branches is empty, so that the other settings of the block mean nothing: "
                             "block=dbb takes the list of configs/block/dbb.yaml, block.branches=[kxk,1x1] "
                             "one of your own, block=none leaves plain convolutions")

    def _check_sgs(self) -> None:
        ours = ("name", "init", "kernel_sizes", "include", "exclude", "without_norm", "sgs_every_n_epochs",
                "sgs_batches")  # a recipe may set some of them for any block
        others = [part.name for part in fields(self) if part.name not in ours
                  and getattr(self, part.name) != getattr(BlockConf(), part.name)]
        if others:
            raise ValueError(f"block.sgs_every_n_epochs={self.sgs_every_n_epochs} scales the gradients of "
                             f"plain convolutions, and block.{others[0]} is of blocks: leave one of them out")


@dataclass
class DataConf:
    """A data set. Paths as typed are resolved against the current folder."""

    name: str = MISSING
    root: str | None = None
    download: bool = True
    image_size: int | None = at_least(2, None, most=2048)
    batch_size: int = at_least(1, 128, most=2**20)
    num_workers: int = at_least(0, 0, most=512)
    val_size: int = at_least(0, 0)
    max_images: int | None = at_least(1, None)
    mean: list[float] = field(default_factory=list)
    std: list[float] = field(default_factory=list)
    interpolation: str = "bilinear"
    crop_pct: float = at_least(0.1, 0.875, most=1)
    crop_padding: int = at_least(0, 0, most=1024)
    flip: bool = True
    color_jitter: bool = False
    lighting: bool = False
    trivial_augment: bool = False
    mixup: float = at_least(0, 0.0, most=1000)
    cutmix: float = at_least(0, 0.0, most=1000)
    on_device: bool = False

    def check(self) -> None:
        """Check names, and which knobs a data set has."""
        check_name("data.name", self.name, [*TENSOR_SETS, *FILE_SETS, "none"])
        check_name("data.interpolation", self.interpolation, ["bilinear", "bicubic"])
        if not (len(self.mean) == len(self.std) == 3 and min(self.std) > 0):
            raise ValueError("data.mean and data.std need three numbers each, one a channel, and no "
                             "deviation of zero")
        if min(self.mean) < 0 or max(self.mean + self.std) > 1:
            raise ValueError(f"data.mean={self.mean} and data.std={self.std} must be at least 0 and at most "
                             "1: pixels are between them (divide numbers of 0 to 255 by 255)")
        for knob in ("mixup", "cutmix"):
            if 0 < getattr(self, knob) < 0.001:  # of whose logarithm a sample is made
                raise ValueError(f"data.{knob}={getattr(self, knob)} must be 0, or at least 0.001")
        unused = ["crop_padding", "on_device"]
        if self.name in TENSOR_SETS:
            unused = ["color_jitter", "lighting", "trivial_augment"]
        for knob in unused:
            if value := getattr(self, knob):
                raise ValueError(f"data.{knob}={value}: data={self.name} has no such option")
        if self.name in TENSOR_SETS and self.crop_pct != DataConf.crop_pct:
            raise ValueError(f"data.crop_pct={self.crop_pct}: data={self.name} crops no test image: leave it "
                             "out")
        if self.image_size is None and self.name in FILE_SETS:
            raise ValueError(f"data.image_size: data={self.name} needs one (224 is usual)")
        if self.on_device and self.num_workers:
            raise ValueError(f"data.num_workers={self.num_workers} must be 0 with data.on_device=true: "
                             "nothing is left to load")


@dataclass
class OptimConf:
    """Optimiser and schedule."""

    name: str = MISSING
    lr: float = at_least(0, most=1e6)
    lr_batch_size: int | None = at_least(1, None, most=10**9)
    momentum: float = 0.9
    weight_decay: float = at_least(0, 0.0, most=1e6)
    decay_norm_and_bias: bool = True
    warmup_epochs: int = at_least(0, 0)
    label_smoothing: float = 0.0
    ema_decay: float | None = None

    def check(self) -> None:
        """Check the name, and fractions."""
        if self.name not in ("sgd", "momentum"):  # timm takes seconds to import
            from timm.optim import list_optimizers
            check_name("optim.name", self.name, list_optimizers())
        for knob in ("label_smoothing", "momentum"):
            if not 0 <= getattr(self, knob) < 1:
                raise ValueError(f"optim.{knob}={getattr(self, knob)} must be at least 0 and less than 1")
        if self.ema_decay is not None and not 0 < self.ema_decay < 1:
            raise ValueError(f"optim.ema_decay={self.ema_decay} must be between 0 and 1: with 1 the average "
                             "would stay at the start; null is no average")


@dataclass
class TrainerConf:
    """Arguments of Lightning's Trainer, under its own names."""

    max_epochs: int = at_least(1, most=10**6)
    max_time: str | None = None
    accelerator: str = "auto"
    devices: Any = "auto"
    num_nodes: int = at_least(1, 1, most=10**5)
    strategy: str = "auto"
    precision: str = "32-true"
    sync_batchnorm: bool = False
    gradient_clip_val: float | None = at_least(0, None)
    accumulate_grad_batches: int = at_least(1, 1, most=10**6)
    check_val_every_n_epoch: int = at_least(1, 1)
    limit_train_batches: int | float = at_least(0, 1.0, most=10**9)
    limit_val_batches: int | float = at_least(0, 1.0, most=10**9)
    log_every_n_steps: int = at_least(0, 50, most=10**9)
    deterministic: bool = False
    benchmark: bool | None = None
    detect_anomaly: bool = False
    profiler: str | None = None
    enable_progress_bar: bool | None = None

    def check(self) -> None:
        """Check names, and that something is trained on, for some time."""
        check_name("trainer.accelerator", self.accelerator, ["auto", "cpu", "gpu", "cuda", "mps", "tpu"])
        for knob in ("limit_train_batches", "limit_val_batches"):
            value = getattr(self, knob)
            if isinstance(value, float) and value > 1:
                raise ValueError(f"trainer.{knob}={value} must be a whole number of batches, or a fraction "
                                 "of at most 1.0")
        if not self.limit_train_batches:
            raise ValueError(f"trainer.limit_train_batches={self.limit_train_batches} leaves nothing "
                             "to train on")
        if self.profiler is not None:
            check_name("trainer.profiler", self.profiler, ["simple", "advanced", "pytorch"])
        seconds("trainer.max_time", self.max_time)


@dataclass
class CheckpointConf:
    """When the newest state is saved within an epoch, under the names of Lightning's ModelCheckpoint."""

    every_n_train_steps: int | None = at_least(1, None)
    train_time_interval: str | None = "00:00:30:00"

    def check(self) -> None:
        """Check the time."""
        seconds("checkpoint.train_time_interval", self.train_time_interval)


@dataclass
class LoggerConf:
    """`csv` writes metrics.csv; `wandb` and `tensorboard` do that and more."""

    name: str = "wandb"
    project: str = "dbb"
    entity: str | None = None
    group: str | None = None
    tags: list[str] = field(default_factory=list)
    offline: bool = False
    id: str | None = None

    def check(self) -> None:
        """Check the name, and that its package is there."""
        check_name("logger.name", self.name, ["csv", "wandb", "tensorboard"])
        if self.name == "tensorboard" and find_spec("tensorboard") is None:
            raise ValueError("logger=tensorboard needs tensorboard, which is not installed: "
                             "pip install tensorboard")


@dataclass
class Settings:
    """All settings of a run, which its checkpoint holds."""

    model: ModelConf = field(default_factory=ModelConf)
    block: BlockConf = field(default_factory=BlockConf)
    data: DataConf = field(default_factory=DataConf)
    optim: OptimConf = field(default_factory=OptimConf)
    trainer: TrainerConf = field(default_factory=TrainerConf)
    checkpoint: CheckpointConf = field(default_factory=CheckpointConf)
    logger: LoggerConf = field(default_factory=LoggerConf)
    seed: int = at_least(0, 0, most=2**32 - 1)

    def __post_init__(self):
        """Check what a type cannot say.

        Raises:
            ValueError: with the knob, its value, and what to do.
        """
        check_numbers(self)
        for part in (self.model, self.data, self.optim, self.trainer, self.checkpoint, self.logger,
                     self.block):  # the last imports PyTorch
            part.check()
        sharded = any(kind in self.trainer.strategy for kind in ("fsdp", "deepspeed"))
        if sharded and self.block.sgs_every_n_epochs is not None:
            raise ValueError(f"block.sgs_every_n_epochs={self.block.sgs_every_n_epochs}: with "
                             f"trainer.strategy={self.trainer.strategy} no process sees a whole gradient: "
                             "take trainer.strategy=ddp")
        if self.optim.warmup_epochs > self.trainer.max_epochs:
            raise ValueError(f"optim.warmup_epochs={self.optim.warmup_epochs} must be at most "
                             f"trainer.max_epochs={self.trainer.max_epochs}")

    def stored(self) -> dict[str, Any]:
        """As plain values, what a checkpoint and config.yaml hold."""
        return {part.name: asdict(self)[part.name] for part in fields(Settings)}
