import json
import os
import subprocess
import sys

import pytest

from bench.records import RecordError, parse_line
from bench.store import Store, StoreError, read_records, sole_writer


def cell(make_record, name, size=3, replicate=0):
    return [
        make_record(key=f"{name}{k}.{replicate}", cell=name, cell_size=size, process_replicate=replicate)
        for k in range(size)
    ]


def test_what_is_written_is_read(tmp_path, make_record):
    store = Store(tmp_path / "new" / "run", resume=False)
    store.append(cell(make_record, "a"))
    assert read_records(tmp_path / "new" / "run") == cell(make_record, "a")


def test_a_second_run_needs_resume(tmp_path, make_record):
    Store(tmp_path, resume=False).append(cell(make_record, "a"))
    with pytest.raises(StoreError, match="already holds records; add --resume"):
        Store(tmp_path, resume=False)
    store = Store(tmp_path, resume=True)
    assert store.holds("a", 0)
    assert not store.holds("a", 1)
    assert not store.holds("b", 0)


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no flock: nothing is kept out there")
def test_two_runs_never_write_into_one_directory(tmp_path, call):
    holding = "import sys, time, pathlib; from bench.store import sole_writer\n"
    holding += "with sole_writer(pathlib.Path(sys.argv[1])): print('held', flush=True); time.sleep(60)"
    out = tmp_path / "run"
    with subprocess.Popen([sys.executable, "-c", holding, out], stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == "held\n"
        refused = call("run", "--preset", "smoke", "--resume", "--out", out)
        assert refused.exit_code == 2
        assert "another run writes there" in refused.stderr
        assert list(out.iterdir()) == []
        # However the other one ends, the directory is free.
        other.kill()
        other.wait()
        with sole_writer(out):
            pass


def test_a_key_is_never_written_twice(tmp_path, make_record):
    store = Store(tmp_path, resume=False)
    store.append(cell(make_record, "a"))
    for again in (cell(make_record, "a"), [make_record(key="x"), make_record(key="x")]):
        with pytest.raises(StoreError, match="is recorded already"):
            store.append(again)
    assert len(read_records(tmp_path)) == 3


def test_a_file_with_a_repeated_key_is_refused(tmp_path, make_record):
    (tmp_path / "records.jsonl").write_bytes(make_record().to_line() * 2)
    with pytest.raises(StoreError, match="two lines share the key k0"):
        read_records(tmp_path)


@pytest.mark.parametrize("keep", range(0, 2000, 97))
def test_a_run_killed_at_any_byte_of_the_last_cell_resumes(tmp_path, make_record, keep):
    store = Store(tmp_path, resume=False)
    store.append(cell(make_record, "a"))
    whole = (tmp_path / "records.jsonl").read_bytes()
    last = b"".join(record.to_line() for record in cell(make_record, "b"))
    torn = last[: min(keep, len(last) - 1)]
    (tmp_path / "records.jsonl").write_bytes(whole + torn)

    resumed = Store(tmp_path, resume=True)
    assert resumed.records == cell(make_record, "a")
    assert resumed.set_aside_bytes == len(torn)
    assert resumed.holds("a", 0)
    assert not resumed.holds("b", 0)
    if torn:
        assert (tmp_path / "torn.jsonl").read_bytes() == torn
    resumed.append(cell(make_record, "b"))
    assert (tmp_path / "records.jsonl").read_bytes() == whole + last


def test_damage_before_the_last_line_is_not_overlooked(tmp_path, make_record):
    lines = b"".join(record.to_line() for record in cell(make_record, "a"))
    (tmp_path / "records.jsonl").write_bytes(lines[:200] + b"\n" + lines)
    with pytest.raises(StoreError, match=r"line 1: .*; repair or remove the file"):
        Store(tmp_path, resume=True)


def test_replicates_of_a_cell_are_told_apart(tmp_path, make_record):
    store = Store(tmp_path, resume=False)
    store.append(cell(make_record, "a", replicate=0))
    store.append(cell(make_record, "a", replicate=1)[:2])
    resumed = Store(tmp_path, resume=True)
    assert resumed.holds("a", 0)
    assert not resumed.holds("a", 1)
    assert len(resumed.records) == 3


def test_a_directory_that_is_a_file_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(StoreError, match="cannot be written"):
        Store(tmp_path / "file", resume=False)


@pytest.mark.skipif(os.geteuid() == 0, reason="the superuser may write into a read-only directory")
def test_a_read_only_directory_is_refused(tmp_path):
    tmp_path.chmod(0o500)
    with pytest.raises(StoreError, match="cannot be written"):
        Store(tmp_path / "run", resume=False)


@pytest.mark.timeout(60)
def test_records_that_are_a_pipe_are_refused_and_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "records.jsonl")
    with pytest.raises(StoreError, match="expected a regular file, got none"):
        Store(tmp_path, resume=True)


def test_a_directory_without_records_is_refused(tmp_path):
    with pytest.raises(StoreError, match=r"holds no records\.jsonl"):
        read_records(tmp_path)


def test_environments_accumulate(tmp_path):
    store = Store(tmp_path, resume=False)
    store.add_environment("a", {"x": 1})
    store.add_environment("b", {"x": 2})
    assert json.loads((tmp_path / "environment.json").read_text()) == {"a": {"x": 1}, "b": {"x": 2}}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"status": "fine"}, "status: expected one of ok"),
        ({"latency_s": None}, "latency_s: present exactly when"),
        ({"status": "mismatch", "reason": "y"}, "latency_s: present exactly when"),
        ({"status": "crash", "reason": "", "latency_s": None, "block_latency_s": ()}, "has a reason"),
        ({"block_latency_s": ()}, "at least one block"),
    ],
)
def test_a_record_that_contradicts_itself_is_refused(make_record, changes, message):
    with pytest.raises(RecordError, match=message):
        make_record(**changes)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "not JSON"),
        ("[]", "not a JSON object"),
        ('{"schema_version": 99}', "schema_version: expected 1 or 2, got 99"),
        ('{"schema_version": 1}', "missing fields"),
    ],
)
def test_lines_that_are_no_records_are_refused(line, message):
    with pytest.raises(RecordError, match=message):
        parse_line(line)


def test_fields_of_a_later_version_are_ignored(make_record):
    line = json.dumps(json.loads(make_record().to_line()) | {"of_a_later_version": 1.0})
    assert parse_line(line) == make_record()
