"""The rows of the tables: recipe and variables of each."""

from dataclasses import dataclass, field
from typing import Any

#: The unit of `start`, `end`, `every` and `rewind` below is so much of a training.
EPOCHS = 20
_TIMES = ("start", "end", "every", "rewind")


@dataclass(frozen=True)
class Row:
    """A way to a sparse model: a recipe, followed while training, or (`after`) applied once when it is done."""

    recipe: str
    variables: dict[str, Any] = field(default_factory=dict)
    after: bool = False

    def scaled(self, epochs: int) -> dict[str, Any]:
        """Return the variables for a training of so many epochs."""
        return {k: v * epochs / EPOCHS if k in _TIMES else v for k, v in self.variables.items()}


#: All rows of a task train alike: epochs, optimizer, learning rates and order of examples.
ROWS: dict[str, Row | None] = {
    "dense": None,
    "one-shot magnitude, no training after": Row("magnitude-50", after=True),
    "gradual magnitude": Row("gradual-magnitude-90", {"start": 2, "end": 14, "every": 0.25}),
    "gradual magnitude, CNN recipe": Row("cnn-gradual-90", {"start": 2, "end": 14, "every": 0.25}),
    "gradual magnitude, last layer spared": Row(
        "gradual-magnitude-90", {"start": 1, "end": 10, "every": 0.25, "exclude": [":last"]}
    ),
    "iterative with rewinding": Row("lottery-ticket", {"rewind": 0.25, "end": 12.25, "every": 4}),
    "RigL": Row("rigl", {"end": 16, "every": 1.0, "steps": 400, "fraction": 0.9}),
    "SET": Row("set", {"end": 16, "every": 1.0, "fraction": 0.8}),
    "static random": Row("static-random"),
    "SNIP": Row("snip"),
    "straight-through top-k": Row("straight-through", {"end": 15, "every": 0.02}),
    "gradual magnitude, global": Row(
        "gradual-magnitude-90", {"start": 2, "end": 14, "every": 0.25, "allocation": "global"}
    ),
    "AC/DC": Row("ac-dc", {"start": 2, "end": 14, "every": 2}),
    "movement": Row("movement", {"start": 2, "end": 14, "every": 0.25}),
    "GraSP": Row("grasp"),
}

#: The rows of the table in the order of their runs: the baseline and the main methods come first.
TABLE = (
    *("dense", "gradual magnitude", "RigL", "SET", "static random", "one-shot magnitude, no training after"),
    *("iterative with rewinding", "SNIP", "straight-through top-k"),
)
SEEDS = (0, 1, 2)
