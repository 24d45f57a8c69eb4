"""What tools/run_picture.py draws of a run's TensorBoard files, whoever wrote them."""

import os

import pytest
from matplotlib.axes import Axes
from torch.utils.tensorboard import SummaryWriter

from tools.run_picture import CURVES, draw


def test_names_of_layers_are_no_formulas(tmp_path):
    with SummaryWriter(str(tmp_path / "run")) as writer:
        for layer in ("a$\\frac$", "b"):
            for name in (f"share/{layer}/kxk", f"gamma/{layer}/kxk", f"share/{layer}/$\\evil{{$"):
                writer.add_scalar(name, 0.5, 1)
    draw(tmp_path / "run", tmp_path / "run.png")
    assert (tmp_path / "run.png").stat().st_size > 10_000


def test_a_run_of_one_layer_and_too_many_branches(tmp_path, monkeypatch):
    with SummaryWriter(str(tmp_path / "run")) as writer:
        for index in range(100):
            writer.add_scalar(f"share/conv1/{index}", 0.5, 1)
        writer.add_scalar("share/conv1/kxk", 0.5, 1)
    drawn = []
    monkeypatch.setattr(Axes, "plot", lambda self, *points, label: drawn.append(label))
    draw(tmp_path / "run", tmp_path / "run.png")
    assert sum(label.isdigit() for label in drawn) == CURVES


def test_a_folder_with_pipes_or_without_runs(tmp_path):
    with pytest.raises(ValueError, match="no TensorBoard files of a run with blocks"):
        draw(tmp_path, tmp_path / "run.png")
    os.mkfifo(tmp_path / "events.out.tfevents.1.x")
    with pytest.raises(ValueError, match="is a link or a device"):
        draw(tmp_path, tmp_path / "run.png")
