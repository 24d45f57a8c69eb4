"""Sweeps that go on, jobs that are put back into the queue, and several processes: the same run, once."""

import json
import os
import signal
import subprocess
import sys
import time
from types import SimpleNamespace

import cloudpickle
import pandas as pd
import pytest
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import OmegaConf
from pytorch_lightning.utilities.exceptions import SIGTERMException

import convert as convert_script
import train as train_script
from models.checkpoint import load_checkpoint, place_of
from runs.folder import FolderTakenError, RunFolder
from runs.same import as_begun, of_the_training
from settings.cli import plain_errors
from tests.helpers import ROOT, TINY, call, relative_error, run
from training.module import Classifier, learning_rate

pytestmark = pytest.mark.slow

SCRIPT = """
import sys
from pathlib import Path
sys.path.insert(0, {root!r})
import {patch}
script = Path({root!r}, "train.py")
exec(compile(script.read_text(), str(script), "exec"))  # under this file's name: a second process starts it
"""
FROZEN = """
import os, signal
from torch import nn
from training.module import Classifier
def frozen(self, batch, batch_idx):
    for module in self.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eval()
    if "STOP" in os.environ and self.global_rank == 0 and batch_idx == 2:
        os.kill(os.getpid(), signal.SIGTERM)
Classifier.on_train_batch_start = frozen
"""
NO_MEMORY = """
import dbb, training.module
start = training.module.start_network
def full(settings, *rest):
    if settings.seed == 1 and settings.model.name == "resnet8":
        raise RuntimeError("out of memory")
    return start(settings, *rest)
training.module.start_network = full
"""


def test_a_sweep_goes_on_where_it_stopped(tmp_path):
    """Of two networks, one cannot take these images; one seed meets a full memory; then again, and more."""
    (tmp_path / "full.py").write_text(NO_MEMORY)
    (tmp_path / "script.py").write_text(SCRIPT.format(root=ROOT, patch="full"))
    command = ["-m", "data=digits", "data.max_images=64", "data.batch_size=32", "trainer.max_epochs=1",
               "logger=csv", "out=sweep"]
    done = run(tmp_path / "script.py", *command, "model=resnet8,vgg16", "seed=0,1", cwd=tmp_path)
    assert done.returncode == 1
    assert "error: 3 jobs failed" in done.stderr
    assert "vgg16 cannot take images of 8 pixels" in done.stderr
    errors = {path.parent.name: path.read_text() for path in tmp_path.glob("sweep/*/error.txt")}
    names = [f"data.batch_size-32+data.max_images-64+data-digits+model-{job}+trainer.max_epochs-1"
             for job in ("resnet8+seed-1", "vgg16+seed-0", "vgg16+seed-1")]
    assert sorted(errors) == names, "settings, sorted; not those of the logger"
    assert errors[names[0]] == "error: RuntimeError: out of memory\n"
    printed = call("report.py", "sweep", "--out", "report", cwd=tmp_path).stdout
    assert "| all runs | 1 | 1 |" in printed
    assert "3 of 4 runs" in printed
    assert f"{names[0]}`: error: RuntimeError: out of memory" in printed
    results = {path: path.stat().st_mtime_ns for path in tmp_path.glob("sweep/*/result.json")}
    assert len(results) == 1
    done = call("train.py", *command, "model=resnet8", "block=none,dbb", "seed=1,0", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr
    results_now = list(tmp_path.glob("sweep/*/result.json"))
    assert len(results_now) == 5, "block=none is said now: two jobs of their own"
    assert all(path.stat().st_mtime_ns == when for path, when in results.items())
    again = call("train.py", *command, "model=resnet8", "block=none,dbb", "seed=0", "data.num_workers=1",
                 cwd=tmp_path)
    assert again.stdout.count("is finished: test top1") == 2
    assert again.returncode == 0

    twins = [str(path) for path in tmp_path.glob("sweep/*") if "block" in path.name]
    printed = call("report.py", *twins, "--out", "report", cwd=tmp_path).stdout
    assert "| dbb | 2 | 1 |" in printed
    written = {path.name for path in (tmp_path / "report").iterdir()}
    assert written == {"variants.csv", "curves.png", "epochs.csv", "report.md", "runs.csv"}
    variants = pd.read_csv(tmp_path / "report" / "variants.csv").set_index("variant")
    results = tmp_path.glob("sweep/*block-dbb*/result.json")
    one, two = (json.loads(path.read_text())["top1"] for path in results)
    assert variants.loc["dbb", "top1"] == pytest.approx(50 * (one + two), rel=1e-4)  # written with six digits
    assert variants.loc["dbb", "predictions_changed"] == 0
    done = call("report.py", "sweep", "--out", "report", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "ended exactly as" in done.stdout, "with block=none said and unsaid"


def test_a_sweep_can_be_sent_to_other_processes():
    """The joblib and submitit launchers pickle the script's function.

    `data.classes` once took torch.classes along, which cannot be pickled.
    """
    cloudpickle.register_pickle_by_value(train_script)
    try:
        cloudpickle.dumps(train_script.main.__wrapped__)
    finally:
        cloudpickle.unregister_pickle_by_value(train_script)


def test_a_folder_is_gone_on_with_only_by_its_own_run(make_settings, tmp_path):
    settings = ("model=resnet8", *TINY, "data.max_images=64", "data.batch_size=32")
    first = train_script.train(make_settings(*settings), tmp_path)
    assert train_script.train(make_settings(*settings, "logger.tags=[again]"), tmp_path) == first
    with pytest.raises(ValueError, match="already holds a run with another optim.lr"):
        train_script.train(make_settings(*settings, "optim.lr=0.3"), tmp_path)
    with pytest.raises(ValueError, match="already holds a run with another seed"):
        train_script.train(make_settings(*settings, "seed=1"), tmp_path)
    (tmp_path / "checkpoints").rename(tmp_path / "away")  # for want of space
    assert train_script.train(make_settings(*settings), tmp_path) == first
    with pytest.raises(ValueError, match="another optim.lr: choose another folder with out=DIR$"):
        train_script.train(make_settings(*settings, "optim.lr=0.3"), tmp_path)
    (tmp_path / "away").rename(tmp_path / "checkpoints")
    (tmp_path / "result.json").unlink()  # stopped in its last evaluation
    (tmp_path / "error.txt").write_text("error: it was full\n")
    assert train_script.train(make_settings(*settings), tmp_path) == first
    assert not (tmp_path / "error.txt").exists()

    weights = (tmp_path / "checkpoints" / "last.ckpt").read_bytes()
    for name in ("result.json", "config.yaml"):
        (tmp_path / name).write_text((tmp_path / name).read_text()[:-40] + '"{')
        with pytest.raises(ValueError, match=f"{name} is damaged: remove it"):
            train_script.train(make_settings(*settings), tmp_path)
        (tmp_path / name).unlink()
    with pytest.raises(ValueError, match="go on with that run by ckpt="):
        train_script.train(make_settings(*settings), tmp_path)
    assert (tmp_path / "checkpoints" / "last.ckpt").read_bytes() == weights, "nothing is lost"


def test_a_run_from_before_a_knob_of_the_data_is_the_same_run(make_settings, tmp_path):
    settings = make_settings("model=resnet8", *TINY)
    old = OmegaConf.create(as_begun(settings, None).stored() | {"logger": {"id": "abc"}})
    for knob in ("interpolation", "crop_pct"):
        del old.data[knob]
    OmegaConf.save(old, tmp_path / "config.yaml")
    (tmp_path / "result.json").write_text("{}")
    assert RunFolder(tmp_path).take_up(settings).logger.id == "abc"
    settings.data.interpolation = "bicubic"
    with pytest.raises(ValueError, match="already holds a run with another data.interpolation"):
        RunFolder(tmp_path).take_up(settings)


def test_a_checkpoint_gone_on_with_elsewhere_is_another_run(make_settings, tmp_path):
    settings = ("model=resnet8", *TINY, "data.max_images=64", "data.batch_size=32")
    train_script.train(make_settings(*settings), tmp_path / "one")
    more = (f"ckpt={tmp_path}/one/checkpoints/last.ckpt", "optim.lr=0.01", "trainer.max_epochs=2")
    train_script.train(make_settings(*more), tmp_path / "two")
    ids = {OmegaConf.load(tmp_path / name / "config.yaml").logger.id for name in ("one", "two")}
    assert len(ids) == 2, "each its own run of W&B"
    changed = ["optim.lr: 0.02 until epoch 1, then 0.01", "trainer.max_epochs: 1 until epoch 1, then 2"]
    assert json.loads((tmp_path / "two" / "result.json").read_text())["changed"] == changed
    (tmp_path / "two" / "result.json").unlink()
    train_script.train(make_settings(f"ckpt={tmp_path}/two/checkpoints/last.ckpt"), tmp_path / "two")
    result = json.loads((tmp_path / "two" / "result.json").read_text())
    assert result["changed"] == changed, "once more, nothing new"
    assert "changed" not in json.loads((tmp_path / "one" / "result.json").read_text())


def test_a_job_of_a_sweep_starts_no_processes(make_settings, tmp_path, monkeypatch):
    monkeypatch.setattr(HydraConfig, "initialized", lambda: True)
    monkeypatch.setattr(HydraConfig, "get", lambda: SimpleNamespace(mode=RunMode.MULTIRUN))
    settings = make_settings("model=resnet8", *TINY, "trainer.accelerator=cpu", "trainer.devices=2")
    again = "trainer.devices=2: each of the 2 processes of this job would start the whole sweep again"
    with pytest.raises(ValueError, match=again):
        train_script.train(settings, tmp_path)
    assert not (tmp_path / "config.yaml").exists()


@pytest.mark.parametrize("strategy", ["ddp_spawn", "ddp_fork", "ddp_notebook"])
def test_processes_that_lose_what_they_measure_are_refused(make_settings, tmp_path, strategy):
    settings = make_settings("model=resnet8", *TINY, "trainer.accelerator=cpu", "trainer.devices=2",
                             f"trainer.strategy={strategy}", "data=folder", f"data.root={tmp_path}/nowhere")
    with pytest.raises(ValueError, match=f"trainer.strategy={strategy}: .*take trainer.strategy=ddp"):
        train_script.train(settings, tmp_path)  # before it looks for the data
    assert not (tmp_path / "config.yaml").exists()


def test_the_place_of_known_images_is_not_of_the_training(make_settings):
    def of(data, root):
        return of_the_training(make_settings(f"data={data}", f"data.root={root}").stored())
    assert of("cifar10", "/a") == of("cifar10", "/b")
    assert of("folder", "/a") != of("folder", "/b")


def test_what_a_sweeper_gets_is_of_the_checkpoint(make_settings, tmp_path):
    """Held-out accuracy of the last epoch, also where that epoch was not validated."""
    settings = make_settings("model=resnet8_dbb", *TINY, "data.max_images=64", "data.batch_size=32",
                             "data.val_size=40", "trainer.max_epochs=2", "trainer.check_val_every_n_epoch=2")
    result = train_script.train(settings, tmp_path / "one")
    metrics = pd.read_csv(tmp_path / "one" / "metrics.csv")
    assert metrics["val/top1"].dropna().tolist() == pytest.approx([result["val_top1"]])
    settings.trainer.check_val_every_n_epoch = 3
    assert train_script.train(settings, tmp_path / "two")["val_top1"] == result["val_top1"]


def test_a_key_that_is_a_number(make_settings, tmp_path):
    """In config.yaml, as somebody may have written it."""
    folder, command = RunFolder(tmp_path), make_settings("model=resnet8", *TINY, "block.init=mean")
    folder.begin(command)
    with folder.config.open("a") as file:
        file.write("7: 1\nmore:\n  5: 1\n")
    assert folder.take_up(command).ckpt is None


def test_one_process_trains_in_a_folder(tmp_path):
    folder = RunFolder(tmp_path)
    taken = pytest.raises(FolderTakenError, match="another process is training in")
    with folder.alone():
        written = folder.lock.stat().st_mtime_ns
        with taken, RunFolder(tmp_path).alone():
            pass
        assert folder.lock.stat().st_mtime_ns == written, "the one that is refused changes nothing"
        folder.refuse_taken()
    with folder.alone():
        pass


def test_a_finished_run_that_one_may_not_write_to(make_settings, tmp_path, monkeypatch):
    """It is finished all the same; and what cannot be written does not hide why a run failed."""
    def forbidden(*args, **kwargs):
        raise PermissionError(13, "Permission denied")
    folder = RunFolder(tmp_path)
    command = make_settings("model=resnet8", "data=digits", "logger=csv", "block.init=mean")
    folder.begin(command)
    folder.finish({"top1": 0.5, "top5": 0.9, "loss": 1.0})
    monkeypatch.setattr("runs.folder.write_text", forbidden)
    monkeypatch.setattr("runs.folder.FileLock.acquire", forbidden)
    with folder.alone():
        assert train_script.train(command, tmp_path)["top1"] == 0.5
    folder.fail("error: something")
    folder.result.unlink()
    with pytest.raises(ValueError, match="cannot write into"), folder.alone():
        pass


def test_a_run_that_is_told_to_stop_does_not_look_finished():
    with pytest.raises(SystemExit) as stop, plain_errors():
        raise SIGTERMException
    assert stop.value.code == 143


def test_a_job_put_back_into_the_queue_is_the_same_run(tmp_path):
    """A stand-in for SLURM: environment variables, a signal, and an scontrol that records its arguments."""
    scontrol = tmp_path / "bin" / "scontrol"
    scontrol.parent.mkdir()
    scontrol.write_text(f"#!/bin/sh\necho $@ > {tmp_path}/asked\n")
    scontrol.chmod(0o755)
    slurm = {"JOB_ID": "4242", "JOB_NAME": "train", "NTASKS": "1", "PROCID": "0", "LOCALID": "0",
             "NODEID": "0", "NODELIST": "localhost"}
    env = os.environ | {f"SLURM_{name}": value for name, value in slurm.items()} | {
        "OMP_NUM_THREADS": "1", "WANDB_MODE": "offline", "PATH": f"{scontrol.parent}:{os.environ['PATH']}"}
    command = [sys.executable, os.path.join(ROOT, "train.py"), "trainer=slurm", "trainer.accelerator=cpu",
               "trainer.devices=1", "trainer.max_epochs=12", "optim.lr=0.01",
               "model=resnet8", "data=digits", "data.max_images=320", "data.batch_size=16"]
    folder = tmp_path / "outputs" / "slurm-4242"
    folder.mkdir(parents=True)
    (folder / "hpc_ckpt_1.ckpt").write_text("of a job that was stopped within its first epoch")
    with (tmp_path / "log").open("w") as log:
        job = subprocess.Popen(command, cwd=tmp_path, env=env, stdout=log, stderr=log)
        while not (folder / "checkpoints" / "last.ckpt").exists() and job.poll() is None:
            time.sleep(0.1)
        job.send_signal(signal.SIGUSR1)
        while not (tmp_path / "asked").exists() and job.poll() is None:
            time.sleep(0.1)
        assert job.wait(60) == 128 + signal.SIGUSR1
    assert "stopped by SIGUSR1 " in (tmp_path / "log").read_text()
    assert (tmp_path / "asked").read_text() == "requeue 4242\n", (tmp_path / "log").read_text()[-2000:]
    assert not (folder / "result.json").exists()
    again = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=300)
    assert again.returncode == 0, again.stderr[-2000:]
    assert "epoch 1/12" not in again.stdout
    assert "epoch 12/12" in again.stdout
    assert (folder / "result.json").exists()
    assert (folder / "hpc_ckpt_1.ckpt").exists(), "which Lightning would have tried to go on from"
    runs = {path.name.split("-")[-1] for path in (folder / "wandb").glob("offline-run-*")}
    assert len(runs) == 1, "two sessions of one W&B run"
    assert [path.name for path in (tmp_path / "outputs").iterdir()] == ["slurm-4242"]


def test_two_processes_train_as_one_with_the_joined_batch(make_settings, tmp_path, monkeypatch):
    """With SGD and frozen norms: the same weights, also where one of them was told to stop after a step.

    Each test image is counted once; there is one folder and one W&B run, and it converts.
    """
    (tmp_path / "frozen.py").write_text(FROZEN)
    options = ["model=resnet8_dbb", "data=digits", "optim.lr=0.002",
               "trainer.max_epochs=1", "trainer.limit_train_batches=6", "trainer.accelerator=cpu",
               "trainer.precision=64-true"]  # in float32, sums that nearly cancel differ by 1e-4
    script = tmp_path / "script.py"
    script.write_text(SCRIPT.format(root=ROOT, patch="frozen"))
    two = (script, *options, "trainer.devices=2", "trainer.strategy=ddp", "out=two")
    stopped = run(*two, cwd=tmp_path, env={"WANDB_MODE": "offline", "STOP": "1"})
    assert stopped.returncode == 143
    assert place_of(load_checkpoint(tmp_path / "two" / "checkpoints" / "last.ckpt")) == (0, 3)
    done = run(*two, cwd=tmp_path, env={"WANDB_MODE": "offline"})
    assert done.returncode == 0, done.stderr[-3000:]
    monkeypatch.setattr(Classifier, "on_train_batch_start", Classifier.on_train_batch_start)  # to put it back
    exec(FROZEN, {})
    train_script.train(make_settings(*options, "trainer.devices=1", "logger=csv"), tmp_path / "one")
    one, two = (load_checkpoint(tmp_path / name / "checkpoints" / "last.ckpt")["state_dict"]
                for name in ("one", "two"))
    for key in one:
        assert relative_error(two[key], one[key]) < 1e-10, key

    assert json.loads((tmp_path / "two" / "result.json").read_text())["processes"] == 2
    metrics = pd.read_csv(tmp_path / "two" / "metrics.csv")
    in_training, at_the_end = (metrics[name].dropna().tolist() for name in ("test/top1", "final/top1"))
    assert in_training == pytest.approx(at_the_end, abs=1e-6)
    runs = {path.name.split("-")[-1] for path in (tmp_path / "two" / "wandb").glob("offline-run-*")}
    assert len(runs) == 1
    ours = {"frozen.py", "script.py", "__pycache__"}
    assert {path.name for path in tmp_path.iterdir()} - ours == {"one", "two"}
    settings = make_settings(f"ckpt={tmp_path}/two/checkpoints/last.ckpt", "export=[]", config_name="convert")
    assert convert_script.convert(settings, tmp_path / "converted")["predictions_changed"] == 0


def test_the_learning_rate_follows_the_batch(make_settings):
    def rate(*overrides):
        return learning_rate(make_settings(*overrides))
    as_it_stands = rate("optim.lr=0.3", "data.batch_size=512")
    assert as_it_stands == pytest.approx(0.3), "unless a batch is named"
    resnet18, on_16_devices = "experiment=dbb_imagenet_resnet18", ("trainer.devices=8", "trainer.num_nodes=2")
    assert rate(resnet18) == pytest.approx(0.1)
    assert rate(resnet18, "data.batch_size=1024") == pytest.approx(0.4)
    assert rate(resnet18, "trainer.accumulate_grad_batches=2") == pytest.approx(0.2)
    assert rate("experiment=modern_imagenet", "data.batch_size=256") == pytest.approx(0.125)
    assert rate(resnet18, "trainer=ddp", *on_16_devices) == pytest.approx(0.1)
