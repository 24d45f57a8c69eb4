"""Train a network. `python train.py --help` says what to type (its text is in configs/train.yaml)."""

import json
import math
import secrets
import shutil
import sys
import traceback
from dataclasses import asdict, replace
from pathlib import Path

if __name__ == "__main__":
    print("loading PyTorch, Lightning and W&B ...", file=sys.stderr, flush=True)  # which takes seconds

import hydra
import pytorch_lightning as pl
import wandb
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from pytorch_lightning.strategies.launchers import _MultiProcessingLauncher, _SubprocessScriptLauncher

from dbb import branchwise, compare_logits, reparameterize
from training.callbacks import (
    log_convolutions,
    log_predictions,
    make_callbacks,
    make_loggers,
    shows_progress_bar,
)
from training.checkpoint import load_checkpoint, load_network, restore
from training.cli import plain_errors, write_text
from training.cost import expected_cost
from training.data import ImageData
from training.evaluate import activations_of_a_batch, pick_device, predict, scores, sentence
from training.module import Classifier, rough_start, try_optimizer
from training.runs import LOCK, FolderTakenError, alone_in, changes, read_result, take_up
from training.safety import DivergedError, WholeCheckpointIO
from training.settings import Settings, resolve


def train(settings: Settings, run_dir: Path) -> dict[str, float]:
    """Train, keep the last checkpoint, and evaluate it on the test set.

    Args:
        settings: of the run; with `ckpt` set, training goes on from there.
        run_dir: gets config.yaml, convolutions.csv, metrics.csv, checkpoints/last.ckpt, result.json and W&B's
            files. If it holds this very run, training goes on where that stopped; if that is finished, its
            result is returned.

    Returns:
        `top1`, `top5` (fractions) and `loss` of the checkpoint kept, branch by branch; `val_top1`, where
        images are held out; `converted_top1` and `predictions_changed` by conversion. Empty in all processes
        but the first.

    Raises:
        ValueError: if a setting or the data is wrong, or `run_dir` already holds another run; see also
            `make_trainer`.
    """
    last, wanted = run_dir / "checkpoints" / "last.ckpt", settings.ckpt
    settings, result = take_up(settings, run_dir), read_result(run_dir)
    if wanted is None and result is not None:
        print(f"{run_dir} is finished: {sentence(result, last)}")
        return result
    if settings.source is not None:
        raise ValueError(f"source={settings.source}: train.py continues its own checkpoints only; "
                         "model.weights=FILE starts from a plain network's weights, convert.py reads "
                         "published files")
    if settings.logger.id is None or (wanted is not None and not last.exists()):
        # The id in a checkpoint belongs to its own folder.
        settings = replace(settings, logger=replace(settings.logger, id=secrets.token_hex(4)))

    trainer = make_trainer(settings, run_dir)
    pl.seed_everything(settings.seed, workers=True, verbose=False)
    checkpoint, done, changed = None, 0, []  # done: epochs
    if settings.ckpt is not None:
        evaluated = result is not None or not last.exists()  # else it stopped in its last evaluation
        checkpoint, done, changed = continued(settings, evaluated)
    data = ImageData(settings.data, settings.seed, first_epoch=done)
    print(f"loading the images of data={settings.data.name}", flush=True)
    data.load(train=True)
    if checkpoint is not None:
        data.check_classes(checkpoint["dbb"]["classes"])
    model = Classifier(settings, data.classes, data.image_size, changed)
    if checkpoint is None and settings.model.weights is None and hasattr(model.net, "whiten"):
        model.net.whiten(next(data.calibration_images()))
    if checkpoint is not None:
        restore(model.net, checkpoint)  # says what does not fit, before Lightning would

    trainer.loggers = make_loggers(settings, run_dir)
    cost = begin(settings, model, trainer, run_dir) if trainer.is_global_zero else {}
    trainer.fit(model, data, ckpt_path=settings.ckpt, weights_only=True)
    if not trainer.is_global_zero:
        return {}
    return final_scores(settings, data, trainer, run_dir, cost)


def continued(settings: Settings, evaluated: bool) -> tuple[dict, int, list[str]]:
    """The checkpoint that training goes on from, its epochs, and the settings that have changed since.

    Args:
        settings: with `ckpt`.
        evaluated: whether nothing is left to do, if no epoch is.

    Raises:
        ValueError: if the checkpoint is no start for these settings.
    """
    checkpoint = load_checkpoint(settings.ckpt)
    stored, done = checkpoint["dbb"]["settings"], checkpoint["epoch"] + 1
    if done >= settings.trainer.max_epochs and evaluated:
        raise ValueError(f"trainer.max_epochs={settings.trainer.max_epochs}: the checkpoint already has "
                         f"{done} epochs; set more to continue")
    if stored["optim"]["name"] != settings.optim.name:
        raise ValueError(f"optim.name={settings.optim.name} cannot continue with the state of "
                         f"{stored['optim']['name']} in the checkpoint")
    return checkpoint, done, [*checkpoint["dbb"].get("changed", []), *changes(stored, settings, done)]


def begin(settings: Settings, model: Classifier, trainer: pl.Trainer, run_dir: Path) -> dict[str, float]:
    """What the first process does before the training: clear the folder, write and print what is trained.

    Returns:
        `parameters`, and `activations_mib` of a batch.
    """
    # Of an earlier session. Lightning's own checkpoints for SLURM are made in the middle of an epoch,
    # from which the order of the data cannot continue.
    for path in (run_dir / "result.json", run_dir / "error.txt", *run_dir.glob("hpc_ckpt_*.ckpt")):
        path.unlink(missing_ok=True)
    write_text(run_dir / "config.yaml", OmegaConf.to_yaml(OmegaConf.create(asdict(settings))))
    for logger in trainer.loggers[1:]:  # the first writes metrics.csv beside the settings
        logger.log_hyperparams(asdict(settings))
    net, size = model.net, model.image_size
    activations = activations_of_a_batch(net, settings.data.batch_size, size) / 2**20
    parameters = sum(p.numel() for p in net.parameters())
    reduced = f", images of {size} pixels reduced {net.total_stride} times" if net.total_stride else ""
    print(f"{settings.model.name} with block={settings.block.name}, on {trainer.strategy.root_device}: "
          f"{parameters:,} parameters, {activations:.0f} MiB for the activations of a batch{reduced}")
    cost = expected_cost(settings, size, trainer.strategy.root_device)
    print(*filter(None, [cost, net.report, rough_start(settings)]), f"run folder: {run_dir}", sep="\n")
    log_convolutions(trainer.loggers[-1], net.report, run_dir)
    return {"parameters": parameters, "activations_mib": activations}


def make_trainer(settings: Settings, run_dir: Path) -> pl.Trainer:
    """Lightning's Trainer of a run; what could not train with it is refused before any data is read.

    Raises:
        ValueError: if the processes would lose what they measure, a job of a sweep would start processes, or
            the optimiser cannot take a step.
    """
    options = asdict(settings.trainer)
    options |= {"sync_batchnorm": False, "enable_progress_bar": shows_progress_bar(settings)}
    try:
        trainer = pl.Trainer(**options, default_root_dir=run_dir, callbacks=make_callbacks(settings, run_dir),
                             plugins=[WholeCheckpointIO()], logger=False, enable_model_summary=False,
                             use_distributed_sampler=False, num_sanity_val_steps=0)
    except ImportError as error:
        asked = (f"trainer.{name}={options[name]}" for name in ("accelerator", "strategy", "precision"))
        raise ValueError(f"{', '.join(asked)}: one of them needs a package that is not installed "
                         f"({error})") from error
    launcher = trainer.strategy.launcher
    if isinstance(launcher, _MultiProcessingLauncher):
        raise ValueError(f"trainer.strategy={settings.trainer.strategy}: it trains in processes made by "
                         "multiprocessing, whose metrics and logs end with them: take trainer.strategy=ddp")
    if isinstance(launcher, _SubprocessScriptLauncher) and HydraConfig.initialized() \
            and HydraConfig.get().mode is RunMode.MULTIRUN:
        raise ValueError(f"trainer.devices={settings.trainer.devices}: each of the {trainer.world_size} "
                         "processes of this job would start the whole sweep again: set trainer.devices=1, or "
                         "start every job by itself, without -m")
    try_optimizer(settings, trainer.strategy.root_device)
    return trainer


def final_scores(settings: Settings, data: ImageData, trainer: pl.Trainer, run_dir: Path,
                 cost: dict[str, float]) -> dict[str, float]:
    """Evaluate the checkpoint kept, branch by branch and converted; print, log and write result.json.

    Returns:
        What result.json holds.
    """
    last = run_dir / "checkpoints" / "last.ckpt"
    net, device = load_network(load_checkpoint(last), settings), pick_device(settings.trainer.accelerator)
    with branchwise(net):
        logits, targets = predict(net, data, device, "test")
        held_out = {}
        if settings.data.val_size:
            of_val = scores(*predict(net, data, device, "val", data.held_out_dataloader()))
            held_out["val_top1"] = of_val["top1"]
    converted, _ = predict(reparameterize(net), data, device, "converted")
    by_conversion = {"converted_top1": scores(converted, targets)["top1"],
                     "predictions_changed": compare_logits([(logits, converted)]).predictions_changed}
    result = scores(logits, targets) | held_out | by_conversion | cost
    changed = trainer.lightning_module.changed
    written = result | ({"changed": changed} if changed else {})
    write_text(run_dir / "result.json", json.dumps(written, indent=2) + "\n")
    for logger in trainer.loggers:
        logger.log_metrics({f"final/{name}": value for name, value in result.items()}, trainer.global_step)
        logger.save()
    log_predictions(trainer.loggers[-1], data, logits, targets)
    print(sentence(result, last),
          f"converted: top1 {result['converted_top1']:.4f}, {result['predictions_changed']} of "
          f"{len(targets)} predictions changed (python convert.py ckpt={last} writes the files)", sep="\n")
    return result


FAILED = []  # jobs of a sweep


@hydra.main(config_path="configs", config_name="train", version_base="1.3")
def main(cfg: DictConfig) -> float | None:
    hydra_cfg = HydraConfig.get()
    run_dir = Path(hydra_cfg.runtime.output_dir)
    try:
        with plain_errors(), alone_in(run_dir):
            try:
                result = train(resolve(cfg, hydra_cfg.overrides.task), run_dir)
            finally:
                left = {path.name for path in run_dir.iterdir()}
                alone = hydra_cfg.mode is not RunMode.MULTIRUN  # a sweep's job leaves its error there
                if alone and cfg.ckpt is None and cfg.out is None and left <= {LOCK}:
                    shutil.rmtree(run_dir)  # ours, and stopped before it began
            return result.get("val_top1")  # what a sweeper may select by
    except (SystemExit, Exception) as stop:
        why = stop.code if isinstance(stop, SystemExit) else f"error: {type(stop).__name__}: {stop}"
        goes_on = hydra_cfg.mode is RunMode.MULTIRUN and isinstance(why, str)  # a number: it was stopped
        of_this_run = goes_on and not isinstance(stop.__context__, FolderTakenError)
        if of_this_run or isinstance(stop.__context__, DivergedError):
            write_text(run_dir / "error.txt", f"{why}\n")
        if not goes_on:
            raise
        if not isinstance(stop, SystemExit):
            traceback.print_exc()
        FAILED.append(run_dir.name)  # the other jobs go on
        print(f"{run_dir.name}: {why}", file=sys.stderr)
        return math.nan
    finally:
        wandb.finish()  # one run a job, also in a multirun


if __name__ == "__main__":
    main()
    if FAILED:
        sys.exit(f"error: {len(FAILED)} jobs failed, see above: {', '.join(FAILED)}")
