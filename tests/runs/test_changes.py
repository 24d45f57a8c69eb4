"""A run that goes on with other settings, or from another checkpoint."""

import copy
import os
import re
import shutil
import signal

import pandas as pd
import pytest
import torch

import train as train_script
from evaluation import evaluate
from models.checkpoint import load_checkpoint
from runs.folder import FolderTakenError, RunFolder
from runs.same import changes
from tests.runs.stopping import SHORT, At, Batches, check_same, fail, interrupt, place, terminate
from training import steps

pytestmark = pytest.mark.slow


def hang_up(trainer):
    os.kill(os.getpid(), signal.SIGHUP)


@pytest.mark.parametrize("change", ["trainer.limit_train_batches=8", "trainer.limit_train_batches=3",
                                    "trainer.accumulate_grad_batches=2"])
def test_epochs_of_another_length(make_settings, train_with, whole, tmp_path, change):
    """After an epoch's end; the learning rate ends near 0, and a stop on the way changes nothing."""
    command = [f"ckpt={whole}/checkpoints/last.ckpt", change, "trainer.max_epochs=4"]
    batches = Batches()
    train_with(make_settings(*command), tmp_path / "whole", batches)
    length = int(change.split("=")[1]) if "limit" in change else 5
    assert batches.seen == [(epoch, batch) for epoch in (2, 3) for batch in range(length)]
    assert batches.rates[0] == pytest.approx(0.05, rel=0.3), "half of the way down"
    assert batches.rates[-1] < 0.02
    with pytest.raises(SystemExit, match="143"):
        train_with(make_settings(*command), tmp_path / "parts", At(2, 1, terminate))
    train_with(make_settings(*command), tmp_path / "parts")
    check_same(tmp_path / "whole", tmp_path / "parts")


def test_another_number_of_processes(make_settings, train_with, tmp_path, capsys, monkeypatch):
    """As `trainer.devices=auto` finds them, it is noted; how the run is watched is no change."""
    with pytest.raises(SystemExit, match="143"):
        train_with(make_settings(*SHORT), tmp_path / "run", At(0, 3, terminate))
    last = tmp_path / "run" / "checkpoints" / "last.ckpt"
    checkpoint = load_checkpoint(last)
    assert checkpoint["dbb"]["processes"] == 1
    checkpoint["dbb"]["processes"] = 2
    torch.save(checkpoint, last)
    watched = make_settings(*SHORT, "trainer.enable_progress_bar=false", "trainer.log_every_n_steps=7",
                            "trainer.profiler=simple")
    with pytest.raises(SystemExit, match="143"):
        train_with(watched, tmp_path / "run", At(1, 1, terminate))
    noted = "processes: 2 until epoch 0, then 1"
    assert f"changed: {noted}\n" in capsys.readouterr().out
    result = train_with(watched, tmp_path / "run")
    assert result["changed"] == [noted]
    assert result["processes"] == 1
    with monkeypatch.context() as patch:  # the folder of a finished run may be read-only
        patch.setattr("runs.folder.output_folder", fail)
        assert RunFolder.of(make_settings(f"out={tmp_path}/run")).path == tmp_path / "run"


def test_rows_of_a_training_whose_checkpoints_are_gone(make_settings, whole, tmp_path, capsys):
    """Somebody removed them; with other settings, and again, nothing that was trained is lost."""
    run = tmp_path / "run"
    for number in ("", "2"):
        shutil.copytree(whole, run, dirs_exist_ok=True)
        shutil.rmtree(run / "checkpoints")
        (run / "result.json").unlink()
        train_script.train(make_settings(*SHORT, "trainer.max_epochs=1", "optim.lr=0.01"), run)
        assert f"it is now metrics-earlier{number}.csv\n" in capsys.readouterr().out
        rows = (run / f"metrics-earlier{number}.csv").read_text()
        assert rows == (whole / "metrics.csv").read_text()
        assert pd.read_csv(run / "metrics.csv")["epoch"].max() == 0


def test_a_process_beside_one_that_trains_alone(make_settings, tmp_path, monkeypatch):
    """Started by srun or torchrun, whose variables say which it is; both would write the same files."""
    monkeypatch.setattr(steps.rank_zero_only, "rank", 1)
    with pytest.raises(ValueError, match="process 2 of a launcher .* have all train together"):
        train_script.train(make_settings(*SHORT), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_checkpoint_that_its_run_replaces_meanwhile(make_settings, train_with, tmp_path, monkeypatch):
    """While another run starts from it: weights of one step, with a place and a history of another."""
    settings, last = make_settings(*SHORT), tmp_path / "run" / "checkpoints" / "last.ckpt"
    for stop in (1, 3):
        with pytest.raises(SystemExit, match="143"):
            train_with(settings, tmp_path / "run", At(0, stop, terminate))
        shutil.copy(last, tmp_path / f"{stop}.ckpt")
    shutil.copy(tmp_path / "1.ckpt", last)
    load = steps.load_data

    def saved_meanwhile(*args):
        shutil.copy(tmp_path / "3.ckpt", last)
        return load(*args)
    monkeypatch.setattr(steps, "load_data", saved_meanwhile)
    with pytest.raises(ValueError, match="was replaced while this run started, by one of step 4 for one of"):
        train_script.train(make_settings(f"ckpt={last}", "optim.lr=0.01"), tmp_path / "other")


def test_places_within_one_epoch_are_told_apart(make_settings, train_with, tmp_path):
    """B went on from one of them."""
    for batch in (1, 3):
        with pytest.raises(SystemExit, match="143"):
            train_with(make_settings(*SHORT), tmp_path / "a", At(1, batch, terminate))
        shutil.copy(tmp_path / "a" / "checkpoints" / "last.ckpt", tmp_path / f"{batch}.ckpt")
    train_script.train(make_settings(f"ckpt={tmp_path}/1.ckpt", "optim.lr=0.05"), tmp_path / "b")
    with pytest.raises(FolderTakenError, match="did not go on from"):
        train_script.train(make_settings(f"ckpt={tmp_path}/3.ckpt", "optim.lr=0.05"), tmp_path / "b")


def test_a_folder_that_is_renamed_while_its_run_trains(make_settings, train_with, tmp_path, monkeypatch):
    """Nothing is written into what took its place."""
    def rename(trainer):
        (tmp_path / "run").rename(tmp_path / "new")
        if trainer.current_epoch == 1:
            (tmp_path / "run" / "checkpoints").mkdir(parents=True)
            (tmp_path / "run" / ".lock").write_text("process 1 of another")
    for epoch, error in ((0, "renamed"), (1, "another run's now")):
        folder = RunFolder(tmp_path / "run")
        folder.path.mkdir(exist_ok=True)
        with folder.alone(), pytest.raises((OSError, FolderTakenError), match=error):
            train_with(make_settings(*SHORT), folder.path, At(epoch, 1, rename))
        assert not list(tmp_path.glob("run/checkpoints/*"))
        if epoch == 0:
            shutil.rmtree(tmp_path / "run", ignore_errors=True)
            shutil.rmtree(tmp_path / "new")


def test_a_folder_that_began_from_another_checkpoint(make_settings, whole, tmp_path):
    """Of the same settings in the end, which it had after others."""
    other, command = tmp_path / "other", ["optim.lr=0.3", "trainer.max_epochs=4"]
    shutil.copytree(whole, other)
    train_script.train(make_settings(f"ckpt={other}/checkpoints/last.ckpt", "optim.lr=0.2",
                                     "trainer.max_epochs=3"), other)
    train_script.train(make_settings(f"ckpt={other}/checkpoints/last.ckpt", *command), tmp_path / "b")
    with pytest.raises(FolderTakenError, match="holds a run of these settings that did not go on from"):
        train_script.train(make_settings(f"ckpt={whole}/checkpoints/last.ckpt", *command), tmp_path / "b")


@pytest.mark.parametrize("place", ["run/checkpoints/mine.ckpt", "mine.ckpt"])
def test_a_checkpoint_that_somebody_renamed(make_settings, whole, tmp_path, place):
    """The run that goes on from it keeps its rows, and its id at W&B."""
    run = tmp_path / "run"
    shutil.copytree(whole, run)
    before, identity = pd.read_csv(run / "metrics.csv"), RunFolder(run).read_config()["logger"]["id"]
    (run / "checkpoints" / "last-previous.ckpt").unlink()
    (run / "checkpoints" / "last.ckpt").rename(tmp_path / place)
    (run / "result.json").unlink()
    train_script.train(make_settings(f"ckpt={tmp_path / place}", "trainer.max_epochs=3"), run)
    rows = pd.read_csv(run / "metrics.csv")
    assert rows["step"].min() == before["step"].min()
    assert set(rows["epoch"].dropna()) == {0, 1, 2}
    assert RunFolder(run).read_config()["logger"]["id"] == identity


@pytest.mark.parametrize("knob", ["trainer.limit_train_batches", "trainer.limit_val_batches"])
def test_one_batch_is_not_all_of_them(make_settings, tmp_path, knob, capsys):
    """A trial of one batch an epoch, 1, is not the run of all batches, 1.0, which is the default."""
    trial, run = (make_settings(*SHORT[:-3], "block.init=mean", f"{knob}={value}") for value in (1, 1.0))
    folder = RunFolder(tmp_path)
    for begun, command in ((trial, run), (run, trial)):
        folder.begin(begun)
        folder.finish({"top1": 0.1, "loss": 1.0})
        assert folder.take_up(begun).ckpt is None
        with pytest.raises(FolderTakenError, match=f"another {knob}: "):
            folder.take_up(command)
    assert changes(trial.stored(), run, 3) == [f"{knob}: 1 until epoch 3, then 1.0"]


def test_what_cannot_change_within_an_epoch(make_settings, train_with, tmp_path):
    """But from the end of the one before, as long as there is a checkpoint of it."""
    with pytest.raises(SystemExit, match="130"):
        train_with(make_settings(*SHORT), tmp_path, At(1, 2, interrupt))
    ckpt = f"ckpt={tmp_path}/checkpoints/last.ckpt"
    smaller = "batch_size: 32 until epoch 1 and 3 batches, then 16: .* epoch's end, or .* by (ckpt=.*)"
    with pytest.raises(ValueError, match=smaller) as refused:
        train_with(make_settings(ckpt, "data.batch_size=16"), tmp_path)
    [way_on] = re.findall(smaller, str(refused.value))
    shutil.copytree(tmp_path, tmp_path / "copy")
    way_on = way_on.replace(str(tmp_path), f"{tmp_path}/copy")
    batches = Batches()
    train_with(make_settings(way_on, "data.batch_size=16"), tmp_path / "copy", batches)
    assert batches.seen[0] == (1, 0)
    with pytest.raises(ValueError, match="trainer.max_epochs=1: the checkpoint already has 1 epochs"):
        train_with(make_settings(ckpt, "trainer.max_epochs=1"), tmp_path)
    usual = signal.signal(signal.SIGHUP, signal.SIG_DFL)  # perhaps ignored: whoever tests has said nohup
    with pytest.raises(SystemExit, match="129"):
        train_with(make_settings(ckpt, "optim.weight_decay=0.1"), tmp_path, At(1, 3, hang_up))
    signal.signal(signal.SIGHUP, usual)
    assert place(tmp_path) == (1, 4)
    with pytest.raises(ValueError, match="until the epoch's end$"):
        train_with(make_settings(ckpt, "data.batch_size=16"), tmp_path)


def test_a_command_that_fails_leaves_a_finished_run_as_it_was(make_settings, whole, tmp_path):
    before = {name: (whole / name).read_bytes() for name in ("config.yaml", "result.json", "metrics.csv")}
    command = f"ckpt={whole}/checkpoints/last.ckpt", "trainer.max_epochs=4", "optim.decay_norm_and_bias=false"
    with pytest.raises(ValueError, match="cannot be gone on from: its optimiser has .* optim.decay_norm"):
        train_script.train(make_settings(*command), whole)
    going_back = f"ckpt={whole}/checkpoints/last-previous.ckpt", "trainer.max_epochs=1"
    with pytest.raises(ValueError, match="the checkpoint already has 1 epochs"):
        train_script.train(make_settings(*going_back), whole)
    assert sorted(os.listdir(whole / "checkpoints")) == ["last-previous.ckpt", "last.ckpt"]
    assert {name: (whole / name).read_bytes() for name in before} == before


def test_rows_of_another_training_do_not_stay(make_settings, train_with, whole, tmp_path):
    """Of one that was killed in the folder before its first checkpoint."""
    with pytest.raises(RuntimeError, match="power failure"):
        train_with(make_settings(*SHORT, "seed=5"), tmp_path, At(0, 3, fail))
    assert len((tmp_path / "metrics.csv").read_text().splitlines()) > 2
    train_script.train(make_settings(f"ckpt={whole}/checkpoints/last.ckpt", "trainer.max_epochs=3"), tmp_path)
    assert pd.read_csv(tmp_path / "metrics.csv")["step"].min() == 9  # the row of the epoch before


def test_weights_beside_their_average_are_checked_too(make_settings, whole, tmp_path):
    """A checkpoint of somebody else's may hold others there than those which eval.py measures."""
    checkpoint = torch.load(whole / "checkpoints" / "last.ckpt", weights_only=True)
    checkpoint["dbb"]["settings"]["optim"]["ema_decay"] = 0.9
    checkpoint["callbacks"]["EMAWeightAveraging"] = {"latest_update_step": 0}
    checkpoint["averaging_state"] = {"n_averaged": torch.tensor(0)}
    checkpoint["current_model_state"] = {key: value.long() for key, value in checkpoint["state_dict"].items()}
    torch.save(checkpoint, tmp_path / "a.ckpt")
    settings = make_settings(f"ckpt={tmp_path}/a.ckpt", "trainer.max_epochs=3")
    with pytest.raises(ValueError, match="of torch.int64 in the file"):
        train_script.train(settings, tmp_path / "run")


def test_without_the_average_from_now_on(make_settings, train_with, tmp_path):
    """A run goes on from its weights."""
    train_script.train(make_settings(*SHORT, "optim.ema_decay=0.999"), tmp_path)
    weights = load_checkpoint(tmp_path / "checkpoints" / "last.ckpt")["current_model_state"]
    seen = []
    train_with(make_settings(f"ckpt={tmp_path}/checkpoints/last.ckpt", "optim.ema_decay=null",
                             "trainer.max_epochs=3"), tmp_path,
               At(2, 0, lambda trainer: seen.append(copy.deepcopy(trainer.lightning_module.state_dict()))))
    assert all(torch.equal(value, weights[key]) for key, value in seen[0].items())
    assert "current_model_state" not in load_checkpoint(tmp_path / "checkpoints" / "last.ckpt")


def test_a_finished_run_without_its_checkpoints_is_not_replaced(make_settings, whole, tmp_path):
    train_script.train(make_settings(*SHORT, "seed=5", "trainer.max_epochs=1"), tmp_path)
    for path in (tmp_path / "checkpoints").iterdir():
        path.unlink()
    with pytest.raises(ValueError, match="already holds a run with another"):
        train_script.train(make_settings(f"ckpt={whole}/checkpoints/last.ckpt"), tmp_path)


def test_a_checkpoint_that_changes_while_it_is_read(make_settings, whole, tmp_path, monkeypatch):
    """The report names the file by its hash: it must be that of what was read."""
    last = tmp_path / "last.ckpt"
    last.write_bytes((whole / "checkpoints" / "last.ckpt").read_bytes())
    digest = evaluate.sha256

    def saved_meanwhile(path):
        last.write_bytes(last.read_bytes())
        return digest(path)
    settings = make_settings(f"ckpt={last}", config_name="eval")
    _, _, about = evaluate.load_run(settings)
    assert about["checkpoint_sha256"] == digest(last)
    monkeypatch.setattr(evaluate, "sha256", saved_meanwhile)
    with pytest.raises(ValueError, match="was written anew by its run while it was read: try again"):
        evaluate.load_run(settings)
