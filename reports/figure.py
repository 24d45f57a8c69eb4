"""A figure of matplotlib's, drawn alike wherever it is drawn."""


def new_figure(width: float, height: float):
    """An empty `matplotlib.figure.Figure`, its sides in inches.

    Whatever a matplotlibrc in the current folder says, which may be somebody else's and start programs.
    """
    import matplotlib
    from matplotlib.figure import Figure
    matplotlib.rcdefaults()
    return Figure(figsize=(width, height), layout="constrained")
