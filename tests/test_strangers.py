"""Files of somebody who means harm: a sentence each, and neither memory, a secret nor a file is lost."""

import contextlib
import json
import os
import random
import shutil
from pathlib import Path

import onnx
import pytest
import torch
import yaml
from PIL import Image

import predict as predict_script
from export.files import load_network
from export.graph import OnnxNetwork
from images.reading import read_pixels
from models.checkpoint import load_checkpoint
from reports.study import MARK
from tests.helpers import TINY, call

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """The folder of a run, converted."""
    folder = tmp_path_factory.mktemp("run")
    assert call("train.py", "model=resnet8_dbb", *TINY, "out=run", cwd=folder).returncode == 0
    assert call("convert.py", "ckpt=run/checkpoints/last.ckpt", cwd=folder).returncode == 0
    return folder / "run"


def test_links_are_not_followed(run, tmp_path):
    """In a folder of a stranger's, they may lead to any file of whoever opens it."""
    victim, folder = tmp_path / "victim", tmp_path / "run"
    shutil.copytree(run, folder)
    (victim / "hub").mkdir(parents=True)
    mine = [victim / name for name in ("b", "d", "hub/config.json", "hub/model.safetensors")]
    for path in mine:
        path.write_text("mine")
    (folder / "checkpoints" / ".last.ckpt.part").symlink_to(victim / "b")
    (folder / "convert" / "hub").symlink_to(victim / "hub")
    (tmp_path / "other" / "checkpoints").mkdir(parents=True)
    shutil.copy(run / "checkpoints" / "last.ckpt", tmp_path / "other" / "checkpoints")
    (tmp_path / "other" / "convert").symlink_to(victim)
    done = call("convert.py", "ckpt=other/checkpoints/last.ckpt", "export=[]", cwd=tmp_path)
    assert "convert is a link or a device, and a run's folder has files and folders of its own" in done.stderr
    report = folder / "convert" / "report.json"
    report.write_text(json.dumps(json.loads(report.read_text()) | {"hub": ["hub/config.json"]}))
    (tmp_path / "study").mkdir()
    (tmp_path / "study" / "report.md").write_text(MARK)
    (tmp_path / "study" / "runs.csv").symlink_to(victim / "d")
    last = "ckpt=run/checkpoints/last.ckpt"
    for command in (["report.py", "run", "--out", "study"], ["train.py", last, "trainer.max_epochs=2"],
                    ["convert.py", last, "export=[]"]):
        done = call(*command, cwd=tmp_path)
        assert done.returncode == 0, done.stderr
    assert {path.read_text() for path in mine} == {"mine"}
    assert not (tmp_path / "study" / "runs.csv").is_symlink()


def test_errors_of_a_stranger_forge_nothing(run, tmp_path, monkeypatch):
    """Only a sentence of ours is shown of error.txt, in one line; a link may lead to a secret."""
    monkeypatch.setenv("SECRET", "of mine")
    texts = {"one": "error: a\x1b[2J\n| 1 | <img src=x> |", "two": "x $(touch PWNED)", "three": None}
    for name, text in texts.items():
        shutil.copytree(run, tmp_path / "study" / name, ignore=lambda *_: ["checkpoints", "convert"])
        (tmp_path / "study" / name / "result.json").unlink()
        error = tmp_path / "study" / name / "error.txt"
        error.symlink_to("/proc/self/environ") if text is None else error.write_text(text)
    shutil.copytree(run, tmp_path / "study" / "good", ignore=lambda *_: ["checkpoints", "convert"])
    done = call("report.py", "study", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    page = (tmp_path / "study" / "report.md").read_text()
    assert r"`study/one`: error: a\\x1b\[2J (1 of 1 epochs)" in page
    assert "`study/two`: not finished" in page
    for text in ("of mine", "<img", "PWNED", "\x1b"):
        assert text not in page + done.stdout


@pytest.mark.parametrize(("name", "change"), [
    ("config.yaml", lambda c: c["trainer"].pop("accumulate_grad_batches")),
    ("config.yaml", lambda c: c.pop("block")),
    ("config.yaml", lambda c: c["trainer"].update(accumulate_grad_batches="x")),
    ("config.yaml", lambda c: c.update({7: 7, "more": {5: 1}})),
    ("config.yaml", lambda c: c.update(seed=10**400)),
    ("config.yaml", lambda c: c["optim"].update(lr=float("nan"))),
    ("result.json", lambda c: c.pop("converted_top1")), ("result.json", lambda c: c.update(settings=3)),
    ("result.json", lambda c: c.update(predictions_changed=float("inf"))),
    ("result.json", lambda c: c.update(changed=5)), ("result.json", lambda c: c.update(top1="0.095")),
    ("result.json", lambda c: c.update(state="x", folder="y"))])
def test_runs_of_other_forms(run, tmp_path, name, change):
    """Each is told, and costs the report no other run."""
    for copy in ("good", "odd"):
        shutil.copytree(run, tmp_path / "study" / copy, ignore=lambda *_: ["checkpoints", "convert"])
    path = tmp_path / "study" / "odd" / name
    content = yaml.safe_load(path.read_text())
    content.update(seed=1) if name == "config.yaml" else None
    change(content)
    path.write_text(yaml.safe_dump(content) if name == "config.yaml" else json.dumps(content))
    done = call("report.py", "study", cwd=tmp_path)
    assert "Traceback" not in done.stderr
    assert done.returncode == 0 or "is there twice" in done.stderr, done.stderr


def test_predict_shows_names_as_they_are(run, tmp_path, capsys, monkeypatch):
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    names = [f"cat\n/etc/passwd  1.0\x1b[2J{i}" for i in range(10)]
    net, about = load_network(run / "convert" / "model.safetensors")
    monkeypatch.setattr(predict_script, "load_verified", lambda path: (net, about | {"classes": names}))
    monkeypatch.setattr("sys.argv", ["predict.py", "model.onnx", str(tmp_path / "a.png")])
    predict_script.main()
    printed = capsys.readouterr().out
    assert len(printed.splitlines()) == 6
    assert "\x1b" not in printed
    assert r"cat\n/etc/passwd  1.0\x1b[2J" in printed


@pytest.mark.parametrize("kind", ["another output", "a loop", "a function", "values elsewhere", "sparse",
                                  "a loop inside", "no text"])
def test_onnx_files_of_other_forms(run, tmp_path, kind):
    model = onnx.load(run / "convert" / "model.onnx")
    if kind == "another output":
        model.graph.output.append(model.graph.input[0])
    elif kind == "a function":  # which could hold a loop
        model.functions.append(onnx.helper.make_function("a", "b", ["x"], ["x"], [], model.opset_import))
    elif kind == "values elsewhere":  # of which the hash in report.json says nothing
        onnx.save(model, tmp_path / "a.onnx", save_as_external_data=True, size_threshold=0)
        model = onnx.load(tmp_path / "a.onnx", load_external_data=False)
    elif kind == "sparse":
        place = onnx.StringStringEntryProto(key="location", value="inside.bin")
        (tmp_path / "inside.bin").write_bytes(bytes(4))
        values = onnx.TensorProto(name="s", data_type=1, dims=[1], data_location=1, external_data=[place])
        indices = onnx.helper.make_tensor("i", onnx.TensorProto.INT64, [1], [0])
        sparse = onnx.SparseTensorProto(values=values, indices=indices, dims=[1])
        model.graph.sparse_initializer.append(sparse)
    elif kind == "a loop inside":  # of an operator that is none
        body = onnx.helper.make_graph([], "body", [], [])
        model.graph.node.append(onnx.helper.make_node("SequenceMap", [""], [], body=body))
    else:
        body = onnx.helper.make_graph([], "body", [], [])
        limit = onnx.helper.make_node("Loop", ["", ""], [], body=body)
        model.graph.node.append(limit)
    onnx.save(model, tmp_path / "a.onnx")
    if kind == "no text":
        path = tmp_path / "a.onnx"
        path.write_bytes(path.read_bytes().replace(b'"model"', b'"mod\xffl"'))
    with pytest.raises(ValueError, match=r"no file of convert.py|a\.onnx cannot be read"):
        OnnxNetwork(Path(tmp_path / "a.onnx"))


def test_predict_takes_a_number_for_each_class(run, tmp_path, monkeypatch):
    monkeypatch.setattr(predict_script, "prepare", lambda path, about: torch.zeros(3, 8, 8))
    about = {"image_size": 8, "classes": ["a", "b"]}
    for logits in (torch.zeros(1, 20), torch.zeros(1, 2, dtype=torch.int64), torch.zeros(2)):
        with pytest.raises(ValueError, match="not a number for each of 2 classes"):
            [*predict_script.predictions(lambda images, logits=logits: logits, about, ["a.png"])]
    with pytest.raises(ValueError, match="infinite or no numbers"):
        [*predict_script.predictions(lambda images: torch.full((1, 2), torch.nan), about, ["a.png"])]
    sizes = []
    about["image_size"] = 2048  # as many pixels at once as of smaller images
    [*predict_script.predictions(lambda images: sizes.append(len(images)) or torch.zeros(len(images), 2),
                                 about, ["a.png"] * 9)]
    assert sizes == [2, 2, 2, 2, 1]


def damaged(content: bytes, draw: random.Random) -> bytes:
    """Bytes changed at a few places, or cut."""
    changed = bytearray(content)
    for _ in range(draw.randint(1, 8)):
        changed[draw.randrange(len(changed))] = draw.randrange(256)
    return bytes(changed[:draw.randrange(len(changed))] if draw.random() < 0.2 else changed)


@pytest.mark.filterwarnings("ignore::UserWarning")  # Pillow's, of what it finds
@pytest.mark.parametrize("kind", ["png", "jpg", "gif", "tif", "bmp", "webp", "safetensors", "ckpt"])
def test_damaged_files_are_read_or_refused(run, tmp_path, kind):
    """More with FUZZ=COUNT."""
    file, read = tmp_path / f"a.{kind}", read_pixels
    if kind == "safetensors":
        content, read = (run / "convert" / "model.safetensors").read_bytes(), load_network
    elif kind == "ckpt":
        content, read = (run / "checkpoints" / "last.ckpt").read_bytes(), load_checkpoint
    else:
        Image.effect_noise((24, 16), 90).convert("RGB").save(file)
        content = file.read_bytes()
    draw = random.Random(0)
    for _ in range(int(os.environ.get("FUZZ", 30))):
        file.write_bytes(damaged(content, draw))
        with contextlib.suppress(ValueError):
            read(str(file))
