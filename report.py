"""Compare the runs of a study: does a block help, by how much, and at what cost?

    python train.py -m model=resnet20 block=none,dbb 'seed=range(5)' out=outputs/study
    python report.py outputs/study [--out results/study] [--baseline LABEL]

Runs that differ only in their seed are one variant. Each variant is compared, seed by seed, with the plain
network (block=none) of otherwise the same settings. Writes report.md, variants.csv, runs.csv, epochs.csv and
curves.png.
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
from training.runs import LOCK, of_the_training, read_config, read_result

METRICS = {"train/loss_epoch": "train_loss", "test/loss": "test_loss", "test/top1": "test_top1",
           "train/seconds_per_step": "seconds_per_step"}
SAME_TIME = (0.8, 1.25)  # ratios of training times that count as about equal


def read_runs(folders: list[Path]) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Every run below some folders.

    Returns:
        The runs, a row each: `folder`, `settings` (flat, without the seed), `seed`, `state` (finished, or why
        not) and, if finished, what result.json holds, the final training loss and the seconds; and their
        epochs, a row each.

    Raises:
        ValueError: if none is finished.
    """
    found = {path.parent.resolve(): path.parent for folder in folders
             for name in (LOCK, "config.yaml", "error.txt") for path in sorted(folder.rglob(name))}
    runs, epochs = [], []
    for place in found.values():
        error, run = place / "error.txt", {"folder": str(place), "settings": {}}
        why = error.read_text().strip() if error.exists() else "stopped before it began"
        try:
            config, result, rows = read_config(place), read_result(place), read_epochs(place)
        except ValueError as damage:
            runs.append(run | {"state": str(damage)})
            continue
        if config is None:
            runs.append(run | {"state": why})
            continue
        settings = {key: str(value) if isinstance(value, list) else value
                    for key, value in of_the_training(config).items()}
        if "seed" not in settings or "trainer.max_epochs" not in settings:
            continue  # a config.yaml of something else, as W&B writes one into its own folder
        epochs.append(rows)
        run |= {"seed": settings.pop("seed"), "settings": settings, "epochs": len(rows)}
        if changed := (result or {}).pop("changed", None):
            run["state"] = f"went on with other settings ({'; '.join(changed)})"
        elif result is None:
            why = why if error.exists() else "not finished"
            run["state"] = f"{why} ({len(rows)} of {settings['trainer.max_epochs']} epochs)"
        else:
            unknown = dict.fromkeys(("train_loss", "seconds_per_step", "seconds"), np.nan)
            run |= {"state": "finished"} | unknown | result
            if len(rows):
                per_step = rows["seconds_per_step"].median()  # of a batch; the steps are the optimiser's
                batches = (rows["step"].iloc[-1] + 1) * settings["trainer.accumulate_grad_batches"]
                run |= {"train_loss": rows["train_loss"].iloc[-1], "seconds_per_step": per_step,
                        "seconds": batches * per_step}
        runs.append(run)
    if not any(run["state"] == "finished" for run in runs):
        raise ValueError(f"no finished run below {', '.join(map(str, folders))}"
                         + "".join(f"\n  {run['folder']}: {run['state']}" for run in runs))
    return pd.DataFrame(runs), pd.concat([rows for rows in epochs if len(rows)] or epochs, ignore_index=True)


def read_epochs(place: Path) -> pd.DataFrame:
    """A run's epochs by metrics.csv, a row each; of one that was run again after an interruption, the last.

    Raises:
        ValueError: if the file is damaged.
    """
    try:
        rows = pd.read_csv(place / "metrics.csv")
    except (FileNotFoundError, pd.errors.EmptyDataError):
        rows = pd.DataFrame()
    except ValueError as error:
        raise ValueError(f"{place}/metrics.csv is damaged ({error})") from error
    rows = rows.reindex(columns=["epoch", "step", *METRICS]).rename(columns=METRICS)
    rows = rows.apply(pd.to_numeric, errors="coerce").dropna(subset=list(METRICS.values()), how="all")
    rows = rows.groupby("epoch").last()
    return rows.assign(folder=str(place), epoch=rows.index.astype(int) + 1)


def name_variants(runs: pd.DataFrame) -> pd.Series:
    """By run, its variant: the settings in which the finished ones differ.

    Of the block it has only what tells two apart. A run with settings of no finished run has no variant.
    """
    finished = runs[runs["state"] == "finished"]["settings"]
    variants = [dict(settings) for settings in {tuple(sorted(s.items())) for s in finished}]
    keys = {key for variant in variants for key in variant}
    differ = sorted(key for key in keys if len({str(variant.get(key)) for variant in variants}) > 1)

    def apart(keys):
        return len({tuple(str(variant.get(key)) for key in keys) for variant in variants})
    names = [key for key in differ if not key.startswith("block.") or key == "block.name"]
    for key in differ:
        if apart([*names, key]) > apart(names):
            names.append(key)

    def label(settings):
        of_block = settings.get("block.name") != "none"  # without a block, its knobs mean nothing
        return ", ".join(str(settings.get(key)) if key == "block.name" else f"{key}={settings.get(key)}"
                         for key in names if key == "block.name" or of_block or not key.startswith("block."))
    return runs["settings"].map(lambda settings: (label(settings) or "all runs") if settings in variants
                                else "")


def paired(runs: pd.DataFrame, variant: str, base: str) -> dict[str, Any]:
    """Difference in top-1 (points) of the seeds that two variants share, with its 95% confidence interval."""
    top1 = {name: runs[runs["variant"] == name].set_index("seed")["top1"] for name in (variant, base)}
    both = 100 * (top1[variant] - top1[base]).dropna()
    if both.empty:
        return {"pairs": 0}
    mean, half = mean_and_half_width(both)
    known = half > 1e-9  # one pair, or the same difference in all (few test images), gives no spread
    interval = {"low": mean - half, "high": mean + half} if known else {}
    return {"pairs": len(both), "difference": mean} | interval


def mean_and_half_width(values: Sequence[float]) -> tuple[float, float]:
    """Mean, and how far its 95% confidence interval (Student's t) reaches to each side; NaN for one value."""
    if len(values) < 2:
        return np.mean(values), np.nan
    return np.mean(values), stats.sem(values) * stats.t.ppf(0.975, len(values) - 1)


def compare_variants(runs: pd.DataFrame, baseline: str | None) -> pd.DataFrame:
    """A variant a row: accuracy, cost, and the differences to its baseline.

    They are taken after the same epochs, and after about equal training time.

    Raises:
        ValueError: if there is no variant of the baseline's name, or a seed ran twice in a variant.
    """
    done = runs[runs["state"] == "finished"]
    twice = done[done.duplicated(["variant", "seed"])]
    if len(twice):
        again = twice.iloc[0]
        raise ValueError(f"seed {again['seed']:.0f} of {again['variant']} is there twice, in "
                         f"{again['folder']} and elsewhere: name the folder of one study")
    if baseline is not None and baseline not in set(done["variant"]):
        names = "; ".join(sorted(set(done["variant"])))
        raise ValueError(f"--baseline {baseline}: there is no such variant; the variants are {names}")
    first = done.drop_duplicates("variant").set_index("variant")["settings"]
    lengths = {variant: sorted(set(group["epochs"].astype(int)))
               for variant, group in done.groupby("variant")}

    def family(variant: str) -> dict:
        return {key: value for key, value in first[variant].items()
                if not key.startswith("block.") and key != "trainer.max_epochs"}

    def is_base(variant: str) -> bool:
        if baseline is None:
            return first[variant]["block.name"] == "none"
        return first[variant] | {"trainer.max_epochs": 0} == first[baseline] | {"trainer.max_epochs": 0}

    rows = []
    for variant, group in done.groupby("variant", sort=False):
        ends = lengths[variant][:1] + lengths[variant][1:][-1:]  # the shortest and the longest
        row = {"variant": variant, "n": len(group), "epochs": "-".join(map(str, ends)),
               "train_loss": group["train_loss"].mean(skipna=False),
               "train_loss_std": group["train_loss"].std(skipna=False),
               "top1": 100 * group["top1"].mean(), "top1_std": 100 * group["top1"].std(),
               "converted_top1": 100 * group["converted_top1"].mean(),
               "predictions_changed": int(group["predictions_changed"].sum()),
               "milliseconds_per_step": 1e3 * group["seconds_per_step"].median(),
               "activations_mib": group["activations_mib"].iloc[0], "seconds": group["seconds"].median()}
        bases = [a for a in first.index
                 if a != variant and is_base(a) and (baseline is not None or family(a) == family(variant))]
        base = next((a for a in bases if lengths[a] == lengths[variant]), None)
        if base is not None:
            row |= {"baseline": base} | paired(done, variant, base)
        times = {a: row["seconds"] / done[done["variant"] == a]["seconds"].median() for a in bases}
        times = {a: ratio for a, ratio in times.items() if np.isfinite(ratio)}
        if times and not is_base(variant):
            nearest = min(times, key=lambda a: abs(np.log(times[a])))
            row |= {"equal_time": nearest, "time_ratio": times[nearest],
                    "wanted_epochs": round(times[nearest] * lengths[nearest][-1])}
            if SAME_TIME[0] <= times[nearest] <= SAME_TIME[1]:
                row |= {f"{key}_equal_time": value
                        for key, value in paired(done, variant, nearest).items()}
        rows.append(row)
    return pd.DataFrame(rows)


def markdown(runs: pd.DataFrame, variants: pd.DataFrame, folders: list[Path],
             baseline: str | None = None) -> str:
    """The report, for people."""
    def cell(row, key, form):
        return form.format(row[key]) if key in row and pd.notna(row[key]) else ""

    def difference(row, suffix=""):
        pairs = cell(row, "pairs" + suffix, "{:.0f}")
        if pairs in ("", "0"):
            return ["no seed in common" if pairs else "", ""]
        count = f" ({pairs} pairs)" if pairs != str(row["n"]) else ""
        interval = cell(row, "low" + suffix, "{:+.2f}") + cell(row, "high" + suffix, " to {:+.2f}")
        return [cell(row, "difference" + suffix, "{:+.2f}") + count,
                interval or ("one pair only" if pairs == "1" else "no spread")]

    plain = baseline or "plain"
    first, equal = [], []
    for _, row in variants.iterrows():
        base = variants[variants["variant"] == row.get("baseline")]
        ratio = [f" ({row[key] / base[key].iloc[0]:.2f}x)" if len(base) and base[key].notna().all() else ""
                 for key in ("milliseconds_per_step", "activations_mib")]
        first.append([row["variant"], str(row["n"]), str(row["epochs"]),
                      f"{row['train_loss']:.4f}" + cell(row, "train_loss_std", " ± {:.4f}"),
                      f"{row['top1']:.2f}" + cell(row, "top1_std", " ± {:.2f}"), *difference(row),
                      f"{row['converted_top1']:.2f} ({row['predictions_changed']} changed)",
                      cell(row, "milliseconds_per_step", f"{{:.0f}}{ratio[0]}"),
                      f"{row['activations_mib']:.1f}{ratio[1]}"])
        if cell(row, "equal_time", "{}"):
            near = cell(row, "pairs_equal_time", "{}")
            wanted = f"not run yet: train it with trainer.max_epochs={row['wanted_epochs']:.0f}"
            equal.append([row["variant"], row["equal_time"] if near else wanted,
                          f"{row['time_ratio']:.2f}" if near else "", *difference(row, "_equal_time")])
    more = len(folders) - 1
    others = f" and {more} more folder{'s' * (more > 1)}" if more else ""
    parts = [f"# {folders[0].name}{others}",
             "Each row is a *variant*: all n runs that differ only in their seed. Its name is what tells it "
             "from the others (`none` is the plain network), and differences are to "
             f"{baseline or 'the plain network of otherwise the same settings'}.",
             "![curves](curves.png)", "## After the same number of epochs",
             table(["variant", "n", "epochs", "final training loss", "test top-1, %",
                    f"difference to {plain}, points", "95% interval",
                    "top-1 after conversion, % (predictions)", "ms a step", "activations a batch, MiB"],
                   first),
             "± is the standard deviation over seeds. A difference is the mean over pairs of runs with the "
             "same seed; if its interval contains 0, it is not significant. Each interval is for one "
             "comparison: without any effect, one in twenty still misses 0. It covers the chance in the "
             "seeds, not in the choice of the test images, which matters where they are few. Times are as "
             "logged, on a machine that may have been busy with other work. Activations are the memory that "
             "a forward pass in float32 keeps for the backward pass."]
    if equal:
        head = ["variant", f"{plain}, trained for about the same time", f"its time / that of {plain}",
                "difference, points", "95% interval"]
        parts += ["## At about equal training time", table(head, equal)]
    left = [f"- `{row.folder}`: {row.state}" for row in runs[runs["state"] != "finished"].itertuples()]
    parts.append("\n".join([f"## Not in the tables: {len(left)} of {len(runs)} runs\n", *left]) if left else
                 f"All {len(runs)} runs found are finished.")
    done = runs[runs["state"] == "finished"]
    seeds = {variant: set(group["seed"].astype(int)) for variant, group in done.groupby("variant")}
    lacking = {variant: sorted(set().union(*seeds.values()) - of) for variant, of in seeds.items()}
    if any(lacking.values()):
        parts.append("Seeds that others have: " + "; ".join(
            f"{variant} lacks {', '.join(map(str, of))}" for variant, of in lacking.items() if of) + ".")
    return "\n\n".join(parts) + "\n"


def draw_curves(epochs: pd.DataFrame, path: Path) -> None:
    """Training loss and test top-1 by epoch, a variant a line; the band is a standard deviation each way."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4.5), layout="constrained")
    shown = [("train_loss", "training loss", 1), ("test_top1", "test top-1, %", 100)]
    for axis, (column, title, scale) in zip(figure.subplots(1, 2), shown, strict=True):
        for variant, group in epochs.groupby("variant", sort=False):
            curve = scale * group.pivot(index="epoch", columns="folder", values=column).dropna(how="all")
            mean = curve.mean(axis=1, skipna=False)  # one that diverged ends the line
            std = curve.std(axis=1).fillna(0)
            [line] = axis.plot(mean.index, mean, label=f"{variant} (n={group['folder'].nunique()})")
            axis.fill_between(mean.index, mean - std, mean + std, color=line.get_color(), alpha=0.2)
        axis.set(title=title, xlabel="epoch")
        axis.xaxis.get_major_locator().set_params(integer=True)
        axis.grid(alpha=0.3)
    figure.legend(*axis.get_legend_handles_labels(), loc="outside lower center", ncols=3, fontsize="small")
    figure.savefig(path, dpi=110)


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
        text = markdown(runs, variants, options.folders, options.baseline)
        (out / "report.md").write_text(text)
        draw_curves(epochs[epochs["state"] == "finished"], out / "curves.png")
        variants.to_csv(out / "variants.csv", index=False, float_format="%.6g")
        runs.drop(columns="settings").to_csv(out / "runs.csv", index=False, float_format="%.6g")
        epochs.to_csv(out / "epochs.csv", index=False, float_format="%.6g")
        print(text, f"written to {out}: report.md, curves.png, variants.csv, runs.csv, epochs.csv", sep="\n")


if __name__ == "__main__":
    main()
