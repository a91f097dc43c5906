"""An on-disk compile cache of its own for each program, per framework; each module is imported only in its worker.

Cold then means an empty cache, whatever ran before and whatever the user keeps; warm means what the cold one left.
"""

from parity_tests.report.files import ScratchFolder


class CacheFolder:
    """A new, empty folder that is removed with this object.

    Attributes:
        path: where it is.
    """

    def __init__(self) -> None:
        self._folder = ScratchFolder("cache")
        self.path = self._folder.name
