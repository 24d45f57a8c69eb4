"""A run's checkpoint, changed by somebody who means harm, or damaged."""

import zipfile
from collections import OrderedDict

import pytest
import torch

from evaluation.evaluate import data_of
from models import limits
from models.checkpoint import load_checkpoint
from tests.helpers import TINY, call

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """The folder of a run."""
    folder = tmp_path_factory.mktemp("run")
    assert call("train.py", "model=resnet8_dbb", *TINY, "out=run", cwd=folder).returncode == 0
    return folder / "run"


def changed(run, file, change):
    """The run's checkpoint, changed, as a file."""
    checkpoint = torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)
    change(checkpoint)
    torch.save(checkpoint, file)
    return file


@pytest.mark.parametrize("script", ["eval.py", "convert.py", "train.py"])
def test_a_file_learns_no_secret(run, tmp_path, monkeypatch, script):
    monkeypatch.setenv("SECRET", "of mine")
    for text in ("${oc.env:SECRET}", "${slurm_job:}"):
        file = changed(run, tmp_path / "a.ckpt",
                       lambda c, text=text: c["dbb"]["settings"]["logger"].update(project=text))
        done = call(script, f"ckpt={file}", "trainer.max_epochs=2", cwd=tmp_path)
        assert done.returncode == 1
        assert "was not written by train.py" in done.stderr
        assert "of mine" not in done.stdout + done.stderr
        assert [path.name for path in tmp_path.iterdir()] == ["a.ckpt"]


@pytest.mark.parametrize("data", ["cifar10", "cifar100"])
def test_a_file_makes_no_folder_and_downloads_nothing(run, tmp_path, data):
    def elsewhere(checkpoint):
        checkpoint["dbb"]["settings"]["data"].update(name=data, root=str(tmp_path / "new"), image_size=None)
    file = changed(run, tmp_path / "a.ckpt", elsewhere)
    done = call("eval.py", f"ckpt={file}", cwd=tmp_path)
    assert done.returncode == 1
    assert "say data.download=true" in done.stderr
    assert not (tmp_path / "new").exists()


def nested(depth):
    return [nested(depth - 1)] if depth else []


def many_times():
    """A small list that names its parts 10 ** 14 times."""
    found = ["x"] * 10
    for _ in range(14):
        found = [found] * 10
    return found


def in_itself():
    found = []
    found.append(found)
    return found


def averaged(checkpoint, steps, last=0, **more):
    """As of a run with an average of the weights, which says of so many steps."""
    checkpoint["dbb"]["settings"]["optim"].update(ema_decay=0.9)
    checkpoint["averaging_state"] = {"n_averaged": steps} | more
    checkpoint["current_model_state"] = checkpoint["state_dict"]
    checkpoint["callbacks"].update(EMAWeightAveraging={"latest_update_step": last})


def scaled(checkpoint, **state):
    """As of a run with scaled gradients."""
    checkpoint["dbb"]["settings"]["block"].update(sgs_every_n_epochs=1)
    checkpoint["callbacks"].update(ScaleGradients={"epoch": 0, "masks": {}} | state)


@pytest.mark.parametrize("change", [
    lambda c: c["dbb"].update(classes=["x"] * (limits.CLASSES + 1)), lambda c: c["dbb"].update(classes=[]),
    lambda c: c["dbb"].update(classes=[1, 2]), lambda c: c["dbb"].update(classes="ten"),
    lambda c: c["dbb"].update(image_size=6000), lambda c: c["dbb"].update(image_size="8"),
    lambda c: c["dbb"].update(settings=[]), lambda c: c.update(dbb=[]), lambda c: c.update(state_dict=[1]),
    lambda c: c["state_dict"].update(a="b"), lambda c: c["dbb"].pop("classes"),
    lambda c: c["state_dict"].update(big=torch.zeros(1).expand(10**9)),
    lambda c: c["dbb"]["settings"]["model"].update(name="vit_7b_patch16_dinov3"),
    lambda c: c["dbb"]["settings"]["model"].update(name=["resnet8"]),
    lambda c: c["dbb"]["settings"].update(model=None), lambda c: c["dbb"]["settings"].update(seed="x"),
    lambda c: c["dbb"]["settings"].update(more=1), lambda c: c["dbb"].update(place="abc"),
    lambda c: c["dbb"].update(images=[1] * 99), lambda c: c["dbb"].update(changed=5),
    lambda c: c["state_dict"].update({5: torch.zeros(1)}), lambda c: c["dbb"].update(place=(0, -5)),
    lambda c: c["callbacks"].update(EpochLoss={}), lambda c: c["dbb"]["settings"].pop("trainer"),
    lambda c: c["dbb"]["settings"]["logger"].update(tags=nested(150)),
    lambda c: c["optimizer_states"][0]["state"].update(more=[torch.ones(10**6)] * 99),
    lambda c: c["dbb"]["settings"]["logger"].update(tags=many_times()), lambda c: c.update(more=in_itself()),
    lambda c: c.update(more=torch.zeros(3, device="meta")), lambda c: c.update(more=torch.eye(3).to_sparse()),
    lambda c: c["dbb"]["settings"]["block"].update(branches=["kxk"] * 3000),
    lambda c: c["dbb"]["settings"]["block"].update(kernel_sizes=[3] * 100_000),
    lambda c: (c["dbb"]["settings"]["model"].update(name="resnet18"),
               c["state_dict"].update(a=torch.zeros(10**7, dtype=torch.uint8))),
    lambda c: c["dbb"]["settings"]["data"].update(image_size=2048),
    lambda c: (c["dbb"]["settings"]["model"].update(name="eva_giant_patch14_224"), c["state_dict"].update(
        {f"net.{i}": c["state_dict"]["net.fc.weight"] for i in range(10**5)})),
    lambda c: c["optimizer_states"][0].update(more=torch.zeros(1).expand(10**9)), lambda c: c.pop("epoch"),
    lambda c: c["loops"]["fit_loop"]["epoch_progress"]["total"].update(ready="x"),
    lambda c: c["callbacks"].update(Timer={"time_elapsed": {"train": []}}),
    lambda c: c.update(epoch="x"), lambda c: c.update(loops="x"), lambda c: c.pop("optimizer_states"),
    lambda c: c.update(current_model_state=3),
    lambda c: (c.update(epoch=-3), c["dbb"].pop("place", None)),
    lambda c: c["dbb"]["settings"]["data"].update(image_size=torch.zeros(2)),
    lambda c: c["callbacks"].update(Timer={"time_elapsed": {"train": 2**52}}),
    lambda c: c["callbacks"]["EpochLoss"].update(count=10**400),
    lambda c: (c["callbacks"].pop("EpochLoss"), c["dbb"].update(place=(0, 1))),
    lambda c: (c["callbacks"]["EpochLoss"].update(count=77), c["dbb"].update(place=(0, 1))),
    lambda c: c.update({"pytorch-lightning_version": "1.6.0"}),
    lambda c: c.update({"pytorch-lightning_version": 2.6}),
    lambda c: c["dbb"].update(image_digest=torch.ones(1)),
    lambda c: c["dbb"].update(weights_digest="a" * 3_000_000),
    lambda c: c.update(current_model_state=c["state_dict"]),
    lambda c: c["callbacks"].update(ScaleGradients={"epoch": 0, "masks": {}}),
    lambda c: c["dbb"]["settings"]["block"].update(sgs_every_n_epochs=1),
    lambda c: scaled(c, epoch=torch.ones(2)), lambda c: scaled(c, masks={"a": torch.ones(3, 3).int()}),
    lambda c: scaled(c, masks=[("a", torch.ones(3, 3))]), lambda c: averaged(c, torch.tensor(-5)),
    lambda c: averaged(c, torch.tensor(10**9)), lambda c: averaged(c, torch.tensor(1j)),
    lambda c: averaged(c, torch.tensor(0.5)), lambda c: averaged(c, "x"),
    lambda c: averaged(c, torch.tensor(0), last=10**9), lambda c: averaged(c, torch.tensor(0), more=1),
    lambda c: (averaged(c, torch.tensor(0)), c.pop("current_model_state")),
    lambda c: c["dbb"].update(place=(50, 0)), lambda c: c["dbb"].update(processes=1.5),
    lambda c: c.update({"pytorch-lightning_version": "banana"}),
    lambda c: c.update({"pytorch-lightning_version": "1." + "9" * 5000}),
    lambda c: c.update({"pytorch-lightning_version": "1.5_..+"}),
    lambda c: c["loops"]["fit_loop"]["epoch_progress"]["total"].update(ready=1.5),
    lambda c: c["dbb"]["settings"].update(logger="x"), lambda c: c["dbb"].update(changed=["x" * 10**6]),
    lambda c: c["dbb"]["settings"]["trainer"].update(gradient_clip_val=10**400),
    lambda c: c["dbb"]["settings"]["data"].update(std=[5e-324] * 3),
    lambda c: c["state_dict"].update({"net.fc.bias": torch.full((10,), 1e300, dtype=torch.float64)})])
def test_checkpoints_of_other_forms(run, tmp_path, change):
    done = call("eval.py", f"ckpt={changed(run, tmp_path / 'a.ckpt', change)}", cwd=tmp_path)
    assert done.returncode == 1
    assert "error: " in done.stderr
    assert "Traceback" not in done.stderr


def test_what_these_differ_from(run, tmp_path):
    for change in (scaled, lambda c: averaged(c, torch.tensor(0))):
        load_checkpoint(changed(run, tmp_path / "a.ckpt", change))


@pytest.mark.parametrize(("change", "message"), [
    ({"name": "folder", "crop_padding": 0, "crop_pct": 0.0}, "data.crop_pct=0.0 must be at least"),
    ({"std": [0.0, 1.0, 1.0]}, "data.mean and data.std need three numbers"),
    ({"mean": [[1], 2, 3]}, "data.mean")])
def test_data_that_are_shown_but_not_loaded(run, tmp_path, change, message):
    """With `data=none` a conversion still says how the network's images are prepared."""
    file = changed(run, tmp_path / "a.ckpt", lambda c: c["dbb"]["settings"]["data"].update(change))
    with pytest.raises(ValueError, match=message):
        data_of(load_checkpoint(file))


def assigned(checkpoint):
    """Weights of half precision, by whose attribute PyTorch would put them in the place of the network's."""
    weights = OrderedDict((key, value.half() if value.is_floating_point() else value)
                          for key, value in checkpoint["state_dict"].items())
    weights._metadata = {key.rpartition(".")[0]: {"version": 2, "assign_to_params_buffers": True}
                         for key in weights}
    checkpoint["state_dict"] = weights


def test_weights_that_would_take_the_place_of_the_networks(run, tmp_path):
    """They are copied into it, and training goes on in its own precision."""
    file = changed(run, tmp_path / "a.ckpt", assigned)
    done = call("train.py", f"ckpt={file}", "trainer.max_epochs=2", "out=on", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    weights = load_checkpoint(tmp_path / "on" / "checkpoints" / "last.ckpt")["state_dict"]
    assert {value.dtype for value in weights.values()} == {torch.float32, torch.int64}


def of_adam(checkpoint):
    """A state of Adam's, after minus one step, which it would divide by."""
    checkpoint["dbb"]["settings"]["optim"]["name"] = "adam"
    [state] = checkpoint["optimizer_states"]
    for buffers in state["state"].values():
        zeros = torch.zeros_like(buffers.pop("momentum_buffer"))
        buffers.update(step=torch.tensor(-1.0), exp_avg=zeros, exp_avg_sq=zeros.clone())
    for group in state["param_groups"]:
        group.update(betas=(0.9, 0.999), eps=1e-8, amsgrad=False)


OF_TRAINING = "the state of its training is of another form"
OF_OPTIMISER = "its optimiser has another state"


@pytest.mark.parametrize(("change", "message"), [
    (lambda c: c["loops"].update(fit_loop=1), OF_TRAINING),
    (lambda c: c["dbb"]["settings"]["optim"].update(momentum="0.9"), OF_OPTIMISER),
    (lambda c: c["optimizer_states"][0].clear(), OF_OPTIMISER),
    (lambda c: c["optimizer_states"][0]["state"][0].update(momentum_buffer=torch.zeros(7)), OF_OPTIMISER),
    (of_adam, OF_OPTIMISER),
])
def test_a_state_of_the_training_of_another_form(run, tmp_path, change, message):
    file = changed(run, tmp_path / "a.ckpt", change)
    done = call("train.py", f"ckpt={file}", "trainer.max_epochs=2", "out=on", cwd=tmp_path)
    assert done.returncode == 1
    assert f"cannot be gone on from: {message}" in done.stderr
    assert "Traceback" not in done.stderr


def test_epochs_are_counted_from_where_the_checkpoint_stands(run, tmp_path):
    """Lightning would go by its own counts, and pass over epochs, or repeat one, without a word."""
    counts = dict.fromkeys(("ready", "started", "processed", "completed"), 3)
    for name, change in {"further": lambda loop: loop["epoch_progress"]["current"].update(counts),
                         "none": lambda loop: loop.pop("epoch_progress")}.items():
        file = changed(run, tmp_path / "a.ckpt", lambda c, change=change: change(c["loops"]["fit_loop"]))
        done = call("train.py", f"ckpt={file}", "trainer.max_epochs=3", f"out={name}", cwd=tmp_path)
        assert done.returncode == 0, done.stderr
        assert [line[:9] for line in done.stdout.splitlines() if line.startswith("epoch ")] == \
            ["epoch 2/3", "epoch 3/3"]
    file = changed(run, tmp_path / "a.ckpt", lambda c: (c["dbb"].update(place=(0, 2**31 - 1)),
                                                       c["callbacks"]["EpochLoss"].update(count=2**31 - 1)))
    done = call("train.py", f"ckpt={file}", "trainer.max_epochs=3", "out=c", cwd=tmp_path)
    assert "it stands after 2147483647 batches of an epoch, and has counted" in done.stderr


def test_tensors_in_one_memory_are_taken_apart(run, tmp_path):
    """Each step of one parameter would change the momentum of all others."""
    def share(checkpoint):
        memory = torch.zeros(10**5)
        for buffers in checkpoint["optimizer_states"][0]["state"].values():
            shape, stride = buffers["momentum_buffer"].shape, buffers["momentum_buffer"].stride()
            buffers["momentum_buffer"] = memory.as_strided(shape, stride)
    file = changed(run, tmp_path / "a.ckpt", share)
    done = call("train.py", f"ckpt={file}", "trainer.max_epochs=2", "out=on", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    [state] = torch.load(tmp_path / "on" / "checkpoints" / "last.ckpt", weights_only=True)["optimizer_states"]
    buffers = [of["momentum_buffer"] for of in state["state"].values()]
    assert len({buffer.untyped_storage().data_ptr() for buffer in buffers}) == len(buffers)


def test_a_schedule_takes_nothing_from_a_file(run, tmp_path):
    """Any name in its state would become an attribute; where it stands is known without it."""
    odd = {"step": None, "optimizer": None, "_step_count": "x"}
    file = changed(run, tmp_path / "a.ckpt", lambda c: c["lr_schedulers"][0].update(odd))
    done = call("train.py", f"ckpt={file}", "trainer.max_epochs=2", "out=on", cwd=tmp_path)
    assert done.returncode == 0, done.stderr


def test_what_a_file_may_not_choose(run, tmp_path):
    """To whom W&B sends, and how many processes load images."""
    def choose(checkpoint):
        checkpoint["dbb"]["settings"]["logger"].update(entity="somebody")
        checkpoint["dbb"]["settings"]["data"].update(num_workers=300, root="x\x1b[2J\nforged")
    file = changed(run, tmp_path / "a.ckpt", choose)
    done = call("eval.py", f"ckpt={file}", "data.root=null", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "logger.entity=somebody is the checkpoint's, and not taken from it" in done.stdout
    assert "\x1b" not in done.stdout
    assert "\nforged" not in done.stdout


def test_a_compressed_checkpoint_is_not_unpacked(run, tmp_path):
    with zipfile.ZipFile(run / "checkpoints" / "last.ckpt") as source, \
            zipfile.ZipFile(tmp_path / "a.ckpt", "w", zipfile.ZIP_DEFLATED) as target:
        for name in source.namelist():
            target.writestr(name, source.read(name))
    with pytest.raises(ValueError, match="it is compressed"):
        load_checkpoint(tmp_path / "a.ckpt")
