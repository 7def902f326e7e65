"""The mistakes a user can make, each with its exit code for the command line and its HTTP status.

Everything here is a `ValueError`: the input was wrong, and the message says which numbers disagree
and what to do. Our own bugs are `assert`s and never arrive as one of these.
"""

import traceback


class LlavaError(ValueError):
    """An error of the caller; its message is for the user."""

    exit_code = 2
    http_status = 400


class OptionError(LlavaError):
    """An option is unknown, out of range, or contradicts another."""


class PromptError(LlavaError):
    """Messages, placeholders and media do not fit each other."""


class ContextError(LlavaError):
    """The prompt and the answer asked for are longer than the context or the KV memory."""


class MediaError(LlavaError):
    """An image or a video cannot be read, or is over a limit."""


class MediaRefused(MediaError):
    """A media source is not allowed here: scheme, address, path or size."""

    http_status = 403


class CheckpointError(LlavaError):
    """A checkpoint, an adapter or a configuration is missing, broken or of another network."""


class Unsupported(LlavaError):
    """Not supported on this machine; the message names the alternative."""

    http_status = 501


class DataError(LlavaError):
    """A training or evaluation data set has a fault; the message names the sample."""


class RemoteError(LlavaError):
    """A server or another process of a run cannot be reached, or does not answer as it should."""

    http_status = 502


def with_place(error: BaseException) -> str:
    """An error of the user's own code: its type, what it says, and the line that raised it."""
    place = traceback.extract_tb(error.__traceback__)[-1]
    return f"{type(error).__name__}: {error} ({place.filename}, line {place.lineno})"
