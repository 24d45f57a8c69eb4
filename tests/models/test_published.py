"""Our networks must compute what the published ones do, from their weights."""

import re

import h5py
import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from models import build_model, load_weights, published
from models.published import translate
from models.reading import read_weights
from tests.helpers import Stranger, randomize, relative_error
from tests.models.published_networks import CLASSES, Orepa, OrepaStem, image, published_model

pytestmark = pytest.mark.slow


class Largest(TorchDispatchMode):
    """Notes how many values the largest tensor has that is made on the CPU."""

    values = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        made = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(made):
            if isinstance(tensor, torch.Tensor) and not tensor.is_meta:
                self.values = max(self.values, tensor.numel())
        return made


def logits_of_ours(weights, source, name, dtype=torch.float64):
    """The logits of our network with the given published weights; their keys must fit exactly."""
    weights, with_blocks = translate(weights, source, name, build_model(name, CLASSES, image_size=128))
    block = {"dbb": "dbb", "acnet": "acb"}[source] if with_blocks else None
    net = build_model(name, CLASSES, block, image_size=128).to(dtype).eval()
    load_weights(net, weights)
    with torch.no_grad():
        return net(image(name).to(dtype)), with_blocks


@pytest.mark.parametrize(("source", "name", "deploy"), [
    ("dbb", "resnet18", False), ("dbb", "resnet50", False), ("dbb", "mobilenet_v1", False),
    ("dbb", "resnet18", True), ("dbb", "mobilenet_v1", True),
    ("acnet", "resnet18", False), ("acnet", "vgg16", False), ("acnet", "resnet18", True),
    ("orepa", "resnet18", False), ("orepa", "resnet50", False),
    ("orepa", "resnet18", True), ("orepa", "resnet50", True)])
def test_our_network_computes_what_the_published_one_does(source, name, deploy):
    weights, expected = published_model(source, name, deploy)
    logits, with_blocks = logits_of_ours(weights, source, name)
    assert with_blocks == (source != "orepa" and not deploy)
    assert relative_error(logits, expected) < 1e-12


def test_the_older_layout_has_no_norm_inside_the_padding_one_and_may_count_no_batches():
    weights, expected = published_model("dbb", "resnet18")
    older = {re.sub(r"(dbb_avg\.bn|dbb_1x1_kxk\.bn1)\.bn\.", r"\1.", key): value
             for key, value in weights.items() if not key.endswith("num_batches_tracked")}
    assert older.keys() < {key.replace("bn.bn.", "bn.").replace("bn1.bn.", "bn1.") for key in weights}
    assert relative_error(logits_of_ours(older, "dbb", "resnet18")[0], expected) < 1e-12


def test_the_large_kernel_of_orepa_may_be_made_of_plain_ones():
    def in_the_stem(values):
        return {f"stage0.conv1.{key}": value for key, value in values.items()}

    stem = randomize(OrepaStem(3, 64, 2).double().eval())
    net = build_model("resnet18", CLASSES, image_size=128)
    ours, _ = translate(in_the_stem(stem.state_dict()), "orepa", "resnet18", net)
    kernels = in_the_stem({f"weight{i}": getattr(stem, f"weight{i}").kernel().detach() for i in range(3)})
    norm = in_the_stem({f"bn.{key}": value for key, value in stem.bn.state_dict().items()})
    plain, _ = translate(kernels | norm, "orepa", "resnet18", net)
    assert plain.keys() == ours.keys()
    assert relative_error(plain["conv1.weight"], ours["conv1.weight"]) < 1e-14


@pytest.mark.parametrize(("key", "odd"), [
    ("dbb_avg.bn.bn.weight", lambda value: value[:, None]),
    ("dbb_1x1_kxk.bn1.bn.bias", lambda value: value[:1]),
    ("dbb_1x1_kxk.bn2.running_mean", lambda value: value[:1])])
def test_norms_whose_values_would_broadcast(key, odd):
    """DBB's inner shift is a product of vectors; of a column and a row it would be a large table."""
    weights, _ = published_model("dbb", "resnet18")
    key = f"stage1.0.conv1.{key}"
    weights = weights | {key: odd(weights[key])}  # others share the dict
    with pytest.raises(ValueError, match="the tensors of stage1.0.conv1.* do not fit together"):
        translate(weights, "dbb", "resnet18", build_model("resnet18", CLASSES, image_size=128))


def test_a_tensor_by_two_names():
    weights, _ = published_model("dbb", "resnet18")
    weights = weights | {"fc.weight": weights["linear.weight"] + 1}
    with pytest.raises(ValueError, match="the file has fc.weight, and the same under dbb's name"):
        translate(weights, "dbb", "resnet18", build_model("resnet18", CLASSES, image_size=128))


def test_tensors_that_are_of_no_real_numbers():
    unit = {f"stage0.conv1.{key}": value for key, value in OrepaStem(3, 64, 2).state_dict().items()}
    unit["stage0.conv1.weight0.vector"] = unit["stage0.conv1.weight0.vector"].to(torch.int8)
    with pytest.raises(ValueError, match="stage0.conv1.weight0.vector is of torch.int8"):
        translate(unit, "orepa", "resnet18", build_model("resnet18", CLASSES, image_size=128))


@pytest.mark.parametrize(("name", "size"), [("avg_conv", (30000, 1)), ("origin", (1, 1, 3, 3))])
def test_tensors_that_do_not_fit_together_make_no_large_one(name, size):
    """A vector times a column, say, of a few kilobytes each."""
    unit = OrepaStem(3, 64, 2).double().state_dict()
    unit |= {key: torch.zeros(size) for key in unit if key.endswith(f"orepa_{name}")}
    unit |= {key: torch.zeros(30000) for key in unit if key.endswith("avg_avg") and name == "avg_conv"}
    values = {f"stage0.conv1.{key}": value for key, value in unit.items()}
    net = build_model("resnet18", CLASSES, image_size=128)
    with Largest() as made, pytest.raises(ValueError, match="do not fit together"):
        translate(values, "orepa", "resnet18", net)
    assert made.values < 10**6


def write_torch(weights, path):
    torch.save({"epoch": 3, "state_dict": {f"module.{key}": value for key, value in weights.items()}}, path)


def write_model(weights, path):
    torch.save({"model": weights, "iteration": 5}, path)


def write_hdf5(weights, path):
    with h5py.File(path, "w") as file:
        for key, value in weights.items():
            file.create_dataset(key, data=value.numpy())


@pytest.mark.parametrize(("write", "name"), [
    (write_torch, "a.pth.tar"), (write_model, "a.pth"), (torch.save, "a.pt"),
    (save_file, "a.safetensors"), (write_hdf5, "a.hdf5")])
def test_files_of_all_formats(write, name, tmp_path):
    weights, expected = published_model("acnet", "resnet18")
    write({key: value.float() if value.is_floating_point() else value
           for key, value in weights.items()}, tmp_path / name)
    read, _ = read_weights(tmp_path / name)
    assert read.keys() == weights.keys()
    assert relative_error(logits_of_ours(read, "acnet", "resnet18", torch.float32)[0], expected) < 1e-5


def test_files_that_are_refused(tmp_path):
    with pytest.raises(ValueError, match="no such file"):
        read_weights(tmp_path / "a.pth")
    torch.save({"weight": torch.rand(1000)}, tmp_path / "whole.pth")
    cut = (tmp_path / "whole.pth").read_bytes()[:2000]
    for name in ("cut.pth", "cut.safetensors", "cut.h5"):
        (tmp_path / name).write_bytes(cut)
        with pytest.raises(ValueError, match=f"{name} cannot be read: it is damaged"):
            read_weights(tmp_path / name)
    torch.save({"weight": Stranger()}, tmp_path / "object.pth")
    with pytest.raises(ValueError, match="more than plain tensors"):
        read_weights(tmp_path / "object.pth")
    number = torch.rand(1)
    for content in ({"state_dict": {"weight": number, "epoch": 3}}, [number], {1: number}):
        torch.save(content, tmp_path / "other.pth")
        with pytest.raises(ValueError, match="it must hold tensors by name"):
            read_weights(tmp_path / "other.pth")


def test_weights_that_do_not_fit_are_named():
    weights, _ = published_model("dbb", "resnet18")
    net = build_model("resnet18", CLASSES, image_size=128)
    for key, missing in {
            "stage1.0.conv1.dbb_1x1_kxk.bn1.bn.bias": r"stage1\.0\.conv1\.\* lacks .*1x1_kxk\.inner\.bias",
            "stage2.0.conv1.dbb_1x1_kxk.bn2.running_mean":
                r"stage2\.0\.conv1\.\* lacks .*1x1_kxk\.bn\.running_mean",
            "stage2.0.shortcut.bn.running_var": r"1 missing \(layer2\.0\.downsample\.1\.running_var\)",
            "stage3.1.conv2.dbb_1x1.conv.weight":
                r"1 missing \(layer3\.1\.conv2\.branches\.1x1\.weight\)"}.items():
        others = {other: value for other, value in weights.items() if other != key}
        with pytest.raises(ValueError, match=missing):
            logits_of_ours(others, "dbb", "resnet18")
    wrong = weights | {"stage1.0.conv1.dbb_1x1_kxk.conv2.weight": torch.rand(64, 5, 3, 3)}
    with pytest.raises(ValueError, match=r"tensors of stage1\.0\.conv1\.\* do not fit together"):
        translate(wrong, "dbb", "resnet18", net)
    strange = weights | {"stage1.0.conv1.se.weight": torch.rand(1), "head.weight": torch.rand(1)}
    del strange["linear.bias"]
    both = r"1 missing \(fc\.bias\); 2 unexpected \(head\.weight, stage1\.0\.conv1\.se\.weight\)"
    with pytest.raises(ValueError, match=both):
        logits_of_ours(strange, "dbb", "resnet18")
    biased = weights | {"stage2.0.shortcut.conv.bias": torch.rand(128, dtype=torch.float64)}
    with pytest.raises(ValueError, match=r"unexpected \(stage2\.0\.shortcut\.bn\.bias"):
        logits_of_ours(biased, "dbb", "resnet18")


def test_grouped_orepa_is_refused():
    unit = {f"stage1.0.conv1.{key}": value for key, value in Orepa(64, 64).state_dict().items()}
    for name in ("origin", "avg_conv", "pfir_conv", "1x1", "1x1_kxk_idconv1", "1x1_kxk_conv2"):
        unit[f"stage1.0.conv1.weight_orepa_{name}"] = unit[f"stage1.0.conv1.weight_orepa_{name}"][:, :16]
    with pytest.raises(ValueError, match=r"stage1\.0\.conv1\.\* do not fit together.*groups"):
        translate(unit, "orepa", "resnet18", build_model("resnet18", CLASSES, image_size=128))


@pytest.mark.parametrize(("source", "name"), [
    ("acnet", "resnet50"), ("dbb", "vgg16"), ("repvgg", "resnet18")])
def test_networks_without_a_layout_are_named(source, name):
    message = f"source={source} has no layout for model.name={name}; there are dbb: resnet18"
    with pytest.raises(ValueError, match=message):
        translate({}, source, name, nn.Identity())


shift, merge, embed = published._shift, published.merge_1x1_kxk, published.embed_kernel
SWAPPED = {"ver_bn": "conv.branches.1xk.bn", "hor_bn": "conv.branches.kx1.bn"}


def drops_pad_correction(**norm):
    return torch.zeros_like(shift(**norm))


def wrong_channel_order(**norm):
    return shift(**norm).flip(0)


def composes_transposed(first, second):
    return merge(first.transpose(0, 1) if len(first) == first.shape[1] else first, second)


def wrong_tap(kernel, size):
    return embed(kernel, size).roll(1, 3)


@pytest.mark.parametrize(("bug", "name", "source", "backbone"), [
    (drops_pad_correction, "_shift", "dbb", "resnet18"),
    (drops_pad_correction, "_shift", "dbb", "mobilenet_v1"),
    (wrong_channel_order, "_shift", "dbb", "resnet18"),
    (wrong_channel_order, "_shift", "dbb", "mobilenet_v1"),
    (composes_transposed, "merge_1x1_kxk", "orepa", "resnet18"),
    (wrong_tap, "embed_kernel", "orepa", "resnet18"),
    (published.NAMES | SWAPPED, "NAMES", "acnet", "vgg16")],
    ids=lambda value: getattr(value, "__name__", None))
def test_bugs_are_noticed(bug, name, source, backbone, monkeypatch):
    weights, expected = published_model(source, backbone)
    monkeypatch.setattr(published, name, bug)
    assert relative_error(logits_of_ours(weights, source, backbone)[0], expected) > 1e-3


def test_swapped_kernels_are_noticed(monkeypatch):
    monkeypatch.setattr(published, "NAMES", published.NAMES | {"ver_conv.weight": "conv.branches.1xk.weight",
                                                               "hor_conv.weight": "conv.branches.kx1.weight"})
    with pytest.raises(ValueError, match="of another shape"):
        logits_of_ours(published_model("acnet", "vgg16")[0], "acnet", "vgg16")


def test_a_stem_convolved_instead_of_correlated_is_noticed(monkeypatch):
    weights, expected = published_model("orepa", "resnet18")
    large = published.OREPA["weight0"]
    monkeypatch.setitem(published.OREPA, "weight0.weight_orepa_origin", lambda u: large(u).flip(2, 3))
    assert relative_error(logits_of_ours(weights, "orepa", "resnet18")[0], expected) > 1e-3
