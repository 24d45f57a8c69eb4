"""report.md, and the pictures beside it."""

from pathlib import Path

from export.graph import nodes

FORMATS = {"top1": "{:.4f}", "top5": "{:.4f}", "loss": "{:.6f}", "parameters": "{:,}", "macs": "{:,}", "latency_ms": "{:.2f}"}


def rows(report: dict) -> list[list[str]]:
    """The table before / after, a row per measure."""
    measured = {name: form for name, form in FORMATS.items() if name in report["before"]}
    return [[name, *(form.format(report[when][name]) for when in ("before", "after"))] for name, form in measured.items()]


def file_rows(report: dict) -> list[list[str]]:
    """The table of files, each compared with the network branch by branch."""
    result = []
    for name, entry in report["files"].items():
        changed, ties = entry["predictions_changed"], entry["ties"]
        if "int8" in name:  # errors that large make a tie of nearly everything
            changed, ties = changed + ties, "-"
        top1 = f"{entry['top1']:.4f}" if "top1" in entry else ""
        result.append([name, f"{entry['bytes']:,}", top1, str(changed), str(ties), f"{entry['relative_error']:.1e}"])
    return result


def markdown(report: dict, recipe: str) -> str:
    """The report, for people."""
    about = report["about"]
    labelled = "top1" in report["before"]
    parts = [f"# {about['model']}, {len(about['classes'])} classes, {about['image_size']} pixels: conversion",
             "![time and size before and after, and the share of every branch](report.png)",
             table(["", "before: branch by branch", "after: one convolution each"], rows(report)),
             f"Compared on {report['images']:,} images" + ("" if labelled else " of noise (`data=none`): no accuracy was measured")
             + ". Each file against the network branch by branch:",
             table(["file", "bytes", "top-1", "predictions changed", "ties", "largest relative logit error"], file_rows(report)),
             "SHA-256:\n\n" + "\n".join(f"    {entry['sha256']}  {name}" for name, entry in report["files"].items())]
    if "graphs" in report:
        kinds = sorted({kind for graph in report["graphs"].values() for kind in graph["nodes"]})
        body = [[kind, *(str(graph["nodes"].get(kind, 0)) for graph in report["graphs"].values())] for kind in kinds]
        body += [["all nodes", *(str(sum(graph["nodes"].values())) for graph in report["graphs"].values())]]
        body += [[name, *(form.format(graph[name]) for graph in report["graphs"].values())]
                  for name, form in FORMATS.items() if name in ("parameters", "macs", "latency_ms")]
        parts += ["## Graphs\n\n![both graphs](graphs.png)", table(["", *report["graphs"]], body)]
    if "int8" in report:
        worst = [[row["layer"], f"{row['range']:.3g}", f"{row['spread']:.1f}", f"{row['weight_db']:.1f}",
                  "" if row["output_db"] is None else f"{row['output_db']:.1f}"] for row in report["int8"]]
        parts += ["## int8\n\nonnxruntime, static, a scale per output channel, calibrated on training images; the "
                  "classifier stays in float. Worst layers first.",
                  table(["layer", "largest weight", "widest / median channel", "weight, dB", "output, dB"], worst)]
    lines = f'{recipe}\nfrom safetensors.torch import load_file\nnet.load_state_dict(load_file("model.safetensors"))\nnet.eval()'
    parts += [f"## Load it without this repository\n\n```python\n{lines}\n```",
              f"Images: {about['image_size']}x{about['image_size']} (shorter side to {about['resize']}, "
              f"{about['interpolation']}, centre crop), RGB in 0 .. 1, minus {about['mean']}, "
              f"over {about['std']}. The norms hold their convolutions' statistics over "
              f"{about['norm_statistics']}."]
    return "\n\n".join(parts) + "\n"


def table(head: list[str], body: list[list[str]]) -> str:
    """A table in Markdown."""
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in [head, ["---"] * len(head), *body])


def draw_report(report: dict, path: Path) -> None:
    """Bars of time and size, before and after, and the branches' shares in every layer."""
    from matplotlib.figure import Figure

    layers = report["shares"]
    figure = Figure(figsize=(10, 3 + 0.22 * len(layers)), layout="constrained")
    top, bottom = figure.subfigures(2, height_ratios=[3, max(0.22 * len(layers), 0.1)])
    for axis, (name, title) in zip(top.subplots(1, 3), [("latency_ms", "one image, ms"), ("parameters", "parameters"),
                                                        ("macs", "multiply-accumulates")], strict=True):
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


def draw_graphs(paths: dict[str, Path], path: Path) -> None:
    """Each ONNX graph from top to bottom, a dot per node, coloured by its type."""
    import networkx
    from matplotlib.figure import Figure

    figure, kinds = Figure(figsize=(5 * len(paths), 14), layout="constrained"), {}
    for axis, (title, file) in zip(figure.subplots(1, len(paths)), paths.items(), strict=True):
        graph, made = networkx.DiGraph(), {}
        for index, (kind, inputs, outputs) in enumerate(nodes(file)):
            graph.add_node(index, color=kinds.setdefault(kind, f"C{len(kinds) % 10}"))
            graph.add_edges_from((made[name], index) for name in inputs if name in made)
            made |= dict.fromkeys(outputs, index)
        for depth, generation in enumerate(networkx.topological_generations(graph)):
            for index in generation:
                graph.nodes[index]["depth"] = depth
        places = networkx.multipartite_layout(graph, subset_key="depth", align="horizontal")
        places = {index: (x, -graph.nodes[index]["depth"]) for index, (x, _) in places.items()}
        networkx.draw_networkx(graph, places, ax=axis, with_labels=False, node_size=14, width=0.4, arrows=False,
                               node_color=[graph.nodes[index]["color"] for index in graph])
        axis.set_title(f"{title}: {len(graph)} nodes")
        axis.axis("off")
    for kind, color in kinds.items():
        axis.scatter([], [], color=color, label=kind)
    axis.legend(loc="lower right", fontsize="small")
    figure.savefig(path, dpi=100)
