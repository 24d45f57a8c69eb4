"""Spatial gradient scaling in a run: when its masks change, what a checkpoint has of them, what is shown."""

from types import SimpleNamespace

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import nn

import train as train_script
from dbb import SpatialGradientScaling
from evaluation.evaluate import load_run
from models.checkpoint import load_checkpoint
from tests.helpers import TINY
from training import sgs


def masks(folder, name="last"):
    return load_checkpoint(folder / "checkpoints" / f"{name}.ckpt")["callbacks"]["ScaleGradients"]["masks"]


@pytest.mark.slow
def test_masks_of_a_run(make_settings, tmp_path, capsys):
    """Of ones for two epochs, then those of the weights that the epoch began with."""
    settings = make_settings("model=resnet8", "block=sgs", "block.sgs_every_n_epochs=2",
                             "block.exclude=[conv1]", *TINY[:-1], "trainer.max_epochs=3",
                             "logger=tensorboard", "data.on_device=true")
    assert train_script.train(settings, tmp_path)["predictions_changed"] == 0
    assert "block=sgs: the gradients of 6 convolutions are scaled, with masks from the end of epoch 2 on" in \
        capsys.readouterr().out
    assert all((mask == 1).all() for mask in masks(tmp_path, "last-previous").values())
    settings.ckpt = str(tmp_path / "checkpoints" / "last-previous.ckpt")
    net, data, _ = load_run(settings, train=True)
    wanted = SpatialGradientScaling(net, exclude=["conv1"])
    images = torch.cat(list(data.calibration_images(2 * settings.data.batch_size)))
    assert wanted.update(images) == {}
    found = masks(tmp_path)
    assert list(found) == list(wanted.masks)
    assert all(torch.equal(found[name], mask) for name, mask in wanted.masks.items())
    assert found["blocks.0.conv1"].argmax() == 4, "a pixel tells most of itself"
    shown = EventAccumulator(str(tmp_path)).Reload().Images("sgs/masks")
    assert [picture.step for picture in shown] == [2 * 8]


def test_a_layer_without_a_mask_is_named(make_settings, capsys):
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.used, self.spare = nn.Conv2d(3, 2, 3), nn.Conv2d(3, 2, 3)

        def forward(self, x):
            return self.used(x)

    class Data:
        def calibration_images(self, count):
            yield torch.zeros(count, 3, 8, 8)
    conf = make_settings("model=resnet8", "block=sgs", "block.sgs_every_n_epochs=1").block
    callback, module = sgs.ScaleGradients(conf, 4), SimpleNamespace(net=Net())
    alone = SimpleNamespace(broadcast=lambda masks: masks)
    trainer = SimpleNamespace(current_epoch=1, is_global_zero=True, datamodule=Data(), loggers=[],
                              global_step=5, strategy=alone)
    callback.on_train_start(trainer, module)
    callback.on_train_batch_start(trainer, module, None, 0)
    printed = capsys.readouterr().out
    assert "block=sgs: the gradient of spare is not scaled in epoch 2: no image reaches it" in printed
    assert "block=sgs: the gradient of used is not scaled in epoch 2: its input is constant" in printed


@pytest.mark.parametrize(("words", "message"), [
    (["block.branches=[kxk,1x1]"], "gradients of plain convolutions, and block.branches is of blocks"),
    (["block.mode=online"], "block.mode is of blocks"),
    (["trainer.strategy=fsdp"], "trainer.strategy=fsdp no process sees a whole gradient"),
    (["block.sgs_every_n_epochs=0"], "block.sgs_every_n_epochs=0 must be at least 1"),
    (["block.sgs_every_n_epochs=null", "block.sgs_batches=3"], "block.branches is empty")])
def test_what_cannot_be_is_a_sentence(make_settings, words, message):
    with pytest.raises(ValueError, match=message):
        make_settings("model=resnet8", "block=sgs", *words)


def test_a_recipe_with_knobs_of_blocks_takes_it(make_settings):
    assert make_settings("experiment=acnet_cifar10_wrn16_8", "block=sgs").block.sgs_every_n_epochs == 5


@pytest.mark.slow
def test_a_network_without_such_convolutions_is_refused(make_settings, tmp_path):
    settings = make_settings("model=resnet8", "block=sgs", "block.kernel_sizes=[5]", *TINY)
    with pytest.raises(ValueError, match="no gradient can be scaled: of 7 convolutions, none is a Conv2d"):
        train_script.train(settings, tmp_path)
    assert not (tmp_path / "config.yaml").exists()


def test_masks_of_a_stranger(make_settings):
    conf = make_settings("model=resnet8", "block=sgs", "block.sgs_every_n_epochs=1").block
    callback, module = sgs.ScaleGradients(conf, 4), SimpleNamespace(net=nn.Sequential(nn.Conv2d(3, 2, 3)))
    callback.load_state_dict({"epoch": 1, "masks": {"0": torch.ones(2, 2)}})
    with pytest.raises(ValueError, match=r"the mask of 0 is \[2, 2\], which is not the size of its kernel"):
        callback.on_train_start(None, module)
    callback.load_state_dict({"epoch": 1, "masks": {"of another network": torch.ones(2, 2, 2)}})
    callback.on_train_start(None, module)
    assert list(callback.scaling.masks) == ["0"]
