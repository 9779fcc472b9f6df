"""The base class of every error that this library raises on purpose."""


class PrdError(Exception):
    """Base class of the library's errors; each also derives from the built-in error that fits (mostly ValueError)."""
