"""Errors of a run that are the user's to mend: printed as they are, without a traceback."""


class RunError(Exception):
    """A run cannot start or go on; the message says what was given and what to change."""


class ConfigError(RunError):
    """The configuration is refused."""


class CheckpointError(RunError):
    """A checkpoint cannot be written, found or read."""
