"""Error of a storm in which a check failed."""


class StormError(Exception):
    """The run did not come through as it must, or the cluster could not be had; the message says what is known."""
