"""An on-disk compile cache of its own for each program, per framework; each module is imported only in its worker.

Cold then means an empty cache, whatever ran before and whatever the user keeps; warm means what the cold one left.
"""

import shutil
import tempfile
import weakref


class CacheFolder:
    """A new, empty folder that is removed with this object.

    Attributes:
        path: where it is.
    """

    def __init__(self) -> None:
        self.path = tempfile.mkdtemp(prefix="partitioned-linear-")
        # Not a TemporaryDirectory: whoever holds the program lets go of it without a word, and that one would warn.
        weakref.finalize(self, shutil.rmtree, self.path, ignore_errors=True)
