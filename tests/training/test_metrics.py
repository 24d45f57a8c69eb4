"""metrics.csv: what a kill or a full disk leaves of it, and how a run goes on with it."""

from pathlib import Path

import pytest
from pytorch_lightning.utilities import rank_zero_only

from runs.folder import RunFolder
from training.metrics import csv_logger


def test_new_columns_leave_the_file_whole(tmp_path, monkeypatch):
    """As at the end of a run: killed in the middle of it, the rows before are all there."""
    logger, path = csv_logger(RunFolder(tmp_path)), tmp_path / "metrics.csv"
    for epoch in range(3):
        logger.log_metrics({"loss": 0.5 + epoch}, epoch)
        logger.save()
    before = path.read_bytes()
    logger.log_metrics({"final/top1": 0.9}, 3)
    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", lambda *args: pytest.fail("killed"))
        with pytest.raises(pytest.fail.Exception):
            logger.save()
    assert path.read_bytes() == before
    logger = csv_logger(RunFolder(tmp_path), 3, 3)
    logger.log_metrics({"final/top1": 0.9}, 3)
    logger.save()
    assert path.read_text().split() == ["final/top1,loss,step", ",0.5,0", ",1.5,1", ",2.5,2", "0.9,,3"]


@pytest.mark.parametrize("damage", [
    "loss,step\n0.5,0\n1.5,1\n2.5", "loss,step\n0.5,0\n1,2,3,4\n1.5,1\n", "loss,step\n0.5,0\n\n1.5,1\n9",
    'loss,step\n0.5,0\n"7\n1.5,1\n', "# my best run\nloss,step\n0.5,0\n1.5,1\n"])
def test_damaged_lines_are_left_out(tmp_path, capsys, damage):
    path = tmp_path / "metrics.csv"
    path.write_text(damage)
    logger = csv_logger(RunFolder(tmp_path), 3, 3)
    logger.log_metrics({"loss": 3.5, "more": 1}, 3)
    logger.save()
    assert path.read_text().split() == ["loss,more,step", "0.5,,0", "1.5,,1", "3.5,1,3"]
    assert "metrics.csv: damaged lines are left out" in capsys.readouterr().out


def test_edited_files(tmp_path, capsys):
    """A column of somebody's stays, in its place by name; what cannot be read at all is kept elsewhere."""
    path = tmp_path / "metrics.csv"
    path.write_bytes(b"\xef\xbb\xbfloss,step,A note\n0.5,0,mine\n")
    logger = csv_logger(RunFolder(tmp_path), 3, 3)
    logger.log_metrics({"loss": 3.5}, 3)
    logger.save()
    assert path.read_text().splitlines() == ["A note,loss,step", "mine,0.5,0", ",3.5,3"]
    path.write_text("loss;step\n0.5;0\n")
    csv_logger(RunFolder(tmp_path), 3, 3)
    assert "metrics.csv has no line of names with step in it" in capsys.readouterr().out
    assert (tmp_path / "metrics-damaged.csv").read_text() == "loss;step\n0.5;0\n"
    path.write_text("loss;step\n")
    csv_logger(RunFolder(tmp_path), 3, 3)
    assert (tmp_path / "metrics-damaged.csv").read_text() == "loss;step\n0.5;0\n", "an earlier one stays"


def test_what_a_kill_left_beside(tmp_path):
    """The file itself under another name, while a logger started; where both are there, somebody else's."""
    path, kept = tmp_path / "metrics.csv", tmp_path / "metrics-before-resume.csv"
    kept.write_text("loss,step\n0.5,0\n1.5,1\n2.5,2\n")
    csv_logger(RunFolder(tmp_path), 1, 2)
    assert path.read_text().split() == ["loss,step", "0.5,0", "1.5,1"]
    kept.write_text("mine")
    csv_logger(RunFolder(tmp_path), 1, 2)
    assert path.read_text().split() == ["loss,step", "0.5,0", "1.5,1"]
    assert (tmp_path / "metrics-before-resume-damaged.csv").read_text() == "mine"


def test_rows_of_what_is_done_again_are_left_out(tmp_path, capsys):
    """Of later steps, and of an epoch that is not done, which trainer.max_time had evaluated."""
    rows = ["epoch,step,test/top1,train/loss_epoch,train/loss_step", "0,9,,,0.7", "0,19,0.5,,", "0,19,,0.6,",
            "1,20,,,0.5", "1,20,0.4,,", "1,20,,0.5,", "1,29,,,0.4", "2,40,0.9,,"]
    path = tmp_path / "metrics.csv"
    path.write_text("\n".join(rows) + "\n")
    csv_logger(RunFolder(tmp_path), 1, 21)
    assert path.read_text().split() == rows[:5]
    assert "rows of what is done again are left out: 4" in capsys.readouterr().out


def test_an_empty_file(tmp_path):
    (tmp_path / "metrics.csv").touch()
    logger = csv_logger(RunFolder(tmp_path))
    logger.log_metrics({"loss": 3.5}, 3)
    logger.save()
    assert (tmp_path / "metrics.csv").read_text().split() == ["loss,step", "3.5,3"]


def test_other_processes_touch_no_file(tmp_path, monkeypatch):
    """With torchrun they come here when they like, while the first one has the file moved away."""
    monkeypatch.setattr(rank_zero_only, "rank", 1)
    folder = RunFolder(tmp_path)
    for path in ([folder.metrics_before], [folder.metrics, folder.metrics_before]):
        for file in path:
            file.write_text("epoch,step\n0,1\n")
        csv_logger(folder, 1, 2)
        assert sorted(tmp_path.iterdir()) == sorted(path)
