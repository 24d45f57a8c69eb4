"""The page and the curves of a study."""

from pathlib import Path

import pandas as pd
from scipy import stats

from reports.figure import new_figure
from reports.markdown import cell, table

CURVES = 24  # for which the figure has room
LONGEST = 200  # letters of a variant's name in the figure
POINTS = 10_000  # of a curve: matplotlib takes minutes for a million
MARK = "Each row is a *variant*"  # by which report.py knows a page of its own


def markdown(runs: pd.DataFrame, variants: pd.DataFrame, folders: list[Path],
             baseline: str | None = None) -> str:
    """The report, for people."""
    plain, more = baseline or "plain", len(folders) - 1
    intervals = ["95% interval", "of all comparisons together"]
    others = {0: "", 1: " and 1 more folder"}.get(more, f" and {more} more folders")
    place = folders[0].resolve()
    parts = [f"# {cell(place.parent.name if place.name == 'runs' else place.name)}{others}",
             f"{MARK}: all n runs that differ only in their seed. Its name is what tells it "
             "from the others (`none` is the plain network), and differences are to "
             f"{baseline or 'the plain network of otherwise the same settings'}.",
             "![curves](curves.png)", "## After the same number of epochs",
             table(["variant", "n", "epochs", "final training loss", "test top-1, %",
                    f"difference to {plain}, points", *intervals,
                    "top-1 after conversion, % (predictions)", "ms a step", "activations a batch, MiB"],
                   [_row(row, variants) for _, row in variants.iterrows()]),
             "± is the standard deviation over seeds. A difference is the mean over pairs of runs with the "
             "same seed; if its interval contains 0, it is not significant. The first interval is for one "
             "comparison: without any effect, one in twenty still misses 0. The second is widened "
             "(Bonferroni) for all comparisons of this page. They cover the chance in the seeds, not in the "
             "choice of the test images, which matters where they are few. Times are as logged, on a machine "
             "that may have been busy with other work. Activations are the memory that a forward pass in "
             "float32 keeps for the backward pass."]
    equal = [_row_of_equal_time(row) for _, row in variants.iterrows() if _cell(row, "equal_time", "{}")]
    if equal:
        head = ["variant", f"{plain}, trained for about the same time", f"its time / that of {plain}",
                "difference, points", *intervals]
        parts += ["## At about equal training time", table(head, equal)]
    return "\n\n".join([*parts, *_what_is_missing(runs)]) + "\n"


def _cell(row: pd.Series, key: str, form: str) -> str:
    return form.format(row[key]) if key in row and pd.notna(row[key]) else ""


def _difference(row: pd.Series, suffix: str = "") -> list[str]:
    """A difference and its two intervals; `suffix` is that of their columns."""
    pairs = _cell(row, "pairs" + suffix, "{:.0f}")
    if pairs in ("", "0"):
        return ["no seed in common" if pairs else "", "", ""]
    count = f" ({pairs} pairs)" if pairs != str(row["n"]) else ""
    one, together = (_cell(row, low + suffix, "{:+.2f}") + _cell(row, high + suffix, " to {:+.2f}")
                     for low, high in (("low", "high"), ("low_all", "high_all")))
    return [_cell(row, "difference" + suffix, "{:+.2f}") + count,
            one or ("one pair only" if pairs == "1" else "no spread"), together]


def _row(row: pd.Series, variants: pd.DataFrame) -> list[str]:
    """A variant after its epochs."""
    base = variants[variants["variant"] == row.get("baseline")]
    ratio = [f" ({row[key] / base[key].iloc[0]:.2f}x)" if len(base) and base[key].notna().all() else ""
             for key in ("milliseconds_per_step", "activations_mib")]
    return [row["variant"], str(row["n"]), str(row["epochs"]),
            f"{row['train_loss']:.4f}" + _cell(row, "train_loss_std", " ± {:.4f}"),
            f"{row['top1']:.2f}" + _cell(row, "top1_std", " ± {:.2f}"), *_difference(row),
            f"{row['converted_top1']:.2f} ({row['predictions_changed']} changed)",
            _cell(row, "milliseconds_per_step", f"{{:.0f}}{ratio[0]}"),
            f"{row['activations_mib']:.1f}{ratio[1]}"]


def _row_of_equal_time(row: pd.Series) -> list[str]:
    """A variant beside the baseline that trained for about as long."""
    near = _cell(row, "pairs_equal_time", "{}")
    wanted = f"not run yet: train it with trainer.max_epochs={row['wanted_epochs']:.0f}"
    return [row["variant"], row["equal_time"] if near else wanted,
            f"{row['time_ratio']:.2f}" if near else "", *_difference(row, "_equal_time")]


def _what_is_missing(runs: pd.DataFrame) -> list[str]:
    """Runs that are in no table, and seeds that only some variants have."""
    left = [f"- `{cell(row.folder)}`: {cell(row.state)}"
            for row in runs[runs["state"] != "finished"].itertuples()]
    parts = [f"All {len(runs)} runs found are finished."]
    if left:
        parts = ["\n".join([f"## Not in the tables: {len(left)} of {len(runs)} runs\n", *left])]
    done = runs[runs["state"] == "finished"]
    seeds = {variant: set(group["seed"].astype(int)) for variant, group in done.groupby("variant")}
    lacking = {variant: sorted(set().union(*seeds.values()) - of) for variant, of in seeds.items()}
    if any(lacking.values()):
        lines = [f"{cell(variant)} lacks {', '.join(map(str, of))}" for variant, of in lacking.items() if of]
        parts.append(f"Seeds that others have: {'; '.join(lines)}.")
    return parts


def draw_curves(epochs: pd.DataFrame, variants: pd.DataFrame, path: Path) -> None:
    """Training loss and test top-1 by epoch, a variant a line; the band is a standard deviation each way.

    Beside them, where times are known, the final top-1 by the time of the training. Of more than `CURVES`
    variants, the most accurate.
    """
    which = f"the {CURVES} most accurate of {len(variants):,} variants" if len(variants) > CURVES else None
    variants = variants.nlargest(CURVES, "top1").sort_index()
    epochs = epochs[epochs["variant"].isin(variants["variant"])]
    timed = variants.dropna(subset="seconds")
    figure = new_figure(11 if timed.empty else 15, 4.5)
    axes, colors = figure.subplots(1, 2 if timed.empty else 3), {}
    shown = [("train_loss", "training loss", 1), ("test_top1", "test top-1, %", 100)]
    for axis, (column, title, scale) in zip(axes[:2], shown, strict=True):
        for variant, group in epochs.groupby("variant", sort=False):
            label = f"{variant[:LONGEST]} (n={group['folder'].nunique()})".replace("$", r"\$")  # no formula
            curve = (scale * group[column]).groupby(group["epoch"]).agg(["mean", "std", "count"])
            curve = curve[curve["count"] > 0]
            whole = curve["count"] == group["folder"].nunique()  # one that diverged ends the line
            curve = curve.assign(mean=curve["mean"].where(whole)).iloc[::len(curve) // POINTS + 1]
            mean, std = curve["mean"], curve["std"].fillna(0)
            [line] = axis.plot(mean.index, mean, label=label)
            colors[variant] = line.get_color()
            axis.fill_between(mean.index, mean - std, mean + std, color=line.get_color(), alpha=0.2)
        axis.set(title=title, xlabel="epoch")
        axis.xaxis.get_major_locator().set_params(integer=True)
        axis.grid(alpha=0.3)
    figure.legend(*axis.get_legend_handles_labels(), loc="outside lower center", ncols=3, fontsize="small",
                  title=which)
    if len(timed):
        _draw_cost(axes[2], timed, colors)
    figure.savefig(path, dpi=110)


def _draw_cost(axis, variants: pd.DataFrame, colors: dict[str, str]) -> None:
    """Final top-1 with the 95% interval of its mean, by minutes; those of a baseline are joined."""
    minutes, n = variants["seconds"] / 60, variants["n"]
    half = stats.t.ppf(0.975, n - 1) * variants["top1_std"] / n**0.5
    for variant, x, y, error in zip(variants["variant"], minutes, variants["top1"], half, strict=True):
        axis.errorbar(x, y, error, fmt="o", capsize=3, color=colors[variant])
    for _, curve in variants.sort_values("seconds").groupby("curve"):
        axis.plot(curve["seconds"] / 60, curve["top1"], "--", color="gray", zorder=0)
    axis.set(title="final test top-1, %, by the time of the training", xlabel="minutes of training steps")
    axis.grid(alpha=0.3)
