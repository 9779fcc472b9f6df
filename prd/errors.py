"""The errors that this library raises on purpose: their base class, and those that several rooms raise."""


class PrdError(Exception):
    """Base class of the library's errors; each also derives from the built-in error that fits (mostly ValueError)."""


class ConfigError(PrdError, ValueError):
    """A configuration that cannot be used: an unknown key, a value of the wrong type or outside its range."""


class CheckpointError(PrdError, ValueError):
    """Saved weights that are damaged, incomplete, or not of the model or run that they are to be loaded into."""


class ModelMismatch(CheckpointError):
    """A saved model that is damaged, of another class, or does not fit the base, text encoder or settings at hand."""


class MissingFile(PrdError, FileNotFoundError):
    """A file or folder that a saved model, a corpus or an option needs and that is not there."""
