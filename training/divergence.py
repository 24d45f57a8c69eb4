"""The end of a training that diverged."""

import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import Callback
from torch import Tensor


class DivergedError(ValueError):
    """The training loss, the weights or the final test loss are not finite any more."""


class StopAtNaN(Callback):
    """Stop when the loss, or a weight, is not finite, before any checkpoint holds what came of it.

    The first such step is kept on the device. It is read every `log_every_n_steps`, and before anything is
    saved, so that no step waits for the GPU.
    """

    def on_train_start(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        self.first = torch.full((), float("inf"), device=module.device)

    def on_train_batch_end(self, trainer, module, outputs: dict[str, Tensor], batch, batch_idx: int) -> None:
        step = trainer.global_step
        bad = ~outputs["loss"].isfinite()
        self.first = torch.where(bad, self.first.clamp(max=step), self.first)
        if trainer.log_every_n_steps and step % trainer.log_every_n_steps == 0:
            self.check(trainer)

    def check(self, trainer: pl.Trainer) -> None:
        """Raise in all processes at once: one that went on would wait for the others."""
        first = trainer.strategy.reduce(self.first, reduce_op="min")
        if first.isfinite():
            self._stop(trainer, f"the training loss is not finite from step {int(first)} on")

    def check_weights(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        """The same of the weights, which a step with a finite loss may have ruined."""
        values = *module.parameters(), *module.buffers()
        whole = bool(torch.stack([value.isfinite().all() for value in values]).all())
        if trainer.strategy.reduce_boolean_decision(not whole, all=False):
            self._stop(trainer, f"the weights are not finite after step {trainer.global_step}")

    @staticmethod
    def _stop(trainer: pl.Trainer, what: str) -> None:
        rate = trainer.optimizers[0].param_groups[0]["lr"]
        raise DivergedError(f"{what} (learning rate now {rate:g}): nothing was saved after it. Lower "
                            "optim.lr, or set optim.warmup_epochs or trainer.gradient_clip_val")
