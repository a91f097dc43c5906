"""Files of parameters: read once, and replaced in one step.

A file is written beside its target and takes its place when it is whole, so that neither a full disk nor SIGKILL can
spoil the old one. While it is written it is locked. The kernel drops the lock with the process, however that ends: an
unfinished file that nobody has locked is abandoned, and the next save to the same place removes it.
"""

import contextlib
import errno
import math
import os
import re
import secrets
import stat
import sys
from pathlib import Path
from typing import Any

from torch_impl.array_types import kind_of

if sys.platform != "win32":
    import fcntl

_KINDS = {stat.S_IFIFO: "pipe", stat.S_IFSOCK: "socket"}
# Where the system has them: never wait for the other end of a pipe.
_NO_WAITING = getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)
_UNFINISHED = re.compile(r"\.[0-9a-f]{16}\.partial")


def as_path(path: Any) -> Path:
    """Return a file's name as a `Path`; refuse what is none by a TypeError, and what no file has by a ValueError."""
    try:
        name = os.fspath(path)
    except Exception:  # whatever the object's own method raises, it is no path
        name = None
    if not isinstance(name, str):
        raise TypeError(f"`path`: expected a str or a Path, got {kind_of(path)}; pass the file's name.")
    try:
        usable = name not in ("", ".") and b"\0" not in os.fsencode(name)
    except UnicodeEncodeError:
        usable = False
    if not usable:
        raise ValueError(f"`path`: expected the name of a file, got {name!r}; pass another name.")
    return Path(name)


def read_file(path: Path, most_bytes: float = math.inf) -> bytes:
    """Return what a file holds, read once and from one opening of it.

    Raises:
        ValueError: If it holds more than `most_bytes`.
        OSError: If it cannot be read, is no regular file, or changes while it is read.
    """
    try:
        # Looked at before it is opened, which some devices take for an order, and after: it may be another by then.
        _check_regular(os.stat(path))
        with open(os.open(path, os.O_RDONLY | _NO_WAITING), "rb") as file:
            before = os.fstat(file.fileno())
            _check_regular(before)
            if before.st_size > most_bytes:
                raise ValueError(
                    f"`path`: expected a file of at most {most_bytes} bytes for this layer, got {before.st_size} in "
                    f"{path.name}; pass the file of a layer of this size."
                )
            content = file.read(before.st_size + 1)
            after = os.fstat(file.fileno())
    except OSError as error:
        got = f"{str(path)!r} ({error.strerror or error})"
        raise type(error)(f"`path`: expected a readable file, got {got}; check the name.") from error
    if len(content) != before.st_size or (before.st_size, before.st_mtime_ns) != (after.st_size, after.st_mtime_ns):
        raise OSError(
            f"`path`: expected a file that stays as it is, got {str(path)!r}, which changed while it was read; load it "
            f"when it is complete."
        )
    return content


def write_file(path: Path, content: bytes) -> None:
    """Write a file, which appears whole or not at all; an old one keeps its mode, and a link is followed.

    Raises:
        OSError: If it cannot be written, or is no regular file; what was there is unchanged.
    """
    target = Path(os.path.realpath(path))
    if not target.parent.is_dir():
        raise FileNotFoundError(f"`path`: expected a file in an existing folder, got {path}; create the folder first.")
    try:
        _replace(target, content)
    except OSError as error:
        got = f"{str(path)!r} ({error.strerror or error})"
        raise type(error)(f"`path`: expected a file that can be written, got {got}; choose another place.") from error


def _check_regular(found: os.stat_result) -> None:
    if stat.S_ISDIR(found.st_mode):
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
    if not stat.S_ISREG(found.st_mode):
        raise OSError(0, f"a {_KINDS.get(stat.S_IFMT(found.st_mode), 'device')}, no regular file")


def _replace(target: Path, content: bytes) -> None:
    try:
        found = os.stat(target)
    except FileNotFoundError:
        found = None
    else:
        _check_regular(found)
        if not os.access(target, os.W_OK, effective_ids=os.access in os.supports_effective_ids):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
    # A name of 255 bytes has no room for more.
    beginning = os.fsdecode(b"." + os.fsencode(target.name)[:200])
    _remove_abandoned(target.parent, beginning)
    handle, temporary = _new_file(target.parent, beginning)
    done = False
    try:
        with open(handle, "wb") as file:
            file.write(content)
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


def _new_file(folder: Path, beginning: str) -> tuple[int, Path]:
    while True:
        temporary = folder / f"{beginning}.{secrets.token_hex(8)}.partial"
        handle = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | _NO_WAITING, 0o666)
        if _locked(handle, temporary) is not False:
            return handle, temporary
        # Taken for an abandoned one in the moment before it was locked.
        os.close(handle)


def _remove_abandoned(folder: Path, beginning: str) -> None:
    try:
        names = [name for name in os.listdir(folder) if name.startswith(beginning)]
    except PermissionError:
        # A folder may take files and not show them.
        return
    for name in names:
        if _UNFINISHED.fullmatch(name.removeprefix(beginning)):
            with contextlib.suppress(OSError):
                handle = os.open(folder / name, os.O_RDONLY | _NO_WAITING | getattr(os, "O_NOFOLLOW", 0))
                with open(handle, "rb"):
                    if _locked(handle, folder / name):
                        os.unlink(folder / name)


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
