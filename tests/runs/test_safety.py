"""What may not lose a run's work: a full disk, a killed write, damaged bytes, a loss that is not finite."""

import errno
import io
import os
import random
import shutil
import subprocess
import sys
from datetime import datetime
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from hydra.core.override_parser.overrides_parser import OverridesParser

import runs.folder
import train as train_script
from models.checkpoint import load_checkpoint
from models.plain import damage
from runs.folder import FolderTakenError, RunFolder
from runs.safety import WholeCheckpointIO, newest, previous, set_aside
from settings.cli import plain_errors, typed
from tests.helpers import TINY, call, relative_error
from training.divergence import DivergedError
from training.module import Classifier

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("failure", [OSError(errno.ENOSPC, "No space left on device"),
                                     RuntimeError("PytorchStreamWriter failed writing file data/0")])
def test_a_checkpoint_is_written_whole_or_not_at_all(tmp_path, monkeypatch, failure):
    last, save = tmp_path / "checkpoints" / "last.ckpt", torch.save
    for epoch in (0, 1):
        WholeCheckpointIO().save_checkpoint({"epoch": epoch}, last)

    def half(checkpoint, file):
        file.write(b"PK half of it")
        raise failure
    monkeypatch.setattr(torch, "save", half)
    with pytest.raises(OSError, match="last.ckpt could not be written .*make room"):
        WholeCheckpointIO().save_checkpoint({"epoch": 2}, last)
    assert torch.load(last) == {"epoch": 1}
    assert torch.load(previous(last)) == {"epoch": 0}
    assert sorted(path.name for path in last.parent.iterdir()) == ["last-previous.ckpt", "last.ckpt"]
    monkeypatch.setattr(torch, "save", save)
    WholeCheckpointIO().save_checkpoint({"epoch": 2}, last)
    assert torch.load(last) == {"epoch": 2}


def test_damaged_bytes_are_found_or_harmless(tmp_path):
    """A flipped bit: an error, or the very values that were saved (some bytes of a zip mean nothing)."""
    path, saved = tmp_path / "last.ckpt", {"weight": torch.arange(5000.0), "epoch": 3}
    WholeCheckpointIO().save_checkpoint(saved, path)
    whole, draw = path.read_bytes(), random.Random(0)
    found = 0
    for _ in range(200):
        place, bit = draw.randrange(len(whole)), 1 << draw.randrange(8)
        path.write_bytes(whole[:place] + bytes([whole[place] ^ bit]) + whole[place + 1:])
        if damage(path) is not None:
            found += 1
            continue
        try:
            loaded = torch.load(path)
        except Exception:  # load_checkpoint makes a sentence of it
            found += 1
            continue
        assert loaded.keys() == saved.keys()
        assert torch.equal(loaded["weight"], saved["weight"])
    assert found > 150


def test_a_damaged_checkpoint_costs_one_epoch(make_settings, tmp_path, capsys):
    """The same command goes on from the one before, and ends as if nothing had happened."""
    command = ["model=resnet8", *TINY, "trainer.max_epochs=3"]
    train_script.train(make_settings(*command), tmp_path / "whole")
    run_dir = tmp_path / "run"
    train_script.train(make_settings(*command), run_dir)
    last = run_dir / "checkpoints" / "last.ckpt"
    (run_dir / "result.json").unlink()
    content = bytearray(last.read_bytes())
    content[len(content) // 2] ^= 1
    last.write_bytes(content)
    with pytest.raises(ValueError, match="cannot be read: it is damaged.*checksum"):
        load_checkpoint(last)
    capsys.readouterr()
    train_script.train(make_settings(*command), run_dir)
    assert "(the checksum of" in capsys.readouterr().out
    ended, expected = (load_checkpoint(tmp_path / name / "checkpoints" / "last.ckpt")["state_dict"]
                       for name in ("run", "whole"))
    assert all(torch.equal(ended[key], value) for key, value in expected.items())
    assert damage(previous(last)) is None
    assert damage(last.with_name("last-damaged.ckpt")) is not None
    last.write_bytes(content)
    done = call("train.py", f"ckpt={last}", "trainer.max_epochs=4", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "going on from the one before, last-previous.ckpt" in done.stdout
    (run_dir / "result.json").write_text('{"top1": 0.1, "top5": 0.2, "loss": 3.0}')
    previous(last).rename(tmp_path / "kept.ckpt")
    last.write_bytes(content)
    finished = make_settings(*command, "trainer.max_epochs=4")
    assert train_script.train(finished, run_dir)["top1"] == 0.1, "of a finished run, none is read"
    (tmp_path / "kept.ckpt").rename(previous(last))
    last.unlink()
    assert newest(last) == previous(last)
    previous(last).write_bytes(content[:1000])
    capsys.readouterr()
    assert newest(last) is None
    assert "last-previous.ckpt cannot be read: it is left out" in capsys.readouterr().out


def test_a_loss_that_is_not_finite_ends_the_run(tmp_path):
    """Nothing is saved after it, the checkpoint before stays, and the report lists the run as failed."""
    command = ["model=resnet8_dbb", *TINY, "out=runs/one", "trainer.log_every_n_steps=4"]
    assert call("train.py", *command, cwd=tmp_path).returncode == 0
    last = tmp_path / "runs" / "one" / "checkpoints" / "last.ckpt"
    before = load_checkpoint(last)["state_dict"]
    on = call("train.py", f"ckpt={last}", "trainer.max_epochs=2", "optim.lr=1e6", cwd=tmp_path)
    assert on.returncode == 1
    assert "the training loss is not finite from step " in on.stderr
    assert "Traceback" not in on.stderr
    after = load_checkpoint(last)["state_dict"]
    assert all(relative_error(after[key], value) == 0 for key, value in before.items())
    assert not Path(last.parent.parent, "result.json").exists()
    listed = call("report.py", "runs", "--out", "report", cwd=tmp_path).stderr
    assert "runs/one: error: the training loss is not finite" in listed
    new = call("train.py", *command[:-2], "out=runs/two", "optim.lr=1e6", cwd=tmp_path)
    assert new.returncode == 1
    assert not list(tmp_path.glob("runs/two/checkpoints/*"))


def test_a_test_loss_that_is_not_finite_is_no_end(make_settings, tmp_path, monkeypatch):
    """Of weights that are; going back to the checkpoint before is open."""
    settings = make_settings("model=resnet8_dbb", *TINY, "trainer.max_epochs=2")
    with monkeypatch.context() as patch:
        patch.setattr("training.steps.scores", lambda *_: {"top1": 0.1, "top5": 0.5, "loss": float("nan")})
        with pytest.raises(DivergedError, match="the test loss is nan, .*last-previous.ckpt, with a lower"):
            train_script.train(settings, tmp_path)
    assert not (tmp_path / "result.json").exists()
    settings.ckpt, settings.optim.lr = str(tmp_path / "checkpoints" / "last-previous.ckpt"), 0.001
    assert train_script.train(settings, tmp_path)["loss"] < 10


def test_weights_that_are_not_finite_are_not_saved(make_settings, tmp_path, monkeypatch):
    """The loss before the step that ruined them is."""
    step = Classifier.training_step

    def ruin(module, batch, batch_idx):
        loss = step(module, batch, batch_idx)
        next(module.net.parameters()).data[0] = torch.inf
        return loss
    monkeypatch.setattr(Classifier, "training_step", ruin)
    settings = make_settings("model=resnet8_dbb", *TINY, "trainer.limit_train_batches=1")
    with pytest.raises(DivergedError, match="the weights are not finite after step 1 .*Lower optim.lr"):
        train_script.train(settings, tmp_path)
    assert not list(tmp_path.glob("checkpoints/*"))


@pytest.mark.parametrize(("error", "advice"), [
    (OSError(errno.EFBIG, "File too large"), "ulimit -f"),
    (PermissionError(errno.EPERM, "Operation not permitted", "metrics.csv"), "may not write there"),
    (OSError(errno.ENOSPC, "No space left on device"), "make room"),
    (OSError(errno.EDQUOT, "Disk quota exceeded"), "make room"),
    (RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 64 vs 0"), "make room"),
    (RuntimeError("CUDA out of memory. Tried to allocate 2 GiB"), "data.batch_size .* from the end of an"),
    (RuntimeError("[gloo/transport/tcp/pair.cc:534] Connection closed by peer"), "another process"),
    (RuntimeError("DataLoader worker (pid 7) is killed by signal: Killed."), "lower data.num_workers"),
    (RuntimeError("DataLoader worker (pid(s) 7) exited unexpectedly"), "lower data.num_workers")])
def test_a_failure_of_the_machine_is_a_sentence(error, advice):
    with pytest.raises(SystemExit, match=f"^error: [^\n]*{advice}"), plain_errors():
        raise error
    with pytest.raises(RuntimeError, match="a fault of ours"), plain_errors():
        raise RuntimeError("a fault of ours")


@pytest.mark.parametrize("path", ["runs/a/last.ckpt", "my runs/a b", "runs/lr=0.1,b", "it's $x `y` \"q\" \\"])
def test_what_is_printed_can_be_typed(path):
    word = subprocess.run(["bash", "-c", f"printf %s {typed('ckpt', path)}"], capture_output=True, text=True)
    [override] = OverridesParser.create().parse_overrides([word.stdout])
    assert override.value() == path


def test_names_that_an_output_cannot_show(monkeypatch):
    """Of a class, in a container whose output is ASCII."""
    written = io.BytesIO()
    with monkeypatch.context() as patch, io.TextIOWrapper(written, "ascii") as output:
        patch.setattr(sys, "stdout", output)
        with plain_errors():
            print("caf\u00e9")
        output.flush()
        assert written.getvalue() == b"caf\\xe9\n"


def test_no_line_of_a_files_looks_like_one_of_ours():
    with pytest.raises(SystemExit) as stop, plain_errors():
        raise ValueError("unknown: x\nerror: forged\n\x1b[2Jcleared")
    assert stop.value.code == "error: unknown: x\n  error: forged\n  \\x1b[2Jcleared"


@pytest.mark.parametrize("name", ["checkpoints", "wandb", ".config.yaml.part", "convolutions.csv"])
def test_a_run_writes_through_no_link(make_settings, tmp_path, name):
    (tmp_path / "mine").mkdir()
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / name).symlink_to(tmp_path / "mine")
    with pytest.raises(ValueError, match=f"{name} is a link or a device, and a run"):
        train_script.train(make_settings("model=resnet8", *TINY), tmp_path / "run")
    assert not [*(tmp_path / "mine").iterdir()]


@pytest.mark.parametrize("name", ["hparams.yaml", "wandb", "metrics.csv", "convert"])
def test_a_runs_folder_with_links_or_pipes(tmp_path, make_settings, name):
    """TensorBoard's logger would write through a link to nothing, W&B's into a linked folder."""
    folder = RunFolder(tmp_path)
    command = make_settings("model=resnet8", "data=digits", "logger=csv")
    for make in (lambda path: path.symlink_to(tmp_path.parent / "elsewhere"), os.mkfifo):
        make(tmp_path / name)
        with pytest.raises(FolderTakenError, match=f"{name} is a link or a device"):
            folder.take_up(command)
        (tmp_path / name).unlink()


def test_a_checkpoint_does_not_choose_the_folder(make_settings, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    command = make_settings("model=resnet8", "block=dbb", "data=digits", "block.name=../../../x y")
    assert RunFolder.of(command).path.parent == Path("outputs/resnet8_.._.._.._x_y_digits")
    with pytest.raises(ValueError, match="block.name=.* must be of signs that can be printed"):
        make_settings("model=resnet8", "block=dbb", "data=digits", 'block.name="a\x1b[2J"')


def test_who_trains_in_a_folder_is_named(tmp_path):
    with RunFolder(tmp_path).alone():
        for _ in range(2):
            named = pytest.raises(ValueError, match=rf"\(process {os.getpid()} of .*\).* dead, remove")
            with named, RunFolder(tmp_path).alone():
                pass


def test_what_no_run_has_written_stays(make_settings, tmp_path):
    """A folder of somebody else's is refused; a checkpoint that lies there starts a folder of its own."""
    settings = make_settings("model=resnet8", *TINY)
    for name in ("config.yaml", "result.json", "metrics.csv", "metrics-before-resume.csv", "error.txt"):
        folder = tmp_path / name
        folder.mkdir()
        (folder / name).write_text("somebody: else")
        with pytest.raises(ValueError, match=f"has {name}, which no run wrote: it is somebody else's"):
            train_script.train(settings, folder)
        assert [path.name for path in folder.iterdir()] == [name]
        assert (folder / name).read_text() == "somebody: else"
    train_script.train(settings, tmp_path / "run")
    last = tmp_path / "run" / "checkpoints" / "last.ckpt"
    best = tmp_path / "config.yaml" / "models" / "best.ckpt"
    best.parent.mkdir()
    shutil.copy(last, best)
    assert RunFolder.of_checkpoint(best) is None
    assert RunFolder.of_checkpoint(last).path == tmp_path / "run"
    done = call("train.py", f"ckpt={best}", "trainer.max_epochs=2", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "config.yaml" / "config.yaml").read_text() == "somebody: else"
    [result] = tmp_path.glob("outputs/*/*/result.json")


def test_a_refused_run_leaves_the_folder_of_the_other(tmp_path):
    """One that another process has begun in; a folder of its own is removed."""
    folder, command = tmp_path / "run", ["model=resnet8", *TINY]
    folder.mkdir()
    with RunFolder(folder).alone():
        done = call("train.py", *command, f"out={folder}", cwd=tmp_path)
        assert done.returncode == 1
        assert "another process is training in" in done.stderr
        assert folder.is_dir()
    done = call("train.py", *command, "optim.name=adahessian", cwd=tmp_path)
    assert done.returncode == 1
    assert not list(tmp_path.glob("outputs/*/*"))


def test_runs_that_begin_in_the_same_second(tmp_path, make_settings, monkeypatch):
    """Each has a folder of its own."""
    seconds = iter([0, 0, 1])
    clock = SimpleNamespace(now=lambda: datetime(2026, 1, 2, 3, 4, next(seconds)))
    monkeypatch.setattr(runs.folder, "datetime", clock)
    monkeypatch.chdir(tmp_path)
    folders = [RunFolder.of(make_settings("model=resnet8", *TINY)).path for _ in range(2)]
    assert [folder.name for folder in folders] == ["2026-01-02_03-04-00", "2026-01-02_03-04-01"]
    assert all(folder.is_dir() for folder in folders)
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "outputs").symlink_to(tmp_path / "unmounted")
    monkeypatch.chdir(tmp_path / "elsewhere")
    seconds = iter([2])
    with pytest.raises(ValueError, match="cannot write into outputs/resnet8_digits"):
        RunFolder.of(make_settings("model=resnet8", *TINY))


def test_a_job_of_a_sweep_that_never_began_says_why(tmp_path):
    """In a folder that Hydra made, too: the other jobs go on."""
    done = call("train.py", "-m", "model=vgg16,resnet8", *TINY, cwd=tmp_path)
    assert done.returncode == 1
    assert "error: 1 jobs failed" in done.stderr
    [error] = tmp_path.rglob("error.txt")
    assert "vgg16 cannot take images of 8 pixels" in error.read_text()
    assert len(list(tmp_path.rglob("result.json"))) == 1


def test_damaged_checkpoints_are_all_kept(tmp_path):
    last = tmp_path / "last.ckpt"
    for text in ("one", "two", "three"):
        last.write_text(text)
        set_aside(last)
    kept = {path.name: path.read_text() for path in tmp_path.iterdir()}
    assert kept == {"last-damaged.ckpt": "one", "last-damaged2.ckpt": "two", "last-damaged3.ckpt": "three"}


@pytest.mark.parametrize(("name", "text"), [
    ("config.yaml", "model: {}\nblock: {}\ndata: {}\noptim: {}\ntrainer: {}\n"),
    ("config.yaml", "model: {}\nblock: x\ndata: {}\noptim: {}\ntrainer: {}\nlogger: null\n"),
    ("config.yaml", "model: {7: 1}\nblock: {}\ndata: {}\noptim: {}\ntrainer: {}\nlogger: {}\n"),
    ("config.yaml", "model: {}\nblock: {positions: x}\ndata: {}\noptim: {}\ntrainer: {}\nlogger: {}\n"),
    ("result.json", "{}"), ("result.json", "[]"), ("result.json", '{"top1": "x", "top5": 1, "loss": null}')])
def test_files_of_another_shape_are_damaged(make_settings, tmp_path, name, text):
    groups = ("model", "block", "data", "optim", "trainer", "logger")
    (tmp_path / "config.yaml").write_text("".join(f"{group}: {{}}\n" for group in groups))
    (tmp_path / name).write_text(text)
    folder = RunFolder(tmp_path)
    with pytest.raises(ValueError, match=f"{name} is damaged: remove it"):
        folder.read_result() or folder.take_up(make_settings("model=resnet8", *TINY))
    assert (tmp_path / name).read_text() == text


def test_a_lock_of_another_kind(tmp_path):
    folder = RunFolder(tmp_path)
    for make in (lambda: folder.lock.write_bytes(b"\xff\xfe"), folder.lock.mkdir):
        make()
        with pytest.raises(ValueError, match="lock is of no run"), folder.alone():
            pass
        if folder.lock.is_file():
            folder.lock.unlink()


def test_an_error_of_somebody_elses_stays(make_settings, tmp_path):
    folder = RunFolder(tmp_path)
    folder.error.write_text("mine")
    folder.fail("error: ours")
    folder.begin(make_settings("model=resnet8", *TINY))
    assert folder.error.read_text() == "mine"
    folder.error.write_text("error: ours")
    folder.begin(make_settings("model=resnet8", *TINY))
    assert not folder.error.exists()
