"""Write and read files whole or not at all, and keep scratch folders; nothing is left behind.

A file is written beside its target and takes its place in one step, so that a full disk, Ctrl-C or SIGKILL leave the
old one as it was. An unfinished file or folder is locked by its process. The kernel drops the lock with the process,
however that ends; an unfinished file without a lock is abandoned, and the next process removes it.
"""

import contextlib
import errno
import os
import re
import secrets
import shutil
import stat
import sys
import tempfile
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

if sys.platform != "win32":
    import fcntl

from parity_tests.report.text import json_text, printable

# Larger than any page or list that is read whole.
_MOST_BYTES = 2**28
_FOLDERS = "partitioned-linear-scratch-"


class OutputError(OSError):
    """A file, or a terminal, that cannot be written; the message is one sentence."""


# --- files ---


def read_text(path: Path) -> str:
    """Read a whole text file, which must be a regular one of sane size: no pipe or device is waited for.

    Raises:
        OSError: if it cannot be read, or is none.
        UnicodeDecodeError: if it is no text.
    """
    # Looked at before it is opened, which some devices take for an order, and after, because it may be another by then.
    _check_regular(path.stat())
    handle = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0))
    with open(handle, "rb") as file:
        found = os.fstat(handle)
        _check_regular(found)
        content = file.read(_MOST_BYTES + 1) if found.st_size <= _MOST_BYTES else b""
    if max(len(content), found.st_size) > _MOST_BYTES:
        raise OSError(0, f"it has more than {_MOST_BYTES} bytes")
    return content.decode("utf-8")


def _check_regular(found: os.stat_result) -> None:
    if stat.S_ISDIR(found.st_mode):
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
    if not stat.S_ISREG(found.st_mode):
        kinds = {stat.S_IFIFO: "pipe", stat.S_IFSOCK: "socket"}
        raise OSError(0, f"a {kinds.get(stat.S_IFMT(found.st_mode), 'device')}, no regular file")


@contextlib.contextmanager
def output(argument: str, path: Path | str) -> Iterator[BinaryIO]:
    """Open a file to be written: it appears whole when the block ends, or the old one stays as it was.

    A link is followed, the mode of an old file is kept, and only regular files are replaced. A device or a pipe, such
    as `/dev/stdout`, is written as it goes.

    Args:
        argument: the option that named it, for the message.
        path: of the file.

    Raises:
        OutputError: if it cannot be written; one sentence.
    """
    path = Path(path)
    with _told(argument, path), _stream(path) or _replacement(path) as file:
        yield file


def write_text(argument: str, path: Path | str, text: str | Iterable[str]) -> None:
    """Write text, whole or piece by piece; see `output`."""
    with output(argument, path) as file:
        for piece in [text] if isinstance(text, str) else text:
            file.write(piece.encode("utf-8"))


def write_json(argument: str, path: Path | str, value: Any) -> None:
    """Write a value as indented JSON; see `output` and `text.json_text`."""
    write_text(argument, path, json_text(value, indent=1) + "\n")


def check_output(argument: str, path: Path | str | None) -> None:
    """Refuse, before the work, a file that could not be written after it.

    Raises:
        OutputError: if its folder is missing or takes no file, or it is nothing that can be written.
    """
    if path is None:
        return
    path = Path(path)
    with _told(argument, path):
        found = _status(path)
        if found is not None and _standard_stream(found) is None and _is_stream(found):
            # Not opened: the reader of a pipe would see it end.
            _check_permitted(path)
        elif found is None or _standard_stream(found) is None:
            with contextlib.suppress(_Kept), _replacement(path) as file:
                # Found out now: the folder takes another file, and the disk another byte.
                file.write(b"\n")
                file.flush()
                raise _Kept


def check_apart(outputs: Mapping[str, Path | str | None]) -> None:
    """Refuse, before the work, two outputs that are one file: the later one would replace the earlier.

    Args:
        outputs: option to path.

    Raises:
        OutputError: with both options; one sentence.
    """
    seen: dict[str, str] = {}
    for argument, path in outputs.items():
        # A device or a pipe takes one after the other.
        if path is None or (os.path.exists(path) and not os.path.isfile(path)):
            continue
        other = seen.setdefault(os.path.realpath(path), argument)
        if other != argument:
            raise OutputError(
                f"{argument}: {printable(path)} is the file of {other} too; choose another for one of them."
            )


class _Kept(Exception):
    """End a trial and keep the old file."""


@contextlib.contextmanager
def _told(argument: str, path: Path) -> Iterator[None]:
    try:
        if "\0" in str(path):
            raise OSError(0, "no name has a NUL in it")
        yield
    except OutputError:
        raise
    except OSError as error:
        raise OutputError(
            f"{argument}: {printable(path)} cannot be written ({error.strerror or error}); make room or choose another "
            "file."
        ) from error


def _status(path: Path) -> os.stat_result | None:
    """Return what is there, links followed; None for nothing, or a link to nothing."""
    try:
        return path.stat()
    except FileNotFoundError:
        return None


def _check_permitted(path: Path) -> None:
    if not os.access(path, os.W_OK, effective_ids=os.access in os.supports_effective_ids):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))


def _is_stream(found: os.stat_result) -> bool:
    return stat.S_ISCHR(found.st_mode) or stat.S_ISFIFO(found.st_mode)


def _standard_stream(found: os.stat_result) -> int | None:
    """Return the standard stream that a file is, by any name: replacing it would lose its other output."""
    for stream in (1, 2):
        with contextlib.suppress(OSError):
            if os.path.samestat(found, os.fstat(stream)):
                return stream
    return None


def _stream(path: Path) -> contextlib.AbstractContextManager[BinaryIO] | None:
    """Open a device, a pipe or a standard stream for writing; return None for a file, which is replaced instead."""
    found = _status(path)
    if found is None:
        return None
    standard = _standard_stream(found)
    if standard is not None:
        (sys.stdout if standard == 1 else sys.stderr).flush()
        return open(os.dup(standard), "wb")
    if not _is_stream(found):
        return None
    if not hasattr(os, "O_NONBLOCK"):
        return path.open("wb")
    try:
        # Without waiting for a reader, who may never come.
        handle = os.open(path, os.O_WRONLY | os.O_NONBLOCK)
    except OSError as error:
        raise OSError(0, "no process reads this pipe") if error.errno == errno.ENXIO else error from None
    os.set_blocking(handle, True)
    return open(handle, "wb")


@contextlib.contextmanager
def _replacement(path: Path) -> Iterator[BinaryIO]:
    """Open a file beside the target, which takes its place when the block ends without an exception."""
    found = _status(path)
    if found is not None:
        _check_regular(found)
        _check_permitted(path)
    target = Path(os.path.realpath(path))
    if not target.parent.is_dir():
        raise FileNotFoundError(0, f"there is no folder {target.parent}")
    _remove_abandoned_files(target)
    handle, temporary = _new_file(target)
    done = False
    try:
        with open(handle, "wb") as file:
            yield file
            file.flush()
            os.fsync(handle)
            if found is not None:
                if hasattr(os, "chown"):
                    with contextlib.suppress(PermissionError):
                        os.chown(temporary, found.st_uid, found.st_gid)
                os.chmod(temporary, stat.S_IMODE(found.st_mode))
            if sys.platform == "win32":
                file.close()
            # Still open, and so still locked.
            os.replace(temporary, target)
            done = True
    finally:
        if not done:
            temporary.unlink(missing_ok=True)


# The file's own name, a number, and an ending that no file of a user's has.
_UNFINISHED = re.compile(r"\.[0-9a-f]{16}\.partial")


def _beginning(target: Path) -> str:
    # A name of 255 bytes has no room for more.
    return os.fsdecode(b"." + os.fsencode(target.name)[:200])


def _new_file(target: Path) -> tuple[int, Path]:
    while True:
        temporary = target.with_name(f"{_beginning(target)}.{secrets.token_hex(8)}.partial")
        handle = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, "O_BINARY", 0), 0o666)
        if _locked(handle, temporary) is not False:
            return handle, temporary
        # Taken for an abandoned one in the moment before it was locked.
        os.close(handle)


def _remove_abandoned_files(target: Path) -> None:
    """Remove the unfinished files of processes that were killed while they wrote the same file."""
    beginning = _beginning(target)
    try:
        names = [name for name in os.listdir(target.parent) if name.startswith(beginning)]
    except PermissionError:
        # A folder may take files and not show them.
        return
    for name in names:
        if _UNFINISHED.fullmatch(name.removeprefix(beginning)):
            _remove_if_abandoned(target.with_name(name), os.unlink)


# --- folders ---


class ScratchFolder:
    """A temporary folder of this process, removed with this object; making one removes those of killed processes.

    Args:
        purpose: part of its name.
        at_exit: False leaves it to the caller to call `cleanup` when Python ends.

    Attributes:
        name: its path.
    """

    def __init__(self, purpose: str, *, at_exit: bool = True) -> None:
        _remove_abandoned_folders()
        while True:
            self.name = tempfile.mkdtemp(prefix=f"{_FOLDERS}{purpose}-")
            lock = _open_to_lock(Path(self.name))
            if lock is None or _locked(lock, Path(self.name)) is not False:
                break
            # Taken for an abandoned one in the moment before it was locked.
            _release([(self.name, lock, os.getpid())])
        # No TemporaryDirectory, which warns if `cleanup` is not called before the object is gone.
        self._held = [(self.name, lock, os.getpid())]
        weakref.finalize(self, _release, self._held).atexit = at_exit

    def cleanup(self) -> None:
        """Remove the folder now."""
        _release(self._held)


def _release(held: list[tuple[str, int | None, int]]) -> None:
    while held:
        folder, lock, owner = held.pop()
        # A forked process that ends in order must leave its parent's folder.
        if os.getpid() == owner:
            shutil.rmtree(folder, ignore_errors=True)
        if lock is not None:
            os.close(lock)


def _remove_abandoned_folders() -> None:
    """Remove the folders of the same user's processes that were killed."""
    with os.scandir(tempfile.gettempdir()) as entries:
        names = [entry.path for entry in entries if entry.name.startswith(_FOLDERS)]
    for name in names:
        _remove_if_abandoned(Path(name), lambda path: shutil.rmtree(path, ignore_errors=True))


# --- locks ---


def _open_to_lock(path: Path) -> int | None:
    """Return a handle of a file or directory; None where it cannot be opened."""
    flags = os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_NOFOLLOW", 0)
    try:
        return os.open(path, flags)
    except OSError:
        return None


def _locked(handle: int, path: Path) -> bool | None:
    """Lock an open file; return False if another process has it or removed it, None where there are no locks."""
    if sys.platform == "win32":
        return None
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        # Some network file systems have none.
        return None
    try:
        return os.path.samestat(os.fstat(handle), os.lstat(path))
    except FileNotFoundError:
        return False


def _remove_if_abandoned(path: Path, remove: Callable[[Path], None]) -> None:
    handle = _open_to_lock(path)
    if handle is None:
        return
    try:
        own = not hasattr(os, "geteuid") or os.fstat(handle).st_uid == os.geteuid()
        if own and _locked(handle, path):
            with contextlib.suppress(OSError):
                remove(path)
    finally:
        os.close(handle)
