"""The errors and the warnings that are this library's own. Wrong arguments are plain ValueError and TypeError."""


class CheckpointError(ValueError):
    """A file that is no valid checkpoint, or not one for the given model. The message says what is wrong and where.

    The middle of a message is left out where names in the file make it longer than a screen.
    """

    def __init__(self, message: str) -> None:
        super().__init__(message if len(message) <= 1000 else f"{message[:600]} ... {message[-300:]}")


class RecipeError(ValueError):
    """A recipe that cannot be followed. The message names the file, the line and the key."""


class LeftDenseWarning(UserWarning):
    """Some layers were left dense on purpose. The message says which, why, and their share of the parameters."""


class MeasuredElsewhereWarning(UserWarning):
    """A checkpoint's forms were chosen on another machine: the answers are right, the speed may not be the best."""


class PaddingWarning(UserWarning):
    """Calibration data has padding that cannot be told from tokens in some layers. The message names them."""


class RemovedLayerWarning(UserWarning):
    """Layers lose all their weights without having been asked to. The message names them, and how to keep some."""


class SavedParametrizedWarning(UserWarning):
    """A checkpoint holds the state of a parametrization, which only a model with the same one can load."""


class ScheduleWarning(UserWarning):
    """A training does not go as its recipe says: in pace, masks or gradients. The message says what to give or do."""


class StaleMaskWarning(UserWarning):
    """A layer keeps more weights than it should, as in an average of weights. The message says the way out."""
