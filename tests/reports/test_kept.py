"""A study of rivals: blocks and scaled gradients in one report, and its runs kept as small files."""

import shutil

import pandas as pd
import pytest
from omegaconf import OmegaConf

from runs.folder import RunFolder
from tests.helpers import TINY, call
from tests.reports.studies import DBB, write_run
from tools.keep_runs import keep, main

pytestmark = pytest.mark.slow


def test_a_study_goes_on_from_what_was_kept(tmp_path):
    command = ["-m", "model=resnet8", *TINY, "trainer.limit_train_batches=2", "seed=0,1", "out=study/runs"]
    for block in (["block=none,dbb"], ["block=sgs", "block.sgs_every_n_epochs=1"]):
        done = call("train.py", *command, *block, cwd=tmp_path)
        assert done.returncode == 0, done.stderr
    assert call("report.py", "study/runs", "--out", "before", cwd=tmp_path).returncode == 0
    runs = sorted(path.parent for path in tmp_path.glob("study/runs/*/result.json"))
    assert len(runs) == 6
    for run in runs:
        keep(RunFolder(run))
        shutil.rmtree(run / "checkpoints")
        metrics = pd.read_csv(run / "metrics.csv")
        assert {"test/top1", "test/top5", "train/images_per_second"} <= {*metrics}
        assert metrics["epoch"].tolist() == [0]
        assert str(tmp_path) not in (run / "config.yaml").read_text()
        assert OmegaConf.load(run / "config.yaml").data.root is None
    again = call("train.py", *command, "block=none,dbb", "data.root=elsewhere", cwd=tmp_path)
    assert again.stdout.count("is finished: test top1") == 4
    assert call("report.py", "study/runs", "--out", "after", cwd=tmp_path).returncode == 0
    before, after = (pd.read_csv(tmp_path / name / "variants.csv") for name in ("before", "after"))
    pd.testing.assert_frame_equal(before, after, rtol=1e-3)
    assert sorted(after["variant"]) == ["dbb", "none", "sgs"]
    assert after.set_index("variant").loc[["dbb", "sgs"], "pairs"].tolist() == [2, 2]


@pytest.mark.parametrize("is_tree", [True, False])
def test_where_a_cifar_lies_is_kept_of_a_tree(tmp_path, is_tree):
    """The archive is the same everywhere, a tree is part of the run."""
    write_run(tmp_path / "a", DBB, 3, 0.75)
    root = tmp_path / "images"
    for split in ("train", "test") if is_tree else ():
        (root / split).mkdir(parents=True)
    config = OmegaConf.load(tmp_path / "a" / "config.yaml")
    config.data.update(name="cifar10", root=str(root))
    OmegaConf.save(config, tmp_path / "a" / "config.yaml")
    keep(RunFolder(tmp_path / "a"))
    kept = OmegaConf.load(tmp_path / "a" / "config.yaml").data.root
    assert kept == (str(root) if is_tree else None)


def test_a_damaged_run_is_named_and_the_others_are_kept(tmp_path, monkeypatch):
    damaged, whole, blocked = tmp_path / "a", tmp_path / "b", tmp_path / "c"
    for folder in (damaged, whole, blocked):
        write_run(folder, DBB, 3, 0.75)
    (blocked / ".config.yaml.part").mkdir()
    (whole / "config.yaml").open("a").write('more: {7: "${x"}\n')
    (damaged / "metrics.csv").write_text("epoch,step\n1\n2\n")
    before = (damaged / "config.yaml").read_text()
    monkeypatch.setattr("sys.argv", ["keep_runs.py", str(tmp_path)])
    with pytest.raises(SystemExit, match="error: .*a/metrics.csv is damaged .lines that are cut") as stopped:
        main()
    assert "c/.config.yaml.part" in str(stopped.value)
    assert (damaged / "config.yaml").read_text() == before
    assert pd.read_csv(whole / "metrics.csv")["epoch"].tolist() == [0, 1]


def test_a_step_that_is_no_number_of_a_machine(tmp_path, monkeypatch):
    write_run(tmp_path / "a", DBB, 3, 0.75)
    metrics = pd.read_csv(tmp_path / "a" / "metrics.csv", dtype=object)
    metrics["step"] = "9" * 400
    metrics.to_csv(tmp_path / "a" / "metrics.csv", index=False)
    monkeypatch.setattr("sys.argv", ["keep_runs.py", str(tmp_path)])
    with pytest.raises(SystemExit, match="error: .*a/metrics.csv is damaged"):
        main()


@pytest.mark.parametrize("kind", ["a link", "a dotted key"])
def test_a_config_that_is_somebody_elses(tmp_path, monkeypatch, kind):
    """Its values do not come into a folder that is committed."""
    config, secret = tmp_path / "a" / "config.yaml", tmp_path / "secret.yaml"
    write_run(tmp_path / "a", DBB, 3, 0.75)
    secret.write_text("token: 1\n" if kind == "a link" else "data.name: digits\n")
    config.unlink()
    config.symlink_to(secret) if kind == "a link" else config.write_text(secret.read_text())
    before = config.read_text()
    monkeypatch.setattr(RunFolder, "is_ours", lambda self: True)  # by its checkpoint, say
    monkeypatch.setattr("sys.argv", ["keep_runs.py", str(tmp_path / "a")])
    with pytest.raises(SystemExit, match="config.yaml is (a link|damaged)"):
        main()
    assert config.read_text() == before
    assert config.is_symlink() == (kind == "a link")


def test_what_no_run_wrote_is_left_as_it_is(tmp_path, monkeypatch, capsys):
    files = {"config.yaml": "data:\n  root: /data  # mine\n", "result.json": '{"acc": 0.9}',
             "metrics.csv": "epoch,step,mine\n0,1,2\n"}
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    monkeypatch.setattr("sys.argv", ["keep_runs.py", str(tmp_path)])
    main()
    assert capsys.readouterr().out == "0 finished runs; other folders, left as they are: 1\n"
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == files
