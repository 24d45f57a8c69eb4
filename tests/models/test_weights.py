"""Weights from elsewhere: which of a file are taken, of which network, and how their images were prepared."""

import json
from argparse import Namespace
from functools import partial

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from timm.utils import CheckpointSaver, ModelEmaV3, NativeScaler
from torch.optim.lr_scheduler import LinearLR, MultiStepLR, SequentialLR

import convert as convert_script
import eval as eval_script
import train as train_script
from evaluation.networks import build_network, load_published, start_network
from evaluation.networks import load_network as load_of_run
from export.files import load_network, save_network
from images.data import ImageData
from models import build_model
from models.checkpoint import load_checkpoint
from models.reading import read_weights
from predict import prepare
from tests.helpers import TINY, Stranger, randomize, relative_error, write_tree
from tests.models.published_networks import image, published_model

pytestmark = pytest.mark.slow

TEN = list("0123456789")


def of_timms_script(folder, net, average):
    """The file of timm's train.py: its own writer, with a scaler, averaged weights and the command line."""
    ema = ModelEmaV3(net)
    ema.module.load_state_dict(average.state_dict())
    optimizer = torch.optim.SGD(net.parameters(), 0.1, momentum=0.9)
    saver = CheckpointSaver(net, optimizer, Namespace(model="test_resnet", mean=(0.5,) * 3, gpu=None), ema,
                            NativeScaler("cpu"), checkpoint_dir=str(folder), recovery_dir=str(folder))
    saver.save_checkpoint(3, 71.5)
    return folder / "last.pth.tar"


def of_torchvisions_script(folder, net, average):
    """As torchvision's references/classification/train.py writes it."""
    ema = torch.optim.swa_utils.AveragedModel(average)
    optimizer = torch.optim.SGD(net.parameters(), 0.1, momentum=0.9)
    schedules = [LinearLR(optimizer), MultiStepLR(optimizer, [30, 60])]
    torch.save({"model": net.state_dict(), "optimizer": optimizer.state_dict(), "epoch": 3,
                "args": Namespace(lr=0.1),
                "lr_scheduler": SequentialLR(optimizer, schedules, [5]).state_dict(),
                "model_ema": ema.state_dict(), "scaler": torch.amp.GradScaler("cpu").state_dict()},
               folder / "model_3.pth")
    return folder / "model_3.pth"


def of_a_compiled_network(folder, net, average):
    weights = {f"module._orig_mod.{key}": value for key, value in average.state_dict().items()}
    torch.save({"state_dict": weights, "args": Namespace()}, folder / "compiled.pth")
    return folder / "compiled.pth"


@pytest.mark.parametrize("write", [of_timms_script, of_torchvisions_script, of_a_compiled_network])
def test_checkpoints_of_other_training_scripts(make_settings, tmp_path, write, capsys):
    """Their averaged weights, where there are any, as they test by; and nothing else becomes readable."""
    net, average = (randomize(timm.create_model("test_resnet", num_classes=10), seed) for seed in (1, 2))
    file = write(tmp_path, net, average)
    settings = make_settings("model=timm", "model.name=test_resnet", "block=dbb", "data=digits",
                             f"model.weights={file}")
    x, ours = torch.randn(2, 3, 64, 64), start_network(settings, TEN, 64)
    with torch.no_grad():
        assert relative_error(ours.eval()(x), average.eval()(x)) < 1e-5
    told = "its averaged weights are taken" in capsys.readouterr().out
    assert told == (write is not of_a_compiled_network)
    for reading in (read_weights, load_checkpoint):
        with pytest.raises(ValueError, match="cannot be read"):
            reading(file)
    torch.save({"state_dict": net.state_dict(), "args": Namespace(), "more": Stranger()}, file)
    with pytest.raises(ValueError, match="more than plain tensors"):
        start_network(settings, TEN, 64)


@pytest.mark.parametrize(("arch", "network"), [
    ("resnet10t", "resnet10t"), ("resnet10t.c3_in1k", "resnet10t"),
    ("hf-hub:timm/resnet10t.c3_in1k", "resnet10t"), ("resnet", None), ("swsl_resnet18", None),
    ("hf-hub:me/mine", None)])
def test_of_which_network_timms_file_says_it_is(tmp_path, arch, network):
    """The name of a class is what timm's CheckpointSaver writes without arguments."""
    torch.save({"arch": arch, "state_dict": {"weight": torch.ones(1)}}, tmp_path / "timm.pth.tar")
    assert read_weights(tmp_path / "timm.pth.tar") == \
        ({"weight": torch.ones(1)}, {} if network is None else {"model": network})


def test_a_file_of_ours_says_of_which_network_it_is(make_settings, tmp_path):
    """So that a MobileNet v1 with ReLU starts from its own weights, from the authors', and from no others."""
    net = randomize(build_model("mobilenet_v1", 10, image_size=32))
    save_network(net, {"model": "mobilenet_v1"}, tmp_path / "ours.safetensors")
    checkpoint = {"state_dict": {f"net.{key}": value for key, value in net.state_dict().items()},
                  "dbb": {"settings": {"model": {"name": "mobilenet_v1"}}}}
    torch.save(checkpoint, tmp_path / "ours.ckpt")
    torch.save(net.state_dict(), tmp_path / "unknown.pth")
    x = torch.randn(2, 3, 32, 32)

    def start(name):
        settings = make_settings("model=mobilenet_v1_dbb", "data=digits", f"model.weights={tmp_path}/{name}")
        return start_network(settings, TEN, 32)
    for name in ("ours.safetensors", "ours.ckpt"):
        with torch.no_grad():
            assert relative_error(start(name).eval()(x), net.eval()(x)) < 1e-5
    with pytest.raises(ValueError, match="has ReLU; these weights are .*, or do not say of which"):
        start("unknown.pth")
    with pytest.raises(ValueError, match="model.name=mobilenet_v1 has ReLU;"):
        start_network(make_settings("model=mobilenet_v1", "model.pretrained=true", "data=digits"), TEN, 32)
    weights, expected = published_model("dbb", "mobilenet_v1", deploy=True)
    torch.save({key: value.float() for key, value in weights.items()}, tmp_path / "authors.pth")
    settings = make_settings("model=mobilenet_v1_dbb", "source=dbb", f"ckpt={tmp_path}/authors.pth",
                             config_name="convert")
    authors, _ = load_published(settings, 128)
    with torch.no_grad():
        assert relative_error(authors(image("mobilenet_v1").float()), expected) < 1e-4


def test_a_large_stem_where_a_small_one_is_built(make_settings, tmp_path):
    torch.save(timm.create_model("resnet18", num_classes=10).state_dict(), tmp_path / "large.pth")
    settings = make_settings("model=resnet18", "data=digits", f"model.weights={tmp_path}/large.pth")
    shapes = r"1 of another shape \(conv1.weight: \[64, 3, 7, 7\], here \[64, 3, 3, 3\]\)"
    with pytest.raises(ValueError, match=shapes):
        start_network(settings, TEN, 32)


def test_images_are_prepared_as_the_weights_want(make_settings, tmp_path, monkeypatch, capsys):
    """From the first epoch to predict.py: timm's mean, deviation and crop; an interpolation as named."""
    torch.save(timm.create_model("test_resnet").state_dict(), tmp_path / "theirs.pth")
    overlay = {"file": str(tmp_path / "theirs.pth")}
    monkeypatch.setattr(timm, "create_model", partial(timm.create_model, pretrained_cfg_overlay=overlay))
    files = write_tree(tmp_path / "files", ("train", "val"), ["n01", "n02"], 4, (90, 70))
    settings = make_settings("model=timm", "model.name=test_resnet", "model.pretrained=true", "data=folder",
                             f"data.root={files}", "data.image_size=64", "data.batch_size=4", *TINY[1:],
                             "data.num_workers=0", "data.interpolation=bicubic")
    printed = capsys.readouterr().out
    assert "images as for timm's weights (test_resnet.r160_in1k): data.mean=[0.5, 0.5, 0.5]" in printed
    result = train_script.train(settings, tmp_path / "run")
    ckpt = f"ckpt={tmp_path}/run/checkpoints/last.ckpt"
    stored = make_settings(ckpt).data
    assert (stored.mean, stored.std) == ([0.5] * 3, [0.5] * 3)
    assert (stored.interpolation, stored.crop_pct) == ("bicubic", 0.95)
    evaluated = eval_script.evaluate(make_settings(ckpt, config_name="eval"))
    assert evaluated["loss"] == pytest.approx(result["loss"], rel=1e-6)
    settings = make_settings(ckpt, "export=[]", "hub=true", config_name="convert")
    convert_script.convert(settings, tmp_path / "out")
    net, about = load_network(tmp_path / "out" / "model.safetensors")
    assert (about["resize"], about["interpolation"], about["mean"]) == (67, "bicubic", [0.5] * 3)
    told = json.loads((tmp_path / "out" / "hub" / "config.json").read_text())["pretrained_cfg"]
    assert (told["interpolation"], int(64 / told["crop_pct"])) == ("bicubic", 67)
    assert "shorter side to 67, bicubic, centre crop" in (tmp_path / "out" / "report.md").read_text()
    data = ImageData(stored, 0)
    data.load(train=False)
    images, _ = data.on_after_batch_transfer(next(iter(data.test_dataloader())))
    ours = torch.stack([prepare(path, about) for path, _ in data.test_set.tree.samples[:4]])
    assert relative_error(ours, images) < 1e-6
    with Image.open(data.test_set.tree.samples[0][0]) as pillow:
        pixels = pillow.resize((round(90 / 70 * 67), 67), Image.Resampling.BICUBIC).crop((11, 2, 75, 66))
    assert relative_error(ours[0], torch.from_numpy(np.array(pixels)).permute(2, 0, 1) / 127.5 - 1) < 0.05
    torch.save(old_file(tmp_path / "run" / "checkpoints" / "last.ckpt"), tmp_path / "old.ckpt")
    old = make_settings(f"ckpt={tmp_path}/old.ckpt").data
    assert (old.interpolation, old.crop_pct) == ("bilinear", 0.875), "as before they could be said"


def old_file(path):
    """A checkpoint as it was before the settings had these two knobs."""
    checkpoint = load_checkpoint(path)
    for knob in ("interpolation", "crop_pct"):
        del checkpoint["dbb"]["settings"]["data"][knob]
    return checkpoint


def test_what_a_file_of_ours_was_trained_on_is_told(make_settings, tmp_path, capsys):
    """Its mean, deviation and classes do not come with its weights."""
    train_script.train(make_settings("model=resnet8", *TINY), tmp_path / "run")
    ckpt = f"{tmp_path}/run/checkpoints/last.ckpt"
    convert_script.convert(make_settings(f"ckpt={ckpt}", "export=[]", config_name="convert"), tmp_path)
    files = write_tree(tmp_path / "files", ("train", "val"), [f"c{i}" for i in range(10)], 1, (40, 40))
    for file in (ckpt, f"{tmp_path}/model.safetensors"):
        settings = make_settings("model=resnet8", "data=folder", f"data.root={files}", "data.image_size=32",
                                 f"model.weights={file}")
        capsys.readouterr()
        start_network(settings, [f"c{i}" for i in range(10)], 32)
        printed = capsys.readouterr().out
        assert "trained with data.mean=[0.305, 0.305, 0.305], here it is [0.485, 0.456, 0.406]" in printed
        assert "trained with data.image_size=8, here it is 32" in printed
        assert 'trained for other classes: "0" where the data has "c0"; the classifier is kept' in printed
        start_network(make_settings("model=resnet8", *TINY, f"model.weights={file}"), TEN, 8)
        assert "trained" not in capsys.readouterr().out


def test_strides_of_small_images_are_told(tmp_path, capsys):
    weights = timm.create_model("mobilenetv2_100", num_classes=10).state_dict()
    build_model("mobilenet_v2", 10, image_size=96, weights=weights)
    assert "stride" not in capsys.readouterr().out
    build_model("mobilenet_v2", 10, image_size=32, weights=weights)
    assert "at 32 pixels conv_stem, blocks.1.0.conv_dw have stride 1, where timm's mobilenetv2_100 has 2" \
        in capsys.readouterr().out


@pytest.mark.parametrize("key", ["features.0.5.weight", f"features.{'9' * 5000}.conv.0.0.weight"])
def test_keys_that_torchvision_does_not_have(key):
    weights = {"features.0.0.weight": torch.zeros(32, 3, 3, 3), key: torch.zeros(1)}
    with pytest.raises(ValueError, match=r"another network: .* 1 unexpected \(features\.[\d.]+") as error:
        build_model("mobilenet_v2", 10, image_size=32, weights=weights)
    assert len(str(error.value)) < 1000


def test_a_tensor_by_torchvisions_name_and_by_timms():
    weights = {"features.0.0.weight": torch.zeros(32, 3, 3, 3), "conv_stem.weight": torch.ones(32, 3, 3, 3)}
    with pytest.raises(ValueError, match="a tensor twice, by torchvision's name and by timm's"):
        build_model("mobilenet_v2", 10, image_size=32, weights=weights)


def test_the_key_of_pytorchs_tutorials(tmp_path):
    torch.save({"model_state_dict": {"weight": torch.ones(1)}, "epoch": 3}, tmp_path / "tutorial.pt")
    assert read_weights(tmp_path / "tutorial.pt") == ({"weight": torch.ones(1)}, {})


@pytest.mark.parametrize("prefix", ["model.", "net.", "model._orig_mod."])
def test_a_network_inside_a_lightning_module(tmp_path, capsys, prefix):
    net = build_model("resnet8", 10, image_size=8)
    weights = {f"{prefix}{key}": value for key, value in net.state_dict().items()}
    torch.save({"state_dict": weights | {"criterion.weight": torch.ones(10)}}, tmp_path / "lightning.ckpt")
    weights, _ = read_weights(tmp_path / "lightning.ckpt")
    ours = build_model("resnet8", 10, image_size=8, weights=weights).state_dict()
    assert all(torch.equal(ours[key], value) for key, value in net.state_dict().items())
    assert f"those under '{prefix}' are taken; not taken: criterion.weight" in capsys.readouterr().out


def test_whatever_key_holds_the_tensors(tmp_path):
    weights = {"weight": torch.ones(1)}
    for content in ({"net": weights, "acc": 91.5}, {"model": {"state_dict": weights}}):
        torch.save(content, tmp_path / "a.pth")
        assert read_weights(tmp_path / "a.pth") == (weights, {})
    torch.save({"generator": weights, "critic": weights}, tmp_path / "a.pth")
    with pytest.raises(ValueError, match="is no file of weights"):
        read_weights(tmp_path / "a.pth")
    torch.save({"state_dict": weights, "best": np.float64(0.5)}, tmp_path / "a.pth")
    with pytest.raises(ValueError, match=r"\(a numpy\.[\w.]+: save its tensors alone"):
        read_weights(tmp_path / "a.pth")


@pytest.mark.parametrize("stored", [torch.ones(1), {"settings": torch.ones(2)},
                                    {"settings": {"model": {"name": "a"}, "data": torch.ones(2)}}])
def test_a_key_of_ours_that_holds_tensors(tmp_path, stored):
    torch.save({"dbb": stored, "weight": torch.ones(1)}, tmp_path / "a.pth")
    with pytest.raises(ValueError, match="a.pth: its key dbb is that of a checkpoint of train.py"):
        read_weights(tmp_path / "a.pth")


@pytest.mark.parametrize(("model", "branches"), [("resnet8", "1x1_avg"), ("vgg16", "1x1,1x1_avg,identity")])
def test_blocks_may_hold_less_than_their_convolutions(make_settings, model, branches):
    """1x1 kernels alone are a ninth: the run's own checkpoint is not that of another network."""
    settings = make_settings(f"model={model}", f"block.branches=[{branches}]")
    state = {f"net.{key}": value for key, value in build_network(settings, 10, 32).state_dict().items()}
    checkpoint = {"dbb": {"classes": TEN, "image_size": 32}, "state_dict": state}
    load_of_run(checkpoint, settings)
    settings.model.name = "resnet18"
    with pytest.raises(ValueError, match="these weights are those of another network: "):
        load_of_run(checkpoint, settings)


def test_quantized_weights_are_refused():
    weights = build_model("resnet8", 10, image_size=8).state_dict()
    weights["fc.bias"] = torch.ones(10, dtype=torch.int8)
    with pytest.raises(ValueError, match="fc.bias is of torch.int8 in the file"):
        build_model("resnet8", 10, image_size=8, weights=weights)


def test_what_timms_script_prepared_images_with_is_told(make_settings, tmp_path, capsys):
    net = timm.create_model("test_resnet", num_classes=10)
    prepared = Namespace(mean=(0.5,) * 3, std=None, crop_pct=1.0, interpolation="bicubic", img_size=64)
    torch.save({"arch": "test_resnet", "state_dict": net.state_dict(), "args": prepared}, tmp_path / "a.pth")
    start_network(make_settings("model=timm", "model.name=test_resnet", "data=digits",
                                f"model.weights={tmp_path}/a.pth"), TEN, 64)
    lines = [line for line in capsys.readouterr().out.splitlines() if "model.weights: trained with" in line]
    assert [line.split("data.")[1].split("=")[0] for line in lines] == ["mean", "interpolation", "crop_pct"]


def test_a_value_that_the_network_cannot_hold(tmp_path):
    weights = build_model("resnet8", 10, image_size=8).state_dict()
    weights["fc.bias"] = torch.full((10,), 1e300, dtype=torch.float64)
    with pytest.raises(ValueError, match="not all finite numbers of torch.float32: fc.bias"):
        build_model("resnet8", 10, image_size=8, weights=weights)
    weights = build_model("resnet8", 10, image_size=8).state_dict()
    weights["bn1.running_var"][3] = -1
    with pytest.raises(ValueError, match="a negative variance: bn1.running_var"):
        build_model("resnet8", 10, image_size=8, weights=weights)


def test_a_tensor_that_a_file_has_twice(tmp_path):
    """With a prefix and without; and an average that is empty, beside weights."""
    weights = build_model("resnet8", 10, image_size=8).state_dict()
    torch.save(weights | {"module.fc.bias": torch.zeros(10)}, tmp_path / "a.pth")
    with pytest.raises(ValueError, match="a.pth holds tensors of one name twice"):
        read_weights(tmp_path / "a.pth")
    torch.save({"state_dict": weights, "state_dict_ema": {}}, tmp_path / "b.pth")
    assert read_weights(tmp_path / "b.pth")[0].keys() == weights.keys()
