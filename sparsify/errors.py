"""Errors and warnings of this library. Wrong arguments are plain ValueError and TypeError."""


class CarryOverWarning(UserWarning):
    """A pruned model's outputs are far worse on other data than on its calibration data. The message names the data."""


class CheckpointError(ValueError):
    """An invalid checkpoint, or one for another model. The message names the fault and its place.

    The middle of a message is left out if long names in the file make it longer than a screen.
    """

    def __init__(self, message: str) -> None:
        super().__init__(message if len(message) <= 1000 else f"{message[:600]} ... {message[-300:]}")


class RecipeError(ValueError):
    """An invalid recipe, or one for another model. The message names the file, the line and the key."""


class DefaultTypesWarning(UserWarning):
    """A model is made of convolutions, so that `convert` takes them unasked. The message has their share."""


class LeftDenseWarning(UserWarning):
    """Some layers were left dense on purpose. The message names them, the reason, and their share of the parameters."""


class LeftFloatWarning(UserWarning):
    """Some layers were not rounded to int8: their outputs would change by more than allowed. The message names them."""


class MeasuredElsewhereWarning(UserWarning):
    """A checkpoint's forms were chosen on another machine: the answers are right, the speed may not be the best."""


class PaddingWarning(UserWarning):
    """Some layers cannot tell padding from tokens in the calibration data. The message names them."""


class RemovedLayerWarning(UserWarning):
    """Layers lose all their weights though asked for less. The message names them and the way to keep some."""


class SavedParametrizedWarning(UserWarning):
    """A checkpoint holds the state of a parametrization: only a model with the same one can load it."""


class ScheduleWarning(UserWarning):
    """A training leaves its recipe: in pace, masks or gradients. The message names the way out."""


class SlowBfloat16Warning(UserWarning):
    """bfloat16 was asked for on a processor without instructions for it, where float32 is much faster."""


class StaleMaskWarning(UserWarning):
    """A layer keeps more weights than it should, as in an average of weights. The message names the way out."""


class UnseenExpertsWarning(UserWarning):
    """Experts without rows of the calibration data lose their smallest weights. The message names layer and numbers."""
