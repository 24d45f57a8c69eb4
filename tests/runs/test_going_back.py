"""Going back to another checkpoint of a run's folder: what was the newest state is kept, with its rows."""

import errno
import json
import os
import shutil

import pandas as pd
import pytest
import torch

import train as train_script
from models.checkpoint import load_checkpoint
from runs import going_back
from tests.runs.stopping import SHORT, At, check_same, fail, place

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("stop", [fail, None])
def test_going_back_to_the_checkpoint_before(make_settings, train_with, whole, tmp_path, capsys, stop):
    """With another rate, in the run's own folder; the same command then goes on, not from the old last.

    The second time it is a copy that somebody made in the run's folder.
    """
    for name in ("whole", "parts"):
        shutil.copytree(whole, tmp_path / name)
        files = tmp_path / name / "checkpoints"
        shutil.copy(files / "last-previous.ckpt", files / "first.ckpt")
    old = load_checkpoint(whole / "checkpoints" / "last.ckpt")
    parts = tmp_path / "parts"

    def train(folder, *more):
        name = "last-previous" if stop is None else "first"
        settings = make_settings(f"ckpt={folder}/checkpoints/{name}.ckpt", "optim.lr=0.01",
                                 "trainer.max_epochs=3")
        return train_with(settings, folder, *more)

    train(tmp_path / "whole")
    assert "last.ckpt is now last-left.ckpt\n" in capsys.readouterr().out
    if stop is None:
        train(parts)
    else:
        with pytest.raises(RuntimeError, match="power failure"):
            train(parts, At(2, 1, stop))
        assert place(parts) == (2, 0)
    train(parts)  # where it is finished: nothing more
    assert "has these settings, and is further: going on from it" in capsys.readouterr().out
    check_same(tmp_path / "whole", parts)
    left = load_checkpoint(parts / "checkpoints" / "last-left.ckpt")
    assert all(torch.equal(value, left["state_dict"][key]) for key, value in old["state_dict"].items())
    assert not (parts / "checkpoints" / "last-left2.ckpt").exists()


@pytest.mark.parametrize("full", ["for the checkpoint", "for the rows"])
def test_going_back_on_a_full_disk(make_settings, whole, tmp_path, monkeypatch, capsys, full):
    """Nothing has changed; with room, the command works, and says what it will replace."""
    run = tmp_path / "run"
    shutil.copytree(whole, run)
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    command = make_settings(f"ckpt={run}/checkpoints/last-previous.ckpt", "optim.lr=0.01",
                            "trainer.max_epochs=3")

    def half(read, file):
        if full == "for the checkpoint":
            file.write(read.read(1000))
        raise OSError(errno.ENOSPC, "No space left on device")
    with monkeypatch.context() as patch:
        where = (shutil, "copyfileobj") if full == "for the checkpoint" else (going_back, "write_text")
        patch.setattr(*where, half)
        with pytest.raises(OSError, match="No space left"):
            train_script.train(command, run)
    assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == before
    train_script.train(command, run)
    assert "last-previous.ckpt is replaced as training goes on" in capsys.readouterr().out


def test_settings_that_changed_before_a_kill_are_said(make_settings, train_with, whole, tmp_path, capsys):
    """By a command that does not name the checkpoint, and so could be one of a new run."""
    run, more = tmp_path / "run", ("optim.lr=0.01", "trainer.max_epochs=3")
    shutil.copytree(whole, run)
    with pytest.raises(RuntimeError, match="power failure"):
        train_with(make_settings(f"ckpt={run}/checkpoints/last.ckpt", *more), run, At(2, 1, fail))
    capsys.readouterr()
    train_script.train(make_settings(*SHORT, *more), run)
    assert "changed since last.ckpt: optim.lr: 0.1 until epoch 2, then 0.01" in capsys.readouterr().out


def test_going_back_over_a_detour(make_settings, train_with, whole, tmp_path, capsys):
    """The last has the settings of the one before it, but trained with others in between."""
    run = tmp_path / "run"
    shutil.copytree(whole, run)
    last, left = run / "checkpoints" / "last.ckpt", run / "checkpoints" / "last-left.ckpt"
    shutil.copy(last, left)
    for epochs, rate in ((3, 0.5), (4, 0.1)):
        rates = f"optim.lr={rate}", f"trainer.max_epochs={epochs}"
        train_script.train(make_settings(f"ckpt={last}", *rates), run)
    train_script.train(make_settings(f"ckpt={left}", "optim.lr=0.1", "trainer.max_epochs=4"), run)
    assert "last.ckpt is now last-left2.ckpt" in capsys.readouterr().out
    changed = load_checkpoint(last)["dbb"]["changed"]
    assert [change for change in changed if "lr" in change] == []


def test_rows_go_with_their_checkpoint(make_settings, whole, tmp_path):
    """Going back and forth, and on from another run's checkpoint in this folder."""
    run, more = tmp_path / "run", "trainer.max_epochs=3"
    files = run / "checkpoints"
    shutil.copytree(whole, run)
    before = pd.read_csv(run / "metrics.csv").dropna(subset=["test/loss"])
    train_script.train(make_settings(f"ckpt={files}/last-previous.ckpt", "optim.lr=0.5", more), run)
    train_script.train(make_settings(f"ckpt={files}/last-left.ckpt", more), run)
    rows = pd.read_csv(run / "metrics.csv").dropna(subset=["test/loss"])
    assert rows["test/loss"].tolist()[:2] == pytest.approx(before["test/loss"].tolist())
    train_script.train(make_settings(*SHORT, "seed=5"), tmp_path / "other")
    shutil.copy(tmp_path / "other" / "checkpoints" / "last.ckpt", files / "other.ckpt")
    train_script.train(make_settings(f"ckpt={files}/other.ckpt", more), run)
    assert pd.read_csv(run / "metrics.csv")["step"].min() == 9, "the row of the epoch before, made up"
    left = pd.read_csv(run / "metrics-left3.csv").dropna(subset=["test/loss"])
    assert left["test/loss"].tolist() == rows["test/loss"].tolist()


def test_rows_that_are_a_hole(make_settings, whole, tmp_path):
    """Nothing is renamed before they are refused."""
    shutil.copytree(whole, tmp_path / "run")
    files = tmp_path / "run" / "checkpoints"
    (files / "last-previous.ckpt").rename(files / "last-left.ckpt")
    settings = make_settings(f"ckpt={files}/last-left.ckpt", "optim.lr=0.01", "trainer.max_epochs=3")
    for name in ("metrics-left.csv", "metrics.csv"):
        (tmp_path / "run" / name).touch()
        os.truncate(tmp_path / "run" / name, 2**42)
        before = {path: path.stat().st_ino for path in files.iterdir()}
        with pytest.raises(ValueError, match=f"{name} is larger than any that a run writes: remove it"):
            train_script.train(settings, tmp_path / "run")
        assert {path: path.stat().st_ino for path in files.iterdir()} == before
        (tmp_path / "run" / name).unlink()


def test_going_back_after_an_attempt_that_saved_nothing(make_settings, train_with, whole, tmp_path):
    """The rows come back too; and a training that was complete is evaluated again."""
    run, more = tmp_path / "run", ("optim.lr=0.5", "trainer.max_epochs=3")
    files = run / "checkpoints"
    shutil.copytree(whole, run)
    before = json.loads((run / "result.json").read_text())
    for _ in range(2):
        with pytest.raises(RuntimeError, match="power failure"):
            train_with(make_settings(f"ckpt={files}/last-previous.ckpt", *more), run, At(1, 3, fail))
    train_script.train(make_settings(f"ckpt={files}/last-left.ckpt"), run)
    check_same(whole, run)
    assert json.loads((run / "result.json").read_text()) == pytest.approx(before)
    assert sorted(path.name for path in run.glob("*/last-left*")) == ["last-left.ckpt", "last-left2.ckpt"]


def test_going_back_where_the_last_is_missing(make_settings, whole, tmp_path):
    """The one before is the newest state then, and is kept."""
    run, more = tmp_path / "run", "trainer.max_epochs=3"
    files = run / "checkpoints"
    shutil.copytree(whole, run)
    newest = (files / "last-previous.ckpt").read_bytes()
    (files / "last.ckpt").rename(files / "first.ckpt")
    (run / "metrics-left.csv").write_text("mine")
    train_script.train(make_settings(f"ckpt={files}/first.ckpt", "optim.lr=0.5", more), run)
    assert (files / "last-left2.ckpt").read_bytes() == newest
    assert (run / "metrics-left.csv").read_text() == "mine"
    assert (run / "metrics-left2.csv").exists()


@pytest.mark.parametrize("here", ["link", "run/../run"])
def test_going_back_by_another_spelling_of_the_folder(make_settings, whole, tmp_path, here):
    """A home that is a link, say: the shell says one path of it, and the system another."""
    run = tmp_path / "run"
    shutil.copytree(whole, run)
    (tmp_path / "link").symlink_to(run)
    newest = (run / "checkpoints" / "last.ckpt").read_bytes()
    train_script.train(make_settings(f"ckpt={tmp_path}/{here}/checkpoints/last-previous.ckpt", "optim.lr=0.5",
                                     "trainer.max_epochs=3"), run)
    assert (run / "checkpoints" / "last-left.ckpt").read_bytes() == newest
    assert (run / "metrics-left.csv").exists()


@pytest.mark.parametrize("name", ["last-epoch2", "last-previous"])
def test_a_copy_of_the_last_is_not_what_was_left(make_settings, whole, tmp_path, name):
    """Somebody's copy has no rows, and the one before the last will make room for others."""
    run = tmp_path / "run"
    files = run / "checkpoints"
    shutil.copytree(whole, run)
    shutil.copy(files / "last-previous.ckpt", files / "first.ckpt")
    newest, rows = (files / "last.ckpt").read_bytes(), (run / "metrics.csv").read_text()
    shutil.copy(files / "last.ckpt", files / f"{name}.ckpt")
    train_script.train(make_settings(f"ckpt={files}/first.ckpt", "optim.lr=0.5", "trainer.max_epochs=4"), run)
    assert (files / "last-left.ckpt").read_bytes() == newest
    assert (run / "metrics-left.csv").read_text() == rows
