"""Real signals sent to the commands: what was compared until then is in the files, which say that there is more."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

import pytest

ROOT = Path(__file__).resolve().parents[2]
# All commands in one process, with invented work, since most of what a start takes is imports. Each is interrupted in
# its fourth piece of work, and again, in impatience, whenever it writes.
SCRIPT = """
import contextlib, json, os, sys, types
from parity_tests.__main__ import app
from parity_tests.commands import defects, findings, pair, run
from parity_tests.report import files
from parity_tests.judge.records import ParityRow

number, lost, commands = int(sys.argv[1]), sys.argv[2] == "lost", json.loads(sys.argv[3])
real_output = files.output

def interrupt():
    # A library may drop the exception, or make another one of it.
    with contextlib.suppress(KeyboardInterrupt) if lost else contextlib.nullcontext():
        os.kill(os.getpid(), number)

def each(make):
    for k in range(9):
        if k == 3:
            interrupt()
        yield make(k)

def row(k):
    return ParityRow("oracle", "torch", f"subject-{k}", "float32", "square", "y", "mismatch" if k == 3 else "ok")

def run_cells(subjects, dtypes, cases, seed, progress, *more, **options):
    for k in range(9):
        progress(f"cell {k}")
        if k == 3:
            interrupt()
        yield row(k)

def finding(k):
    def measure():
        if k == 3:
            interrupt()
        return 2.0
    return types.SimpleNamespace(
        name=f"finding-{k}", library="numpy", seen_in=(), figure="", sentence="", missing=lambda: "", measure=measure,
        state=lambda *_: "there", present=lambda *_: True,
    )

def entry(k):
    rows = [types.SimpleNamespace(bound_fraction=0.5)]
    report = types.SimpleNamespace(ok=True, rows=rows, likely_cause="", headline="")
    return pair.Entry(f"pair-{k}", report, report, ())

def output(argument, path):
    os.kill(os.getpid(), number)
    return real_output(argument, path)

run.chosen_frameworks = pair.chosen_frameworks = defects.chosen_frameworks = lambda names: ["torch", "jax"]
run.chosen_modes, run.chosen_subjects, run.count_cells = lambda *a, **o: {}, lambda *a: [], lambda *a: 9
run.run_cells = run_cells
defects._cell_defects = lambda *a: each(lambda k: defects.Score("here", f"defect-{k}", k != 3, "cause"))
defects._layer_defects = defects._training_defects = defects._pair_defects = lambda *a: iter(())
findings.all_findings = lambda: map(finding, range(9))
pair.overview = lambda: each(entry)
files.output = output
ended = {}
for name, arguments in commands.items():
    try:
        app(arguments, prog_name="parity_tests")
    except SystemExit as error:
        ended[name] = error.code
print(json.dumps(ended))
"""


@pytest.fixture(
    scope="module",
    params=[(signal.SIGINT, "raised"), (signal.SIGTERM, "lost")],
    ids=["Ctrl-C", "time limit, its exception lost"],
)
def interrupted(request, tmp_path_factory):
    """How every command ended, and the folder with its files."""
    folder = tmp_path_factory.mktemp("interrupted")
    (folder / "README.md").write_text("as it was")
    commands = {
        "run": ["run", "--junit", "run.xml", "--html", "run.html", "--dtype", "float32"],
        "defects": ["defects"],
        "findings": ["findings"],
        "pairs": ["pairs", "--readme", "README.md"],
    }
    commands = {name: [*arguments, "--json", f"{name}.json"] for name, arguments in commands.items()}
    number, what = request.param
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(int(number)), what, json.dumps(commands)],
        capture_output=True,
        text=True,
        check=False,
        cwd=folder,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr
    return folder, json.loads(done.stdout.splitlines()[-1]), done.stdout


def test_every_command_ends_with_the_status_of_an_interruption(interrupted):
    _, ended, shown = interrupted
    assert ended == dict.fromkeys(("run", "defects", "findings", "pairs"), 130)
    assert shown.count("interrupted: ") == len(ended)


def test_a_run_keeps_whole_cells_and_counts_the_others(interrupted):
    folder, _, _ = interrupted
    found = json.loads((folder / "run.json").read_text())
    # The piece of work that was interrupted is no mismatch.
    assert [row["implementation"] for row in found["rows"]] == ["subject-0", "subject-1", "subject-2"]
    assert found["stopped"] == "interrupted: 6 of 9 cells were left"
    assert found["cells_left"] == 6
    (suite,) = ElementTree.parse(folder / "run.xml").getroot()
    assert [case.find("error") is not None for case in suite] == [False, False, False, True]
    assert "interrupted with 6 cells left" in (folder / "run.html").read_text()


def test_defects_findings_and_pairs_keep_what_was_done(interrupted):
    folder, _, _ = interrupted
    for name, part, key in (
        ("defects", "defects", "name"),
        ("findings", "findings", "name"),
        ("pairs", "pairs", "name"),
    ):
        found = json.loads((folder / f"{name}.json").read_text())
        assert [entry[key] for entry in found[part]] == [f"{part[:-1]}-{k}" for k in range(3)]
        assert found["stopped"].startswith("interrupted: 3 ")
    found = json.loads((folder / "defects.json").read_text())
    assert (found["planted"], found["killed"], found["survivors"]) == (3, 3, [])


def test_a_table_of_some_pairs_does_not_replace_that_of_all(interrupted):
    folder, _, _ = interrupted
    assert (folder / "README.md").read_text() == "as it was"
    assert [name for name in os.listdir(folder) if name.endswith(".partial")] == []


# A shell starts what it puts into the background with SIGINT ignored, and that is inherited.
STARTING = """
import os, signal
signal.signal(signal.SIGINT, signal.default_int_handler)
os.kill(os.getpid(), signal.SIGINT)
"""


@pytest.mark.parametrize("package", ["parity_tests", "bench"])
def test_an_interruption_while_a_command_is_imported_ends_without_a_traceback(package, tmp_path):
    (tmp_path / "typer.py").write_text(STARTING)
    done = subprocess.run(
        [sys.executable, "-m", package, "findings"],
        capture_output=True,
        check=False,
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": f"{tmp_path}{os.pathsep}{ROOT}"},
        timeout=60,
    )
    assert (done.returncode, done.stdout, done.stderr) == (130, b"", b"")
