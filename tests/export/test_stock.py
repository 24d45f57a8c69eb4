"""What convert.py writes is the stock network: by the recipe, in torchvision, timm, ONNX and int8."""

import sys
from pathlib import Path

import onnx
import pytest
import timm
import torch
import torchvision
from PIL import Image
from torch import nn
from torchvision.transforms.v2 import functional as TF

import predict as predict_script
from dbb import fold_norms
from export import files, graph, int8
from models import BACKBONES, build_model, recipe
from tests.helpers import ROOT, call, randomize, relative_error, write_tree
from tests.models.networks import SIZE

pytestmark = pytest.mark.slow


@pytest.mark.parametrize(("name", "size"), [
    *((name, SIZE.get(name, 32)) for name in BACKBONES),
    ("resnet18", 96), ("mobilenet_v1", 96), ("regnetx_002", 96)])
def test_recipe_rebuilds_the_network_without_this_repository(name, size, monkeypatch):
    ours = randomize(build_model(name, 5, image_size=size)).eval()
    elsewhere = [path for path in sys.path if path not in ("", ROOT)]
    monkeypatch.setattr(sys, "path", [str(Path(ROOT, "models")), *elsewhere])
    for module in {path.stem for path in Path(ROOT, "models").glob("*.py")} & set(sys.modules):
        monkeypatch.delitem(sys.modules, module)
    namespace = {}
    exec(recipe(name, 5, size), namespace)
    theirs = namespace["net"]
    theirs.load_state_dict(ours.state_dict(), strict=True)
    x = torch.randn(2, 3, size, size)
    with torch.no_grad():
        assert torch.equal(theirs.eval()(x), ours(x))


def test_torchvision_takes_the_keys_of_a_resnet():
    ours = randomize(build_model("resnet18", 5, image_size=96)).eval()
    theirs = torchvision.models.resnet18(num_classes=5)
    theirs.load_state_dict(ours.state_dict(), strict=True)
    x = torch.randn(2, 3, 96, 96)
    with torch.no_grad():
        assert relative_error(theirs.eval()(x), ours(x)) < 1e-6


def signature(path):
    """Every node: its type, its attributes, and the shapes of its constants, in order; names left out."""
    model = onnx.load(path)
    shapes, made = {tensor.name: tuple(tensor.dims) for tensor in model.graph.initializer}, {}
    nodes = []
    for index, node in enumerate(model.graph.node):
        inputs = [shapes.get(name, made.get(name, name)) for name in node.input]
        nodes.append((node.op_type, inputs, sorted(str(attribute) for attribute in node.attribute)))
        made |= {name: (index, i) for i, name in enumerate(node.output)}
    return nodes, [str(opset) for opset in model.opset_import]


@pytest.mark.parametrize(("name", "size"), [
    ("mobilenet_v1", 32), ("resnet8", 16), ("vgg16_narrow", 32)])
def test_graph_is_that_of_the_fused_stock_network_node_for_node(name, size, tmp_path):
    image, about = torch.zeros(2, 3, size, size), {}
    for file, block in (("ours", "dbb"), ("stock", None)):
        net = fold_norms(randomize(build_model(name, 5, block, size)).eval(), image)
        graph.export_onnx(net, image, about, tmp_path / file)
    ours, stock = signature(tmp_path / "ours"), signature(tmp_path / "stock")
    assert ours == stock
    kinds = {kind for kind, _, _ in ours[0]}
    assert "BatchNormalization" not in kinds
    assert "Conv" in kinds


def test_int8_arithmetic_does_not_overflow(tmp_path):
    """Without VNNI, onnxruntime adds pairs of 8-bit products in 16 bits: signed, these weights overflow."""
    net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.ReLU(),
                        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 5))
    for parameter in net.parameters():
        nn.init.uniform_(parameter, 0.8, 1)
    images = torch.rand(32, 3, 8, 8) * 0.2 + 0.8
    about = {"model": "x", "classes": list("abcde"), "image_size": 8, "resize": 8,
             "interpolation": "bilinear", "mean": [0.0] * 3, "std": [1.0] * 3}
    graph.export_onnx(net.eval(), images[:2], about, tmp_path / "float.onnx")
    int8.quantize(tmp_path / "float.onnx", tmp_path / "int8.onnx", images.split(8))
    with torch.no_grad():
        assert relative_error(graph.OnnxNetwork(tmp_path / "int8.onnx")(images), net(images)) < 0.02


def test_folder_for_timm(tmp_path):
    tree = write_tree(tmp_path / "tree", ("train", "val"), ["ant", "bee"], 4, (80, 80))
    train = call("train.py", "model=mobilenet_v1_dbb", "data=folder", f"data.root={tree}",
                 "data.image_size=72", "data.batch_size=4", "data.num_workers=0",
                 "trainer.max_epochs=1", "optim.lr=0.001", "logger=csv", "out=run", cwd=tmp_path)
    assert train.returncode == 0, train.stderr
    done = call("convert.py", f"ckpt={tmp_path}/run/checkpoints/last.ckpt", "hub=true", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    folder = tmp_path / "run" / "convert"
    net = timm.create_model(f"local-dir:{folder}/hub", pretrained=True).eval()
    assert tuple(net.pretrained_cfg["mean"]) == (0.485, 0.456, 0.406)
    assert int(72 / net.pretrained_cfg["crop_pct"]) == 82, "as timm computes it"
    assert tuple(net.pretrained_cfg["input_size"]) == (3, 72, 72)
    assert net.pretrained_cfg["interpolation"] == "bilinear"
    assert tuple(net.pretrained_cfg["label_names"]) == ("ant", "bee")
    x = torch.randn(3, 3, 72, 72)
    ours, about = files.load_network(folder / "model.safetensors")
    with torch.no_grad():
        assert torch.equal(net(x), ours(x))
        assert relative_error(net(x), graph.OnnxNetwork(folder / "model.onnx")(x)) < 1e-5

    photograph = next((tree / "val" / "ant").iterdir())
    [(_, found)] = predict_script.predictions(ours, about, [str(photograph)])
    image = TF.resize(TF.pil_to_tensor(Image.open(photograph)), [82], antialias=True)
    pixels = TF.normalize(TF.center_crop(image, [72]) / 255, [0.485, 0.456, 0.406], [0.229, 0.224, 0.225])
    with torch.no_grad():
        ant, bee = ours(pixels[None]).softmax(1)[0].tolist()
    assert {name: probability for probability, name in found} == pytest.approx({"ant": ant, "bee": bee})


def test_folder_for_timm_of_a_resnet(tmp_path):
    net = randomize(build_model("resnet18", 3, image_size=96)).eval()
    about = {"image_size": 96, "resize": 110, "interpolation": "bilinear", "mean": [0.5] * 3,
             "std": [0.2] * 3, "classes": ["a", "b", "c"]}
    files.save_hub(net, about, tmp_path)
    x = torch.randn(2, 3, 96, 96)
    with torch.no_grad():
        assert torch.equal(timm.create_model(f"local-dir:{tmp_path}", pretrained=True).eval()(x), net(x))
