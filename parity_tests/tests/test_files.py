"""Files: loads that never block, saves and outputs that are whole or not there, and folders of killed processes."""

import ast
import contextlib
import importlib
import os
import resource
import signal
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from parity_tests.judge.subjects import framework_available
from parity_tests.report import files

ROOT = Path(__file__).resolve().parents[2]
TREES = [f"{framework}_impl" for framework in ("torch", "jax") if framework_available(framework)]
MOST = 10**6
# A load or a save that waits for somebody else would wait for ever.
pytestmark = pytest.mark.timeout(60)


def files_of(tree):
    return importlib.import_module(f"{tree}.files")


def writers():
    found = {"commands": lambda path, text: files.write_text("--json", path, text)}
    for tree in TREES:
        found[tree] = lambda path, text, tree=tree: files_of(tree).write_file(Path(path), text.encode())
    return found


def readers():
    found = {"commands": lambda path: files.read_text(Path(path))}
    for tree in TREES:
        found[tree] = lambda path, tree=tree: files_of(tree).read_file(Path(path), MOST).decode()
    return found


every_reader = pytest.mark.parametrize("read", readers().values(), ids=readers())
every_writer = pytest.mark.parametrize("write", writers().values(), ids=writers())


def test_the_trees_have_the_same_file():
    text = (ROOT / "torch_impl/files.py").read_text()
    assert text.replace("from torch_impl.", "from jax_impl.") == (ROOT / "jax_impl/files.py").read_text()


# --- reading ---


@every_reader
def test_only_regular_files_are_read_and_nothing_is_waited_for(read, tmp_path):
    good, link, pipe = tmp_path / "good", tmp_path / "link", tmp_path / "pipe"
    good.write_text("text")
    link.symlink_to(good)
    assert read(good) == read(link) == "text"
    os.mkfifo(pipe)
    for path, kind in ((pipe, "a pipe"), ("/dev/zero", "a device"), (tmp_path, "Is a directory")):
        with pytest.raises(OSError, match=kind):
            read(path)


@every_reader
def test_a_file_of_no_sane_size_is_refused_before_it_is_in_memory(read, tmp_path):
    with open(tmp_path / "huge", "wb") as file:
        os.truncate(file.fileno(), 2**40)
    with pytest.raises((OSError, ValueError), match=r"more than \d+ bytes|at most 1000000 bytes .* got 1099511627776"):
        read(tmp_path / "huge")


@pytest.mark.parametrize("tree", TREES)
@pytest.mark.parametrize("text", ["longer than it was", "other text", "less"])
def test_a_file_that_changes_while_it_is_read_is_refused(tree, text, tmp_path, monkeypatch):
    path, real = tmp_path / "file", os.fstat
    path.write_text("some texts")

    def write_after_the_first_look(handle):
        found = real(handle)
        monkeypatch.setattr("os.fstat", real)
        path.write_text(text)
        os.utime(path, ns=(0, found.st_mtime_ns + 1))
        return found

    monkeypatch.setattr("os.fstat", write_after_the_first_look)
    with pytest.raises(OSError, match="which changed while it was read; load it when it is complete"):
        files_of(tree).read_file(path, MOST)
    assert files_of(tree).read_file(path, MOST) == text.encode()


@pytest.mark.parametrize("tree", TREES)
@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="there is no /proc here")
def test_a_file_with_more_in_it_than_it_says_is_refused(tree):
    with pytest.raises(OSError, match="which changed while it was read"):
        files_of(tree).read_file(Path("/proc/self/maps"), MOST)


@pytest.mark.parametrize("tree", TREES)
def test_a_load_takes_everything_from_one_opening(tree, tmp_path, monkeypatch):
    """A file that is replaced while it is loaded gives the old arrays or the new ones, never some of both."""
    layer, save, load, export = layer_of(tree)
    path, other = tmp_path / "layer", tmp_path / "other"
    save(layer(0), path)
    other.write_bytes(b"no such format")
    real = os.open

    def open_and_replace(name, *arguments, **options):
        handle = real(name, *arguments, **options)
        if Path(name) == path:
            os.replace(other, path)
        return handle

    monkeypatch.setattr("os.open", open_and_replace)
    target = layer(1)
    load(target, path)
    assert not other.exists()
    assert all((export(target)[name] == array).all() for name, array in export(layer(0)).items())


@pytest.mark.parametrize("tree", TREES)
def test_a_layer_refuses_pipes_and_files_far_too_large(tree, tmp_path):
    layer, _, load, export = layer_of(tree)
    target = layer(0)
    before = export(target)
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(OSError, match=r"^`path`: expected a readable file, got .*pipe' \(a pipe, no regular file\); "):
        load(target, tmp_path / "pipe")
    with open(tmp_path / "huge", "wb") as file:
        os.truncate(file.fileno(), 2**40)
    with pytest.raises(
        ValueError, match=r"^`path`: expected a file of at most 100000128 bytes for this layer, got 1099"
    ):
        load(target, tmp_path / "huge")
    for name in ("", "a\0b", "\ud800"):
        with pytest.raises(ValueError, match=r"^`path`: expected the name of a file, got '.*'; pass"):
            load(target, name)
    assert all((export(target)[name] == array).all() for name, array in before.items())


def layer_of(tree):
    """A function from a seed to a small layer, and how it is saved, loaded and exported."""
    package = importlib.import_module(tree)
    if tree == "torch_impl":
        torch = importlib.import_module("torch")

        def layer(seed):
            torch.manual_seed(seed)
            return package.PartitionedLinear(2, 3, 2, init="torch")
    else:
        nnx = importlib.import_module("flax.nnx")

        def layer(seed):
            return package.PartitionedLinear(2, 3, 2, init="torch", rngs=nnx.Rngs(seed))

    return layer, package.save_parameters, package.load_parameters, package.export_parameters


# --- writing ---


@every_writer
def test_a_save_replaces_regular_files_follows_links_and_keeps_the_mode(write, tmp_path):
    target, link = tmp_path / "folder" / "target", tmp_path / "link"
    target.parent.mkdir()
    link.symlink_to(target)
    write(link, "first")  # a link to nothing
    assert link.is_symlink()
    umask = os.umask(0)
    os.umask(umask)
    assert stat.S_IMODE(target.stat().st_mode) == 0o666 & ~umask
    target.chmod(0o640)
    write(link, "second")
    assert (target.read_text(), stat.S_IMODE(target.stat().st_mode)) == ("second", 0o640)
    assert link.is_symlink()
    assert os.listdir(target.parent) == ["target"]
    long = tmp_path / ("n" * 255)
    write(long, "third")
    assert long.read_text() == "third"


@every_writer
def test_what_cannot_be_replaced_is_refused_and_stays(write, tmp_path):
    loop = tmp_path / "loop"
    loop.symlink_to(loop)
    (tmp_path / "file").write_text("old")
    os.mkfifo(tmp_path / "pipe")
    refused = {tmp_path: "Is a directory", tmp_path / "none" / "file": "folder", loop: "symbolic links"}
    refused[tmp_path / "file" / "x"] = "folder|Not a directory"
    refused |= {tmp_path / "pipe": "pipe", tmp_path / ("n" * 256): "File name too long"}
    for path, why in refused.items():
        with pytest.raises(OSError, match=why):
            write(path, "new")
    assert stat.S_ISFIFO((tmp_path / "pipe").stat().st_mode)
    assert (tmp_path / "file").read_text() == "old"
    assert len(os.listdir(tmp_path)) == 3


@contextlib.contextmanager
def nobody():
    """Without root's right to write everywhere."""
    if os.geteuid() != 0:
        yield
        return
    os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(0)


@every_writer
def test_files_and_folders_that_may_not_be_written_stay(write, tmp_path):
    for folder in (tmp_path, *tmp_path.parents[:3]):
        folder.chmod(0o755)
    protected, path = tmp_path / "protected", tmp_path / "open" / "file"
    protected.mkdir()
    path.parent.mkdir()
    write(path, "old")  # imports what nobody may read
    path.chmod(0o444)
    path.parent.chmod(0o777)
    protected.chmod(0o555)
    with nobody():
        for refused in (path, protected / "file"):
            with pytest.raises(OSError, match="Permission denied"):
                write(refused, "new")
        write(path.parent / "another", "new")
    assert path.read_text() == "old"
    assert sorted(os.listdir(path.parent)) == ["another", "file"]
    assert os.listdir(protected) == []


@contextlib.contextmanager
def full_disk(size):
    """No file of this process grows beyond a size, as on a disk that is full there."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@every_writer
def test_a_full_disk_leaves_the_old_file_and_no_other(write, tmp_path):
    path = tmp_path / "file"
    path.write_text("old")
    with (
        full_disk(2**16),
        pytest.raises(OSError, match=r"(cannot|can) be written.*\(File too large\).* choose another"),
    ):
        write(path, "x" * 2**17)
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["file"]


# Loads one file of a package without the package, which would load a framework; stops where the file is written.
_SAVING = """
import os, pathlib, runpy, sys, time
def wait(handle):
    print("written", flush=True)
    time.sleep(3600)
os.fsync = wait
found = runpy.run_path(sys.argv[1])
if "write_file" in found:
    found["write_file"](pathlib.Path(sys.argv[2]), b"new")
else:
    found["write_text"]("--json", sys.argv[2], "new")
"""


@pytest.mark.parametrize("module", [*(f"{tree}/files.py" for tree in TREES), "parity_tests/report/files.py"])
def test_what_a_killed_save_left_is_removed_by_the_next_one_and_not_while_it_writes(module, tmp_path):
    name = "commands" if module.startswith("parity") else module.split("/")[0]
    write, path = writers()[name], tmp_path / "file"
    path.write_text("old")
    bystanders = {f".file.{'0' * 15}.partial", ".file.partial", f".other.{'0' * 16}.partial"}
    for bystander in bystanders:
        (tmp_path / bystander).touch()
    command = [sys.executable, "-c", _SAVING, str(ROOT / module), str(path)]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT)}
    ) as child:
        assert child.stdout.readline() == b"written\n"
        (left,) = set(os.listdir(tmp_path)) - bystanders - {"file"}
        write(path, "mine")
        assert left in os.listdir(tmp_path), "a save that is under way was taken for an abandoned one"
        child.send_signal(signal.SIGKILL)
        child.wait()
    assert left in os.listdir(tmp_path)
    assert path.read_text() == "mine"
    write(path, "last")
    assert set(os.listdir(tmp_path)) == {"file"} | bystanders


# --- outputs of commands ---


def test_devices_and_pipes_that_are_named_are_written_as_they_are(tmp_path):
    files.write_text("--json", "/dev/null", "text")
    assert stat.S_ISCHR(os.stat("/dev/null").st_mode)
    with pytest.raises(
        files.OutputError, match=r"--json: /dev/full cannot be written \(No space left on device\); make"
    ):
        files.write_text("--json", "/dev/full", "text")
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    files.check_output("--json", pipe)
    files.write_text("--json", pipe, "text")
    assert os.read(reader, 100) == b"text"
    os.close(reader)
    files.check_output("--json", pipe)
    with pytest.raises(files.OutputError, match=r"pipe cannot be written \(no process reads this pipe\); make"):
        files.write_text("--json", pipe, "text")


_PRINTING = """
from parity_tests.report import files
print("before")
for name in {names}:
    files.check_output("--json", name)
    files.write_text("--json", name, "text\\n")
print("after")
"""


@pytest.mark.parametrize("kind", ["pipe", "file"])
def test_standard_output_under_any_name_keeps_what_else_goes_there(kind, tmp_path):
    path = tmp_path / "printed"
    names = ["/dev/stdout", "/dev/fd/1", *([str(path)] if kind == "file" else [])]
    command = [sys.executable, "-c", _PRINTING.format(names=names)]
    options = {"cwd": ROOT, "env": os.environ | {"PYTHONPATH": str(ROOT)}, "check": True}
    if kind == "pipe":
        shown = subprocess.run(command, stdout=subprocess.PIPE, **options).stdout.decode()
    else:
        with path.open("wb") as file:
            subprocess.run(command, stdout=file, **options)
        shown = path.read_text()
    assert shown == "before\n" + "text\n" * len(names) + "after\n"


def test_an_output_is_tried_before_the_work(tmp_path):
    old = tmp_path / "old"
    old.write_text("old")
    for path in (old, tmp_path / "new", "/dev/null", None):
        files.check_output("--json", path)
    assert os.listdir(tmp_path) == ["old"]
    assert old.read_text() == "old"
    for path in (tmp_path, tmp_path / "none" / "file", "", "a\0b"):
        with pytest.raises(files.OutputError, match=r"^--json: .* cannot be written \(.*\); make room or choose"):
            files.check_output("--json", path)
    with full_disk(0), pytest.raises(files.OutputError, match="File too large"):
        files.check_output("--json", old)


def test_an_exception_while_it_is_written_leaves_the_old_output(tmp_path):
    def pieces():
        yield "new"
        raise KeyboardInterrupt

    path = tmp_path / "old"
    path.write_text("old")
    with pytest.raises(KeyboardInterrupt):
        files.write_text("--json", path, pieces())
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["old"]


# --- folders ---

_WORKING = """
import sys, time
from parity_tests.report.files import ScratchFolder
folder = ScratchFolder("worker")
print(folder.name, flush=True)
time.sleep(3600 * int(sys.argv[1]))
"""


def test_folders_of_killed_processes_are_removed_by_the_next_one_and_no_others(tmp_path, monkeypatch):
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    bystander = tmp_path / "partitioned-linear-results"
    bystander.mkdir()
    command = [sys.executable, "-c", _WORKING]
    options = {"stdout": subprocess.PIPE, "text": True, "cwd": ROOT, "env": os.environ | {"PYTHONPATH": str(ROOT)}}
    assert not Path(subprocess.run([*command, "0"], check=True, **options).stdout.strip()).exists()
    with subprocess.Popen([*command, "1"], **options) as child:
        folder = Path(child.stdout.readline().strip())
        (folder / "inside").mkdir()
        files.ScratchFolder("another").cleanup()
        assert folder.exists(), "the folder of a process that runs was taken for an abandoned one"
        child.kill()
    assert folder.exists()
    mine = files.ScratchFolder("another")
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([bystander.name, Path(mine.name).name])
    mine.cleanup()
    assert os.listdir(tmp_path) == [bystander.name]


_SERVING = """
import os, tempfile
from parity_tests.frameworks.torch.sharded import ShardedTorchSubject, _running
from parity_tests.judge.inputs import Case, draw_inputs
from parity_tests.judge.subjects import load_subjects
(subject,) = [found for found in load_subjects("torch", "cpu", ["sharded"]) if found.implementation == "einsum"]
for _ in range(3):  # the order of a file's tensors is another in each
    found = list(subject.vjp(draw_inputs(Case("divided", (2,), 2, 3, 3), "float32")))
    assert found == ["y", "dx", "dweight", "dbias"], found
print([child.child.pid for child in _running[0]._children], os.listdir(tempfile.gettempdir()))
"""


@pytest.mark.skipif("torch_impl" not in TREES, reason="needs torch")
def test_sharded_processes_and_the_folder_in_which_they_meet_are_removed(tmp_path):
    environment = os.environ | {"PYTHONPATH": str(ROOT), "TMPDIR": str(tmp_path), "OMP_NUM_THREADS": "1"}
    options = {"capture_output": True, "text": True, "check": True, "cwd": ROOT, "env": environment}
    done = subprocess.run([sys.executable, "-c", _SERVING], **options)
    pids, names = map(ast.literal_eval, done.stdout.strip().replace("] [", "]\n[").splitlines())
    assert len(pids) == 2
    assert any("scratch-shards-" in name for name in names)
    assert done.stderr == ""
    assert [name for name in os.listdir(tmp_path) if "torchinductor" not in name] == []
    for pid in pids:
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)
