"""Files that hold less than they say, by holes, compression or views: what they lack could fill a memory."""

import json
import os
import signal
import zipfile

import h5py
import numpy as np
import pytest
import torch
from safetensors.torch import save_file

import train as train_script
from evaluation import networks
from export.files import load_network
from export.reading import load_verified
from models import limits
from models.build import build_model
from models.checkpoint import load_checkpoint
from models.reading import read_weights
from models.weights import load_plain
from tests.helpers import TINY


@pytest.mark.parametrize("name", ["a.ckpt", "a.h5", "a.safetensors"])
def test_a_file_most_of_which_is_a_hole(tmp_path, name):
    """A few bytes of it lie on the disk."""
    if name == "a.ckpt":
        torch.save({"weight": torch.ones(2**16)}, tmp_path / name)
    elif name == "a.safetensors":
        save_file({"weight": torch.ones(2**16)}, tmp_path / name)
    else:
        with h5py.File(tmp_path / name, "w") as file:
            file["weight"] = np.ones(2**16, "f4")
    assert read_weights(tmp_path / name)[0]["weight"].sum() == 2**16
    os.truncate(tmp_path / name, 2**33)
    with pytest.raises(ValueError, match="cannot be read.*most of it is a hole"):
        read_weights(tmp_path / name)
    with pytest.raises(ValueError, match="cannot be read.*most of it is a hole"):
        load_checkpoint(tmp_path / name)


@pytest.mark.parametrize("name", ["model.onnx", "model.safetensors"])
def test_a_converted_network_that_is_a_hole(tmp_path, name):
    """Its checksum would take hours."""
    (tmp_path / name).write_bytes(b"a")
    os.truncate(tmp_path / name, 2**42)
    files = {name: {"sha256": "0" * 64}}
    (tmp_path / "report.json").write_text(json.dumps({"files": files}))
    with pytest.raises(ValueError, match=f"{name} cannot be read: most of it is a hole"):
        load_verified(tmp_path / name)
    if name == "model.safetensors":
        (tmp_path / "report.json").unlink()
        with pytest.raises(ValueError, match=f"{name} cannot be read: most of it is a hole"):
            load_verified(tmp_path / name)


@pytest.mark.parametrize(("size", "written"), [(8, 0), (8, 4), (6, 4), (6, 6), (8, 8)])
def test_hdf5_without_its_values(tmp_path, size, written):
    """Its chunks are stored whole: those at the border hold more than they are there for."""
    with h5py.File(tmp_path / "a.h5", "w") as file:
        file["fc.bias"] = np.ones(1000, "f4")
        file.create_dataset("fc.weight", (size, size), "f4", chunks=(4, 4))[:written] = 1
    if written == size:
        assert read_weights(tmp_path / "a.h5")[0]["fc.weight"].sum() == size**2
        return
    with pytest.raises(ValueError, match="cannot be read.*it lacks values"):
        read_weights(tmp_path / "a.h5")


def test_a_tensor_of_another_shape_is_not_computed_with():
    """Of so many numbers that there is no memory for any result."""
    net = build_model("resnet8", 10)
    weights = net.state_dict() | {"conv1.weight": torch.ones(1).expand(2**50)}
    with pytest.raises(ValueError, match=r"1 of another shape .conv1.weight: \[1125899906842624\]"):
        load_plain(net, weights)


def test_files_that_unpack_to_more(tmp_path):
    with h5py.File(tmp_path / "a.h5", "w") as file:
        file.create_dataset("a", shape=(10**8,), dtype="u1", chunks=(10**6,), compression="gzip", fillvalue=0)
    with h5py.File(tmp_path / "b.h5", "w") as file:
        file["a"] = h5py.ExternalLink("/etc/passwd", "x")
    torch.save({"a": torch.zeros(10**6)}, tmp_path / "whole.pth")
    with zipfile.ZipFile(tmp_path / "whole.pth") as source, \
            zipfile.ZipFile(tmp_path / "c.pth", "w", zipfile.ZIP_DEFLATED) as target:
        for name in source.namelist():
            target.writestr(name, source.read(name))
    torch.save({"a": torch.zeros(1).expand(10**9)}, tmp_path / "d.pth")
    for name in ("a.h5", "b.h5", "c.pth", "d.pth"):
        with pytest.raises(ValueError, match="cannot be read"):
            read_weights(tmp_path / name)


@pytest.fixture
def devices(monkeypatch):
    """Where blocks are made, one after another; on "meta" they take no memory."""
    made, block = [], networks.ReparamConv2d

    def make(*args, **more):
        made.append(torch.empty(0).device.type)
        return block(*args, **more)
    monkeypatch.setattr(networks, "ReparamConv2d", make)
    return made


def test_a_network_with_blocks_is_compared_before_it_takes_memory(make_settings, tmp_path, devices):
    """A file of 300 KB may name one of 60 branches: 6 GB."""
    train_script.train(make_settings("model=resnet8_dbb", *TINY), tmp_path)
    settings = make_settings(f"ckpt={tmp_path}/checkpoints/last.ckpt", "trainer.max_epochs=2")
    checkpoint = load_checkpoint(settings.ckpt)
    networks.load_network(checkpoint, settings)
    assert {*devices} == {"meta", "cpu"}
    devices.clear()
    settings.block.branches = ["kxk"] * 60
    for use in (lambda: networks.load_network(checkpoint, settings),
                lambda: train_script.train(settings, tmp_path / "on")):
        with pytest.raises(ValueError, match="these weights are those of another network: "):
            use()
    assert {*devices} == {"meta"}


def test_a_published_file_of_classes_without_values(make_settings, tmp_path, monkeypatch):
    """They were a network of 2.7 GB."""
    made, build = [], networks.build_model
    monkeypatch.setattr(networks, "build_model",
                        lambda *args, **more: made.append(torch.empty(0).device.type) or build(*args, **more))
    torch.save({"linear.weight": torch.zeros(10**5, 0), "x": torch.zeros(10)}, tmp_path / "a.pth")
    settings = make_settings("model=resnet18", "source=dbb", f"ckpt={tmp_path}/a.pth", config_name="convert")
    with pytest.raises(ValueError, match="another network: resnet18 has 62,476,512 parameters, the file 10"):
        networks.load_published(settings, 224)
    assert made == ["meta"]


@pytest.mark.parametrize("shape", [[0, 2**63 - 1, 2], [0, 2**64 - 1]])
def test_a_converted_network_with_a_tensor_of_a_strange_shape(tmp_path, shape):
    header = json.dumps({"a": {"dtype": "F32", "shape": shape, "data_offsets": [0, 0]}}).encode()
    (tmp_path / "a.safetensors").write_bytes(len(header).to_bytes(8, "little") + header)
    with pytest.raises(ValueError, match=r"a.safetensors cannot be read: .*verflow[^\n]*$"):
        load_network(tmp_path / "a.safetensors")


@pytest.mark.parametrize("harm", [lambda: os.kill(os.getpid(), signal.SIGSEGV), lambda: sum(iter(int, 1))])
def test_a_reader_that_crashes_or_never_ends(tmp_path, monkeypatch, harm):
    """By lists in it that name themselves, HDF5 of 200 KB made libhdf5 do both."""
    monkeypatch.setattr(limits, "HDF5_SECONDS", 1)
    monkeypatch.setattr(h5py, "File", lambda path: harm())
    (tmp_path / "a.h5").write_bytes(b"x" * 100)
    with pytest.raises(ValueError, match="a.h5 cannot be read: .*reading it crashed, or took over 1 seconds"):
        read_weights(tmp_path / "a.h5")


def test_a_group_that_is_its_own_part(tmp_path):
    """The address of the only node below the root's, in the old form, is changed to the root's own."""
    with h5py.File(tmp_path / "a.h5", "w", libver="earliest") as file:
        for name in range(2000):
            file[f"{name:04}"] = np.ones(1, "f4")
    content = bytearray((tmp_path / "a.h5").read_bytes())
    nodes = [place for place in range(0, len(content), 8) if content[place:place + 5] == b"TREE\0"]
    root = max(nodes, key=lambda place: content[place + 5])  # the level
    assert content[root + 5] >= 1
    content[root + 32:root + 40] = root.to_bytes(8, "little")  # behind the header and the first key
    (tmp_path / "a.h5").write_bytes(content)
    with pytest.raises(ValueError, match="a.h5 cannot be read"):
        read_weights(tmp_path / "a.h5")
