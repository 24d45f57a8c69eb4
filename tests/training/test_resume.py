"""A run that stopped and went on ends with the same weights as one that did not."""

from pathlib import Path

import pytest
import torch
from pytorch_lightning.callbacks import Callback

import train as train_script
from models.checkpoint import load_checkpoint
from training import steps as train_steps
from training.module import warmup_cosine

pytestmark = pytest.mark.slow

SHORT = ("model=resnet8_dbb", "data=digits", "logger=csv", "trainer.max_epochs=3",
         "trainer.limit_train_batches=3", "trainer.limit_val_batches=1", "trainer.log_every_n_steps=1")


class Crash(Callback):
    """Die at the start of the second epoch."""

    def on_train_epoch_start(self, trainer, module):
        if trainer.current_epoch == 1:
            raise RuntimeError("power failure")


def weights(run_dir: Path) -> dict[str, torch.Tensor]:
    return load_checkpoint(run_dir / "checkpoints" / "last.ckpt")["state_dict"]


@pytest.mark.parametrize("extra", [("data.num_workers=2",)], ids=["workers"])  # more in test_stops.py
def test_resumed_run_is_bitwise_the_same(make_settings, tmp_path, monkeypatch, extra):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    train_script.train(make_settings(*SHORT, *extra), whole)

    callbacks = train_steps.make_callbacks
    with monkeypatch.context() as patch:
        patch.setattr(train_steps, "make_callbacks", lambda *args: [*callbacks(*args), Crash()])
        with pytest.raises(RuntimeError, match="power failure"):
            train_script.train(make_settings(*SHORT, *extra), parts)
    assert load_checkpoint(parts / "checkpoints" / "last.ckpt")["epoch"] == 0

    again = (*SHORT, *extra) if "data.num_workers=2" in extra else (f"ckpt={parts}/checkpoints/last.ckpt",)
    train_script.train(make_settings(*again), parts)  # the same command, or the checkpoint alone
    before, after = weights(whole), weights(parts)
    assert before.keys() == after.keys()
    different = [key for key in before if not torch.equal(before[key], after[key])]
    assert not different

    rows = (parts / "metrics.csv").read_text().splitlines()
    steps = [line.split(",")[rows[0].split(",").index("step")] for line in rows[1:]]
    assert {"0", "3", "8"} <= set(steps), "the metrics of both sessions stand in one file"


def test_settings_beside_a_checkpoint_take_effect(make_settings, tmp_path, capsys):
    train_script.train(make_settings(*SHORT, "trainer.max_epochs=1"), tmp_path)
    changed = make_settings(f"ckpt={tmp_path}/checkpoints/last.ckpt", "trainer.max_epochs=2",
                            "optim.lr=0.03", "optim.weight_decay=0.5")
    assert "trainer.max_epochs: 1 -> 2" in capsys.readouterr().out
    train_script.train(changed, tmp_path)
    checkpoint = load_checkpoint(tmp_path / "checkpoints" / "last.ckpt")
    assert checkpoint["epoch"] == 1
    group = checkpoint["optimizer_states"][0]["param_groups"][0]
    assert group["weight_decay"] == 0.5
    assert group["initial_lr"] == 0.03
    assert group["lr"] == pytest.approx(0, abs=1e-9), "the cosine was stretched to the new length"


def test_a_changed_batch_keeps_the_place_in_the_schedule(make_settings, tmp_path):
    """Half of the epochs done is half of the cosine, however many steps an epoch has."""
    six_steps = ("data.batch_size=32", "trainer.limit_train_batches=6")
    train_script.train(make_settings(*SHORT, "trainer.max_epochs=2", *six_steps), tmp_path)
    ckpt, two_steps = f"ckpt={tmp_path}/checkpoints/last.ckpt", "trainer.limit_train_batches=2"
    train_script.train(make_settings(ckpt, "trainer.max_epochs=4", two_steps), tmp_path)
    rows = (tmp_path / "metrics.csv").read_text().splitlines()
    column = rows[0].split(",").index("lr-momentum" if "lr-momentum" in rows[0] else "lr-SGD")
    rates = [float(row.split(",")[column]) for row in rows[1:] if row.split(",")[column]]
    assert rates[-4:] == pytest.approx([0.1 * warmup_cosine(step, 8, 0) for step in (4, 5, 6, 7)])


@pytest.mark.parametrize(("override", "message"), [("trainer.max_epochs=1", "already has 1 epochs"),
                                                  ("optim.name=adamw", "state of momentum")])
def test_what_a_checkpoint_cannot_go_on_with(make_settings, tmp_path, override, message):
    train_script.train(make_settings(*SHORT, "trainer.max_epochs=1"), tmp_path)
    before = (tmp_path / "config.yaml").read_text()
    more = make_settings(f"ckpt={tmp_path}/checkpoints/last.ckpt", "trainer.max_epochs=3", override)
    with pytest.raises(ValueError, match=message):
        train_script.train(more, tmp_path)
    assert (tmp_path / "config.yaml").read_text() == before
