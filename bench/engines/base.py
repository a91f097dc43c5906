"""What the engines have in common."""

ENGINES: tuple[str, ...] = ("local", "dask")


class EngineError(Exception):
    """Cells that could not be measured although nothing was wrong with the request; the message is one sentence."""
