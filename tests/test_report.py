"""report.py against numbers worked out here, and what it does with runs that failed or stopped."""

import csv
import json

import numpy as np
import pytest
from omegaconf import OmegaConf

import report as report_script

PLAIN = {"name": "none", "branches": [], "mode": "exact", "init": None}
DBB = {"name": "dbb", "branches": ["kxk", "1x1"], "mode": "exact", "init": None}


def write_run(folder, block, seed, top1=None, epochs=2, done=None, seconds=0.1, lr=0.1, loss=1.0):
    """A run's folder as train.py leaves it; without `top1`, one that stopped after `done` epochs."""
    folder.mkdir(parents=True)
    settings = {"model": {"name": "resnet8"}, "block": block, "optim": {"lr": lr}, "trainer": {"max_epochs": epochs}, "seed": seed,
                "ckpt": None, "out": None, "logger": {"id": f"{seed}", "name": "csv"}}
    OmegaConf.save(OmegaConf.create(settings), folder / "config.yaml")
    with (folder / "metrics.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, ["epoch", "step", "train/loss_step", "train/loss_epoch", "test/top1", "test/loss",
                                       "train/seconds_per_step"])
        writer.writeheader()
        for epoch in range(epochs if done is None else done):
            step = 10 * epoch + 9
            writer.writerow({"epoch": epoch, "step": step - 5, "train/loss_step": 3.0})
            writer.writerow({"epoch": epoch, "step": step, "test/top1": 0.1 * epoch, "test/loss": 2.0})
            writer.writerow({"epoch": epoch, "step": step, "train/loss_epoch": loss, "train/seconds_per_step": seconds})
    if top1 is not None:
        (folder / "result.json").write_text(json.dumps({
            "top1": top1, "converted_top1": top1, "predictions_changed": 0, "activations_mib": 2.0 if block is PLAIN else 5.0}))


def study(folder, **kwargs):
    for seed, (plain, dbb) in enumerate([(0.70, 0.73), (0.72, 0.73), (0.71, 0.76)]):
        write_run(folder / f"plain{seed}", PLAIN, seed, plain)
        write_run(folder / f"dbb{seed}", DBB, seed, dbb, seconds=0.3, **kwargs)


def compare(folder, baseline=None):
    runs, epochs = report_script.read_runs([folder])
    runs["arm"] = report_script.name_arms(runs)
    arms = report_script.compare_arms(runs, baseline)
    return runs, epochs, arms.set_index("arm"), report_script.markdown(runs, arms, [folder])


def test_paired_difference_and_its_interval(tmp_path):
    study(tmp_path)
    _, epochs, arms, text = compare(tmp_path)
    assert list(arms.index) == ["dbb", "none"]
    differences = np.array([3.0, 1.0, 5.0])
    half = 4.302652729911275 * np.sqrt(((differences - 3) ** 2).sum() / 2) / np.sqrt(3)  # Student's t, 2 degrees of freedom, 97.5%
    dbb = arms.loc["dbb"]
    assert (dbb["n"], dbb["baseline"]) == (3, "none")
    assert dbb[["difference", "low", "high"]].tolist() == pytest.approx([3, 3 - half, 3 + half])
    assert dbb["top1"] == pytest.approx(74)
    assert dbb["top1_std"] == pytest.approx(np.sqrt(3))
    assert dbb["milliseconds_per_step"] == pytest.approx(300)
    assert dbb["seconds"] == pytest.approx(20 * 0.3)
    assert "300 (3.00x) | 5.0 (2.50x)" in text
    assert f"+3.00 | {3 - half:+.2f} to {3 + half:+.2f}" in text
    assert "All runs are finished." in text
    assert len(epochs) == 12
    assert epochs["epoch"].max() == 2


def test_equal_compute_takes_the_plain_run_of_equal_time(tmp_path):
    study(tmp_path)
    _, _, arms, text = compare(tmp_path)
    assert "| dbb | none yet: trainer.max_epochs=6 would do |" in text
    for seed, top1 in enumerate([0.74, 0.75, 0.74]):
        write_run(tmp_path / f"long{seed}", PLAIN, seed, top1, epochs=6)
    _, _, arms, text = compare(tmp_path)
    dbb = arms.loc["dbb, trainer.max_epochs=2"]
    assert dbb["equal_compute"] == "none, trainer.max_epochs=6"
    assert dbb["time_ratio"] == pytest.approx(1)
    assert dbb["difference_equal_compute"] == pytest.approx(np.mean([-1, -2, 2]))
    assert dbb["difference"] == pytest.approx(3), "equal epochs as before"


def test_unfinished_and_failed_runs_are_listed(tmp_path):
    study(tmp_path)
    write_run(tmp_path / "stopped", DBB, 3, done=1)
    write_run(tmp_path / "failed", DBB, 4, done=0)
    (tmp_path / "failed" / "error.txt").write_text("error: out of memory\n")
    (tmp_path / "never").mkdir()
    (tmp_path / "never" / "error.txt").write_text("error: no such data\n")
    runs, _, arms, text = compare(tmp_path)
    assert arms["n"].tolist() == [3, 3]
    assert "Not in the tables: 3 of 9 runs" in text
    assert f"`{tmp_path}/stopped`: not finished (1 of 2 epochs)" in text
    assert f"`{tmp_path}/failed`: error: out of memory (0 of 2 epochs)" in text
    assert f"`{tmp_path}/never`: error: no such data" in text


def test_arms_are_named_by_what_differs(tmp_path):
    for seed in (0, 1):
        for init in ("ones", "third"):
            write_run(tmp_path / f"{init}{seed}", DBB | {"init": init}, seed, 0.5 + 0.01 * seed + 0.1 * (init == "third"))
    _, _, arms, _ = compare(tmp_path)
    assert set(arms.index) == {"block.init=ones", "block.init=third"}
    assert "baseline" not in arms
    _, _, arms, _ = compare(tmp_path, "block.init=ones")
    assert arms.loc["block.init=third", "difference"] == pytest.approx(10)
    with pytest.raises(ValueError, match="--baseline plain: there is no such arm; the arms are block.init=ones; block.init=third"):
        compare(tmp_path, "plain")


def test_a_comparison_does_not_mix_what_else_differs(tmp_path):
    study(tmp_path)
    for seed in range(3):
        write_run(tmp_path / f"fast{seed}", DBB, seed, 0.9, lr=0.2)
    _, _, arms, _ = compare(tmp_path)
    assert np.isnan(arms.loc["dbb, optim.lr=0.2", "difference"]), "no plain network was trained with that lr"
    assert arms.loc["dbb, optim.lr=0.1", "difference"] == pytest.approx(3)


def test_what_cannot_be_compared(tmp_path):
    with pytest.raises(ValueError, match="no finished run below"):
        compare(tmp_path)
    study(tmp_path)
    write_run(tmp_path / "again", DBB, 1, 0.9)
    with pytest.raises(ValueError, match="seed 1 of dbb is there twice"):
        compare(tmp_path)
