"""Base classes of the errors that this library raises on purpose."""


class PrdError(Exception):
    """Base class of the library's errors; each also derives from the built-in error that fits (mostly ValueError)."""


class CheckpointError(PrdError, ValueError):
    """A checkpoint that is damaged, or is not the model it is said to be."""
