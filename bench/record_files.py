"""Files of records, plain or compressed, read line by line and again from any line.

A published `records.jsonl.xz` is a row of independent xz streams of about a megabyte, each of whole lines. `xz -d` and
every library read them as one file, and one line costs the unpacking of its stream alone: cells are read one at a time
without a temporary file and without the whole in memory.
"""

import os
import sys
from collections.abc import Iterator
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from io import BytesIO
from itertools import zip_longest
from pathlib import Path
from types import ModuleType
from typing import BinaryIO, NamedTuple

from bench.environments import StoreError
from bench.records import Record, RecordError, parse_line

RECORDS = "records.jsonl"
_SUFFIX = ".xz"
COMPRESSED = RECORDS + _SUFFIX
# How every stream begins.
_MAGIC = b"\xfd7zXZ\0"
# The published runs of a checkout; an installation has a few of them.
_PUBLISHED = Path(__file__).parent / "results"
_STREAM_BYTES = 2**20
# The records of a cell lie far apart, one group for each set of processes: so many groups may advance side by side.
_KEPT_STREAMS = 16
# A file made by `xz` itself is a single stream, which has to be in memory whole.
_MOST_STREAM_BYTES = 2**28
_CHUNK_BYTES = 2**18
# Hundreds of times as long as any line that was measured.
_LONGEST_LINE_BYTES = 2**24


class Position(NamedTuple):
    """Where a line is."""

    path: Path  # the file
    number: int  # of the line, from 1
    stream: int  # offset of its compressed stream in the file; 0 in a plain file
    start: int  # offset of its first byte in the unpacked stream, or in the plain file


@dataclass(frozen=True, slots=True)
class Line:
    """A line of a file of records."""

    position: Position  # where it is
    data: bytes  # the line with its end; the last line of a run that was killed may lack it

    @property
    def where(self) -> str:
        """Return file and number, for messages."""
        return f"{self.position.path}, line {self.position.number}"

    def parsed(self) -> Record:
        """Read the record in this line.

        Raises:
            RecordError: if it is damaged.
        """
        if len(self.data) > _LONGEST_LINE_BYTES:
            raise RecordError(f"longer than {_LONGEST_LINE_BYTES >> 20} MiB, as no record is")
        return parse_line(self.data)

    def record(self) -> Record:
        """Read the record in this line, or say where the damage is.

        Raises:
            StoreError: if it is damaged.
        """
        try:
            return self.parsed()
        except RecordError as error:
            raise StoreError(f"{self.where}: {error}; repair or remove the file.") from error


def run_directory(name: str) -> Path:
    """Return the directory of a run: the one of this path, else the published run of this name, such as `h200`."""
    directory = Path(name)
    return _PUBLISHED / name if name in _published() and not directory.exists() else directory


def _published() -> list[str]:
    return sorted(path.parent.name for path in _PUBLISHED.glob(f"*/{COMPRESSED}"))


def records_file(directory: Path) -> Path:
    """Find the file of a run's records, plain or compressed.

    Raises:
        StoreError: if the directory holds none, or both.
    """
    there = [path for path in (directory / RECORDS, directory / COMPRESSED) if os.path.lexists(path)]
    found = [path for path in there if path.is_file()]
    if there and not found:
        raise StoreError(f"{there[0]}: expected a regular file, got none; restore the records or give another DIR.")
    if not found:
        raise StoreError(
            f"{directory}: holds no {RECORDS} or {COMPRESSED}; give the --out directory of a `bench run`, or the name "
            f"of a published run that is here ({', '.join(_published())}; a checkout has all, in bench/results)."
        )
    if len(found) > 1:
        raise StoreError(f"{directory}: holds both {RECORDS} and {COMPRESSED}; remove the one that is not wanted.")
    return found[0]


def scan(path: Path, *, torn: bool = False) -> Iterator[Line]:
    """Read a file line by line, so that no size of it fills the memory.

    Args:
        path: the file.
        torn: whether a last line without an end is wanted too; only a run that was killed leaves one.

    Raises:
        StoreError: if the file cannot be read or unpacked.
    """
    number = 0
    try:
        with path.open("rb") as file:
            for stream, unpacked in _streams(path, file):
                start = 0
                for data, length in _lines(unpacked):
                    number += 1
                    if torn or data.endswith(b"\n") or len(data) > _LONGEST_LINE_BYTES:
                        yield Line(Position(path, number, stream, start), data)
                    start += length
    except OSError as error:
        raise _unreadable(path, error) from error


def _streams(path: Path, file: BinaryIO) -> Iterator[tuple[int, BinaryIO]]:
    """Iterate over the streams of a file: offset and content of each; a plain file is a single one."""
    if path.suffix != _SUFFIX:
        yield 0, file
        return
    offset, size, whole = 0, os.fstat(file.fileno()).st_size, True
    while offset < size or not offset:
        if not whole:
            raise StoreError(
                f"{path}: the stream before byte {offset} ends within a line; unpack the file (`xz -d`) and compress "
                "it with `python -m bench compress`."
            )
        unpacked, following = _unpacked(path, file, offset)
        whole = not unpacked or unpacked.endswith(b"\n")
        yield offset, BytesIO(unpacked)
        offset = _next_stream(file, following)


def _next_stream(file: BinaryIO, offset: int) -> int:
    """Return the offset of the next stream: between streams the format allows zeros, four at a time."""
    zeros = 0
    file.seek(offset)
    while data := file.read(_CHUNK_BYTES):
        rest = data.lstrip(b"\0")
        zeros += len(data) - len(rest)
        if rest:
            break
    return offset + zeros // 4 * 4


def _lines(file: BinaryIO) -> Iterator[tuple[bytes, int]]:
    """Iterate over lines and their lengths; one that is far too long is cut off."""
    while data := file.readline(_LONGEST_LINE_BYTES + 1):
        length = len(data)
        if length > _LONGEST_LINE_BYTES:
            while not (rest := file.readline(_CHUNK_BYTES)).endswith(b"\n") and rest:
                length += len(rest)
            length += len(rest)
        yield data, length


def _unpacked(path: Path, file: BinaryIO, offset: int) -> tuple[bytes, int]:
    """Unpack and check the stream that begins at an offset; return it and the offset behind it.

    Raises:
        StoreError: if it is cut off, damaged, or far too large.
    """
    lzma = _lzma(path)
    file.seek(offset)
    unpacker, parts, size, packed = lzma.LZMADecompressor(lzma.FORMAT_XZ), [], 0, b""
    head = b""
    try:
        while not unpacker.eof:
            if unpacker.needs_input:
                packed = file.read(_CHUNK_BYTES)
                head = head or packed[: len(_MAGIC)]
                if not packed and offset and not _MAGIC.startswith(head):
                    raise StoreError(
                        f"{path}: has other bytes than xz wrote behind byte {offset}; fetch the file anew."
                    )
                if not packed:
                    raise StoreError(f"{path}: is cut off; fetch the file anew.")
            parts.append(unpacker.decompress(packed, _CHUNK_BYTES))
            size, packed = size + len(parts[-1]), b""
            if size > _MOST_STREAM_BYTES:
                raise StoreError(
                    f"{path}: one stream holds more than {_MOST_STREAM_BYTES >> 20} MiB; unpack the file (`xz -d`) and "
                    "compress it with `python -m bench compress`."
                )
    except lzma.LZMAError as error:
        raise StoreError(f"{path}: is damaged ({error}); fetch the file anew.") from error
    return b"".join(parts), file.tell() - len(unpacker.unused_data)


def _lzma(path: Path) -> ModuleType:
    """Import the library, which a Python that was built without it lacks; only compressed files need it."""
    try:
        import lzma
    except ImportError as error:
        raise StoreError(
            f"{path}: the Python {sys.executable} was built without lzma; unpack the file (`xz -d`), or take another."
        ) from error
    return lzma


def _unreadable(path: Path, error: OSError) -> StoreError:
    return StoreError(f"{path}: cannot be read ({error.strerror}); check the file.")


class LineReader:
    """Reads lines again that a scan has found; a context, since it keeps files open and streams unpacked."""

    def __init__(self) -> None:
        self._stack = ExitStack()
        self._files: dict[Path, BinaryIO] = {}
        self._unpacked: dict[tuple[Path, int], bytes] = {}

    def __enter__(self) -> "LineReader":
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def line(self, position: Position) -> Line:
        """Read one line.

        Raises:
            StoreError: if the file cannot be read or unpacked.
        """
        path, _, stream, start = position
        try:
            if path not in self._files:
                self._files[path] = self._stack.enter_context(path.open("rb"))
            file = self._files[path]
            if path.suffix != _SUFFIX:
                file.seek(start)
                return Line(position, file.readline(_LONGEST_LINE_BYTES + 1))
            # The one that was used last is the last to go.
            unpacked = self._unpacked.pop((path, stream), None)
            if unpacked is None:
                unpacked = _unpacked(path, file, stream)[0]
        except OSError as error:
            raise _unreadable(path, error) from error
        self._unpacked[path, stream] = unpacked
        if len(self._unpacked) > _KEPT_STREAMS:
            del self._unpacked[next(iter(self._unpacked))]
        end = unpacked.find(b"\n", start) + 1
        return Line(position, unpacked[start : end or None])


def compress(directory: Path) -> Path:
    """Replace the plain records of a finished run by compressed ones, of the same lines.

    Returns:
        The compressed file.

    Raises:
        StoreError: if there are none, a line is torn, or the disk takes no more; the plain file then stays.
    """
    plain, packed = records_file(directory), directory / COMPRESSED
    if plain == packed:
        raise StoreError(f"{packed}: is compressed already; nothing was changed.")
    temporary = directory / f".{RECORDS}.tmp{_SUFFIX}"
    lzma = _lzma(packed)
    try:
        with temporary.open("wb") as file:
            for lines in _whole_lines(plain):
                file.write(lzma.compress(lines))
            file.flush()
            os.fsync(file.fileno())
        pairs = zip_longest((line.data for line in scan(plain)), (line.data for line in scan(temporary)))
        if not all(read == written for read, written in pairs):
            raise StoreError(f"{directory}: what was written is not what was read; check the disk and try again.")
        os.replace(temporary, packed)
        plain.unlink()
    except OSError as error:
        raise StoreError(f"{directory}: cannot be written ({error.strerror}); make room and try again.") from error
    finally:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)
    return packed


def _whole_lines(path: Path) -> Iterator[bytes]:
    """Iterate over the lines of a plain file, about a stream of them at a time."""
    lines, size = [], 0
    for line in scan(path, torn=True):
        if not line.data.endswith(b"\n"):
            raise StoreError(f"{line.where}: the line has no end; let `bench run --resume` set it aside first.")
        lines.append(line.data)
        size += len(line.data)
        if size >= _STREAM_BYTES:
            yield b"".join(lines)
            lines, size = [], 0
    if lines:
        yield b"".join(lines)
