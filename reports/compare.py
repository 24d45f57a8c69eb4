"""Compare the variants of a study, seed by seed."""

from typing import Any

import numpy as np
import pandas as pd
from scipy import stats

SAME_TIME = (0.8, 1.25)  # ratios of training times that count as about equal


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
    both = 100 * pd.DataFrame({"ours": top1[variant], "theirs": top1[base]}).dropna()
    if both.empty:
        return {"pairs": 0}
    differences = both["ours"] - both["theirs"]
    found = {"pairs": len(both), "difference": differences.mean()}
    # One pair, or the same difference in all (few test images), gives no spread.
    if len(both) > 1 and differences.std() > 1e-9:
        interval = stats.ttest_rel(both["ours"], both["theirs"]).confidence_interval(0.95)
        found |= {"low": interval.low, "high": interval.high}
    return found


def together(variants: pd.DataFrame) -> pd.DataFrame:
    """Add the intervals widened (Bonferroni) so that all differences hold together, with 95% confidence.

    Columns `low_all` and `high_all`, and likewise for equal time, whose differences count if they are others.
    """
    suffixes = {"": "baseline", "_equal_time": "equal_time"}
    suffixes = {suffix: base for suffix, base in suffixes.items() if f"low{suffix}" in variants}
    compared = [variants.loc[variants[f"low{suffix}"].notna(), ["variant", base]]
                for suffix, base in suffixes.items()]
    count, wider = len({pair for pairs in compared for pair in pairs.itertuples(False, None)}), {}
    for suffix in suffixes:
        middle, free = variants[f"difference{suffix}"], variants[f"pairs{suffix}"] - 1
        half = (variants[f"high{suffix}"] - middle) * stats.t.ppf(1 - 0.025 / count, free)
        half /= stats.t.ppf(0.975, free)
        wider |= {f"low_all{suffix}": middle - half, f"high_all{suffix}": middle + half}
    return variants.assign(**wider)


def _equal_time(done: pd.DataFrame, row: dict[str, Any], epochs: dict[str, int]) -> dict[str, Any]:
    """The difference to the baseline that trained for the time nearest to a variant's, if about as long.

    `epochs` are those of each baseline; nothing is returned where no time is known.
    """
    times = {a: row["seconds"] / done[done["variant"] == a]["seconds"].median() for a in epochs}
    times = {a: ratio for a, ratio in times.items() if np.isfinite(ratio)}
    if not times:
        return {}
    nearest = min(times, key=lambda a: abs(np.log(times[a])))
    found = {"equal_time": nearest, "time_ratio": times[nearest],
             "wanted_epochs": max(1, round(times[nearest] * epochs[nearest]))}
    if SAME_TIME[0] <= times[nearest] <= SAME_TIME[1]:
        pairs = paired(done, row["variant"], nearest)
        found |= {f"{key}_equal_time": value for key, value in pairs.items()}
    return found


def compare_variants(runs: pd.DataFrame, baseline: str | None) -> pd.DataFrame:
    """A variant a row: accuracy, cost, and the differences to its baseline.

    They are taken after the same epochs, and after about equal training time.

    Raises:
        ValueError: if there is no variant of the baseline's name, or a seed ran twice in a variant.
    """
    done = runs[runs["state"] == "finished"]
    twice = done[done.duplicated(["variant", "seed"])]
    if len(twice):
        variant, seed = twice.iloc[0][["variant", "seed"]]
        both = done[(done["variant"] == variant) & (done["seed"] == seed)]["folder"]
        raise ValueError(f"seed {seed:.0f} of {variant} is there twice, with other results, in "
                         f"{' and '.join(both)}: move one away, or name the folder of one study")
    if baseline is not None and baseline not in set(done["variant"]):
        names = "; ".join(sorted(set(done["variant"])))
        raise ValueError(f"--baseline {baseline}: there is no such variant; the variants are {names}")
    first = done.drop_duplicates("variant").set_index("variant")["settings"]
    lengths = {variant: sorted(set(group["epochs"].astype(int)))
               for variant, group in done.groupby("variant")}

    def family(variant: str) -> dict[str, Any]:
        return {key: value for key, value in first[variant].items()
                if not key.startswith("block.") and key != "trainer.max_epochs"}

    def is_base(variant: str) -> bool:
        if baseline is None:
            return first[variant]["block.name"] == "none"
        return first[variant] | {"trainer.max_epochs": 0} == first[baseline] | {"trainer.max_epochs": 0}

    families = {variant: family(variant) if baseline is None else None for variant in first.index}
    of_base = [variant for variant in first.index if is_base(variant)]
    rows = []
    for variant, group in done.groupby("variant", sort=False):
        ends = lengths[variant][:1] + lengths[variant][1:][-1:]  # the shortest and the longest
        row = {"variant": variant, "n": len(group), "epochs": "-".join(map(str, ends)),
               "train_loss": group["train_loss"].mean(skipna=False),
               "train_loss_std": group["train_loss"].std(skipna=False),
               "top1": 100 * group["top1"].mean(), "top1_std": 100 * group["top1"].std(),
               "converted_top1": 100 * group["converted_top1"].mean(),
               "predictions_changed": sum(map(int, group["predictions_changed"])),
               "milliseconds_per_step": 1e3 * group["seconds_per_step"].median(),
               "activations_mib": group["activations_mib"].iloc[0], "seconds": group["seconds"].median()}
        bases = [a for a in of_base if a != variant and families[a] == families[variant]]
        same = min([variant, *bases], key=lambda a: lengths[a])
        row["curve"] = same if variant in of_base else None  # of a baseline, whatever its number of epochs
        base = next((a for a in bases if lengths[a] == lengths[variant]), None)
        if base is not None:
            row |= {"baseline": base} | paired(done, variant, base)
        if bases and variant not in of_base:
            row |= _equal_time(done, row, {a: lengths[a][-1] for a in bases})
        rows.append(row)
    return together(pd.DataFrame(rows))
