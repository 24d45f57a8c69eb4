"""Which runs of a study count, as which variant: of other files, older, repeated, stopped, failed or odd."""

import json

import pytest

from reports.runs import RESULT
from reports.study import draw_curves
from tests.reports.studies import DBB, PLAIN, compare, study, write_run

pytestmark = pytest.mark.slow

COLUMNS = "epoch,step,train/loss_epoch"


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


@pytest.mark.parametrize(("both", "of_dbb", "of_plain"), [
    ({"image_digest": "a", "test_digest": "b"}, {"image_digest": "c"}, {"test_digest": "d"}),
    ({"weights_digest": "a"}, {"weights_digest": "b"}, {"weights_digest": "c"}),
    ({"processes": 1}, {"processes": 2}, {"processes": 4})])
def test_seeds_on_other_files_are_another_variant(tmp_path, both, of_dbb, of_plain):
    """Images added to a folder, say, weights trained on, or `trainer.devices=auto` on other machines."""
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
    kinds = "images=", "weights=", "processes="
    assert all(any(kind in name for kind in kinds) for name in names), names
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
    write_run(tmp_path / "repeated", DBB, 0, 0.73, seconds=0.3, loss=1.0000001)  # by keep_runs.py
    write_run(tmp_path / "plain_ones", PLAIN | {"init": "ones"}, 0, 0.70)
    _, _, variants, text = compare(tmp_path)
    assert variants["n"].to_dict() == {"none": 3, "dbb": 3}
    assert "Not in the tables: 2 of 8 runs" in text
    assert f"`{tmp_path}/repeated`: ended exactly as {tmp_path}/dbb0, of the same settings and seed" in text


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
    ("result.json", json.dumps(dict.fromkeys(RESULT, 1) | {"activations_mib": 10**400}), "none of a run's"),
    ("result.json", json.dumps(dict.fromkeys(RESULT, 1) | {"top1": True}), "is none of a run's"),
    ("result.json", json.dumps(dict.fromkeys(RESULT, 1) | {"top1": -10**30}), "is none of a run's"),
    ("result.json", json.dumps(dict.fromkeys(RESULT, 1) | {"predictions_changed": -1}), "is none of a run's"),
    ("metrics.csv", f"{COLUMNS},train/seconds_per_step\n0,1,1,1e18\n", "an epoch or a value is none of"),
    ("metrics.csv", f"{COLUMNS},train/seconds_per_step\n0,1,1,-1\n", "an epoch or a value is none of"),
    ("metrics.csv", f"{COLUMNS},train/seconds_per_step\n0,1,1,inf\n", "an epoch or a value is none of"),
    ("config.yaml", "seed: 0\noptim: {lr: 'nan'}\ntrainer: {max_epochs: 1}\n", "numbers that are not finite"),
    ("config.yaml", "", "is a link"), ("result.json", "", "is a link")])
def test_an_odd_run_costs_the_report_no_other(tmp_path, name, text, why):
    study(tmp_path)
    odd = tmp_path / "odd"
    write_run(odd, DBB, 3, 0.75)
    (odd / name).unlink()
    (odd / name).write_text(text) if text else (odd / name).symlink_to("/proc/self/pagemap")
    runs, _, variants, page = compare(tmp_path)
    assert variants.loc["dbb", "n"] == 3
    assert why is None or why in page
