"""Files that were edited, cut or lost: one sentence and exit status 2, never a traceback."""

import json
import os
from pathlib import Path

import pytest

from bench.records import RecordError, parse_line
from bench.store import Store
from bench.tests.conftest import file_size_limit
from bench.tests.synthetic import FINGERPRINT, cell_records

WRONG = ("", "x", -1, 0, 0.5, 1e300, True, None, [], [1], {}, {"a": 1}, [{"a": 1}], [-1.0], [1e-3, 2e-3, 3e-3])


@pytest.fixture
def lines(make_record):
    """The lines of one small cell, with every optional field filled in."""
    filled = {
        "synchronised_latency_s": (0.001,),
        "kernels": {"gemm": 2},
        "enqueue_s": 1e-5,
        "ceiling_flops_per_s": 1e12,
        "ceiling_bytes_per_s": 1e11,
        "peak_flops_per_s": 2e12,
        "peak_bytes_per_s": 2e11,
        "stopped": "resolved",
        "conditions": ({"clock_hz": 1e9},),
    }
    records = cell_records(make_record, 0, (128, 32, 32, 32), competitors=3)
    return [json.loads(record.to_line()) | filled for record in records]


@pytest.fixture
def run_of(tmp_path):
    """Writes lines as the records of a run."""

    def write(lines, environments=None):
        directory = tmp_path / "run"
        directory.mkdir(exist_ok=True)
        (directory / "records.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        (directory / "environment.json").write_text(
            json.dumps({"e0": FINGERPRINT} if environments is None else environments)
        )
        return directory

    return write


def said(done):
    """The one sentence of a refusal."""
    assert done.exit_code == 2, done.output
    (line,) = done.stderr.strip().splitlines()
    assert line.startswith("bench: ")
    return line


def test_whatever_a_field_is_changed_to_a_report_is_made_or_refused_in_one_sentence(lines, run_of, call):
    """Every field times every wrong value; what may be read must also go through every output."""
    refused, read, sentences = set(), [], []
    for name in lines[0]:
        for value in WRONG:
            changed = lines[0] | {name: value}
            try:
                parse_line(json.dumps(changed))
            except RecordError as error:
                refused.add(name)
                sentences.append(str(error))
            else:
                read.append(changed)
    assert not any("\n" in sentence for sentence in sentences)
    # Text that names things may be anything; all else is checked.
    free = {"key", "cell", "workload", "dtype", "layout", "cache", "reason", "seed", "process_replicate", "optimizer"}
    assert refused >= set(lines[0]) - free
    directory = run_of([])
    outputs = [item for kind in ("markdown", "json", "csv") for item in (f"--{kind}", directory / f"r.{kind}")]
    # One file with one changed line each would be slow: each changed record becomes a cell of its own.
    everything = []
    for k, changed in enumerate(read):
        rest = [line | {"key": f"{k}-{j}"} for j, line in enumerate(lines[1:])]
        everything += [
            line | {"cell": f"cell-{k}", "environment_id": "e0"} for line in (changed | {"key": f"k{k}"}, *rest)
        ]
    done = call("report", run_of(everything), *outputs)
    assert done.exit_code == 0, done.output
    for command in (("claims",), ("validate",), ("compare", directory)):
        assert call(*command, directory).exit_code in (0, 1, 2)


@pytest.mark.parametrize("text", ['{"a": NaN}', '{"a": Infinity}', "[" * 100_000, '"x"', "\udcff"])
def test_lines_that_are_no_json_are_refused(text):
    with pytest.raises(RecordError, match=r"not JSON|not a JSON object"):
        parse_line(text.encode("utf-8", "surrogateescape").decode("utf-8", "replace"))


def test_bytes_that_are_no_text_are_refused(lines, run_of, call):
    directory = run_of(lines)
    with (directory / "records.jsonl").open("ab") as file:
        file.write(b"\xff\xfe\n")
    assert "line 5: not JSON" in said(call("report", directory))


@pytest.mark.parametrize(
    ("environments", "message"),
    [
        ({}, "records name the environment e0, which environment.json lacks"),
        ({"e0": {}}, "fingerprint e0: cpu_model: expected str, got 'None'"),
        ({"e0": FINGERPRINT | {"frameworks": {"torch": {}}}}, "frameworks: torch lacks its versions"),
        ({"e0": FINGERPRINT | {"affinity": 2}}, "affinity: expected list"),
        ([], "expected an object of fingerprints by id"),
        ({"e0": 3}, "expected an object of fingerprints by id"),
    ],
)
@pytest.mark.parametrize("command", ["report", "claims", "run"])
def test_an_environment_that_is_lost_or_damaged_is_one_sentence(lines, run_of, call, command, environments, message):
    directory = run_of(lines, environments)
    arguments = ("run", "--resume", "--out", directory) if command == "run" else (command, directory)
    assert message in said(call(*arguments))


def test_an_environment_file_that_is_no_json_is_one_sentence(lines, run_of, call):
    directory = run_of(lines)
    (directory / "environment.json").write_bytes(b"{\xff")
    assert "not JSON" in said(call("report", directory))


def test_records_without_any_environment_file_are_one_sentence(lines, run_of, call):
    directory = run_of(lines)
    (directory / "environment.json").unlink()
    assert "restore that file" in said(call("report", directory))


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="this system has no /dev/full to stand for a full disk")
@pytest.mark.parametrize("option", ["--markdown", "--json", "--csv"])
def test_a_full_disk_is_one_sentence(lines, run_of, call, option):
    assert f"{option}: /dev/full cannot be written (No space left on device)" in said(
        call("report", run_of(lines), option, "/dev/full")
    )


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="this system has no /dev/full to stand for a full disk")
@pytest.mark.parametrize("command", ["claims", "compare", "recommend", "validate"])
def test_every_command_says_when_the_disk_is_full(lines, run_of, call, command):
    directory = run_of(lines)
    more = {
        "compare": (directory, directory),
        "recommend": (directory, "--num-partitions", 32, "--in-features", 32, "--out-features", 32, "--batch", 128),
    }.get(command, (directory,))
    for option in ("--json", "--csv"):
        assert "No space left" in said(call(command, *more, option, "/dev/full"))


OUTPUTS = ("markdown", "json", "csv", "frameworks-csv", "readme", "chart", "winner-map", "roofline", "html", "summary")


@pytest.mark.sample(3)
@pytest.mark.parametrize("option", [*OUTPUTS, "framework-map"])
def test_a_disk_that_fills_while_a_report_is_written_keeps_the_old_one(lines, run_of, call, tmp_path, option):
    if option in ("chart", "winner-map", "roofline", "framework-map"):
        pytest.importorskip("altair", reason="charts need the report extra")
    directory, path = run_of(lines), tmp_path / "out.html"
    old = "<!-- results:begin -->\n<!-- results:end -->\n"
    path.write_text(old)
    path.chmod(0o640)
    with file_size_limit(100):
        assert "File too large" in said(call("report", directory, f"--{option}", path))
    assert path.read_text() == old
    assert [name for name in os.listdir(tmp_path) if "partial" in name] == []
    assert call("report", directory, f"--{option}", path).exit_code == 0
    assert len(path.read_text()) > 100
    assert path.stat().st_mode & 0o777 == 0o640


def test_a_real_disk_that_fills_while_a_report_is_written_keeps_the_old_one(lines, run_of, call, tiny_disk):
    directory, path = run_of(lines), tiny_disk / "out.json"
    path.write_text("old")
    with pytest.raises(OSError, match="No space left"):
        (tiny_disk / "ballast").write_bytes(bytes(2**20))
    assert "No space left" in said(call("report", directory, "--json", path))
    # Room for a page, which is enough for the trial before the work, and not for the report.
    os.truncate(tiny_disk / "ballast", (tiny_disk / "ballast").stat().st_size - 4096)
    assert "No space left" in said(call("report", directory, "--json", path))
    assert path.read_text() == "old"
    assert sorted(os.listdir(tiny_disk)) == ["ballast", "out.json"]


@pytest.mark.timeout(60)
def test_a_readme_that_is_no_file_is_one_sentence(lines, run_of, call, tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for path, why in (
        (tmp_path / "pipe", "a pipe, no regular file"),
        ("/dev/zero", "a device"),
        (tmp_path, "Is a dir"),
    ):
        assert why in said(call("report", run_of(lines), "--readme", path))


def test_an_output_never_replaces_the_records_or_another_output(lines, run_of, call, tmp_path):
    directory = run_of(lines)
    before = {path.name: path.read_bytes() for path in directory.iterdir()}
    link = tmp_path / "link"
    link.symlink_to(directory / "records.jsonl")
    for path in (directory / "records.jsonl", directory / "environment.json", directory / "records.jsonl.xz", link):
        for command, option in (
            ("report", "--json"),
            ("report", "--markdown"),
            ("claims", "--csv"),
            ("validate", "--csv"),
        ):
            assert "has the name of a run's own records" in said(call(command, directory, option, path))
    assert {path.name: path.read_bytes() for path in directory.iterdir()} == before
    one, other = tmp_path / "one", tmp_path / "other"
    other.symlink_to(one)
    assert "--csv: " in (twice := said(call("report", directory, "--json", one, "--csv", other)))
    assert "is the file of --json too; choose another" in twice
    assert "is the file of --readme too" in said(call("claims", directory, "--markdown", one, "--readme", one))
    (tmp_path / "new").mkdir()
    run = ("run", "--preset", "smoke", "--out", tmp_path / "new", "--json")
    assert "is the file of --out too" in said(call(*run, tmp_path / "new" / "." / "report.md"))
    assert not one.exists()


@pytest.mark.parametrize("name", ["records.jsonl", "records.jsonl.xz", "environment.json"])
def test_what_is_no_regular_file_is_called_so(lines, run_of, call, name):
    directory = run_of(lines)
    for path in (directory / "records.jsonl", directory / name):
        path.unlink(missing_ok=True)
    if name == "environment.json":
        (directory / "records.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    for make in (os.mkfifo, os.mkdir, lambda path: os.symlink("nothing", path), lambda path: os.symlink(name, path)):
        make(directory / name)
        assert f"{name}: expected a regular file, got none; restore" in said(call("report", directory))
        (directory / name).rmdir() if (directory / name).is_dir() else (directory / name).unlink()


def test_a_disk_that_fills_up_during_a_run_keeps_what_is_there(tmp_path, make_record, monkeypatch):
    store = Store(tmp_path, resume=False)
    store.append(cell_records(make_record, 0, (1, 2, 4, 8), competitors=2))

    def full(path, data):
        raise OSError(28, os.strerror(28))

    monkeypatch.setattr("bench.store._append", full)
    with pytest.raises(ValueError, match=r"cannot be written any more \(No space left on device\).*add --resume"):
        store.append(cell_records(make_record, 1, (1, 2, 4, 8), competitors=2))
    monkeypatch.undo()
    assert len(Store(tmp_path, resume=True).records) == 3
