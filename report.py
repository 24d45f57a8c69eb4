"""Compare the runs of a study: does a block help, by how much, and at what cost?

    python train.py -m model=resnet20 block=none,dbb 'seed=range(5)' out=outputs/study
    python report.py outputs/study [--out results/study] [--baseline LABEL]

Runs that differ only in their seed are one variant. Each variant is compared, seed by seed, with the plain
network (block=none) of otherwise the same settings. Writes report.md, variants.csv, runs.csv, epochs.csv and
curves.png.
"""

import argparse
import tempfile
from pathlib import Path

if __name__ == "__main__":
    from settings.cli import plain_errors, refuse_matplotlibrc
    with plain_errors():
        refuse_matplotlibrc()  # before it is read, which importing does

from models import limits
from reports.compare import compare_variants, name_variants
from reports.runs import read_runs
from reports.study import MARK, draw_curves, markdown
from settings.cli import output_folder, plain_errors, printable

WRITTEN = ("report.md", "curves.png", "variants.csv", "runs.csv", "epochs.csv")


def refuse_others(out: Path) -> str | None:
    """Refuse to replace a file that no earlier report wrote.

    Returns:
        The heading of the report that stands there, if one does.

    Raises:
        ValueError: if there is one.
    """
    page = out / WRITTEN[0]
    known = page.is_file() and page.stat().st_size <= limits.REPORT
    text = page.read_text(errors="replace") if known else ""
    there = [name for name in WRITTEN if (out / name).exists()]
    if there and MARK not in text:
        raise ValueError(f"{out / there[0]} is to be written, but what stands there is of no earlier report: "
                         "choose another folder with --out DIR")
    return text.partition("\n")[0] if there else None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", nargs="+", type=Path, help="of runs, or of folders of runs")
    parser.add_argument("--out", type=Path, help="where to write; by default into the first folder")
    parser.add_argument("--baseline", help="the variant to compare all others with; by default the plain "
                                           "network of the same settings")
    options = parser.parse_args()
    with plain_errors():
        runs, epochs = read_runs(options.folders)
        runs["variant"] = name_variants(runs)
        variants = compare_variants(runs, options.baseline)
        epochs = epochs.merge(runs[["folder", "variant", "seed", "state"]], on="folder")
        out = output_folder(options.out or options.folders[0])
        earlier = refuse_others(out)
        text = markdown(runs, variants, options.folders, options.baseline)
        with tempfile.TemporaryDirectory(dir=out) as folder:  # what takes a link's place does not follow it
            part = Path(folder)
            (part / "report.md").write_text(text)
            draw_curves(epochs[epochs["state"] == "finished"], variants, part / "curves.png")
            runs = runs.drop(columns="settings")
            for name, rows in {"variants.csv": variants, "runs.csv": runs, "epochs.csv": epochs}.items():
                rows.to_csv(part / name, index=False, float_format="%.6g", errors="backslashreplace")
            for name in WRITTEN:
                (part / name).replace(out / name)
        print(text, printable(f"written to {out}: {', '.join(WRITTEN)}"), sep="\n")
        if earlier not in (None, text.partition("\n")[0]):
            print(printable(f'it had the report "{earlier.removeprefix("# ")[:200]}", which is replaced'))


if __name__ == "__main__":
    main()
