"""Train a network. `python train.py --help` says what to type (its text is in configs/train.yaml)."""

import os
import sys
from pathlib import Path

if __name__ == "__main__":
    print("loading PyTorch, Lightning and W&B ...", file=sys.stderr, flush=True)  # which takes seconds
    from settings.early import check_command_line
    check_command_line("train")

import hydra
import pytorch_lightning as pl
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig

from evaluation.evaluate import sentence
from runs.folder import RunFolder
from runs.going_back import go_back
from runs.safety import newest
from settings.cli import as_sentence, plain_errors, printable
from settings.command import Command, resolve
from training import steps, sweep
from training.divergence import DivergedError
from training.loggers import finish, make_loggers
from training.start import log_missed_epoch, refuse_published, start_of, with_identity


def train(command: Command, run_dir: Path) -> dict[str, float]:
    """Train, keep the last checkpoint, and evaluate it on the test set.

    Args:
        command: the run; with `ckpt` set, training goes on from there.
        run_dir: gets what `RunFolder` names, and W&B's files. If it holds this very run, training goes on
            where that stopped; if that is finished, its result is returned.

    Returns:
        `top1`, `top5` (fractions) and `loss` of the checkpoint kept, branch by branch; `val_top1`, where
        images are held out; `converted_top1` and `predictions_changed` by conversion. Empty in all processes
        but the first, and where `trainer.max_time` ended the training.

    Raises:
        ValueError: if a setting or the data is wrong, or `run_dir` already holds another run.
    """
    folder, asked = RunFolder(run_dir), command.ckpt
    command, result = folder.take_up(command), folder.read_result()
    if result is not None and (asked is None or command.ckpt != asked):
        changed = f" (changed on the way: {result['changed']})" if "changed" in result else ""
        print(printable(f"{run_dir} is finished: {sentence(result, folder.last)}{changed}"))
        return result
    refuse_published(command)
    command = with_identity(command, folder, fresh=asked is not None)
    trainer = steps.make_trainer(command, folder)
    pl.seed_everything(command.seed, workers=True, verbose=False)
    start = start_of(command, folder, result, trainer.world_size)
    data = steps.load_data(command, start)
    model = steps.make_model(command, data, start, trainer.strategy.root_device)
    if trainer.is_global_zero:
        go_back(folder, command.ckpt)
    trainer.loggers = make_loggers(command, folder, start.epochs, start.step)
    cost = steps.begin(command, model, trainer, folder) if trainer.is_global_zero else {}
    if trainer.is_global_zero:
        log_missed_epoch(command, data, trainer, folder, start)
    steps.fit(trainer, model, data, command, start)
    if not trainer.is_global_zero or steps.stopped_by_time(command, folder):
        return {}
    return steps.final_scores(command, data, trainer, folder, cost)


def run(cfg: DictConfig, folder: RunFolder | None = None) -> float | None:
    """Train as the configs and the command line say, in `folder` or where these say.

    Returns:
        What a sweeper may select by: `val_top1`.
    """
    if cfg.ckpt and cfg.source is None:
        cfg.ckpt = str(newest(Path(os.path.expanduser(cfg.ckpt))) or cfg.ckpt)
    command = resolve(cfg, HydraConfig.get().overrides.task)
    made_here = folder is None and not (command.out and os.path.exists(command.out))
    folder = folder or RunFolder.of(command)
    with folder.alone():
        try:
            return train(command, folder.path).get("val_top1")
        except DivergedError as error:
            folder.fail(as_sentence(error))
            raise
        finally:
            if made_here:
                folder.remove_if_unused()


@hydra.main(config_path="configs", config_name="train", version_base="1.3")
def main(cfg: DictConfig) -> float | None:
    try:
        with plain_errors():
            return sweep.job(run, cfg) if sweep.in_a_sweep() else run(cfg)
    finally:
        finish()


if __name__ == "__main__":
    main()
    sweep.exit_if_jobs_failed()
