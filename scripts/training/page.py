"""docs/results/training.md and docs/results/training.svg, from the results of the runs."""

from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from statistics import mean, median, stdev
from typing import Any

from training.rows import ROWS
from training.tasks import TASKS, Task

Result = dict[str, Any]
Cells = dict[tuple[str, float], list[float]]

#: A run so many points below the median has not trained.
COLLAPSE = 30
_INTRO = """# Training results

Written by `scripts/train.py report` from docs/results/training.jsonl; nothing here is typed in by hand. All rows of a
table train alike: bfloat16 autocast on the CPU, a learning rate that falls to 0 on a cosine. The score of the last
epoch on test data, mean and standard deviation over seeds; in brackets the difference to the dense model. A cell
without a deviation has one seed, a missing one has not been run. Images are Fashion-MNIST, 60,000 for training and
10,000 for test; the text is the Brown corpus, every tenth file for test and two of ten for training.
"""
_COMMANDS = {
    "mlp": "scripts/train.py table",
    "vit": 'scripts/train.py row "gradual magnitude" --model vit --sparsity 0.9',
    "resnet": 'scripts/train.py row "gradual magnitude, CNN recipe" --model resnet --sparsity 0.9 --sparsity 0.95',
    "resnet-wide": 'scripts/train.py row "gradual magnitude, CNN recipe" --model resnet-wide --sparsity 0.95',
    "lstm": 'scripts/train.py row "gradual magnitude" --model lstm --sparsity 0.8',
    "lstm-wide": 'scripts/train.py row "gradual magnitude, last layer spared" --model lstm-wide',
}


def write(results: Sequence[Result], folder: Path) -> None:
    """Write the page and the picture."""
    text = [_INTRO, "![Accuracy against sparsity](training.svg)\n"]
    for model, task in TASKS.items():
        cells = _cells(results, model)
        if cells:
            unit = "test accuracy in %" if task.measure == "accuracy" else "test perplexity, lower is better"
            text += [f"## {task.title}", f"    {_COMMANDS[model]}\n"]
            text += [f"{task.epochs} epochs, a batch of {task.batch}; {unit}.\n", *_table(cells, task), ""]
            text += _zeros(results, model)
    text += ["## Recipes\n", *_recipes({str(result["row"]) for result in results}), ""]
    (folder / "training.md").write_text("\n".join(text))
    _draw(_cells(results, "mlp"), folder / "training.svg")


def _cells(results: Sequence[Result], model: str) -> Cells:
    """Collect the scores of each row and sparsity: accuracies in %, or perplexities."""
    cells: Cells = defaultdict(list)
    for result in results:
        if result["model"] == model:
            score = 100 * result["accuracy"] if "accuracy" in result else result["perplexity"]
            cells[result["row"], result["sparsity"]].append(score)
    return dict(cells)


def _table(cells: Cells, task: Task) -> list[str]:
    dense = cells.get(("dense", 0.0))
    sparsities = sorted({sparsity for _, sparsity in cells if sparsity})
    lines = ["| | " + " | ".join(f"{s:.0%}" for s in sparsities) + " |", "|---|" + "---:|" * len(sparsities)]
    for row in ROWS:
        if row == "dense" and dense:
            lines.append(f"| dense, 0% | {_text(dense, None, task)} |" + " |" * (len(sparsities) - 1))
        elif any((row, s) in cells for s in sparsities):
            lines.append(f"| {row} | " + " | ".join(_text(cells.get((row, s)), dense, task) for s in sparsities) + " |")
    return lines


def _zeros(results: Sequence[Result], model: str) -> list[str]:
    """List the share of zeros of each row: in the weights of all layers, spared ones too, and in all parameters."""
    lines = {}
    for result in results:
        if result["model"] == model and "parameters" in result:
            zeros, of_all = result["zeros"], result["zeros"] * result["weights"] / result["parameters"]
            lines[result["row"], result["sparsity"]] = (
                f"- {result['row']}, {result['sparsity']:.0%}: zeros in all layers, spared ones too, {zeros:.1%}; "
                f"in all parameters {of_all:.1%}"
            )
    return [*lines.values(), ""] if lines else []


def _recipes(rows: set[str]) -> list[str]:
    """List the recipe and the variables of each row."""
    lines = []
    for name, row in ROWS.items():
        if row is not None and name in rows:
            given = {key: " ".join(v) if isinstance(v, list) else v for key, v in row.variables.items()}
            variables = ", ".join(f"{key} {value}" for key, value in given.items())
            lines.append(f"- {name}: recipes/{row.recipe}.yaml" + (f" ({variables})" if variables else ""))
    return lines


def _text(scores: list[float] | None, dense: list[float] | None, task: Task) -> str:
    if not scores:
        return ""
    spread = f" ± {stdev(scores):.2f}" if len(scores) > 1 else ""
    if task.measure == "perplexity":
        apart = f" ({mean(scores) / mean(dense) - 1:+.1%})" if dense else ""
    else:
        apart = f" ({mean(scores) - mean(dense):+.2f})" if dense else ""
        if median(scores) - min(scores) > COLLAPSE:
            spread += f", one collapsed to {min(scores):.2f}"
    return f"{mean(scores):.2f}{spread}{apart}"


def _draw(cells: Cells, file: Path) -> None:
    """Draw accuracy against sparsity, a line a row."""
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams.update({"svg.hashsalt": "sparsify", "svg.fonttype": "none", "font.size": 9})
    import matplotlib.pyplot as plt

    figure, panel = plt.subplots(figsize=(7, 4), layout="constrained")
    sparsities = TASKS["mlp"].sparsities
    for row in ROWS:
        points = [(100 * s, mean(cells[row, s])) for s in sparsities if (row, s) in cells]
        if points:
            panel.plot(*zip(*points, strict=True), marker="o", markersize=3, label=row)
    if ("dense", 0.0) in cells:
        panel.axhline(mean(cells["dense", 0.0]), color="#000000", linewidth=0.8, label="dense")
    panel.set_ylim(80, 91)
    panel.set_xticks([100 * s for s in sparsities])
    panel.set_xlabel("zeros, %")
    panel.set_ylabel("test accuracy, %")
    panel.legend(fontsize=8, frameon=False, loc="center left", bbox_to_anchor=(1, 0.5))
    figure.savefig(file, metadata={"Date": None})
    plt.close(figure)
