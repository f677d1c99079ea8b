"""A detector of ultralytics, built from its configuration."""

from __future__ import annotations

import os
import tempfile
from functools import partial
from typing import Any

import torch

from zoo_models.model import Model


def detector(n_classes: int, name: str = "yolo11n") -> Any:
    """Build a YOLO of ultralytics, with random weights."""
    os.environ.setdefault("YOLO_CONFIG_DIR", tempfile.gettempdir())  # its settings file
    from ultralytics.nn.tasks import DetectionModel

    return DetectionModel(f"{name}.yaml", nc=n_classes, verbose=False)


def _full() -> Any:
    with torch.device("cpu"):  # its constructor runs the model for the strides
        model = detector(80)
    strides = model.stride
    model = model.to("meta")
    model.model[-1].stride = strides  # read one by one
    return model


MODELS = {
    "yolo11n": Model(
        small=partial(detector, 4),
        inputs=lambda: (torch.randn(1, 3, 64, 64),),
        full=_full,
        full_inputs=lambda: (torch.randn(1, 3, 640, 640),),
        # a constant: it turns the shares of distances into one
        convert={"exclude": "*.dfl.conv"},
        continuous=False,
    )
}
