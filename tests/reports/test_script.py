"""What report.py writes, and where."""

import pytest

import report as report_script
from reports.study import MARK
from tests.helpers import call
from tests.reports.studies import study

pytestmark = pytest.mark.slow


def test_a_matplotlibrc_in_the_current_folder_starts_nothing(tmp_path):
    (tmp_path / "matplotlibrc").write_text("text.usetex: True\n")
    study(tmp_path)
    done = call("report.py", ".", cwd=tmp_path)
    assert done.returncode == 0, done.stderr


def test_a_report_replaces_no_file_of_somebody_elses(tmp_path):
    (tmp_path / "runs.csv").write_text("mine")
    with pytest.raises(ValueError, match="runs.csv is to be written, but what stands there is of no earlier"):
        report_script.refuse_others(tmp_path)
    (tmp_path / "report.md").write_text("# My notes")
    with pytest.raises(ValueError, match="report.md is to be written"):
        report_script.refuse_others(tmp_path)
    (tmp_path / "report.md").write_text(f"# Runs\n\n{MARK}: ...")
    assert report_script.refuse_others(tmp_path) == "# Runs"


def test_a_folder_in_an_old_alphabet_costs_the_report_no_run(tmp_path, monkeypatch):
    study(tmp_path)
    (tmp_path / "dbb0").rename(tmp_path / "caf\udce9")  # é in Latin-1
    monkeypatch.setattr("sys.argv", ["report.py", str(tmp_path)])
    report_script.main()
    assert "caf\\udce9" in (tmp_path / "runs.csv").read_text()


def test_a_report_of_other_runs_is_not_replaced_without_a_word(tmp_path, capsys, monkeypatch):
    for name in ("one", "two"):
        study(tmp_path / name / "runs")
    out, said = ["--out", str(tmp_path / "report")], []
    for name in ("one", "one", "two"):
        monkeypatch.setattr("sys.argv", ["report.py", str(tmp_path / name / "runs"), *out])
        report_script.main()
        said.append('it had the report "one", which is replaced' in capsys.readouterr().out)
    assert said == [False, False, True]
