"""report.md, and the pictures beside it."""

from pathlib import Path

from export.graph import Node
from reports.figure import new_figure
from reports.markdown import table

FORMATS = {"top1": "{:.4f}", "top5": "{:.4f}", "loss": "{:.6f}", "parameters": "{:,}", "macs": "{:,}",
           "latency_ms": "{:.2f}"}

COLORS = {"Conv": "#dbe9fb", "BatchNormalization": "#fde9cf"}  # as in docs/block.svg


def rows(report: dict) -> list[list[str]]:
    """The table before / after, a row per measure."""
    measured = {name: form for name, form in FORMATS.items() if name in report["before"]}
    return [[name, *(form.format(report[when][name]) for when in ("before", "after"))]
            for name, form in measured.items()]


def file_rows(report: dict) -> list[list[str]]:
    """The table of files, each compared with the network branch by branch."""
    result = []
    for name, entry in report["files"].items():
        changed, ties = entry["predictions_changed"], entry["ties"]
        if "int8" in name:  # with errors that large, nearly every change would count as a tie
            changed, ties = changed + ties, "-"
        top1 = f"{entry['top1']:.4f}" if "top1" in entry else ""
        result.append([name, f"{entry['bytes']:,}", top1, str(changed), str(ties),
                       f"{entry['relative_error']:.1e}"])
    return result


def print_tables(report: dict) -> None:
    """Print what was measured: a line a file, then the table before / after."""
    for name, size, top1, changed, ties, error in file_rows(report):
        score = f"top1 {top1}  " if top1 else ""
        print(f"{name:20s}{size:>12s} bytes  {score}{changed} changed, {ties} ties, relative error {error}")
    print(f"\n{'':12s}{'before':>16s}{'after':>16s}")
    for name, before, after in rows(report):
        print(f"{name:12s}{before:>16s}{after:>16s}")
    print(f"{report['predictions_changed']} of {report['images']} predictions changed, "
          f"{report['ties']} ties, largest relative logit error {report['relative_error']:.1e}")
    if report["biases"]:
        print(f"{_of_biases(report)}; report.md has the lines that build it")
    if "top1" not in report["before"]:
        print("data=none: compared on seeded noise images; no accuracy was measured")


def _of_biases(report: dict) -> str:
    """What the network is where blocks without a norm behind them became convolutions."""
    first, *others = report["biases"]
    more = f" and {len(others)} more" if others else ""
    return (f"model.safetensors is {report['about']['model']} with a bias in convolutions that have none "
            f"there ({first}{more})")


def markdown(report: dict, recipe: str) -> str:
    """The report, for people."""
    about = report["about"]
    noise = "" if "top1" in report["before"] else " of noise (`data=none`): no accuracy was measured"
    hashes = "\n".join(f"    {entry['sha256']}  {name}" for name, entry in report["files"].items())
    parts = [f"# {about['model']}, {len(about['classes'])} classes, {about['image_size']} pixels: conversion",
             "![time and size before and after, and the share of every branch](report.png)",
             table(["", "before: branch by branch", "after: one convolution each"], rows(report)),
             f"Compared on {report['images']:,} images{noise}. "
             "Each file against the network branch by branch:",
             table(["file", "bytes", "top-1", "predictions changed", "ties", "largest relative logit error"],
                   file_rows(report)),
             f"SHA-256:\n\n{hashes}"]
    if report["biases"]:
        parts.append(f"{_of_biases(report)}: no norm follows them that could hold the bias of their block.")
    if "graphs" in report:
        graphs = report["graphs"].values()
        kinds = sorted({kind for graph in graphs for kind in graph["nodes"]})
        body = [[kind, *(str(graph["nodes"].get(kind, 0)) for graph in graphs)] for kind in kinds]
        body += [["all nodes", *(str(sum(graph["nodes"].values())) for graph in graphs)]]
        body += [[name, *(FORMATS[name].format(graph[name]) for graph in graphs)]
                 for name in ("parameters", "macs", "latency_ms")]
        parts += ["## Graphs\n\n![both graphs](graphs.png)", table(["", *report["graphs"]], body)]
    if "int8" in report:
        worst = [[row["layer"], f"{row['range']:.3g}", f"{row['spread']:.1f}", f"{row['weight_db']:.1f}",
                  "" if row["output_db"] is None else f"{row['output_db']:.1f}"] for row in report["int8"]]
        parts += ["## int8\n\nonnxruntime, static, a scale per output channel, calibrated on training "
                  "images; the classifier stays in float. Worst layers first.",
                  table(["layer", "largest weight", "widest / median channel", "weight, dB", "output, dB"],
                        worst)]
    lines = (f"{recipe}\nfrom safetensors.torch import load_file\n"
             'net.load_state_dict(load_file("model.safetensors"))\nnet.eval()')
    parts += [f"## Load it without this repository\n\n```python\n{lines}\n```",
              f"Images: {about['image_size']}x{about['image_size']} (shorter side to {about['resize']}, "
              f"{about['interpolation']}, centre crop), RGB in 0 .. 1, minus {about['mean']}, "
              f"over {about['std']}. The norms hold their convolutions' statistics over "
              f"{about['norm_statistics']}."]
    return "\n\n".join(parts) + "\n"


def draw_report(report: dict, path: Path) -> None:
    """Bars of time and size, before and after, and the branches' shares in every layer."""
    layers = report["shares"]
    figure = new_figure(10, 3 + 0.22 * len(layers))
    top, bottom = figure.subfigures(2, height_ratios=[3, max(0.22 * len(layers), 0.1)])
    bars = [("latency_ms", "one image, ms"), ("parameters", "parameters"), ("macs", "multiply-accumulates")]
    for axis, (name, title) in zip(top.subplots(1, 3), bars, strict=True):
        values = [report[when][name] for when in ("before", "after")]
        axis.bar(["before", "after"], values, color=["tab:orange", "tab:blue"])
        axis.set_title(title)
    if layers:
        axis, left = bottom.subplots(), [0.0] * len(layers)
        for branch in dict.fromkeys(key for layer in layers.values() for key in layer):
            widths = [layer.get(branch, 0.0) for layer in layers.values()]
            axis.barh(list(layers), widths, left=left, label=branch)
            left = [a + b for a, b in zip(left, widths, strict=True)]
        axis.invert_yaxis()
        axis.set_xlabel("share of each branch in the merged kernel (Frobenius norms)")
        axis.legend(loc="upper left", bbox_to_anchor=(1, 1))
    figure.savefig(path, dpi=100)


def draw_graphs(block: tuple[str, list[Node], list[Node]], counts: dict[str, dict], path: Path) -> None:
    """One block before and after, an operator a box; and both whole graphs, operators counted by kind.

    Args:
        block: of `export.graph.first_block`.
        counts: by graph, its `export.graph.summary`.
        path: of the picture.
    """
    name, before, after = block
    figure = new_figure(15, 8)
    left, middle, right = figure.subplots(1, 3, width_ratios=[3.2, 1, 1.4])
    draw_operators(left, before)
    left.set_title(f"{name} in training: {len(before)} operators")
    draw_operators(middle, after)
    middle.set_ylim(left.get_ylim())
    middle.set_title(f"converted: {len(after)}")
    kinds = list(dict.fromkeys(kind for graph in counts.values() for kind in graph["nodes"]))
    height = 0.8 / len(counts)
    for index, (title, graph) in enumerate(counts.items()):
        rows_of_graph = [row + index * height for row in range(len(kinds))]
        counted = [graph["nodes"].get(kind, 0) for kind in kinds]
        bars = right.barh(rows_of_graph, counted, height, color=("tab:orange", "tab:blue")[index],
                          label=f"{title}: {sum(graph['nodes'].values())} operators")
        right.bar_label(bars, padding=2)
    right.set_yticks([row + (len(counts) - 1) * height / 2 for row in range(len(kinds))], kinds)
    right.invert_yaxis()
    right.set_title("the whole network")
    right.legend(loc="lower right")
    right.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=100)


def draw_operators(axis, operators: list[Node]) -> None:
    """A small graph from top to bottom: a labelled box an operator, below all that it reads."""
    places, made, columns = {"x": (0.0, 0.0)}, {}, 0
    for node in operators:
        sources = [made.get(name, "x") for name in node.inputs]
        across = sum(places[source][0] for source in sources) / len(sources)
        if sources == ["x"]:
            across, columns = float(columns), columns + 1
        label = f"{node.kind}\n{node.kernel}" if node.kernel else node.kind
        key = node.outputs[0]
        places[key] = (across, min(places[source][1] for source in sources) - 1)
        made |= dict.fromkeys(node.outputs, key)
        box = {"boxstyle": "round,pad=0.4", "facecolor": COLORS.get(node.kind, "white"),
               "edgecolor": "dimgray"}
        axis.text(*places[key], label, ha="center", va="center", zorder=2, fontsize=9, bbox=box)
    places["x"] = ((columns - 1) / 2, 0.0)
    circle = {"boxstyle": "circle", "facecolor": "white"}
    axis.text(*places["x"], "x", ha="center", va="center", fontsize=12, zorder=2, bbox=circle)
    for node in operators:
        lines = 1 + (f"\n{node.kernel}".count("\n") if node.kernel else 0)
        to_the_edge = 4 + 5.8 * lines  # half the height of the box, in points
        for name in node.inputs:
            arrow = {"arrowstyle": "-|>", "color": "dimgray", "shrinkB": to_the_edge}
            source = places[made.get(name, "x")]
            axis.annotate("", places[node.outputs[0]], source, zorder=1, arrowprops=arrow)
    across, down = zip(*places.values(), strict=True)
    axis.set_xlim(min(across) - 0.6, max(across) + 0.6)
    axis.set_ylim(min(down) - 0.6, 0.6)
    axis.axis("off")
