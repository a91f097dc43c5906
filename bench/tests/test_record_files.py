"""Compressed records are read by every command as plain ones are; damage to the file is one sentence."""

import json
import lzma
import shutil
import subprocess
import sys

import pytest

from bench import record_files
from bench.record_files import COMPRESSED, RECORDS, LineReader, compress, scan
from bench.store import Archive, read_cells
from bench.study import results as study_results
from bench.study.results import read_results
from bench.tests.conftest import example_record
from bench.tests.synthetic import cell_records, write_sweep

SHAPE = ("--num-partitions", 4, "--in-features", 2, "--out-features", 2, "--batch", 8)


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    """A run of some cells."""
    directory = tmp_path_factory.mktemp("plain") / "run"
    write_sweep(directory, example_record, 12, competitors=5)
    return directory


@pytest.fixture(scope="module")
def packed(plain, tmp_path_factory):
    """The same run, compressed into several streams."""
    directory = tmp_path_factory.mktemp("packed") / "run"
    shutil.copytree(plain, directory)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(record_files, "_STREAM_BYTES", 20_000)
        compress(directory)
    return directory


def streams(path):
    return {line.position.stream for line in scan(path)}


@pytest.mark.parametrize(
    "command",
    [("report", "--all"), ("claims",), ("recommend", *SHAPE), ("validate",), ("compare", "SAME")],
    ids=lambda command: command[0],
)
def test_every_command_says_the_same_of_both(plain, packed, call, command, tmp_path):
    found = []
    for directory in (plain, packed):
        arguments = [plain if argument == "SAME" else argument for argument in command]
        done = call(*arguments, directory, "--json", tmp_path / "f.json", "--csv", tmp_path / "f.csv")
        assert done.exit_code == 0, done.output
        found.append((done.stdout, (tmp_path / "f.json").read_text(), (tmp_path / "f.csv").read_text()))
    assert found[0] == found[1]
    assert len(found[0][1]) > 50


def test_what_is_compressed_is_what_was_there(plain, packed):
    assert not (packed / RECORDS).exists()
    assert lzma.decompress((packed / COMPRESSED).read_bytes()) == (plain / RECORDS).read_bytes()
    assert len(streams(packed / COMPRESSED)) > 5
    assert [line.data for line in scan(packed / COMPRESSED)] == [line.data for line in scan(plain / RECORDS)]


def test_lines_are_read_again_in_any_order(packed, monkeypatch):
    monkeypatch.setattr(record_files, "_KEPT_STREAMS", 2)
    lines = list(scan(packed / COMPRESSED))
    with LineReader() as reader:
        for line in (*lines[::-1], *lines[::7]):
            assert reader.line(line.position) == line


def test_few_streams_are_in_memory_at_a_time(packed, monkeypatch):
    unpacked = []
    real = record_files._unpacked
    monkeypatch.setattr(record_files, "_unpacked", lambda path, file, at: unpacked.append(at) or real(path, file, at))
    cells = Archive([packed]).places()
    scanned = len(unpacked)
    assert len(list(read_cells(cells))) == 12
    # Every stream once for the scan and once for the cells, although a cell may lie in two.
    assert sorted(unpacked[scanned:]) == sorted(unpacked[:scanned]) == sorted(streams(packed / COMPRESSED))


def test_several_processes_read_one_compressed_file(plain, packed, monkeypatch):
    alone = read_results([plain])
    monkeypatch.setattr(study_results, "_CELLS_A_TASK", 5)
    monkeypatch.setattr(study_results, "_MANY_CELLS", 1)
    monkeypatch.setattr("os.cpu_count", lambda: 2)
    assert read_results([packed]) == alone


def test_a_file_that_xz_made_is_read(plain, call, tmp_path):
    shutil.copytree(plain, tmp_path / "run")
    (tmp_path / "run" / RECORDS).unlink()
    (tmp_path / "run" / COMPRESSED).write_bytes(lzma.compress((plain / RECORDS).read_bytes()))
    assert call("report", tmp_path / "run", "--all").stdout == call("report", plain, "--all").stdout
    assert len(streams(tmp_path / "run" / COMPRESSED)) == 1


def damaged(packed):
    """Name to the bytes of a damaged file, and what is said of it."""
    whole = packed
    first = len(whole) // 2
    flipped = whole[:first] + bytes([whole[first] ^ 1]) + whole[first + 1 :]
    line = b'{"schema_version": 1}\n'
    return {
        "cut": (whole[:-100], "is cut off; fetch the file anew"),
        "cut in the first stream": (whole[:50], "is cut off"),
        "empty": (b"", "is cut off"),
        "followed by something else": (
            whole + b"hi\n",
            f"has other bytes than xz wrote behind byte {len(whole)}; fetch",
        ),
        "flipped": (flipped, "is damaged (Corrupt input data)"),
        "more behind": (whole + b"more of it" * 9, "is damaged (Input format not supported"),
        "no xz": (b"records" * 9, "is damaged (Input format not supported"),
        "plain": (line, "is damaged (Input format not supported"),
        "within a line": (lzma.compress(line[:5]) + lzma.compress(line[5:]), "ends within a line; unpack the file"),
    }


@pytest.mark.parametrize("name", damaged(b"x" * 200))
@pytest.mark.parametrize("command", ["report", "claims", "recommend", "validate", "compare"])
def test_a_damaged_file_is_one_sentence(packed, tmp_path, call, command, name):
    directory = tmp_path / "run"
    shutil.copytree(packed, directory)
    data, message = damaged((packed / COMPRESSED).read_bytes())[name]
    (directory / COMPRESSED).write_bytes(data)
    more = {"recommend": SHAPE, "compare": (packed,)}.get(command, ())
    done = call(command, *more, directory)
    assert done.exit_code == 2, done.output
    (sentence,) = done.stderr.strip().splitlines()
    assert sentence.startswith(f"bench: {directory / COMPRESSED}: ")
    assert message in sentence


def test_a_stream_that_would_fill_the_memory_is_refused(packed, tmp_path, call, monkeypatch):
    shutil.copytree(packed, tmp_path / "run")
    monkeypatch.setattr(record_files, "_MOST_STREAM_BYTES", 2**20)
    (tmp_path / "run" / COMPRESSED).write_bytes(lzma.compress(bytes(2**24)))
    assert "one stream holds more than 1 MiB; unpack" in call("report", tmp_path / "run").stderr


def test_both_files_at_once_are_refused(plain, packed, tmp_path, call):
    shutil.copytree(packed, tmp_path / "run")
    shutil.copy(plain / RECORDS, tmp_path / "run")
    for command in (("report",), ("claims",), ("recommend", *SHAPE), ("validate",), ("compare", plain), ("compress",)):
        done = call(*command, tmp_path / "run")
        assert done.exit_code == 2
        assert "holds both records.jsonl and records.jsonl.xz; remove the one" in done.stderr


def test_a_run_never_goes_on_in_compressed_records(packed, tmp_path, call):
    shutil.copytree(packed, tmp_path / "run")
    before = (tmp_path / "run" / COMPRESSED).read_bytes()
    for options in ((), ("--resume",)):
        done = call("run", "--preset", "smoke", "--out", tmp_path / "run", *options)
        assert done.exit_code == 2
        assert "holds compressed records; " in done.stderr
        assert ("unpack them first (`xz -d " in done.stderr) == bool(options)
    assert {path.name for path in (tmp_path / "run").iterdir()} == {COMPRESSED, "environment.json"}
    assert (tmp_path / "run" / COMPRESSED).read_bytes() == before


def test_the_command_compresses_once(plain, tmp_path, call):
    shutil.copytree(plain, tmp_path / "run")
    done = call("compress", tmp_path / "run")
    assert done.exit_code == 0, done.output
    assert "MB became" in done.stdout
    assert call("report", tmp_path / "run", "--all").stdout == call("report", plain, "--all").stdout
    assert "is compressed already; nothing was changed" in call("compress", tmp_path / "run").stderr
    assert "holds no records.jsonl" in call("compress", tmp_path).stderr


def test_a_torn_run_and_a_full_disk_leave_the_plain_file(tmp_path, make_record, call, monkeypatch):
    data = b"".join(record.to_line() for record in cell_records(make_record, 0, (4, 4, 4, 4), competitors=2))
    (tmp_path / RECORDS).write_bytes(data[:-5])
    assert "line 3: the line has no end" in call("compress", tmp_path).stderr
    (tmp_path / RECORDS).write_bytes(data)

    def full(handle):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    assert "cannot be written (No space left on device)" in call("compress", tmp_path).stderr
    assert [(path.name, path.read_bytes()) for path in tmp_path.iterdir()] == [(RECORDS, data)]


def test_a_python_without_lzma_says_so_for_compressed_files_alone(plain, packed, call, monkeypatch):
    monkeypatch.setitem(sys.modules, "lzma", None)
    assert "was built without lzma; unpack the file" in call("report", packed).stderr
    assert call("report", plain).exit_code == 0
    monkeypatch.undo()
    assert call("report", packed).exit_code == 0


@pytest.mark.skipif(shutil.which("xz") is None, reason="xz is not installed here")
def test_xz_unpacks_it(packed, plain):
    done = subprocess.run(["xz", "-dc", packed / COMPRESSED], capture_output=True, check=True)
    assert done.stdout == (plain / RECORDS).read_bytes()
    assert json.loads(done.stdout.splitlines()[0])["schema_version"] == 1


def test_zeros_between_streams_are_what_the_format_allows(packed, tmp_path, call):
    shutil.copytree(packed, tmp_path / "run")
    path = tmp_path / "run" / COMPRESSED
    whole = path.read_bytes()
    for padded in (whole + bytes(8), whole + bytes(4) + lzma.compress(b"")):
        path.write_bytes(padded)
        done = call("report", tmp_path / "run", "--all")
        assert (done.exit_code, done.stderr) == (0, "")
        assert done.stdout == call("report", packed, "--all").stdout
    path.write_bytes(whole + bytes(3))
    assert call("report", tmp_path / "run").exit_code == 2
