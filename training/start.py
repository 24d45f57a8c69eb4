"""What a run starts from: nothing, or a checkpoint, and whether the settings and the images go with it."""

import secrets
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import pytorch_lightning as pl
from pytorch_lightning.plugins import Precision
from torch import Tensor, nn

from evaluation.evaluate import pick_device, predict, scores
from evaluation.networks import load_network
from images.data import ImageData
from models.checkpoint import load_checkpoint, place_of
from models.say import say
from reports.runs import read_epochs
from runs.folder import RunFolder
from runs.going_back import has_rows_of
from runs.safety import is_whole, previous
from runs.same import changes, not_taken
from settings.cli import typed
from settings.command import Command
from settings.values import differ, flat, seconds

# What decides which images an epoch's batches have, and after which of them the optimiser takes a step.
OF_AN_EPOCH = ("data.batch_size", "data.max_images", "data.val_size", "seed",
               "trainer.accumulate_grad_batches", "trainer.limit_train_batches")


class Start(NamedTuple):
    """What training goes on from: a checkpoint, what is done by then, and the settings that have changed."""

    checkpoint: dict[str, Any] | None = None
    epochs: int = 0
    batches: int = 0
    step: int = 0
    changed: Sequence[str] = ()


def refuse_published(command: Command) -> None:
    """Refuse to train on a published file, which has no state of an optimiser.

    Raises:
        ValueError: if `source` names whose file it is.
    """
    if command.source is not None:
        raise ValueError(f"source={command.source}: train.py continues its own checkpoints only; "
                         "model.weights=FILE starts from a plain network's weights, convert.py reads "
                         "published files")


def with_identity(command: Command, folder: RunFolder, fresh: bool) -> Command:
    """The command with an id for W&B; `fresh` where `ckpt` is another folder's, to which its id belongs."""
    if command.logger.id is not None and (has_rows_of(folder, command.ckpt) or not fresh):
        return command
    return replace(command, logger=replace(command.logger, id=secrets.token_hex(4)))


def start_of(command: Command, folder: RunFolder, result: dict[str, Any] | None, processes: int) -> Start:
    """What training starts from, in so many processes.

    Raises:
        ValueError: if the checkpoint is no start for these settings.
    """
    if command.ckpt is None:
        return Start()
    checkpoint = load_checkpoint(command.ckpt)
    stored, (done, batches) = checkpoint["dbb"]["settings"], place_of(checkpoint)
    counted = flat(checkpoint["loops"]).get("fit_loop.epoch_loop.batch_progress.current.ready")
    if batches and batches != counted:
        raise ValueError(f"ckpt={command.ckpt} was not written by train.py: it stands after {batches} "
                         f"batches of an epoch, and has counted {counted}")
    same_end = stored["trainer"].get("max_epochs") == command.trainer.max_epochs
    # Stopped in its last evaluation, or left complete.
    unevaluated = same_end and (result is None and folder.has_state or folder.goes_back(command.ckpt))
    if done >= command.trainer.max_epochs and not unevaluated:
        raise ValueError(f"trainer.max_epochs={command.trainer.max_epochs}: the checkpoint already has "
                         f"{done} epochs; set more to continue")
    limit = seconds("trainer.max_time", command.trainer.max_time)
    used = flat({"": checkpoint["callbacks"].get("Timer")}).get(".time_elapsed.train", 0)
    if limit is not None and used >= limit and done < command.trainer.max_epochs:
        raise ValueError(f"trainer.max_time={command.trainer.max_time} is the time of all sessions of this "
                         "run, and used up: give more, or none")
    if stored["optim"].get("name") != command.optim.name:
        raise ValueError(f"optim.name={command.optim.name} cannot continue with the state of "
                         f"{stored['optim'].get('name')} in the checkpoint")
    now = changes(stored, command, done, batches)
    for change in now:
        if batches and change.startswith(OF_AN_EPOCH):
            raise ValueError(f"{change}: this can change between two epochs only, and the checkpoint stands "
                             f"within epoch {done + 1}, after {batches} batches: go on without it until the "
                             f"epoch's end{_or_back(command.ckpt)}")
    if Path(command.ckpt).resolve().parent == folder.checkpoints.resolve():
        for setting in not_taken(folder.read_config() or {}, stored, command):
            say(f"{folder.config} says {setting}, which is not taken: settings are the checkpoint's, and "
                "those of the command line")
    before = checkpoint["dbb"].get("processes", processes)  # an older file does not say
    if before != processes:  # norms take their own process's images
        now.append(f"processes: {before} until epoch {done}, then {processes}")
        say(f"changed: {now[-1]}")
    all_changes = [*checkpoint["dbb"].get("changed", []), *now]
    return Start(checkpoint, done, batches, checkpoint["global_step"], all_changes)


def _or_back(ckpt: str) -> str:
    """The other way to change what can change between two epochs only, if there is one."""
    before = previous(Path(ckpt))
    if not is_whole(before) or place_of(load_checkpoint(before))[1]:
        return ""
    return f", or from the end of the epoch before by {typed('ckpt', before)}"


def other_images(data: ImageData, start: Start) -> list[str]:
    """A sentence each for the training and the test images, if they are not those from before.

    Raises:
        ValueError: if there are other training images within an epoch.
    """
    if start.checkpoint is None:
        return []
    about, found = start.checkpoint["dbb"], []
    for name, key, kind, now in (("training", "images", "image_digest", len(data.train_indices)),
                                 ("test", "test_images", "test_digest", len(data.test_indices))):
        before, digest = about.get(key, now), about.get(kind)  # an older file does not say
        others = digest not in (None, data.digests[kind])
        if before != now:
            found.append(f"{name} images: {before:,} until epoch {start.epochs}, then {now:,}")
        elif others:
            found.append(f"{name} images: others, or of other classes, after epoch {start.epochs}")
        else:
            continue
        if start.batches and name == "training":
            raise ValueError(f"{found[0]}: this can change between two epochs only, and the checkpoint "
                             f"stands within epoch {start.epochs + 1}, after {start.batches} batches: go "
                             "on with the images that were there (in place of a damaged one, another under "
                             "its name)")
        held = ", and others are held out" if others and name == "training" and data.conf.val_size else ""
        say(f"changed: {found[-1]}{held}")
    return found


class AsInTraining(nn.Module):
    """A network in the arithmetic of `trainer.precision`, as a training evaluates it; logits in float32."""

    def __init__(self, net: nn.Module, precision: Precision):
        super().__init__()
        self.net, self.precision = precision.convert_module(net), precision

    def forward(self, images: Tensor) -> Tensor:
        images = images.to(next(self.net.parameters()).dtype)
        with self.precision.forward_context():
            return self.net(images).float()


def log_missed_epoch(command: Command, data: ImageData, trainer: pl.Trainer, folder: RunFolder,
                     start: Start) -> None:
    """Log what metrics.csv lacks of the last epoch that is done, if the run was stopped before that.

    The checkpoint has its training loss. It is evaluated as it would have been, if on all images.
    """
    if not start.epochs or start.batches:
        return
    known, values = read_epochs(folder), {}
    known = known[known["epoch"] == start.epochs]
    loss = start.checkpoint["callbacks"].get("EpochLoss")  # an older file has none
    if loss is not None and known["train_loss"].isna().all():
        values["train/loss_epoch"] = loss["total"] / loss["count"]
    conf = command.trainer
    due = start.epochs % conf.check_val_every_n_epoch == 0 and not differ(conf.limit_val_batches, 1.0)
    if due and known["test_top1"].isna().all():
        net = AsInTraining(load_network(start.checkpoint, command), trainer.precision_plugin)
        device = pick_device(command.trainer.accelerator)
        found = scores(*predict(net, data, device, "missed", exact=False))
        values |= {f"test/{name}": value for name, value in found.items()}
        if command.data.val_size:
            found = scores(*predict(net, data, device, "missed", data.held_out_dataloader(), exact=False))
            values |= {f"val/{name}": value for name, value in found.items()}
    for logger in trainer.loggers if values else ():
        logger.log_metrics(values | {"epoch": start.epochs - 1}, start.checkpoint["global_step"] - 1)
        logger.save()
