"""A run that is stopped within an epoch goes on exactly there."""

from types import SimpleNamespace

import pandas as pd
import pytest
import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import Callback, Timer

import train as train_script
from models.checkpoint import load_checkpoint
from runs.safety import previous
from tests.helpers import write_tree
from tests.runs.stopping import SHORT, At, check_same, fail, interrupt, place, terminate
from training import saving

pytestmark = pytest.mark.slow

EXTRAS = {"plain": (), "mixup": ("data.mixup=0.2", "data.cutmix=1.0"), "workers": ("data.num_workers=2",),
          "ema": ("optim.ema_decay=0.9", "optim.warmup_epochs=1"),
          "float64": ("trainer.precision=64-true", "optim.ema_decay=0.9"),
          "sgs": ("block=sgs", "block.sgs_every_n_epochs=1"),
          "accumulation": ("trainer.accumulate_grad_batches=2", "optim.ema_decay=0.9")}


@pytest.mark.parametrize("extra", EXTRAS.values(), ids=EXTRAS)
def test_a_signal_within_an_epoch(make_settings, train_with, whole, tmp_path, capsys, extra):
    """SIGTERM arrives in the third batch of the second epoch; an accumulation ends with the fourth."""
    parts = tmp_path / "parts"
    if extra not in (EXTRAS["plain"], EXTRAS["workers"]):  # for which nothing may change
        whole = tmp_path / "whole"
        train_with(make_settings(*SHORT, *extra), whole)
    with pytest.raises(SystemExit) as stop:
        train_with(make_settings(*SHORT, *extra), parts, At(1, 2, terminate))
    assert stop.value.code == 143
    done = 4 if "trainer.accumulate_grad_batches=2" in extra else 3
    assert f"stopped by SIGTERM in epoch 2, after {done} batches of it; what is" in capsys.readouterr().err
    assert place(parts) == (1, done)
    assert not (parts / "result.json").exists()
    train_with(make_settings(*SHORT, *extra), parts)
    assert place(parts) == (2, 0)
    check_same(whole, parts)


def test_an_evaluation_leaves_the_average_as_it_is(make_settings, tmp_path):
    """It is of float32, beside weights of half precision."""
    for every in (1, 2):
        train_script.train(make_settings(*SHORT[:-1], "optim.ema_decay=0.9", "trainer.precision=bf16-true",
                                         f"trainer.check_val_every_n_epoch={every}"), tmp_path / str(every))
    one, two = (load_checkpoint(tmp_path / name / "checkpoints" / "last.ckpt") for name in "12")
    assert one["state_dict"]["net.fc.weight"].dtype == torch.float32
    assert one["current_model_state"]["net.fc.weight"].dtype == torch.bfloat16
    for name in ("state_dict", "current_model_state"):
        assert all(torch.equal(value, two[name][key]) for key, value in one[name].items())


@pytest.mark.parametrize(("epoch", "batch", "left"), [(0, 4, (0, 4)), (1, 0, (1, 0)), (1, 2, (1, 1))])
def test_a_crash_costs_the_steps_since_the_last_save(make_settings, train_with, whole, tmp_path, epoch, batch,
                                                     left):
    """Saved every second step, and after each epoch."""
    every = (*SHORT, "checkpoint.every_n_train_steps=2")
    for _ in range(2):  # the second time from where the first was saved
        with pytest.raises(RuntimeError, match="power failure"):
            train_with(make_settings(*every), tmp_path / "parts", At(epoch, batch, fail))
        assert place(tmp_path / "parts") == left
    train_with(make_settings(*every), tmp_path / "parts")
    check_same(whole, tmp_path / "parts")


@pytest.mark.parametrize("batch", [0, 4])
def test_scaled_gradients_after_a_crash(make_settings, train_with, tmp_path, batch):
    """The masks of an epoch are those of the weights that it began with, also where it began twice."""
    settings = make_settings(*SHORT, *EXTRAS["sgs"])
    train_with(settings, tmp_path / "whole")
    with pytest.raises(RuntimeError, match="power failure"):
        train_with(settings, tmp_path / "parts", At(1, batch, fail))
    assert place(tmp_path / "parts") == (1, 0)
    train_with(settings, tmp_path / "parts")
    check_same(tmp_path / "whole", tmp_path / "parts")


@pytest.mark.parametrize("action", [fail, terminate])
def test_an_epoch_is_saved_before_its_evaluation(make_settings, train_with, whole, tmp_path, action):
    with pytest.raises((RuntimeError, SystemExit), match="power failure|143"):
        train_with(make_settings(*SHORT), tmp_path / "parts", At(0, 0, action, validation=True))
    assert place(tmp_path / "parts") == (1, 0)
    train_with(make_settings(*SHORT), tmp_path / "parts")
    check_same(whole, tmp_path / "parts")
    rows = [pd.read_csv(folder / "metrics.csv").groupby("epoch").last()
            for folder in (whole, tmp_path / "parts")]
    for column in ("train/loss_epoch", "test/top1", "test/top5", "test/loss"):
        assert rows[1][column].tolist() == pytest.approx(rows[0][column].tolist(), rel=1e-5), column


class AtItsEnd(Callback):
    """Ctrl-C once the last epoch is over, when its steps and its evaluation are."""

    def on_train_epoch_end(self, trainer, module):
        if trainer.current_epoch == trainer.max_epochs - 1:
            interrupt(trainer)


def test_a_signal_after_the_last_epoch(make_settings, train_with, whole, tmp_path, capsys):
    """The run stops, and so would a sweep; the same command then evaluates."""
    with pytest.raises(SystemExit, match="130"):
        train_with(make_settings(*SHORT), tmp_path, AtItsEnd())
    assert "stopped by SIGINT after its last epoch" in capsys.readouterr().err
    assert not (tmp_path / "result.json").exists()
    train_with(make_settings(*SHORT), tmp_path)
    check_same(whole, tmp_path)


def test_a_damaged_test_image_costs_no_epoch(make_settings, tmp_path):
    files = write_tree(tmp_path / "files", ("train", "val"), ["a", "b"], 8, (40, 40))
    broken = files / "val" / "b" / "7.png"
    content = broken.read_bytes()
    broken.write_bytes(content[:100])
    settings = make_settings("model=resnet8", "data=folder", f"data.root={files}", "data.image_size=32",
                             "data.batch_size=4", "data.num_workers=0", "logger=csv", "trainer.max_epochs=1")
    with pytest.raises(ValueError, match="7.png"):
        train_script.train(settings, tmp_path / "run")
    assert place(tmp_path / "run") == (1, 0)
    broken.write_bytes(content)
    assert "top1" in train_script.train(settings, tmp_path / "run")


def test_the_time_of_a_run_ends_within_an_epoch(make_settings, train_with, whole, tmp_path, monkeypatch,
                                                capsys):
    """Not finished; with more time it goes on, and ends as if it had never stopped."""
    steps = []
    with monkeypatch.context() as patch:
        patch.setattr(Timer, "time_elapsed", lambda self, *stage: 3600 if len(steps) >= 7 else 0)
        count = At(0, 0, None)
        count.on_train_batch_start = lambda *args: steps.append(args)
        result = train_with(make_settings(*SHORT, "trainer.max_time=00:01:00:00"), tmp_path / "parts", count)
    assert result == {}
    assert place(tmp_path / "parts") == (1, 2)
    assert not (tmp_path / "parts" / "result.json").exists()
    assert "stopped by trainer.max_time=00:01:00:00 after 1 of 2 epochs and 2 batches" in \
        capsys.readouterr().out
    with monkeypatch.context() as patch:
        patch.setattr(Timer, "time_elapsed", lambda self, *stage: 3600)
        with pytest.raises(ValueError, match="of all sessions .* and used up"):
            train_with(make_settings(*SHORT, "trainer.max_time=00:01:00:00"), tmp_path / "parts")
    train_with(make_settings(*SHORT, "trainer.max_time=00:05:00:00"), tmp_path / "parts")
    check_same(whole, tmp_path / "parts")
    before = {path: path.read_bytes() for path in (tmp_path / "parts").iterdir() if path.is_file()}
    longer = make_settings(f"ckpt={tmp_path}/parts/checkpoints/last.ckpt", "trainer.max_epochs=3",
                           "trainer.max_time=00:01:00:00")
    with pytest.raises(ValueError, match="of all sessions .* and used up"):
        train_with(longer, tmp_path / "parts")
    assert {path: path.read_bytes() for path in before} == before


def test_a_run_that_began_from_another_goes_on_by_the_same_command(make_settings, train_with, tmp_path,
                                                                   capsys):
    """With `ckpt=A out=B`, from B's own state; a line of metrics.csv that a full disk cut is left out."""
    train_with(make_settings(*SHORT, "trainer.max_epochs=1"), tmp_path / "a")
    command = [f"ckpt={tmp_path}/a/checkpoints/last.ckpt", "trainer.max_epochs=3"]
    train_with(make_settings(*command), tmp_path / "whole")
    with pytest.raises(SystemExit, match="143"):
        train_with(make_settings(*command), tmp_path / "b", At(2, 2, terminate))
    metrics = tmp_path / "b" / "metrics.csv"
    metrics.write_bytes(metrics.read_bytes()[:-7])
    last = tmp_path / "b" / "checkpoints" / "last.ckpt"
    last.rename(previous(last))  # killed while the next one took its place
    capsys.readouterr()
    result = train_with(make_settings(*command), tmp_path / "b")
    assert "epoch 2/3" not in capsys.readouterr().out, "which b has done"
    check_same(tmp_path / "whole", tmp_path / "b", cut=12)
    assert train_with(make_settings(*command), tmp_path / "b")["loss"] == result["loss"], "it is finished"
    with pytest.raises(ValueError, match="already holds a run with another trainer.max_epochs"):
        train_with(make_settings(command[0], "trainer.max_epochs=4"), tmp_path / "b")


def test_a_state_is_saved_at_an_interval(make_settings, train_with, tmp_path, monkeypatch):
    """Of a clock that moves on by 20 seconds a step, with one minute between two states."""
    saved, clock, save = [], iter(range(0, 10_000, 20)), pl.Trainer.save_checkpoint
    monkeypatch.setattr(saving, "time", SimpleNamespace(monotonic=lambda: next(clock)))

    def watched(trainer, *args, **kwargs):
        saved.append(trainer.global_step)
        save(trainer, *args, **kwargs)
    monkeypatch.setattr(pl.Trainer, "save_checkpoint", watched)
    train_with(make_settings(*SHORT, "checkpoint.train_time_interval=00:00:01:00"), tmp_path)
    assert saved == [3, 5, 8, 10]


@pytest.mark.parametrize(("extra", "lost"), [
    ((), ["train/loss_epoch"]), ((), ["train/loss_epoch", "test/top1"]),
    (("trainer.check_val_every_n_epoch=2",), ["train/loss_epoch"]),
    (("trainer.limit_val_batches=3",), ["train/loss_epoch"]),
    (("trainer.precision=bf16-mixed",), ["train/loss_epoch", "test/top5", "test/loss"]),
    (("trainer.precision=bf16-true",), ["test/top5"]),  # Lightning adds losses up in bfloat16
    (("trainer.precision=64-true",), ["train/loss_epoch", "test/loss"])])
def test_what_metrics_lack_of_an_epoch_is_made_up(make_settings, train_with, tmp_path, extra, lost):
    """Lightning writes the test's row, then the loss's; a run may be killed between them."""
    command = make_settings(*SHORT, "trainer.max_epochs=1", *extra)
    train_with(command, tmp_path)
    path = tmp_path / "metrics.csv"
    rows = pd.read_csv(path)
    before = rows[lost].max()
    rows = rows[rows[lost].isna().all(axis=1) & rows["final/top1"].isna()]
    rows.to_csv(path, index=False)
    (tmp_path / "result.json").unlink()
    train_with(command, tmp_path)
    assert pd.read_csv(path)[lost].max().tolist() == pytest.approx(before.tolist(), rel=1e-5)
