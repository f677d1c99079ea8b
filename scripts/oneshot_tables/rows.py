"""The rows and columns of the tables: arguments of `sparsify.prune`."""

from typing import Any

#: Line -> arguments of prune. `recover_s`: then so many seconds of `sparsify.recover`; `whole_s`: then as many as are
#: left of these for everything; `move`: with masks that move.
METHODS: dict[str, dict[str, Any]] = {
    "magnitude": {"method": "magnitude"},
    "magnitude + refit": {"method": "magnitude", "refit": True},
    "Wanda": {"method": "wanda"},
    "Wanda, swaps": {"method": "wanda", "swap": True},
    "SparseGPT": {"method": "sparsegpt"},
    "SparseGPT + refit": {"method": "sparsegpt", "refit": True},
    "SparseGPT, swaps + refit": {"method": "sparsegpt", "swap": True, "refit": True},
    "SparseGPT, correcting": {"method": "sparsegpt", "correct": True},
    "SparseGPT, correcting, reconstruct 2": {"method": "sparsegpt", "correct": True, "reconstruct": 2},
    "ALPS": {"method": "alps"},
    "ALPS, correcting": {"method": "alps", "correct": True},
    "ALPS, correcting, reconstruct 2": {"method": "alps", "correct": True, "reconstruct": 2},
    "ALPS, correcting, then recover for 4 min": {"method": "alps", "correct": True, "recover_s": 240.0},
    "ALPS, correcting, then recover, 4 min in all": {"method": "alps", "correct": True, "whole_s": 235.0},
    "SparseGPT + refit, then recover, 15 min in all": {"method": "sparsegpt", "refit": True, "whole_s": 895.0},
    **{
        f"ALPS, correcting, then recover, moving, {minutes} min in all": {
            **{"method": "alps", "correct": True, "move": True},
            "whole_s": seconds,
        }
        for minutes, seconds in ((4, 235.0), (20, 1190.0))
    },
}
#: Column -> sparsity or pattern.
COLUMNS: dict[str, dict[str, Any]] = {
    **{f"{n}%": {"sparsity": n / 100} for n in (50, 60, 70, 80, 90, 95)},
    "2:4": {"pattern": "2:4"},
    "1x4, 50%": {"pattern": "1x4", "sparsity": 0.5},
}
#: Allocations of one sparsity to the layers; "sensitivity" is measured by `sparsify sensitivity`.
ALLOCATIONS = ("uniform", "erk", "depth:0.05", "owl", "error", "sensitivity")
ALLOCATED_METHODS = ("SparseGPT", "ALPS", "ALPS, correcting")
ALLOCATED_COLUMN = "70%"


def allocated(method: str, allocation: str) -> str:
    """Name the line of a method with an allocation other than uniform.

    >>> allocated("ALPS", "owl")
    'ALPS, owl'
    """
    return method if allocation == "uniform" else f"{method}, {allocation}"


#: Every line, those with an allocation too.
LINES: dict[str, dict[str, Any]] = METHODS | {
    allocated(method, name): {**METHODS[method], "allocation": name}
    for method in ALLOCATED_METHODS
    for name in ALLOCATIONS
    if name != "uniform"
}
