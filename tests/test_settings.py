"""Every knob is checked; twins, groups and experiments compose."""

from pathlib import Path

import pytest
from hydra.errors import HydraException

from models import BACKBONES
from tests.conftest import ROOT

MODELS = [path.stem for path in Path(ROOT, "configs", "model").glob("*.yaml")]


@pytest.mark.parametrize(("override", "knob"), [
    ("trainer.max_epochs=abc", "trainer.max_epochs"), ("trainer.max_epoch=3", "max_epoch"), ("+trainer.max_epoch=3", "max_epoch"),
    ("+nonsense=1", "nonsense"), ("data.flip=perhaps", "data.flip"), ("trainer.limit_train_batches=many", "limit_train_batches"),
    ("model=resnet19", "resnet19"), ("block.name=dbbb", "did you mean dbb"), ("data.color_jitter=true", "data.color_jitter"),
    ("data.batch_size=0", "data.batch_size"), ("data.std=[0,1,1]", "data.std"), ("data.val_size=-1", "data.val_size"),
    ("data.image_size=-3", "data.image_size"),
    ("optim.label_smoothing=2", "label_smoothing"), ("seed=-1", "seed"), ("optim.warmup_epochs=-1", "warmup_epochs"),
    ("trainer.limit_train_batches=0", "limit_train_batches"),
    ("optim.name=sgdd", "did you mean sgd"),
    ("logger.name=wand", "did you mean wandb"), ("data.name=cifar11", "did you mean cifar10"), ("model=timm", "model.name")])
def test_wrong_settings_fail_at_once(make_settings, override, knob):
    with pytest.raises((ValueError, HydraException), match=knob.replace(".", r"\.")) as error:
        make_settings("data=digits", *([override] if override != "model=timm" else ["model=timm"]))
    assert knob in f"{error.value} {error.value.__cause__}"


def test_every_backbone_has_its_twin(make_settings):
    assert set(MODELS) == {*BACKBONES, *(f"{name}_dbb" for name in BACKBONES), "timm"}
    for name in BACKBONES:
        assert make_settings(f"model={name}") == make_settings(f"model={name}_dbb", "block=none")
        assert make_settings(f"model={name}_dbb") == make_settings(f"model={name}", "block=dbb")
        assert make_settings(f"model={name}_dbb", "block=acb").block.name == "acb"


@pytest.mark.parametrize("data", ["cifar10", "cifar100", "imagenet", "digits"])
def test_groups_compose(make_settings, data):
    settings = make_settings(f"data={data}", "debug=default", "logger=csv")
    assert settings.data.name == data
    assert settings.logger.name == "csv"
    assert settings.trainer.max_epochs < 100


def test_seed_zero_is_a_seed(make_settings):
    assert make_settings("seed=0").seed == 0


def test_normalisation_of_the_digits_is_theirs(make_settings):
    from training.data import ImageData
    settings = make_settings("data=digits")
    data = ImageData(settings.data, 0)
    data.load(train=True)
    pixels = data.train_set.images.double() / 255
    assert settings.data.mean[0] == pytest.approx(pixels.mean().item(), abs=5e-3)
    assert settings.data.std[0] == pytest.approx(pixels.std().item(), abs=5e-3)
