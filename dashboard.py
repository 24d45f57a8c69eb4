"""Build the saved W&B dashboard of a project: curves by group, the conversion, the branches, and what the
network gets wrong.

    python dashboard.py --project dbb [--entity TEAM]

The package is an extra: pip install -e '.[train,dashboard]'.
"""

import argparse
import sys
from importlib.util import find_spec

import wandb

from training.wandb_settings import refuse_settings_of_folder


def make_workspace(entity: str, project: str):
    """The dashboard's definition, a `wandb_workspaces.workspaces.Workspace`; nothing is sent."""
    import wandb_workspaces.reports.v2 as wr
    import wandb_workspaces.workspaces as ws
    from wandb_workspaces.expr import Config

    def by_group(title, *metrics):
        return wr.LinePlot(title=title, x="epoch", y=list(metrics), groupby_aggfunc="mean",
                           groupby_rangefunc="stddev")

    def by_step(title, pattern, **options):  # what is logged beside no epoch
        return wr.LinePlot(title=title, x="trainer/global_step", metric_regex=pattern, **options)

    learning = [by_group("test top-1", "test/top1"), by_group("test loss", "test/loss"),
                by_group("training loss", "train/loss_epoch"), by_step("learning rate", "^lr-")]
    conversion = [
        wr.BarPlot(title="top-1, branch by branch and converted",
                   metrics=["final/top1", "final/converted_top1"]),
        wr.ScalarChart(title="predictions changed", metric="final/predictions_changed",
                       groupby_aggfunc="max"),
        wr.BarPlot(title="milliseconds an image",
                   metrics=["convert/before/latency_ms", "convert/after/latency_ms"]),
        wr.MediaBrowser(media_keys=["convert/report"])]
    cost = [by_group("seconds a step", "train/seconds_per_step"),
            by_group("peak memory, MiB", "train/peak_memory_mib"),
            wr.BarPlot(title="activations a batch, MiB", metrics=["final/activations_mib"])]
    branches = [by_step("share in the merged kernel", "^share/", max_runs_to_show=1),
                by_step("mean size of gamma", "^gamma/", max_runs_to_show=1)]
    sections = [ws.Section("Learning", is_open=True, panels=learning),
                ws.Section("Before and after conversion", is_open=True, panels=conversion),
                ws.Section("Cost of training", panels=cost),
                ws.Section("Branches", panels=branches),
                ws.Section("Mistakes", panels=[wr.MediaBrowser(media_keys=["wrongly_classified"])])]
    groups = [Config("model.name"), Config("data.name"), Config("block.name")]
    return ws.Workspace(entity=entity, project=project, name="Diverse Branch Block",
                        auto_generate_panels=False, sections=sections,
                        runset_settings=ws.RunsetSettings(groupby=groups))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--project", required=True)
    parser.add_argument("--entity", help="user or team; by default that of your key")
    options = parser.parse_args()
    if find_spec("wandb_workspaces") is None:
        sys.exit("error: the dashboard needs wandb-workspaces: pip install -e '.[train,dashboard]'")
    try:
        refuse_settings_of_folder()
    except ValueError as error:
        sys.exit(f"error: {error}")
    try:
        entity = options.entity or wandb.Api().default_entity
        print("written:", make_workspace(entity, options.project).save().url)
    except (wandb.Error, ValueError) as error:
        sys.exit(f"error: W&B did not take the dashboard ({error}); is there a key (wandb login), and such a "
                 "project?")


if __name__ == "__main__":
    main()
