"""docs/results/training.md and docs/results/training.svg, from the results of the runs."""

from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from statistics import mean, median, stdev
from typing import Any

from training.rows import EPOCHS, ROWS, SPARSITIES

Result = dict[str, Any]
Cells = dict[tuple[str, float], list[float]]

#: A run so many points below the median has not trained.
COLLAPSE = 30
_INTRO = """# Training results

Written by `scripts/train.py report` from docs/results/training.jsonl; nothing here is typed in by hand. Fashion-MNIST,
60,000 images for training and 10,000 for test, {epochs} epochs for every row, a batch of 128, bfloat16 autocast on the
CPU, a learning rate that falls to 0 on a cosine. Test accuracy of the last epoch in %, mean and standard deviation over
seeds; in brackets the difference to the dense model in points. A cell without a deviation has one seed, a missing one
has not been run.
"""
_TITLES = {
    "mlp": "## MLP 784-512-256-10, SGD with momentum\n    scripts/train.py table",
    "vit": "## Vision Transformer, 4 layers of width 96, patches of 7x7, AdamW; attention is pruned too\n"
    '    scripts/train.py row "gradual magnitude" --model vit --sparsity 0.9',
}


def write(results: Sequence[Result], folder: Path) -> None:
    """Write the page and the picture."""
    text = [_INTRO.format(epochs=EPOCHS), "![Accuracy against sparsity](training.svg)\n"]
    for model, title in _TITLES.items():
        cells = _cells(results, model)
        if cells:
            text += [title + "\n", *_table(cells), ""]
    text += ["## Recipes\n", *_recipes({str(result["row"]) for result in results}), ""]
    (folder / "training.md").write_text("\n".join(text))
    _draw(_cells(results, "mlp"), folder / "training.svg")


def _cells(results: Sequence[Result], model: str) -> Cells:
    """Collect the accuracies of each row and sparsity, in %."""
    cells: Cells = defaultdict(list)
    for result in results:
        if result["model"] == model:
            cells[result["row"], result["sparsity"]].append(100 * result["accuracy"])
    return dict(cells)


def _table(cells: Cells) -> list[str]:
    dense = cells.get(("dense", 0.0))
    lines = ["| | " + " | ".join(f"{s:.0%}" for s in SPARSITIES) + " |", "|---|" + "---:|" * len(SPARSITIES)]
    for row in ROWS:
        if row == "dense" and dense:
            lines.append(f"| dense, 0% | {_text(dense, None)} |" + " |" * (len(SPARSITIES) - 1))
        elif any((row, s) in cells for s in SPARSITIES):
            lines.append(f"| {row} | " + " | ".join(_text(cells.get((row, s)), dense) for s in SPARSITIES) + " |")
    return lines


def _recipes(rows: set[str]) -> list[str]:
    """List the recipe and the variables of each row."""
    lines = []
    for name, row in ROWS.items():
        if row is not None and name in rows:
            variables = ", ".join(f"{key} {value}" for key, value in row.variables.items())
            lines.append(f"- {name}: recipes/{row.recipe}.yaml" + (f" with {variables}" if variables else ""))
    return lines


def _text(accuracies: list[float] | None, dense: list[float] | None) -> str:
    if not accuracies:
        return ""
    spread = f" ± {stdev(accuracies):.2f}" if len(accuracies) > 1 else ""
    if median(accuracies) - min(accuracies) > COLLAPSE:
        spread += f", one collapsed to {min(accuracies):.2f}"
    apart = f" ({mean(accuracies) - mean(dense):+.2f})" if dense else ""
    return f"{mean(accuracies):.2f}{spread}{apart}"


def _draw(cells: Cells, file: Path) -> None:
    """Draw accuracy against sparsity, a line a row."""
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams.update({"svg.hashsalt": "sparsify", "svg.fonttype": "none", "font.size": 9})
    import matplotlib.pyplot as plt

    figure, panel = plt.subplots(figsize=(7, 4), layout="constrained")
    for row in ROWS:
        points = [(100 * s, mean(cells[row, s])) for s in SPARSITIES if (row, s) in cells]
        if points:
            panel.plot(*zip(*points, strict=True), marker="o", markersize=3, label=row)
    if ("dense", 0.0) in cells:
        panel.axhline(mean(cells["dense", 0.0]), color="#000000", linewidth=0.8, label="dense")
    panel.set_ylim(80, 91)
    panel.set_xticks([100 * s for s in SPARSITIES])
    panel.set_xlabel("zeros, %")
    panel.set_ylabel("test accuracy, %")
    panel.legend(fontsize=8, frameon=False, loc="center left", bbox_to_anchor=(1, 0.5))
    figure.savefig(file, metadata={"Date": None})
    plt.close(figure)
