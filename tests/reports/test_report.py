"""report.py against numbers worked out here; test_which_runs.py has what it does with each run."""

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from matplotlib.figure import Figure

import report as report_script
from reports.markdown import table
from reports.study import CURVES, draw_curves, markdown
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


@pytest.mark.parametrize(("name", "more", "baseline"), [
    ("cifar10", 0, None), ("cifar100", 0, None), ("init", 5, "block.init=None")])
def test_the_pages_in_results_are_what_their_numbers_make(name, more, baseline):
    """As `report.py` wrote them from the runs; the CSV files beside them hold all that the page needs."""
    folder = Path(ROOT, "results", name)
    runs, variants = pd.read_csv(folder / "runs.csv"), pd.read_csv(folder / "variants.csv")
    folders = [Path(f"study_{name}"), *[Path("more")] * more]
    text = markdown(runs, variants, folders, baseline)
    assert text == (folder / "report.md").read_text()


def test_of_many_variants_the_most_accurate_are_drawn(tmp_path, monkeypatch):
    """For more the figure has no room, and their names would cover it."""
    legend, seen = Figure.legend, []
    monkeypatch.setattr(Figure, "legend", lambda *args, **how: seen.append((args[2], how["title"]))
                        or legend(*args, **how))
    for count in (CURVES, CURVES + 6):
        names = [f"optim.lr={i}" for i in range(count)]
        variants = pd.DataFrame({"variant": names, "top1": range(count), "seconds": np.nan})
        epochs = pd.DataFrame({"variant": names, "folder": names, "epoch": 1, "train_loss": 1.0,
                               "test_top1": 0.5})
        draw_curves(epochs, variants, tmp_path / "a.png")
        assert seen[-1][0] == [f"{name} (n=1)" for name in names[-CURVES:]]
    assert [title for _, title in seen] == [None, f"the {CURVES} most accurate of {CURVES + 6} variants"]


def test_names_that_would_forge_lines():
    assert table(["a"], [["x | y\n| 1 <img src=x>"]]).splitlines()[-1] == \
        r"| x \| y\\n\| 1 &lt;img src=x> |"
    assert table(["a"], [["![p](http://x)"]]).splitlines()[-1] == r"| \!\[p\](http:<!-- -->//x) |"
    assert table(["a"], [["WWW.x.y a@b&#64;c"]]).splitlines()[-1] == \
        "| WWW<!-- -->.x.y a@<!-- -->b&amp;#64;c |"
