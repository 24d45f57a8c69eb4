"""What convert.py leaves behind: files that load elsewhere, the same every time; graphs, int8, predict.py."""

import json
import platform
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import nn
from torchvision.transforms.v2 import functional as TF

import convert as convert_script
from dbb import DiverseBranchBlock
from export import files, formats, graph
from export.place import refuse_anothers, require_place, staged
from export.reading import load_verified
from tests.helpers import ROOT, TINY, call, relative_error, run, write_tree

pytestmark = pytest.mark.slow

EVERYTHING = "export=[onnx,training_onnx,pt2,int8]"


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A few steps of a small network with blocks: its checkpoint."""
    cwd = tmp_path_factory.mktemp("run")
    done = call("train.py", "model=resnet8_dbb", *TINY, "out=run", cwd=cwd)
    assert done.returncode == 0, done.stderr
    return cwd / "run" / "checkpoints" / "last.ckpt"


@pytest.fixture(scope="module")
def converted(trained):
    """The folder of a conversion with all files, and what was printed."""
    done = call("convert.py", f"ckpt={trained}", EVERYTHING, cwd=trained.parent)
    assert done.returncode == 0, done.stderr
    return trained.parent.parent / "convert", done.stdout


def test_the_folder(converted):
    folder, printed = converted
    models = ["model.safetensors", "model.onnx", "model-training.onnx", "model.pt2", "model-int8.onnx"]
    pages = ["report.md", "report.json", "report.png", "graphs.png"]
    assert sorted(path.name for path in folder.iterdir()) == sorted([*models, *pages])
    assert len({path.stat().st_mode for path in folder.iterdir()}) == 1, "all as readable as any new file"
    report = json.loads((folder / "report.json").read_text())
    assert list(report["files"]) == models
    for name, entry in report["files"].items():
        assert entry["sha256"] == files.sha256(folder / name)
        assert entry["bytes"] == (folder / name).stat().st_size
        if "int8" not in name:
            assert (entry["predictions_changed"], entry["images"]) == (0, 360)
            assert 0 < entry["relative_error"] < 1e-4
            assert abs(entry["top1"] - report["before"]["top1"]) <= entry["ties"] / 360
        assert name in printed
    assert (folder / "model.onnx").stat().st_size < (folder / "model-training.onnx").stat().st_size
    text = (folder / "report.md").read_text()
    assert report["files"]["model.onnx"]["sha256"] in text
    assert "| BatchNormalization | 28 | 0 |" in text
    assert "| Conv | 42 | 7 |" in text  # kxk, 1x1, two of 1x1_avg, two of 1x1_kxk in each of 7 blocks
    assert text.count("| blocks.") == 6  # the int8 table has every layer
    for shares in report["shares"].values():
        assert list(shares) == ["kxk", "1x1", "1x1_avg", "1x1_kxk"]
        assert abs(sum(shares.values()) - 1) < 1e-12


def test_no_path_of_this_machine_is_in_a_file(converted):
    for path in converted[0].iterdir():
        contents = [path.read_bytes()]
        if zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as archive:
                contents += [archive.read(name) for name in archive.namelist()]
        for content in contents:
            assert ROOT.encode() not in content, path
            assert b"site-packages" not in content, path


def test_the_same_checkpoint_gives_the_same_bytes(trained, converted, tmp_path):
    """From this process, and from one of its own."""
    assert run("convert.py", f"ckpt={trained}", f"out={tmp_path}/again", cwd=tmp_path).returncode == 0
    for name in ("model.safetensors", "model.onnx"):
        assert (tmp_path / "again" / name).read_bytes() == (converted[0] / name).read_bytes()


def test_another_checkpoint_of_the_same_name(trained, converted, tmp_path):
    """Outside a run's folder, its name chooses where the files go."""
    refuse_anothers(converted[0], trained)
    (tmp_path / "last.ckpt").write_bytes(b"another")
    with pytest.raises(ValueError, match="has the files of another checkpoint that is called last.ckpt"):
        refuse_anothers(converted[0], tmp_path / "last.ckpt")


def test_header_says_what_the_network_is(trained, converted):
    _, about = files.load_network(converted[0] / "model.safetensors")
    assert graph.OnnxNetwork(converted[0] / "model.onnx").about == about
    assert about["model"] == "resnet8"
    assert about["classes"] == [str(digit) for digit in range(10)]
    assert (about["image_size"], about["mean"], about["std"]) == (8, [0.305] * 3, [0.376] * 3)
    assert about["checkpoint_sha256"] == files.sha256(trained)
    assert torch.__version__.startswith(about["versions"]["torch"])
    assert about["top1"] == json.loads((converted[0] / "report.json").read_text())["before"]["top1"]


def test_weights_load_into_a_stock_network_in_another_process(converted, tmp_path):
    code = (converted[0] / "report.md").read_text().split("```python\n")[1].split("```")[0]
    shutil.copy(Path(ROOT, "models", "cifar_resnet.py"), tmp_path)
    shutil.copy(converted[0] / "model.safetensors", tmp_path)
    (tmp_path / "load.py").write_text(code + "import sys, torch\ntorch.manual_seed(0)\n"
                                      "torch.save(net(torch.randn(4, 3, 8, 8)), 'logits.pt')\n"
                                      "assert not {'dbb', 'models', 'training'} & set(sys.modules)\n")
    subprocess.run([sys.executable, "load.py"], cwd=tmp_path, check=True)
    torch.manual_seed(0)
    x = torch.randn(4, 3, 8, 8)
    onnx_logits = graph.OnnxNetwork(converted[0] / "model.onnx")(x)
    assert relative_error(torch.load(tmp_path / "logits.pt", weights_only=True), onnx_logits) < 1e-5


def test_onnx_and_pt2_take_any_batch(converted):
    network = graph.OnnxNetwork(converted[0] / "model.onnx")
    program = torch.export.load(converted[0] / "model.pt2").module()
    training = graph.OnnxNetwork(converted[0] / "model-training.onnx")
    for batch in (1, 3, 17):
        x = torch.randn(batch, 3, 8, 8)
        assert network(x).shape == (batch, 10)
        assert relative_error(program(x), network(x)) < 1e-5
        assert relative_error(training(x), network(x)) < 1e-5


def test_int8_report_has_every_convolution_worst_first(converted):
    report = json.loads((converted[0] / "report.json").read_text())
    layers = {"conv1", *(f"blocks.{i}.conv{j}" for i in range(3) for j in (1, 2))}
    assert {row["layer"] for row in report["int8"]} == layers
    outputs = [row["output_db"] for row in report["int8"]]
    assert None not in outputs
    assert outputs == sorted(outputs)
    assert min(outputs) > 10


def test_wrong_exports_write_nothing(trained, make_settings, tmp_path, monkeypatch):
    def fails(message, *overrides, out="out"):
        with pytest.raises(ValueError, match=message):
            convert_script.convert(make_settings(f"ckpt={trained}", *overrides, config_name="convert"),
                                   tmp_path / out)
        assert not (tmp_path / out).exists()

    fails("export=onxx is unknown; known are safetensors, onnx, training_onnx, pt2, int8; did you mean onnx",
          "export=[onxx]")
    fails("calibrate with", "export=[int8]", "data=none")
    fails("hub=true: timm does not build resnet8 for 8 pixels", "hub=true")
    monkeypatch.setattr(formats, "find_spec", lambda name: None if name == "onnxscript" else name)
    fails(r"export=\[onnx\] needs onnxscript, which is not installed: pip install -e '.\[train,export\]'")
    nothing = make_settings(f"ckpt={trained}", "export=[]", config_name="convert")
    report = convert_script.convert(nothing, tmp_path / "none")
    assert list(report["files"]) == ["model.safetensors"]


def test_an_earlier_conversion_stays_when_a_later_one_fails(trained, make_settings, tmp_path, monkeypatch):
    settings = make_settings(f"ckpt={trained}", config_name="convert")
    (tmp_path / "model.pt2").write_text("somebody's")
    convert_script.convert(settings, tmp_path)
    assert (tmp_path / "model.pt2").read_text() == "somebody's"
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    export = graph.export_onnx

    def broken(net, *arguments, **kwargs):
        nn.init.zeros_(net.fc.weight)
        export(net, *arguments, **kwargs)

    monkeypatch.setattr(graph, "export_onnx", broken)
    with pytest.raises(ValueError, match="model.onnx changed the network: .* no weights were written"):
        convert_script.convert(settings, tmp_path)
    after = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    assert json.loads(after.pop("report-failed.json"))["files"]["model.onnx"]["relative_error"] > 0.1
    assert after == before


@pytest.fixture(scope="module")
def photographs(tmp_path_factory):
    """The same picture in many modes, and files that are none."""
    folder = tmp_path_factory.mktemp("images")
    pixels = np.random.default_rng(0).integers(0, 256, (12, 10, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(folder / "rgb.png")
    Image.fromarray(pixels).convert("L").save(folder / "grey.png")
    Image.fromarray(pixels).convert("L").convert("RGB").save(folder / "grey_as_rgb.png")
    Image.fromarray(pixels).convert("RGBA").save(folder / "rgba.png")
    Image.fromarray(pixels[..., 0].astype(np.uint16) * 257).save(folder / "deep.png")
    Image.fromarray(pixels[..., 0]).save(folder / "shallow.png")
    Image.fromarray(np.full((4, 4), 70_000, np.int32)).save(folder / "wide.tif")
    Image.fromarray(np.full((4, 4), 0.8, np.float32)).save(folder / "real.tif")
    Image.new("1", (20_000, 20_000)).save(folder / "bomb.png")
    (folder / "cut.png").write_bytes((folder / "rgb.png").read_bytes()[:60])
    return folder


def classes(printed: str) -> dict[str, list[str]]:
    lines = printed.splitlines()
    starts = [i for i, line in enumerate(lines) if not line.startswith("  ")]
    ends = [*starts[1:], None]
    return {Path(lines[i]).name: [line.strip() for line in lines[i + 1:end]]
            for i, end in zip(starts, ends, strict=True)}


@pytest.mark.parametrize(("start", "model"), [(run, "model.onnx"), (call, "model.safetensors")])
def test_predict(converted, photographs, start, model):
    good = ["rgb.png", "grey.png", "grey_as_rgb.png", "rgba.png", "deep.png", "shallow.png"]
    done = start("predict.py", str(converted[0] / model), *(str(photographs / name) for name in good),
                 cwd=photographs)
    assert (done.returncode, done.stderr) == (0, "")
    found = classes(done.stdout)
    assert list(found) == good
    assert found["grey.png"] == found["grey_as_rgb.png"]
    assert found["rgba.png"] == found["rgb.png"]
    assert found["deep.png"] == found["shallow.png"]
    net, about = files.load_network(converted[0] / "model.safetensors")
    image = TF.pil_to_tensor(Image.open(photographs / "rgb.png"))
    image = (TF.center_crop(TF.resize(image, [8], antialias=True), [8]) / 255 - 0.305) / 0.376
    with torch.no_grad():
        top = net(image[None]).softmax(1)[0].topk(5)
    top = zip(top.values, top.indices, strict=True)
    assert found["rgb.png"] == [f"{p:.4f}  {about['classes'][i]}" for p, i in top]


def test_predict_from_the_command_line_names_what_it_cannot_read(converted, photographs):
    bad = ["cut.png", "missing.png", "wide.tif", "real.tif", "bomb.png"]
    done = call("predict.py", str(converted[0] / "model.onnx"), "rgb.png", *bad, cwd=photographs)
    assert done.returncode == 1
    assert list(classes(done.stdout)) == ["rgb.png"]
    assert all(name in done.stderr for name in bad)
    assert "error: 5 of 6 images could not be read" in done.stderr
    assert "Traceback" not in done.stderr
    failed = call("predict.py", "nowhere.onnx", "rgb.png", cwd=photographs)
    assert failed.returncode == 1
    assert failed.stderr.startswith("error: nowhere.onnx: there is no such file")


def test_predict_refuses_what_convert_did_not_write(converted, tmp_path, capsys):
    def fails(message, path):
        with pytest.raises(ValueError, match=message):
            load_verified(path)

    fails("only .onnx and .safetensors", converted[0] / "model.pt2")
    for name in ("model.onnx", "model.safetensors"):
        folder = tmp_path / name
        folder.mkdir()
        shutil.copy(converted[0] / "report.json", folder)
        content = bytearray((converted[0] / name).read_bytes())
        content[len(content) // 2] ^= 1
        (folder / name).write_bytes(content)
        fails("another SHA-256", folder / name)
        (folder / "report.json").write_text("{}")
        fails("does not say what", folder / name)
        (folder / "report.json").unlink()
        load_verified(folder / name)
        assert "was not verified" in capsys.readouterr().err
        (folder / name).write_bytes(content[:1000])
        fails("cannot be read", folder / name)
    weights, path = load_file(converted[0] / "model.safetensors"), tmp_path / "other.safetensors"
    path.write_bytes(b"")
    fails("cannot be read", path)
    _, about = files.load_network(converted[0] / "model.safetensors")
    odd, no_std = {"model": ["os"], "classes": 3}, about | {"std": [1.0, 0.0, 1.0]}
    for header in (None, "no JSON", json.dumps(odd), json.dumps(no_std)):
        save_file(weights, path, header and {"dbb": header})
        fails("no header of convert.py", path)


def test_the_picture_names_the_average():
    """Average pooling is a convolution with a constant kernel in the file; its box says what it is."""
    net = nn.Sequential(DiverseBranchBlock(3, 4, 3, padding=1)).eval()
    name, before, after = graph.first_block(net, torch.zeros(2, 3, 8, 8))
    kernels = [node.kernel for node in before if node.kind == "Conv"]
    assert kernels == ["3x3, 3 to 4", "1x1, 3 to 4", "1x1, 3 to 4", "3x3 average pooling\n4 channels",
                       "1x1, 3 to 3", "3x3, 3 to 4"]
    assert (name, [(node.kind, node.kernel) for node in after]) == ("0", [("Conv", "3x3, 3 to 4")])


def test_a_conversion_does_not_take_the_place_of_something_else(trained, make_settings, tmp_path):
    (tmp_path / "report.md").mkdir()
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "model.onnx").write_text("somebody's")
    (tmp_path / "coverage").mkdir()
    (tmp_path / "coverage" / "report.json").write_text('{"meta": {}, "files": {"a.py": {}}}')
    for out in (tmp_path, tmp_path / "other", tmp_path / "coverage"):
        before = sorted(out.rglob("*"))
        with pytest.raises(ValueError, match="what stands there is of no earlier conversion"):
            convert_script.convert(make_settings(f"ckpt={trained}", config_name="convert"), out)
        assert sorted(out.rglob("*")) == before


def test_a_later_conversion_replaces_what_an_earlier_one_wrote(trained, make_settings, tmp_path, capsys):
    """Nothing else; and it clears what one that was killed has left."""
    (tmp_path / "hub").mkdir()
    for name in ("model.pt2", "hub/config.json"):
        (tmp_path / name).write_text("somebody's")
    with subprocess.Popen([sys.executable, "-c", ""]) as ended:
        pass
    left = tmp_path / f".part-{platform.node()}+{ended.pid}-abc"
    left.mkdir()
    (tmp_path / f".part-{platform.node()}+{10**20}-abc").mkdir()
    convert_script.convert(make_settings(f"ckpt={trained}", config_name="convert"), tmp_path)
    assert (tmp_path / "model.onnx").exists()
    report = json.loads((tmp_path / "report.json").read_text())
    report["files"] |= {"../outside": {}, "model.txt": {}}
    (tmp_path / "report.json").write_text(json.dumps(report))
    outside = tmp_path.parent / "outside"
    outside.write_text("somebody's")
    (tmp_path / "graphs.png").write_text("somebody's")
    convert_script.convert(make_settings(f"ckpt={trained}", "export=[]", config_name="convert"), tmp_path)
    assert outside.exists()
    assert {str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*")} == {
        "hub", "hub/config.json", "model.pt2", "model.safetensors", "report.md", "report.json", "report.png",
        "graphs.png"}
    assert (tmp_path / "model.pt2").read_text() == "somebody's"
    assert f"removed from {tmp_path}: model.onnx, of the conversion before" in capsys.readouterr().out


def test_a_conversion_is_for_the_size_and_classes_of_the_training(trained, make_settings, tmp_path):
    def fails(message, *overrides):
        with pytest.raises(ValueError, match=message):
            convert_script.convert(make_settings(f"ckpt={trained}", *overrides, config_name="convert"),
                                   tmp_path / "convert")

    fails("trained on images of 8 pixels", "data.image_size=16")
    tree = write_tree(tmp_path / "tree", ("train", "val"), [f"class{i}" for i in range(10)], 1, (8, 8))
    fails("other classes .* class0 where that has 0", "data=folder", f"data.root={tree}",
          "data.image_size=8", "data.batch_size=2")
    assert not (tmp_path / "convert").exists()


def test_a_conversion_that_is_killed_while_files_take_their_places(tmp_path, monkeypatch, capsys):
    """The next one knows them all for a conversion's own; that of another checkpoint says so."""
    report = {"about": {}, "relative_error": 0.0, "hub": []}

    def write(names):
        with staged(tmp_path) as part:
            for name in names:
                (part / name).write_text("weights")
            (part / "report.json").write_text(json.dumps(report | {"files": dict.fromkeys(names, {})}))
    write(["model.safetensors", "model.onnx"])
    placed, replace = [], Path.replace

    def killed(self, place):
        if placed:
            raise KeyboardInterrupt
        placed.append(place)
        return replace(self, place)
    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", killed)
        with pytest.raises(KeyboardInterrupt):
            write(["model.safetensors"])
    assert placed == [tmp_path / "report.json"]
    require_place(tmp_path, ["model.safetensors", "model.onnx"])
    write(["model.safetensors", "model.onnx"])
    assert {path.name for path in tmp_path.iterdir()} == {"model.safetensors", "model.onnx", "report.json"}
    assert "another checkpoint" not in capsys.readouterr().out
    report["about"] = {"checkpoint_sha256": "another"}
    write(["model.safetensors"])
    assert "had the conversion of another checkpoint" in capsys.readouterr().out
