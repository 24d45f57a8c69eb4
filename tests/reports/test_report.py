"""report.py against numbers worked out here, and what it does with runs that failed or stopped."""

import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

import report as report_script
from reports.runs import RESULT
from reports.study import draw_curves, markdown
from tests.helpers import ROOT
from tests.reports.studies import DBB, PLAIN, compare, study, write_run

pytestmark = pytest.mark.slow


def test_paired_difference_and_its_interval(tmp_path):
    study(tmp_path)
    _, epochs, variants, text = compare(tmp_path)
    assert list(variants.index) == ["dbb", "none"]
    differences = np.array([3.0, 1.0, 5.0])
    t = 4.302652729911275  # Student's, 2 degrees of freedom, 97.5%
    half = t * np.sqrt(((differences - 3) ** 2).sum() / 2) / np.sqrt(3)
    dbb = variants.loc["dbb"]
    assert (dbb["n"], dbb["baseline"]) == (3, "none")
    assert dbb[["difference", "low", "high"]].tolist() == pytest.approx([3, 3 - half, 3 + half])
    assert dbb["top1"] == pytest.approx(74)
    assert dbb["top1_std"] == pytest.approx(np.sqrt(3))
    assert dbb["milliseconds_per_step"] == pytest.approx(300), "the median"
    assert dbb["seconds"] == pytest.approx(20 * 0.3)
    assert dbb["train_loss"] == pytest.approx(4 + 1.2), "of the last epoch"
    assert dbb["train_loss_std"] == pytest.approx(0.1 * np.sqrt(3))
    assert (dbb["converted_top1"], dbb["predictions_changed"]) == (pytest.approx(73), 6)
    assert "73.00 (6 changed) | 300 (3.00x) | 5.0 (2.50x)" in text
    assert f"| +3.00 | {3 - half:+.2f} to {3 + half:+.2f} | {3 - half:+.2f} to {3 + half:+.2f} |" in text
    assert "All 6 runs found are finished." in text
    assert "lacks" not in text
    assert len(epochs) == 12
    assert epochs["epoch"].max() == 2


def test_intervals_that_hold_together(tmp_path):
    """Two comparisons, by Bonferroni: each with a confidence of 97.5%."""
    study(tmp_path)
    for seed, top1 in enumerate([0.71, 0.72, 0.72]):
        write_run(tmp_path / f"acb{seed}", DBB | {"name": "acb"}, seed, top1)
    _, _, variants, text = compare(tmp_path)
    t = 6.205346816570644  # Student's, 2 degrees of freedom, 98.75%
    half = t * 2 / np.sqrt(3)
    assert variants.loc["dbb", ["low_all", "high_all"]].tolist() == pytest.approx([3 - half, 3 + half])
    assert variants.loc["acb", "high_all"] > variants.loc["acb", "high"]
    assert f"{3 - half:+.2f} to {3 + half:+.2f}" in text


def test_equal_time_takes_the_plain_run_of_equal_time(tmp_path):
    study(tmp_path)
    _, _, variants, text = compare(tmp_path)
    assert "| dbb | not run yet: train it with trainer.max_epochs=6 |" in text
    for seed, top1 in enumerate([0.74, 0.75, 0.74]):
        write_run(tmp_path / f"long{seed}", PLAIN, seed, top1, epochs=6)
        write_run(tmp_path / f"other{seed}", PLAIN, seed, 0.9, epochs=6, lr=0.2)
    for baseline in (None, "none, optim.lr=0.1, trainer.max_epochs=6"):
        _, _, variants, text = compare(tmp_path, baseline)
        dbb = variants.loc["dbb, optim.lr=0.1, trainer.max_epochs=2"]
        assert dbb["equal_time"] == "none, optim.lr=0.1, trainer.max_epochs=6"
        assert dbb["time_ratio"] == pytest.approx(1)
        assert dbb["difference_equal_time"] == pytest.approx(np.mean([-1, -2, 2]))
        assert dbb["difference"] == pytest.approx(3), "equal epochs as before"
        assert "| none, optim.lr=0.1, trainer.max_epochs=6 | 1.00 | -0.33 |" in text
        if baseline is None:
            curves = variants["curve"].dropna()
            of_lr = {name: curve for name, curve in curves.items() if "lr=0.1" in name}
            assert len(of_lr) == 2
            assert set(of_lr.values()) == {"none, optim.lr=0.1, trainer.max_epochs=2"}
            assert curves.to_dict() == of_lr | {name: name for name in curves.index if name not in of_lr}
        compared = 1 if baseline is None else 2
        assert variants["equal_time"].notna().sum() == compared, "plain ones only when asked for"


@pytest.mark.parametrize(("seconds", "near"), [
    (0.15, False), (0.128, False), (0.12, True), (0.078, False), (0.083, True)])
def test_what_equal_time_is(tmp_path, seconds, near):
    for seed in range(2):
        write_run(tmp_path / f"plain{seed}", PLAIN, seed, 0.7, epochs=4)
        write_run(tmp_path / f"dbb{seed}", DBB, seed, 0.7, epochs=4, seconds=seconds)
    _, _, _, text = compare(tmp_path)
    assert ("not run yet: " not in text) == near


def test_time_counts_batches_not_the_steps_of_the_optimiser(tmp_path):
    write_run(tmp_path / "one", DBB, 0, 0.7, accumulate=4)
    assert compare(tmp_path)[2].loc["all runs", "seconds"] == pytest.approx(20 * 4 * 0.1)


def test_seeds_without_a_partner(tmp_path):
    """Two variants whose seeds are partly the same, and one that shares none."""
    study(tmp_path)
    write_run(tmp_path / "more", DBB, 7, 0.99)
    acb = DBB | {"name": "acb", "branches": ["kxk", "1xk"]}
    write_run(tmp_path / "acb", acb, 8, 0.99)
    _, _, variants, text = compare(tmp_path)
    assert variants.loc["dbb", ["n", "pairs", "difference"]].tolist() == [4, 3, pytest.approx(3)]
    assert "+3.00 (3 pairs)" in text
    assert "Seeds that others have: acb lacks 0, 1, 2, 7; dbb lacks 8; none lacks 7, 8." in text
    assert "no seed in common" in text
    write_run(tmp_path / "acb1", acb, 1, 0.82)
    assert "+10.00 (1 pairs) | one pair only" in compare(tmp_path)[3]


def test_unfinished_and_failed_runs_are_listed(tmp_path):
    study(tmp_path)
    write_run(tmp_path / "stopped", DBB, 3, done=1)
    write_run(tmp_path / "failed", DBB, 4, done=0)
    (tmp_path / "failed" / "error.txt").write_text("error: out of memory\n")
    (tmp_path / "never").mkdir()
    (tmp_path / "never" / "error.txt").write_text("error: no such data\n")
    write_run(tmp_path / "killed", DBB, 5, 0.9)
    (tmp_path / "killed" / "result.json").write_text('{"top1": 0.')
    write_run(tmp_path / "begun", DBB, 6, lr=0.7)
    (tmp_path / "begun" / "metrics.csv").write_text("")
    (tmp_path / "asked").mkdir()
    (tmp_path / "asked" / ".lock").touch()
    (tmp_path / "dbb0" / "wandb").mkdir()  # W&B's own file, of a run online
    config = "trainer: {value: {max_epochs: 2}}\nseed: {value: 0}\n"
    (tmp_path / "dbb0" / "wandb" / "config.yaml").write_text(config)
    runs, epochs, variants, text = compare(tmp_path)
    assert variants["n"].to_dict() == {"dbb": 3, "none": 3}, "and the names are of what is finished"
    assert "Not in the tables: 6 of 12 runs" in text
    assert f"`{tmp_path}/killed`: {tmp_path}/killed/result.json is damaged" in text
    assert f"`{tmp_path}/begun`: not finished (0 of 2 epochs)" in text
    assert f"`{tmp_path}/asked`: stopped before it began" in text
    assert f"`{tmp_path}/stopped`: not finished (1 of 2 epochs)" in text
    assert f"`{tmp_path}/failed`: error: out of memory (0 of 2 epochs)" in text
    assert f"`{tmp_path}/never`: error: no such data" in text
    named = runs.set_index("folder")["variant"]
    assert named[str(tmp_path / "begun")] == "", "it has an lr that no finished run has"
    assert named[str(tmp_path / "stopped")] == "dbb"


def test_a_run_that_went_on_with_other_settings_is_no_variant(tmp_path):
    study(tmp_path)
    changed = "trainer.max_epochs: 2 until epoch 2, then 6"
    for seed in range(3):
        write_run(tmp_path / f"stretched{seed}", PLAIN, seed, 0.9, epochs=6)
        path = tmp_path / f"stretched{seed}" / "result.json"
        result = json.loads(path.read_text()) | {"changed": [changed]}
        path.write_text(json.dumps(result))
    _, _, variants, text = compare(tmp_path)
    assert set(variants.index) == {"none", "dbb"}
    assert "3 of 9 runs" in text
    assert f"`{tmp_path}/stretched2`: went on with other settings ({changed})" in text


def test_pairs_that_all_differ_by_the_same_have_no_interval(tmp_path):
    for seed, top1 in enumerate([0.70, 0.72]):
        write_run(tmp_path / f"plain{seed}", PLAIN, seed, top1)
        write_run(tmp_path / f"dbb{seed}", DBB, seed, top1 + 0.0028)
    _, _, variants, text = compare(tmp_path)
    assert "| +0.28 | no spread |" in text
    assert "low" not in variants or np.isnan(variants.loc["dbb", "low"])


def test_variants_are_named_by_what_differs(tmp_path):
    for seed in (0, 1):
        for init in ("ones", "third"):
            top1 = 0.5 + 0.01 * seed + 0.1 * (init == "third")
            write_run(tmp_path / f"{init}{seed}", DBB | {"init": init}, seed, top1)
    _, _, variants, _ = compare(tmp_path)
    assert set(variants.index) == {"block.init=ones", "block.init=third"}
    assert "baseline" not in variants
    _, _, variants, _ = compare(tmp_path, "block.init=ones")
    assert variants.loc["block.init=third", "difference"] == pytest.approx(10)
    message = "plain: there is no such variant; the variants are block.init=ones; block.init=third"
    with pytest.raises(ValueError, match=f"--baseline {message}"):
        compare(tmp_path, "plain")
    write_run(tmp_path / "plain", PLAIN, 0, 0.5)
    assert set(compare(tmp_path)[2].index) == {"none", "dbb, block.init=ones", "dbb, block.init=third"}


def test_a_comparison_does_not_mix_what_else_differs(tmp_path):
    study(tmp_path)
    for seed in range(3):
        write_run(tmp_path / f"fast{seed}", DBB, seed, 0.9, lr=0.2)
    _, _, variants, _ = compare(tmp_path)
    differences = variants["difference"]
    assert np.isnan(differences["dbb, optim.lr=0.2"]), "no plain network was trained with that lr"
    assert differences["dbb, optim.lr=0.1"] == pytest.approx(3)


@pytest.mark.parametrize(("both", "of_dbb", "of_plain"), [
    ({"image_digest": "a", "test_digest": "b"}, {"image_digest": "c"}, {"test_digest": "d"}),
    ({"weights_digest": "a"}, {"weights_digest": "b"}, {"weights_digest": "c"})])
def test_seeds_on_other_files_are_another_variant(tmp_path, both, of_dbb, of_plain):
    """Images that were added to a folder, say, or weights that were trained on, between two calls."""
    study(tmp_path)

    def say_digests(place, digests):
        path = place / "result.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | digests))
    for seed in range(3):
        for kind in ("plain", "dbb"):
            say_digests(tmp_path / f"{kind}{seed}", both)
    assert set(compare(tmp_path)[2].index) == {"none", "dbb"}
    say_digests(tmp_path / "dbb2", of_dbb)
    say_digests(tmp_path / "plain2", of_plain)
    variants = compare(tmp_path)[2]
    assert sorted(variants["n"]) == [1, 1, 2, 2]
    assert variants["pairs"].dropna().tolist() == [2], "the others have no plain network on their images"
    path = tmp_path / "dbb2" / "config.yaml"
    path.write_text(path.read_text().replace("  num_workers: 0\n", "  num_workers: 0\n  mixup: 0.2\n"))
    names = compare(tmp_path)[2].index
    assert all("images=" in name or "weights=" in name for name in names), names
    assert "mixup=0.2" in " ".join(names)


def test_what_a_run_may_lack(tmp_path):
    """Epochs of one step have no time, evaluation may be rare, a metrics.csv gone, a loss diverged."""
    study(tmp_path, workers=2)  # how images are fetched does not tell variants apart
    write_run(tmp_path / "again", DBB, 3, 0.75, loss=float("nan"))
    path = tmp_path / "plain0" / "metrics.csv"
    path.write_text(path.read_text() + "0,9,,7.0,,,\n")  # an epoch that was run again: its last loss counts
    runs, epochs, variants, text = compare(tmp_path)
    assert set(variants.index) == {"none", "dbb"}
    assert "| dbb | 4 | 2 | nan |" in text
    losses = epochs.set_index(["folder", "epoch"])["train_loss"]
    assert losses[[(str(tmp_path / "plain0"), 1)]].tolist() == [7.0]
    for name in ("plain0", "plain1", "plain2"):
        (tmp_path / name / "metrics.csv").write_text("epoch,step,train/loss_epoch\n0,9,1.0\n1,19,0.5\n")
    runs, epochs, variants, text = compare(tmp_path)
    assert "| none | 3 | 2 | 0.5000 ± 0.0000 | 71.00 ± 1.00 |  |  |  | 70.00 (6 changed) |  | 2.0 |" in text
    epochs = epochs.merge(runs[["folder", "variant", "seed", "state"]], on="folder")
    draw_curves(epochs, variants.reset_index(), tmp_path / "curves.png")
    path.write_text(path.read_text() + "2,0,1.0" + path.read_text())  # one line torn, the next glued to it
    runs, _, variants, text = compare(tmp_path)
    assert variants.loc["none", "n"] == 2
    assert f"{tmp_path}/plain0/metrics.csv is damaged" in text
    for path in tmp_path.glob("*/metrics.csv"):
        path.unlink()
    assert compare(tmp_path)[2]["n"].to_dict() == {"dbb": 4, "none": 3}


def test_runs_cut_short_are_not_at_equal_epochs(tmp_path):
    study(tmp_path)
    moved = tmp_path / "dbb0" / "metrics.csv"  # which went on in another folder, and logged one epoch there
    head, *rows = moved.read_text().splitlines()
    moved.write_text("\n".join([head, *rows[3:]]) + "\n")
    write_run(tmp_path / "cut", DBB, 3, 0.75, done=1)  # by trainer.max_time
    _, _, variants, text = compare(tmp_path)
    assert "| dbb | 4 | 1-2 |" in text
    assert np.isnan(variants.loc["dbb"].get("difference", np.nan))


def test_curves_have_a_standard_deviation_to_each_side(tmp_path, monkeypatch):
    from matplotlib.axes import Axes
    drawn = []

    def fill_between(axis, x, low, high, **_):
        drawn.append((list(x), list(low), list(high)))
    monkeypatch.setattr(Axes, "fill_between", fill_between)
    study(tmp_path)
    write_run(tmp_path / "stopped", DBB, 3, done=1, loss=100)
    monkeypatch.setattr("sys.argv", ["report.py", str(tmp_path), str(tmp_path)])
    report_script.main()
    std = 0.1 * np.sqrt(3)
    losses = [band for band in drawn if max(band[2]) < 10]
    below, above = pytest.approx([6.2 - std, 5.2 - std]), pytest.approx([6.2 + std, 5.2 + std])
    assert any(x == [1, 2] and low == below and high == above for x, low, high in losses)
    assert any(low == pytest.approx([0, 10]) for _, low, _ in drawn), "top-1 in percent"

    drawn.clear()
    write_run(tmp_path / "diverged", DBB, 4, 0.1, loss=float("nan"))
    report_script.main()
    assert sum(np.isnan(low).all() for _, low, _ in drawn) == 1, "no mean without it"


def test_accuracy_by_time(tmp_path, monkeypatch):
    """A point a variant with the interval of its mean; those of the plain network are joined."""
    from matplotlib.axes import Axes
    points, lines, plot = [], [], Axes.plot

    def errorbar(axis, x, y, error, **_):
        points.append((x, y, error))

    def spy(axis, x, y, *args, **kwargs):
        lines.append((list(x), list(y)))
        return plot(axis, x, y, *args, **kwargs)
    monkeypatch.setattr(Axes, "errorbar", errorbar)
    monkeypatch.setattr(Axes, "plot", spy)
    study(tmp_path)
    for seed, top1 in enumerate([0.74, 0.75, 0.74]):
        write_run(tmp_path / f"long{seed}", PLAIN, seed, top1, epochs=8)
    monkeypatch.setattr("sys.argv", ["report.py", str(tmp_path)])
    report_script.main()
    of_std = 4.302652729911275 / np.sqrt(3)  # Student's, 2 degrees of freedom, 97.5%
    expected = [(2, 71, of_std), (6, 74, of_std * np.sqrt(3)), (8, 74 + 1 / 3, of_std / np.sqrt(3))]
    for found, (seconds, top1, half) in zip(sorted(points), expected, strict=True):
        assert found == pytest.approx((seconds / 60, top1, half))
    assert lines[-1] == (pytest.approx([2 / 60, 8 / 60]), pytest.approx([71, 74 + 1 / 3]))


def test_what_cannot_be_compared(tmp_path):
    with pytest.raises(ValueError, match="no finished run below"):
        compare(tmp_path)
    study(tmp_path)
    write_run(tmp_path / "again", DBB, 1, 0.9)
    both = f"{tmp_path}/again and {tmp_path}/dbb1"
    with pytest.raises(ValueError, match=f"seed 1 of dbb is there twice, with other results, in {both}"):
        compare(tmp_path)


def test_a_knob_that_is_newer_than_a_study(tmp_path):
    """Runs from before it had its default."""
    study(tmp_path)
    write_run(tmp_path / "newer", DBB | {"sgs_batches": 2, "without_norm": False}, 3, 0.75)
    assert compare(tmp_path)[2]["n"].to_dict() == {"dbb": 4, "none": 3}
    write_run(tmp_path / "another", DBB | {"without_norm": True}, 3, 0.75)
    names = {"dbb, block.without_norm=False", "dbb, block.without_norm=True", "none"}
    assert set(compare(tmp_path)[2].index) == names


def test_a_run_that_was_repeated_counts_once(tmp_path):
    """In another folder, by another spelling, and with knobs of blocks, which a plain network has none of."""
    study(tmp_path)
    write_run(tmp_path / "repeated", DBB, 0, 0.73, seconds=0.3)
    write_run(tmp_path / "plain_ones", PLAIN | {"init": "ones"}, 0, 0.70)
    _, _, variants, text = compare(tmp_path)
    assert variants["n"].to_dict() == {"none": 3, "dbb": 3}
    assert "Not in the tables: 2 of 8 runs" in text
    assert f"`{tmp_path}/repeated`: ended exactly as {tmp_path}/dbb0, of the same settings and seed" in text


@pytest.mark.parametrize(("name", "more", "baseline"), [
    ("cifar10", 0, None), ("cifar100", 0, None), ("init", 5, "block.init=None")])
def test_the_pages_in_results_are_what_their_numbers_make(name, more, baseline):
    """As `report.py` wrote them from the runs; the CSV files beside them hold all that the page needs."""
    folder = Path(ROOT, "results", name)
    runs, variants = pd.read_csv(folder / "runs.csv"), pd.read_csv(folder / "variants.csv")
    folders = [Path(f"study_{name}"), *[Path("more")] * more]
    text = markdown(runs, variants, folders, baseline)
    assert text == (folder / "report.md").read_text()


@pytest.mark.parametrize(("name", "text", "why"), [
    ("metrics.csv", "epoch,step,train/loss_epoch\n1,1,1\n3e6,2,1\n", "an epoch or a value is none of"),
    ("config.yaml", "seed: 0\nx: [" + "1, " * 10_000 + "1]\n", "is damaged"),
    ("metrics.csv", "epoch,step,train/loss_epoch\n0.2,1,1\n0.7,2,1\n", "an epoch or a value is none of"),
    ("metrics.csv", "epoch,step,train/loss_epoch\n0,1,1e308\n1,2,-1e308\n", "an epoch or a value is none"),
    ("metrics.csv", "epoch,step,train/loss_epoch" + "," * 100_000, "lines that are cut"),
    ("metrics.csv", "", "it is a link"), ("config.yaml", "x: " + "1:" * 50_000 + "1", "is damaged"),
    ("config.yaml", "seed: 0\ntrainer: 5\n", None),
    ("config.yaml", "seed: 1\nname: \"\\ud800\"\n", "is damaged"),
    ("config.yaml", "seed: ${oc.env:HOME}\ntrainer: {max_epochs: 1}\n", "is damaged"),
    ("result.json", json.dumps(dict.fromkeys(RESULT, 1) | {"activations_mib": 10**400}), "too large"),
    ("result.json", json.dumps(dict.fromkeys(RESULT, 1) | {"top1": True}), "no number"),
    ("result.json", json.dumps(dict.fromkeys(RESULT, 1) | {"top1": -10**30}), "no number")])
def test_an_odd_run_costs_the_report_no_other(tmp_path, name, text, why):
    study(tmp_path)
    odd = tmp_path / "odd"
    write_run(odd, DBB, 3, 0.75)
    (odd / name).unlink()
    (odd / name).write_text(text) if text else (odd / name).symlink_to("/proc/self/pagemap")
    runs, _, variants, page = compare(tmp_path)
    assert variants.loc["dbb", "n"] == 3
    assert why is None or why in page
