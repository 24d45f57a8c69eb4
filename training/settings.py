"""The schema behind `configs/`, and where a run's settings come from: the command line, or a checkpoint.

Every knob is a typed field, so that a misspelt name and a value of the wrong type fail at once.
"""

import hashlib
import math
import os
import re
from dataclasses import asdict, dataclass, field, replace
from datetime import datetime
from difflib import get_close_matches
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import timm
import timm.optim
from hydra.core.config_store import ConfigStore
from omegaconf import MISSING, DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from pytorch_lightning.utilities import rank_zero_only

from dbb import BRANCHES, INITS, MODES
from export.files import KINDS
from models import timms_name
from models.build import UNTRAINED
from training.checkpoint import load_checkpoint
from training.cli import output_folder, plain_errors
from training.published import SOURCES

TENSOR_SETS = ("cifar10", "cifar100", "digits")  # held in memory, augmented as whole batches
FILE_SETS = ("imagenet", "folder")  # read image by image
OF_THE_COMMAND = ("ckpt", "out", "source", "tolerance", "export", "hub")  # not of the training
LEAST = {  # what a number must be at least
    "data.batch_size": 1, "data.image_size": 1, "data.val_size": 0, "data.num_workers": 0,
    "data.max_images": 1, "data.crop_pct": 0.1, "data.crop_padding": 0, "data.mixup": 0, "data.cutmix": 0,
    "optim.lr_batch_size": 1, "block.copies": 1, "block.positions": 4, "block.kernel_sizes": 1,
    "trainer.max_epochs": 1, "trainer.accumulate_grad_batches": 1, "optim.warmup_epochs": 0, "optim.lr": 0,
    "optim.weight_decay": 0, "seed": 0,
}


@dataclass
class ModelConf:
    """The backbone. A warm start: `pretrained` fetches timm's weights, `weights` reads a file."""

    name: str = MISSING
    pretrained: bool = False
    weights: str | None = None
    channels_last: bool = False
    compile: bool | str = False


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
    copies: int = 1
    mode: str = "exact"
    positions: int | None = None
    # Stored by name. None, in old files, is what "auto" was: "ones", with trained weights "single".
    init: str | None = "auto"
    kernel_sizes: list[int] = field(default_factory=lambda: [2, 3, 4, 5, 6])
    include: list[str] | None = None
    exclude: list[str] | None = None
    layers: list[LayersConf] = field(default_factory=list)


@dataclass
class DataConf:
    """A data set. Paths as typed are resolved against the current folder."""

    name: str = MISSING
    root: str | None = None
    download: bool = True
    image_size: int | None = None
    batch_size: int = 128
    num_workers: int = 0
    val_size: int = 0
    max_images: int | None = None
    mean: list[float] = field(default_factory=list)
    std: list[float] = field(default_factory=list)
    interpolation: str = "bilinear"
    crop_pct: float = 0.875
    crop_padding: int = 0
    flip: bool = True
    color_jitter: bool = False
    lighting: bool = False
    trivial_augment: bool = False
    mixup: float = 0.0
    cutmix: float = 0.0
    on_device: bool = False


@dataclass
class OptimConf:
    """Optimiser and schedule."""

    name: str = MISSING
    lr: float = MISSING
    lr_batch_size: int | None = None
    momentum: float = 0.9
    weight_decay: float = 0.0
    decay_norm_and_bias: bool = True
    warmup_epochs: int = 0
    label_smoothing: float = 0.0
    ema_decay: float | None = None


@dataclass
class TrainerConf:
    """Arguments of Lightning's Trainer, under its own names."""

    max_epochs: int = MISSING
    max_time: str | None = None
    accelerator: str = "auto"
    devices: Any = "auto"
    num_nodes: int = 1
    strategy: str = "auto"
    precision: str = "32-true"
    sync_batchnorm: bool = False
    gradient_clip_val: float | None = None
    accumulate_grad_batches: int = 1
    check_val_every_n_epoch: int = 1
    limit_train_batches: int | float = 1.0
    limit_val_batches: int | float = 1.0
    log_every_n_steps: int = 50
    deterministic: bool = False
    benchmark: bool | None = None
    detect_anomaly: bool = False
    profiler: str | None = None
    enable_progress_bar: bool | None = None


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


@dataclass
class Settings:
    """All settings of a run.

    `out` is where it writes; `source` says whose file `ckpt` is; the last three are convert.py's.
    """

    model: ModelConf = field(default_factory=ModelConf)
    block: BlockConf = field(default_factory=BlockConf)
    data: DataConf = field(default_factory=DataConf)
    optim: OptimConf = field(default_factory=OptimConf)
    trainer: TrainerConf = field(default_factory=TrainerConf)
    logger: LoggerConf = field(default_factory=LoggerConf)
    seed: int = 0
    ckpt: str | None = None
    out: str | None = None
    source: str | None = None
    tolerance: float = 1e-4
    export: list[str] = field(default_factory=lambda: ["onnx"])
    hub: bool = False

    def __post_init__(self):
        """Check what a type cannot say.

        Raises:
            ValueError: with the knob, its value, and what to do.
        """
        self._check_names()
        self._check_numbers()
        self._check_together()

    def _check_names(self) -> None:
        for knob, names in (("branches", self.block.branches), ("depthwise", self.block.depthwise or []),
                            *(("layers", layers.branches) for layers in self.block.layers)):
            for name in names:
                _one_of(f"block.{knob}", name, list(BRANCHES))
        _one_of("block.mode", self.block.mode, list(MODES))
        if self.block.init is not None:
            _one_of("block.init", self.block.init, ["auto", *INITS])
        if self.source is not None:
            _one_of("source", self.source, list(SOURCES))
        for kind in self.export:
            _one_of("export", kind, list(KINDS))
        if self.model.compile not in (True, False, "reduce-overhead"):
            raise ValueError(f"model.compile={self.model.compile} is unknown: true, false or reduce-overhead "
                             "(CUDA graphs)")
        _one_of("data.name", self.data.name, [*TENSOR_SETS, *FILE_SETS, "none"])
        _one_of("data.interpolation", self.data.interpolation, ["bilinear", "bicubic"])
        _one_of("logger.name", self.logger.name, ["csv", "wandb", "tensorboard"])
        if self.logger.name == "tensorboard" and find_spec("tensorboard") is None:
            raise ValueError("logger=tensorboard needs tensorboard, which is not installed: "
                             "pip install tensorboard")
        _one_of("optim.name", self.optim.name, timm.optim.list_optimizers())

    def _check_numbers(self) -> None:
        knobs = flat(asdict(self)) | {"block.kernel_sizes": min(self.block.kernel_sizes, default=1)}
        for knob, value in knobs.items():
            if isinstance(value, float) and not math.isfinite(value):
                raise ValueError(f"{knob}={value} must be a finite number")
        for knob, least in LEAST.items():
            if knobs[knob] is not None and knobs[knob] < least:
                raise ValueError(f"{knob}={knobs[knob]} must be at least {least}")
        for knob in ("optim.label_smoothing", "optim.momentum"):
            if not 0 <= knobs[knob] < 1:
                raise ValueError(f"{knob}={knobs[knob]} must be at least 0 and less than 1")
        if self.trainer.limit_train_batches <= 0:
            raise ValueError(f"trainer.limit_train_batches={self.trainer.limit_train_batches} leaves nothing "
                             "to train on")
        if not (len(self.data.mean) == len(self.data.std) == 3 and min(self.data.std) > 0):
            raise ValueError("data.mean and data.std need three numbers each, one a channel, and no "
                             "deviation of zero")

    def _check_together(self) -> None:
        """Check knobs that mean something only beside others."""
        data, block = self.data, self.block
        if not block.kernel_sizes:
            raise ValueError("block.kernel_sizes=[] would make no blocks: name one size or more, or choose "
                             "block=none")
        if self.model.pretrained and self.model.weights is not None:
            raise ValueError(f"model.pretrained=true and model.weights={self.model.weights}: a network "
                             "starts from one of them")
        if "int8" in self.export and data.name == "none":
            raise ValueError("export=[int8] needs training images to calibrate with, and data=none has none")
        unused = ["crop_padding", "on_device"]
        if data.name in TENSOR_SETS:
            unused = ["color_jitter", "lighting", "trivial_augment"]
        for knob in unused:
            if value := getattr(data, knob):
                raise ValueError(f"data.{knob}={value}: data={data.name} has no such option")
        if data.name in TENSOR_SETS and data.crop_pct != DataConf.crop_pct:
            raise ValueError(f"data.crop_pct={data.crop_pct}: data={data.name} crops no test image: leave it "
                             "out")
        if data.image_size is None and data.name in FILE_SETS:
            raise ValueError(f"data.image_size: data={data.name} needs one (224 is usual)")
        if data.on_device and data.num_workers:
            raise ValueError(f"data.num_workers={data.num_workers} must be 0 with data.on_device=true: "
                             "nothing is left to load")
        if not (block.branches or block.layers) and replace(block, init="auto") != BlockConf():
            raise ValueError("block.branches is empty, so that the other settings of the block mean nothing: "
                             "block=dbb takes the list of configs/block/dbb.yaml, block.branches=[kxk,1x1] "
                             "one of your own, block=none leaves plain convolutions")


def flat(settings: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested settings under their names on the command line, e.g. `optim.lr`."""
    result = {}
    for key, value in settings.items():
        result |= flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return result


def _one_of(knob: str, value: str, known: list[str]) -> None:
    if value not in known:
        nearest = get_close_matches(value, known, n=3)
        hint = f"; did you mean {' or '.join(nearest)}?" if nearest else ""
        names = ", ".join(known) if len(known) <= 12 else f"{len(known)} names"
        raise ValueError(f"{knob}={value} is unknown; known are {names}{hint}")


def resolve(cfg: DictConfig, overrides: list[str]) -> Settings:
    """The settings of a run, checked.

    With `ckpt`, every setting is the checkpoint's unless the command line gives it; changes are printed.

    Args:
        cfg: what Hydra composed.
        overrides: the command line, `key=value` each.

    Raises:
        ValueError: if a setting is wrong, or cannot be changed on a checkpoint.
    """
    try:
        if _list_changed(overrides):
            cfg.block.name = "custom"
        if "block=none" in overrides:  # the plain network of a sweep, whatever else is said about blocks
            cfg.block = OmegaConf.structured(BlockConf)
        for knob in ("ckpt", "out"):
            if cfg.get(knob) is not None:
                cfg[knob] = os.path.expanduser(cfg[knob])
        if cfg.ckpt is not None and cfg.source is None:
            cfg = _on_checkpoint(cfg, overrides)
        cfg = OmegaConf.merge(OmegaConf.structured(Settings), OmegaConf.to_container(cfg, resolve=True))
        settings = OmegaConf.to_object(cfg)
    except OmegaConfBaseException as error:
        key = getattr(error, "full_key", None) or ""
        raise ValueError(f"{key}: {str(error).splitlines()[0]}") from error
    for conf, knob in ((settings.data, "root"), (settings.model, "weights")):
        if getattr(conf, knob) is not None:
            setattr(conf, knob, str(Path(getattr(conf, knob)).expanduser().resolve()))
    if settings.model.pretrained and settings.ckpt is None:
        _prepare_as_trained(settings, overrides)
    return settings


def _prepare_as_trained(settings: Settings, overrides: list[str]) -> None:
    """Prepare images as they were for timm's weights, except for what the command line gives."""
    trained = timm.get_pretrained_cfg(timms_name(settings.model.name)[0])
    if trained is None or settings.model.name in UNTRAINED:  # no weights to fetch, which the builder says
        return
    named = {override.split("=")[0].lstrip("+~") for override in overrides}
    taken = {"mean": list(trained.mean), "std": list(trained.std), "interpolation": trained.interpolation}
    if settings.data.name in FILE_SETS:
        taken["crop_pct"] = trained.crop_pct
    taken = {knob: value for knob, value in taken.items() if f"data.{knob}" not in named}
    for knob, value in taken.items():
        setattr(settings.data, knob, value)
    told = " ".join(f"data.{knob}={value}" for knob, value in taken.items())
    weights = f"{trained.architecture}.{trained.tag}"
    rank_zero_only(print)(f"model.pretrained=true: images as for timm's weights ({weights}): "
                          f"{told or 'none; the command line sets them all'}")
    if settings.data.name in FILE_SETS and trained.crop_mode != "center":
        rank_zero_only(print)(f"timm's own crop_mode is {trained.crop_mode} for these weights: it is not "
                              "followed, test images keep their proportions, and their centre is taken")


def _list_changed(overrides: list[str]) -> bool:
    """Whether the command line makes another block of the one that a file in configs/block describes."""
    keys = {override.split("=")[0].lstrip("+~") for override in overrides}
    return bool(keys & {"block.branches", "block.depthwise", "block.layers"}) and "block.name" not in keys


def _on_checkpoint(cfg: DictConfig, overrides: list[str]) -> DictConfig:
    stored = load_checkpoint(cfg.ckpt)["dbb"]["settings"]
    own = {key: cfg[key] for key in OF_THE_COMMAND if key in cfg}
    result = OmegaConf.merge(OmegaConf.structured(Settings), stored, own)
    for override in overrides:
        key, plus = override.split("=")[0].lstrip("+~"), override[0] in "+~"
        if key in ("experiment", "debug") or plus:
            raise ValueError(f"{override} cannot be used with ckpt=, which takes every setting from the "
                             "checkpoint: name the settings to change themselves")
        if key in ("model.weights", "model.pretrained"):
            raise ValueError(f"{override} cannot be used with ckpt=: the checkpoint's own weights are "
                             "loaded; leave out one of them")
        for changed in (["model", "block"] if key == "model" else [key]):
            before, after = OmegaConf.select(result, changed), OmegaConf.select(cfg, changed)
            if before != after:
                print(f"changed from the checkpoint: {changed}: {before} -> {after}")
            OmegaConf.update(result, changed, after, merge=False)
    if result.block.init == "auto":  # another mode of the same blocks, which are trained already
        result.block.init = stored.get("block", {}).get("init")
    return result


def _run_dir(ckpt: str | None, out: str | None, model: str | None, block: str, data: str,
             overrides: list[str]) -> str:
    """The run's folder: the checkpoint's own, or a new one; only the first process of a job makes one."""
    ckpt, out = (path and os.path.expanduser(path) for path in (ckpt, out))
    if int(os.environ.get("RANK", os.environ.get("SLURM_PROCID", "0"))) != 0:
        return out or "."
    if ckpt is not None and out is None:
        return str(Path(ckpt).absolute().parent.parent) if Path(ckpt).is_file() else "."
    block = "custom" if _list_changed(overrides) else block
    name = model if block == "none" else f"{model}_{block}"
    with plain_errors():
        return str(output_folder(out or f"outputs/{name}_{data}/{datetime.now():%Y-%m-%d_%H-%M-%S}"))


def _job_name(data: str, overrides: list[str]) -> str:
    """The folder of a sweep's job: its settings in one order, so that a job keeps it when the sweep grows."""
    ignored = {"out", "data.num_workers", "logger"}
    if data in TENSOR_SETS:  # the same images in every place
        ignored.add("data.root")
    if "block=none" in overrides:  # see resolve()
        ignored.add("block")
    kept = sorted(override for override in overrides if override == "block=none"
                  or not {key := override.split("=")[0].lstrip("+~"), key.split(".")[0]} & ignored)
    wanted = "+".join(kept).replace("=", "-") or "defaults"
    # Only what Hydra takes unquoted in ckpt=PATH, and a file system as one name.
    name = re.sub(r"[^\w.+-]", "_", wanted, flags=re.ASCII)[:150]
    return name if name == wanted else f"{name[:140]}-{hashlib.sha256(wanted.encode()).hexdigest()[:8]}"


def _slurm_job() -> str:
    with plain_errors():
        if "SLURM_JOB_ID" not in os.environ:
            raise ValueError("trainer=slurm: SLURM_JOB_ID, which names the run's folder, is set in jobs of "
                             "SLURM only: elsewhere take trainer=ddp, or out=DIR")
    return os.environ["SLURM_JOB_ID"]


ConfigStore.instance().store(name="schema", node=Settings)
OmegaConf.register_new_resolver("first", lambda *values: next(value for value in values if value))
OmegaConf.register_new_resolver("run_dir", _run_dir, use_cache=True)
OmegaConf.register_new_resolver("job_name", _job_name)
OmegaConf.register_new_resolver("slurm_job", _slurm_job)
