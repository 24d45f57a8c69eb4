"""Compare the runs of a study: does a block help, by how much, and at what cost?

    python train.py -m model=resnet20 block=none,dbb 'seed=range(5)' out=outputs/study
    python report.py outputs/study [--out results/study] [--baseline LABEL]

Runs that differ in their seed alone are one arm. Each arm is compared with the plain network (block=none) of otherwise the same
settings, seed by seed. Writes report.md, arms.csv, runs.csv, epochs.csv and curves.png.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from scipy import stats

from export.report import table
from training.cli import output_folder, plain_errors
from training.runs import SAME_RUN, flat, read_config, read_result

METRICS = {"train/loss_epoch": "train_loss", "test/loss": "test_loss", "test/top1": "test_top1",
           "train/seconds_per_step": "seconds_per_step"}
SAME_TIME = (0.8, 1.25)  # runs whose training times have a ratio within these count as runs of equal compute


def read_runs(folders: list[Path]) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Every run below some folders.

    Returns:
        The runs, a row each: `folder`, `settings` (flat, without the seed), `seed`, `state` (finished, or why not) and, if finished,
        what result.json holds, the final training loss and the seconds; and their epochs, a row each.

    Raises:
        ValueError: if there is none.
    """
    runs, epochs = [], []
    places = sorted({path.parent for folder in folders for name in ("config.yaml", "error.txt") for path in folder.rglob(name)})
    for place in places:
        config, result, error = read_config(place), read_result(place), place / "error.txt"
        if config is None or "trainer" not in config:  # failed before it began
            if error.exists():
                runs.append({"folder": str(place), "settings": {}, "state": error.read_text().strip()})
            continue
        settings = {key: _plain(value) for key, value in flat(config).items() if key.split(".")[0] not in SAME_RUN}
        run = {"folder": str(place), "seed": settings.pop("seed"), "settings": settings, "epochs": 0}
        if (place / "metrics.csv").exists():
            rows = pd.read_csv(place / "metrics.csv")
            rows = rows[[name for name in ("epoch", "step", *METRICS) if name in rows]].rename(columns=METRICS)
            rows = rows.dropna(subset=[name for name in METRICS.values() if name in rows], how="all").groupby("epoch").last()
            epochs.append(rows.assign(folder=str(place), epoch=rows.index.astype(int) + 1))
            run |= {"epochs": len(rows)}
            if result is not None and len(rows):
                run |= {"train_loss": rows["train_loss"].iloc[-1], "seconds_per_step": rows["seconds_per_step"].median()}
                run |= {"seconds": (rows["step"].iloc[-1] + 1) * run["seconds_per_step"]}
        if result is None:
            why = error.read_text().strip() if error.exists() else "not finished"
            run["state"] = f"{why} ({run['epochs']} of {settings['trainer.max_epochs']} epochs)"
        else:
            run |= {"state": "finished"} | result
        runs.append(run)
    if not any(run["state"] == "finished" for run in runs):
        raise ValueError(f"no finished run below {', '.join(map(str, folders))}"
                         + "".join(f"\n  {run['folder']}: {run['state']}" for run in runs))
    return pd.DataFrame(runs), pd.concat(epochs, ignore_index=True)


def _plain(value: Any) -> Any:
    """A value that can be compared and be a key."""
    return str(value) if isinstance(value, list) else value


def name_arms(runs: pd.DataFrame) -> pd.Series:
    """By run, its arm: the settings in which the arms differ; the block alone, where it says all."""
    arms = [dict(settings) for settings in {tuple(sorted(s.items(), key=str)) for s in runs["settings"]}]
    differ = [key for key in {key for arm in arms for key in arm} if len({str(arm.get(key)) for arm in arms}) > 1]
    names = sorted(key for key in differ if not key.startswith("block.") or key == "block.name")
    rest = sorted(set(differ) - set(names))
    for key in rest:  # a knob of the block counts where the name of the block does not tell two arms apart
        if len({tuple(str(arm.get(name)) for name in names) for arm in arms}) < len(arms):
            names.append(key)
    return runs["settings"].map(lambda settings: ", ".join(
        str(settings.get(key)) if key == "block.name" else f"{key}={settings.get(key)}" for key in names) or "all runs")


def paired(runs: pd.DataFrame, arm: str, base: str) -> dict[str, Any]:
    """Difference in top-1 (points) of the seeds that two arms share, with the 95% confidence interval of Student's t."""
    both = runs[runs["arm"] == arm].set_index("seed")["top1"] - runs[runs["arm"] == base].set_index("seed")["top1"]
    both = 100 * both.dropna()
    mean, half = mean_and_half_width(both)
    return {"pairs": len(both), "difference": mean, "low": mean - half, "high": mean + half}


def mean_and_half_width(values: Sequence[float]) -> tuple[float, float]:
    """Mean, and how far its 95% confidence interval (Student's t) reaches to each side; NaN for a single value."""
    return np.mean(values), stats.sem(values) * stats.t.ppf(0.975, len(values) - 1) if len(values) > 1 else np.nan


def compare_arms(runs: pd.DataFrame, baseline: str | None) -> pd.DataFrame:
    """An arm a row: accuracy, cost, and the differences to its baseline at equal epochs and at equal compute.

    Raises:
        ValueError: if there is no arm of the baseline's name, or a seed ran twice in an arm.
    """
    done = runs[runs["state"] == "finished"]
    twice = done[done.duplicated(["arm", "seed"])]
    if len(twice):
        raise ValueError(f"seed {twice['seed'].iloc[0]:.0f} of {twice['arm'].iloc[0]} is there twice, in {twice['folder'].iloc[0]} and "
                         "elsewhere: name the folder of one study")
    if baseline is not None and baseline not in set(done["arm"]):
        raise ValueError(f"--baseline {baseline}: there is no such arm; the arms are {'; '.join(sorted(set(done['arm'])))}")
    first = done.drop_duplicates("arm").set_index("arm")["settings"]

    def family(arm: str, *without: str) -> dict:
        return {k: v for k, v in first[arm].items() if not k.startswith("block.") and k not in without}

    rows = []
    for arm, group in done.groupby("arm", sort=False):
        plain = [a for a in first.index if first[a]["block.name"] == "none"] if baseline is None else [baseline]
        row = {"arm": arm, "n": len(group), "epochs": int(group["epochs"].max()), "train_loss": group["train_loss"].mean(),
               "train_loss_std": group["train_loss"].std(), "top1": 100 * group["top1"].mean(), "top1_std": 100 * group["top1"].std(),
               "converted_top1": 100 * group["converted_top1"].mean(), "predictions_changed": int(group["predictions_changed"].sum()),
               "milliseconds_per_step": 1e3 * group["seconds_per_step"].median(), "activations_mib": group["activations_mib"].iloc[0],
               "seconds": group["seconds"].median()}
        base = next((a for a in plain if a != arm and (baseline or family(a) == family(arm))), None)
        if base is not None:
            row |= {"baseline": base} | paired(done, arm, base)
        same = [a for a in plain if a != arm and family(a, "trainer.max_epochs") == family(arm, "trainer.max_epochs")]
        times = {a: row["seconds"] / done[done["arm"] == a]["seconds"].median() for a in same}
        if times and arm not in plain:
            nearest = min(times, key=lambda a: abs(np.log(times[a])))
            row |= {"equal_compute": nearest, "time_ratio": times[nearest], "wanted_epochs": round(
                times[nearest] * done[done["arm"] == nearest]["epochs"].max())}
            if SAME_TIME[0] <= times[nearest] <= SAME_TIME[1]:
                row |= {f"{key}_equal_compute": value for key, value in paired(done, arm, nearest).items()}
        rows.append(row)
    return pd.DataFrame(rows)


def markdown(runs: pd.DataFrame, arms: pd.DataFrame, folders: list[Path]) -> str:
    """The report, for people."""
    def cell(row, key, form):
        return form.format(row[key]) if key in row and pd.notna(row[key]) else ""

    def difference(row, suffix=""):
        if not cell(row, "difference" + suffix, "{}"):
            return ["", ""]
        return [cell(row, "difference" + suffix, "{:+.2f}"),
                cell(row, "low" + suffix, "{:+.2f}") + cell(row, "high" + suffix, " to {:+.2f}") or "one pair only"]

    first, equal = [], []
    for _, row in arms.iterrows():
        base = arms[arms["arm"] == row.get("baseline")]
        ratio = [f" ({row[key] / base[key].iloc[0]:.2f}x)" if len(base) else "" for key in ("milliseconds_per_step", "activations_mib")]
        first.append([row["arm"], str(row["n"]), str(row["epochs"]), f"{row['train_loss']:.4f}" + cell(row, "train_loss_std", " ± {:.4f}"),
                      f"{row['top1']:.2f}" + cell(row, "top1_std", " ± {:.2f}"), *difference(row),
                      f"{row['converted_top1']:.2f} ({row['predictions_changed']} changed)",
                      f"{row['milliseconds_per_step']:.0f}{ratio[0]}", f"{row['activations_mib']:.1f}{ratio[1]}"])
        if cell(row, "equal_compute", "{}"):
            near = "pairs_equal_compute" in row and pd.notna(row["pairs_equal_compute"])
            equal.append([row["arm"], row["equal_compute"] if near else f"none yet: trainer.max_epochs={row['wanted_epochs']:.0f} would do",
                          f"{row['time_ratio']:.2f}" if near else "", *difference(row, "_equal_compute")])
    parts = [f"# {', '.join(folder.name for folder in folders)}", "![curves](curves.png)", "## At equal epochs",
             table(["arm", "n", "epochs", "final training loss", "test top-1, %", "difference to plain, points", "95% interval",
                     "converted top-1, % (predictions)", "ms a step", "activations a batch, MiB"], first),
             "± is the standard deviation over seeds. Differences are paired by seed; one whose interval holds 0 is not significant. Each "
             "interval is for one comparison: of twenty without any effect, one misses 0. Time is what the runs logged, on a machine that "
             "may have done other things; activations are what a forward pass in float32 leaves for backward."]
    if equal:
        head = ["arm", "plain network of equal training time", "time ratio", "difference, points", "95% interval"]
        parts += ["## At equal compute", table(head, equal)]
    left = [f"- `{row.folder}`: {row.state}" for row in runs[runs["state"] != "finished"].itertuples()]
    parts.append("\n".join([f"## Not in the tables: {len(left)} of {len(runs)} runs\n", *left]) if left else "All runs are finished.")
    return "\n\n".join(parts) + "\n"


def draw_curves(epochs: pd.DataFrame, path: Path) -> None:
    """Training loss and test top-1 by epoch, an arm a line; the band is a standard deviation to each side."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4.5), layout="constrained")
    shown = [("train_loss", "training loss", 1), ("test_top1", "test top-1, %", 100)]
    for axis, (column, title, scale) in zip(figure.subplots(1, 2), shown, strict=True):
        for arm, group in epochs.groupby("arm", sort=False):
            curve = scale * group.pivot_table(index="epoch", columns="folder", values=column)
            mean, std = curve.mean(axis=1), curve.std(axis=1).fillna(0)
            [line] = axis.plot(mean.index, mean, label=f"{arm} (n={curve.shape[1]})")
            axis.fill_between(mean.index, mean - std, mean + std, color=line.get_color(), alpha=0.2)
        axis.set(title=title, xlabel="epoch")
        axis.grid(alpha=0.3)
    axis.legend(fontsize="small")
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", nargs="+", type=Path, help="of runs, or of folders of runs")
    parser.add_argument("--out", type=Path, help="where to write; by default into the first folder")
    parser.add_argument("--baseline", help="the arm to compare all others with; by default the plain network of the same settings")
    options = parser.parse_args()
    with plain_errors():
        runs, epochs = read_runs(options.folders)
        runs["arm"] = name_arms(runs)
        arms = compare_arms(runs, options.baseline)
        epochs = epochs.merge(runs[["folder", "arm", "seed", "state"]], on="folder")
        out = output_folder(options.out or options.folders[0])
        text = markdown(runs, arms, options.folders)
        (out / "report.md").write_text(text)
        draw_curves(epochs[epochs["state"] == "finished"], out / "curves.png")
        arms.to_csv(out / "arms.csv", index=False, float_format="%.6g")
        runs.drop(columns="settings").to_csv(out / "runs.csv", index=False, float_format="%.6g")
        epochs.drop(columns=["folder", "state"]).to_csv(out / "epochs.csv", index=False, float_format="%.6g")
        print(text, f"written to {out}: report.md, curves.png, arms.csv, runs.csv, epochs.csv", sep="\n")


if __name__ == "__main__":
    main()
