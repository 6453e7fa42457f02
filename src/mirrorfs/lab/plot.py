"""The ratios of a benchmark as a picture: for each workload a bar for each system, from native to where the system is."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from mirrorfs.errors import MirrorfsError

_WIDTH_IN = 9.0
_BAR_IN = 0.17
_MARGIN_IN = 1.6
_GROUP = 0.8  # of the distance between two workloads


def require() -> None:
    """MirrorfsError if matplotlib cannot be imported."""
    try:
        import matplotlib.figure  # noqa: F401
    except ImportError:
        raise MirrorfsError(
            "--plot needs matplotlib: `.venv/bin/python -m pip install matplotlib`, or install mirrorfs[plot]"
        ) from None


def draw(ratios: Mapping[str, Mapping[str, float]], file: Path, *, base: str, title: str) -> None:
    """Write the SVG file: the ratios to the system `base`, by workload and system, on a logarithmic scale.

    Every workload has the same systems. Raises MirrorfsError without matplotlib, OSError if the file cannot be written.
    """
    require()
    import matplotlib as mpl
    from matplotlib.figure import Figure
    from matplotlib.ticker import FuncFormatter

    workloads = list(ratios)
    systems = list(next(iter(ratios.values())))
    height = _MARGIN_IN + _BAR_IN * len(workloads) * (len(systems) + 1)
    # Text stays text, and the same figures make the same file.
    with mpl.rc_context({"svg.fonttype": "none", "svg.hashsalt": "mirrorfs"}):
        # Not through pyplot, which keeps figures and looks for a screen.
        figure = Figure(figsize=(_WIDTH_IN, height), layout="constrained")
        axes = figure.subplots()
        axes.set_xscale("log")
        for number, system in enumerate(systems):
            places = _places(len(workloads), number, len(systems))
            values = [ratios[workload][system] for workload in workloads]
            bars = axes.barh(places, [value - 1 for value in values], _GROUP / len(systems), left=1, label=system)
            axes.bar_label(bars, [f"{value:.3g}" for value in values], padding=3, fontsize=7)
        axes.axvline(1, color="black", linewidth=1)
        axes.set_yticks(range(len(workloads)), workloads)
        axes.invert_yaxis()
        axes.margins(x=0.12, y=0.01)
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, position: f"{value:g}"))
        axes.grid(axis="x", which="major", alpha=0.3)
        axes.set_axisbelow(True)
        axes.set_xlabel(f"operations per second, as a multiple of {base} (logarithmic)")
        axes.set_title(title, fontsize=10)
        figure.legend(loc="outside lower center", ncols=len(systems))
        figure.savefig(file, format="svg", metadata={"Date": None})


def _places(count: int, number: int, of: int) -> Sequence[float]:
    """Where the bars of one system are, so that the group of a workload is around its whole number."""
    return [workload + _GROUP * ((number + 0.5) / of - 0.5) for workload in range(count)]
