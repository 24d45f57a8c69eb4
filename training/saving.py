"""The newest state of a run on the disk: after each epoch, at an interval, and when a signal ends the run."""

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from types import FrameType

import pytorch_lightning as pl
from pytorch_lightning.callbacks import Checkpoint
from pytorch_lightning.plugins.environments import SLURMEnvironment

from runs.folder import RunFolder
from settings.cli import typed
from settings.schema import CheckpointConf
from settings.values import seconds
from training.divergence import StopAtNaN


class LastCheckpoint(Checkpoint):
    """Keep the newest state in `checkpoints/last.ckpt`; nothing is selected on test data.

    What a step draws at random is a function of (seed, epoch, batch), and the batches that are done are all
    the state that a loader has. So a run goes on exactly from where it was saved: between two steps of the
    optimiser, and at an epoch's end before its validation, which may fail.
    """

    def __init__(self, folder: RunFolder, conf: CheckpointConf, divergence: StopAtNaN):
        self.folder, self.divergence, self.steps = folder, divergence, conf.every_n_train_steps
        self.seconds = seconds("checkpoint.train_time_interval", conf.train_time_interval)
        self.asked = None  # the signal that told the run to stop

    def on_train_start(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        self.asked, self.saved_at = None, time.monotonic()
        if threading.current_thread() is threading.main_thread():  # Lightning puts the old handlers back
            more = [signal.SIGUSR1] if SLURMEnvironment.detect() else []
            if signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:  # which nohup asks for
                more.append(signal.SIGHUP)
            for number in (signal.SIGTERM, signal.SIGINT, *more):
                signal.signal(number, self._ask)

    def _ask(self, number: int, frame: FrameType | None) -> None:
        if self.asked is not None:  # again, before the step has ended
            sys.exit(128 + number)
        self.asked = signal.Signals(number)

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx: int) -> None:
        done, asked = batch_idx + 1, self.asked
        last = done == trainer.num_training_batches
        if not last and done % trainer.accumulate_grad_batches:
            trainer.should_stop = False  # trainer.max_time says so again after the next batch
        elif last or self._agreed(trainer, asked is not None or self._due(trainer)):
            self.divergence.check(trainer)
            self.divergence.check_weights(trainer, module)
            if trainer.is_global_zero:
                self.folder.refuse_taken()
            trainer.save_checkpoint(self.folder.last, weights_only=False)  # the optimiser's state, too
            self.saved_at = time.monotonic()
            where = f"in epoch {trainer.current_epoch + 1}, after {done} batches of it"
            self._stop(trainer, asked, where, trainer._logger_connector.update_train_step_metrics)

    def on_validation_batch_end(self, trainer: pl.Trainer, *args) -> None:
        self._stop(trainer, self.asked, f"while epoch {trainer.current_epoch + 1} was evaluated")

    def on_train_end(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        self._stop(trainer, self.asked, "after its last epoch")

    def _due(self, trainer: pl.Trainer) -> bool:
        enough_steps = self.steps is not None and trainer.global_step % self.steps == 0
        enough_time = self.seconds is not None and time.monotonic() - self.saved_at >= self.seconds
        return enough_steps or enough_time or trainer.should_stop

    def _agreed(self, trainer: pl.Trainer, decision: bool) -> bool:
        """Whether any process says so: they save, and stop, after the same step."""
        return trainer.strategy.reduce_boolean_decision(decision, all=False)

    def _stop(self, trainer: pl.Trainer, asked: signal.Signals | None, where: str,
              log: Callable[[], None] = lambda: None) -> None:
        """End the run, if a process was told to; `log` is what Lightning would do next."""
        if not self._agreed(trainer, asked is not None):
            return
        log()
        asked = asked or signal.SIGTERM  # which another process got
        if trainer.is_global_zero:
            print(f"stopped by {asked.name} {where}; what is done is saved: go on by python train.py "
                  f"{typed('ckpt', self.folder.last)}", file=sys.stderr)
            if asked is signal.SIGUSR1:
                requeue()
        sys.exit(128 + asked)


def requeue() -> None:
    """Have SLURM put this job back into its queue."""
    array, task = (os.environ.get(f"SLURM_ARRAY_{name}_ID") for name in ("JOB", "TASK"))
    job = os.environ["SLURM_JOB_ID"] if array is None else f"{array}_{task}"
    done = subprocess.run(["scontrol", "requeue", job], check=False)
    if done.returncode:
        print(f"scontrol requeue {job} failed: start the job again", file=sys.stderr)
