"""Error of a storm in which a check failed."""


class StormError(Exception):
    """Failure of a check, or of the cluster to start; the message describes the state."""
