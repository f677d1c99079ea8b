"""The picture of a benchmark of layers: speed against sparsity, a line per peer, from its rows."""

from pathlib import Path

from benchmarks.bars import FEW, MANY, Bar, geometric_mean, ratios
from benchmarks.layers import CACHED, INT8, OURS
from benchmarks.tables import Record, sparsities

#: (ours, opponent) -> color; ours in int8 is dashed
_LINES = {
    (OURS, "best dense fp32"): "#000000",
    (OURS, "torch fp32"): "#4477aa",
    (OURS, "torch bf16"): "#66ccee",
    (OURS, "torch int8"): "#228833",
    (OURS, "torch csr"): "#ccbb44",
    (OURS, "torch csr matmul"): "#aa3377",
    (OURS, "best dense int8"): "#ee6677",
    (INT8, "best dense int8"): "#ee6677",
}


def draw(record: Record, file: Path) -> None:
    """Draw a sparse layer's speed as a multiple of each peer's, few tokens left, many right."""
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams.update({"svg.hashsalt": "sparsify", "svg.fonttype": "none", "font.size": 9})
    import matplotlib.pyplot as plt

    rows = record["rows"]
    figure, panels = plt.subplots(1, 2, figsize=(9, 3.6), sharey=True, layout="constrained")
    for panel, tokens in zip(panels, (FEW, MANY), strict=True):
        panel.set_title(Bar(CACHED, tokens, "").where)
        for (ours, against), color in _LINES.items():
            bar = Bar(CACHED, tokens, against, ours=ours)
            points = [(s, [r.times for r in ratios(rows, bar, s)]) for s in sparsities(rows)]
            line = [(100 * s, geometric_mean(times)) for s, times in points if times]
            if line:
                style = {"linestyle": "-" if ours == OURS else "--", "color": color}
                label = against if ours == OURS else f"{against}, sparsify int8"
                panel.plot(*zip(*line, strict=True), marker="o", markersize=3, label=label, **style)
        panel.axhline(1, color="#bbbbbb", linewidth=0.8)
        panel.set_yscale("log")
        panel.set_yticks([0.5, 1, 2, 5, 10, 20, 50], labels=["0.5", "1", "2", "5", "10", "20", "50"])
        panel.set_xlabel("zeros, %")
    panels[0].set_ylabel("sparsify is this many times as fast as")
    panels[1].legend(fontsize=8, frameon=False, loc="center left", bbox_to_anchor=(1, 0.5))
    figure.savefig(file, metadata={"Date": None})
    plt.close(figure)
