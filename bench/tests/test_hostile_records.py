r"""Lines and environments that nobody measured: one sentence each, the rest is shown, and no command takes for ever."""

import json

import pytest

from bench import record_files
from bench.environments import unusable
from bench.tests.synthetic import FINGERPRINT, cell_records

# What every command needs beside the directory.
READ = {
    "report": (),
    "claims": (),
    "recommend": ("--num-partitions", 32, "--in-features", 32, "--out-features", 32, "--batch", 128),
    "compare": ("ANOTHER",),
    "validate": (),
}
# Text that JSON tests need as bytes.
NUL, O_UMLAUT, MARK = bytes(1), bytes([0xF6]), bytes([0xEF, 0xBB, 0xBF])


@pytest.fixture
def lines(make_record):
    """The lines of one small cell."""
    records = cell_records(make_record, 0, (128, 32, 32, 32), competitors=3, rounds=2)
    return [json.loads(record.to_line()) for record in records]


@pytest.fixture
def run_of(tmp_path):
    """Writes bytes as the records and the environments of a run."""

    def write(data, environments=None, name="run"):
        directory = tmp_path / name
        directory.mkdir(exist_ok=True)
        (directory / "records.jsonl").write_bytes(b"".join(line + b"\n" for line in data))
        (directory / "environment.json").write_bytes(environments or json.dumps({"e0": FINGERPRINT}).encode())
        return directory

    return write


@pytest.fixture
def command_of(call, run_of, lines):
    """Runs a command that reads records on a directory."""

    def run(command, directory, *outputs):
        another = run_of(written(lines), name="another")
        more = [another if argument == "ANOTHER" else argument for argument in READ[command]]
        return call(command, *more, directory, *outputs)

    return run


def written(lines):
    return [json.dumps(line).encode() for line in lines]


def told(done, command):
    """What a command says of damage: only `validate` is asked for it, and so prints it."""
    if command != "validate":
        return done.stderr.splitlines()
    return [line for line in done.stdout.splitlines()[:-2] if not line.startswith("Remark")]


def hostile_lines(line):
    """Name to bytes that stand where a record should be, and what is said of them."""
    whole = json.dumps(line).encode()

    def changed(name, value):
        return json.dumps(line | {name: "@"}).encode().replace(b'"@"', value)

    start = b'{"schema_version": 1, "key": "a", "cell": "b", "cell_size": 3, '
    deep = b'{"a":' * 500 + b"1" + b"}" * 500
    return {
        "5,000 digits where the size of a cell is": (changed("cell_size", b"9" * 5000), "a number of 5000 digits"),
        "5,000 digits in an unknown field": (whole[:-1] + b', "z": ' + b"1" * 5000 + b"}", "a number of 5000 digits"),
        "a number beyond every float": (changed("latency_s", b"1e999"), "latency_s: expected 0 or numbers from"),
        "the same in an object": (changed("parity", b'{"y": {"max_abs_error": 1e999}}'), "parity: expected at most"),
        "an integer beyond arrays": (changed("batch", b"9223372036854775808"), "batch: expected 0 or numbers from"),
        "an integer beyond floats": (changed("batch", b"1" + b"0" * 350), "batch: expected 0 or numbers from"),
        "a denormal ceiling": (changed("ceiling_flops_per_s", b"1e-320"), "ceiling_flops_per_s: expected 0 or"),
        "a denormal sample": (changed("block_latency_s", b"[1e-320, 0.01]"), "block_latency_s: expected a list of"),
        "a megabyte": (b"x" * 2**20, "not JSON"),
        "a megabyte that looks like a record": (start + b', "process_replicate": 1, ' * 40_000, "not JSON"),
        "deep lists": (b"[" * 100_000, "it is nested too deeply"),
        "deep objects in a field": (changed("switches", deep), "switches: expected at most 4 levels"),
        "NUL": (whole.replace(b"loop", b"lo" + NUL), "Invalid control character"),
        "NULs, as a crash leaves them": (NUL * 1000, "not JSON"),
        "another encoding": (whole.replace(b"loop", O_UMLAUT), "is not UTF-8"),
        "half a character": (changed("workload", rb'"\ud800"'), "holds half of a surrogate pair"),
        "a field twice": (whole[:-1] + b', "latency_s": 1.0}', "the name 'latency_s' stands twice in one object"),
        "a name twice in a field": (changed("parity", b'{"y": {}, "y": {}}'), "the name 'y' stands twice"),
        "a byte order mark": (MARK + whole, "begins with a byte order mark"),
        "nothing": (b"", "not JSON"),
    }


@pytest.mark.timeout(100)
@pytest.mark.parametrize("command", READ)
def test_hostile_lines_are_one_sentence_each_and_the_rest_is_shown(lines, run_of, command_of, command):
    whole = command_of(command, run_of(written(lines)))
    data, hostile = written(lines), hostile_lines(lines[1])
    for k, name in enumerate(hostile):
        cell = [line | {"cell": f"{k + 1:016x}", "key": f"{k}-{line['key']}"} for line in lines]
        first, _, *rest = written(cell)
        data += [hostile_lines(cell[1])[name][0], first, *rest]
    done = command_of(command, run_of(data))
    assert (whole.exit_code, done.exit_code) == (0, 1 if command == "validate" else 2), done.output
    sentences = told(done, command)
    for k, (name, (_, message)) in enumerate(hostile.items()):
        (sentence,) = [line for line in sentences if f"records.jsonl, line {len(lines) * (k + 1) + 1}: " in line]
        assert message in sentence, name
    if command != "validate":
        assert len(sentences) == len(hostile)
        # The cell that is whole, and none of those that lost a record.
        assert done.stdout == whole.stdout
        assert len(done.stdout) > 200


def test_a_field_within_a_field_is_not_taken_for_the_records_own(lines, run_of, command_of):
    nested = {"a": 1, "environment_id": "e9", "process_replicate": 7, "cell": "x"}
    changed = [line | {"switches": nested, "conditions": [nested] * 20} for line in lines]
    moved = [{"switches": nested} | line for line in changed]
    for some in (changed, moved):
        done = command_of("report", run_of(written(some)))
        assert (done.exit_code, done.stderr) == (0, "")
        assert done.stdout == command_of("report", run_of(written(lines))).stdout


def test_what_is_left_out_is_counted_beyond_twenty_sentences(lines, run_of, command_of):
    done = command_of("report", run_of([*written(lines), *[b"{}"] * 30]))
    assert done.exit_code == 2
    assert len(done.stderr.splitlines()) == 21
    assert "10 further damaged lines were left out" in done.stderr.splitlines()[-1]


def test_cells_that_lack_a_record_are_left_out_with_a_line_that_nobody_can_place(lines, run_of, command_of):
    other = [line | {"cell": "f" * 16, "key": f"f-{line['key']}"} for line in lines[1:]]
    directory = run_of([*written(lines), b"{}", *written(other)])
    done = command_of("report", directory)
    assert done.stderr.count("line 5: ") == 1
    assert done.stderr.endswith("(cells that lack a record, and are left out: 1).\n")
    assert done.stdout == command_of("report", run_of(written(lines))).stdout
    # Where a run is under way its last cell lacks records too, and nothing is damaged.
    assert command_of("report", run_of(written([*lines, *other]))).exit_code == 0


def test_a_page_is_not_drawn_of_what_is_left(lines, run_of, call, tmp_path):
    directory, page = run_of([*written(lines), b"{}"]), tmp_path / "README.md"
    for command, name in (("report", "results"), ("claims", "claims")):
        markers = f"<!-- {name}:begin -->\n<!-- {name}:end -->\n"
        page.write_text(markers)
        done = call(command, directory, "--readme", page)
        assert (done.exit_code, len(done.stderr.splitlines())) == (2, 1)
        assert "line 5: schema_version" in done.stderr
        assert page.read_text() == markers


def test_a_line_that_is_longer_than_any_record_is_not_kept_in_memory(lines, run_of, command_of, monkeypatch):
    monkeypatch.setattr(record_files, "_LONGEST_LINE_BYTES", 10_000)
    directory = run_of([*written(lines), b"x" * 1_000_000, *written([lines[0] | {"key": "z", "cell": "z"}])])
    assert max(len(line.data) for line in record_files.scan(directory / "records.jsonl")) == 10_001
    done = command_of("report", directory)
    assert "line 5: longer than " in done.stderr
    assert done.stdout == command_of("report", run_of(written(lines))).stdout


WRONG = ("x", 0, 1e999, True, None, [], {}, [1], [None], {"a": 1}, {"a": None}, [[]])


def parts_of(value, path=()):
    """The path of every part of a value, at any depth."""
    yield path
    for name in value if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ():
        yield from parts_of(value[name], (*path, name))


def replaced(value, path, new):
    """A copy with another value at a path."""
    if not path:
        return new
    copy = dict(value) if isinstance(value, dict) else list(value)
    copy[path[0]] = replaced(value[path[0]], path[1:], new)
    return copy


def test_an_environment_of_wrong_types_at_any_depth_is_one_sentence_and_the_rest_is_shown(lines, run_of, command_of):
    whole = FINGERPRINT | {"gpus": ["a GPU, 1"], "cpu_features": ["fma"], "cpu_count": 2}
    kinds = [replaced(whole, path, wrong) for path in parts_of(whole) for wrong in WRONG]
    sentences = [unusable(["e"], {"e": kind}, "here").get("e") for kind in kinds]
    read = [kind for kind, sentence in zip(kinds, sentences, strict=True) if sentence is None]
    refused = [kind for kind, sentence in zip(kinds, sentences, strict=True) if sentence is not None]
    assert len(refused) > 100
    assert len(read) > 20
    assert all(len(sentence.splitlines()) == 1 and len(sentence) < 300 for sentence in sentences if sentence)
    # What may be read goes through every command; what may not is named, beside what is whole.
    environments = {f"r{k}": kind for k, kind in enumerate(read)} | {
        f"bad{k}": kind for k, kind in enumerate(refused[:9])
    }
    data = [
        line | {"cell": f"cell-{name}", "key": f"{name}-{line['key']}", "environment_id": name, "cell_size": 2}
        for name in environments
        for line in lines[:2]
    ]
    directory = run_of(written(data), json.dumps(environments).replace("Infinity", "1e999").encode())
    for command in READ:
        done = command_of(command, directory, "--json", directory / "f.json", "--csv", directory / "f.csv")
        assert sum(": fingerprint bad" in line for line in told(done, command)) == 9, command
        assert done.exit_code in (1, 2)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (MARK + b"{}", "it begins with a byte order mark"),
        (b'{"e0": 1, "e0": 2}', "the name 'e0' stands twice in one object"),
        (rb'{"e0": {"cpu_model": "\ud800"}}', "holds half of a surrogate pair"),
        (b"[" * 100_000, "it is nested too deeply"),
        (b'{"e0": ' + b"9" * 5000 + b"}", "a number of 5000 digits"),
        (b'{"e0": "' + NUL + b'"}', "Invalid control character"),
        (b'{"e0": "' + O_UMLAUT + b'"}', "byte 8 is not UTF-8"),
    ],
)
@pytest.mark.parametrize("command", [*READ, "run"])
def test_an_environment_file_that_is_hostile_is_one_sentence(lines, run_of, call, command_of, command, data, message):
    directory = run_of(written(lines), data)
    done = call("run", "--resume", "--out", directory) if command == "run" else command_of(command, directory)
    (sentence,) = told(done, command)
    assert message in sentence
    assert done.exit_code == (1 if command == "validate" else 2)


def test_a_run_never_rewrites_environments_that_it_cannot_read(lines, run_of, call, command_of):
    deep = b'{"e1": ' + b"[" * 500 + b"]" * 500 + b", " + json.dumps({"e0": FINGERPRINT}).encode()[1:]
    directory = run_of(written(lines), deep)
    # No record names it.
    assert command_of("report", directory).exit_code == 0
    done = call("run", "--resume", "--out", directory)
    assert (done.exit_code, len(done.stderr.splitlines())) == (2, 1)
    assert "fingerprint e1: expected an object" in done.stderr
    assert (directory / "environment.json").read_bytes() == deep
