"""The house rules, as tests: twin rooms and twin functions, sizes, one-way imports without circles, isolation."""

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest

from parity_tests.judge.subjects import framework_available

ROOT = Path(__file__).resolve().parents[2]

# Files that only one tree has, each with its reason.
ONE_SIDED = {
    "torch_impl": {
        "masked_layer.py": "the source article's layer: a dense parameter, a torch idea",
        "linears.py": "lists of nn.Linear, in and out: a torch pattern",
        "implementations/fused.py": "kernels of Triton's, which PyTorch for CUDA brings; XLA writes its own",
        "fused_kernels.py": "these kernels, which only a process with Triton can import",
    },
    "jax_impl": {
        "linen.py": "Flax has two module systems; torch has one",
        "implementations/by_feature.py": "XLA fuses the terms of the sum; without a compiler each is a pass over y",
        "implementations/in_turn.py": "a loop inside the compiled program; without a compiler it is `loop`",
    },
}
# Functions that the two trees share as copies, since neither may import the other: by file, each with its name.
TWINS = {
    "array_types.py": ("UnsupportedImplementationError", "kind_of", "shown", "said", "_on_one_line"),
    "checkpoints.py": (
        *("without_wrappers", "key_of", "linears_in", "check_keys", "arrays_from_linears"),
        *("of_partition", "linears_from_arrays", "_advice"),
        *("from_axes", "to_axes", "_sizes", "_checked_patterns"),
    ),
    "files.py": (
        *("as_path", "read_file", "write_file", "_check_regular"),
        *("_replace", "_new_file", "_remove_abandoned", "_locked"),
    ),
    "layouts.py": ("check_axes", "find_axes", "layout_advice", "static_indices", "check_indices"),
    "packing.py": (
        *("Bucket", "stop", "Packing", "num_partitions", "order"),
        *("packing_of", "has_unequal_sizes", "check_packing", "_each_size"),
    ),
    "registry.py": ("_shared_reason", "implementation_names", "get_implementation", "_listed"),
    "validation.py": ("_names",),
    "parameters.py": ("_check_version", "_deserialized"),
}
LONGEST, SHORTEST = 400, 40
MOST_FILES = 250
# Files below the shortest length, each with the name by which a reader looks for it. Packages, their entries and the
# implementations of the table need no reason.
SHORT = {
    "parity_tests/pair/plugin.py": "the pytest plugin",
    "torch_impl/selection.py": "what auto means, the twin of JAX's room",
}
# Files that only one framework's folder of the judge has.
OF_ONE_FRAMEWORK = {
    "modes.py": "arrays and modules of torch, which many need, beside its modes; JAX's modes lie with its subjects",
    "alternatives.py": "what single operations may have been meant to do is tried on the torch side",
    "norm_alternatives.py": "likewise, of norms",
    "loss_alternatives.py": "likewise, of losses",
    "window_alternatives.py": "likewise, of convolutions and pools",
    "sharded.py": "processes; JAX divides over devices of one process",
    "defects.py": "defects of user pairs are planted in the Flax side",
    "checkpoints.py": "orbax is JAX's; torch's side has state dicts and safetensors files",
    "modules.py": "Flax has module systems, JAX has functions",
}
ALLOWED = {
    "torch_impl": {"torch_impl"},
    "jax_impl": {"jax_impl"},
    "parity_tests": {"parity_tests", "torch_impl", "jax_impl"},
    "bench": {"bench", "parity_tests", "torch_impl", "jax_impl"},
}
FRAMEWORK_MODULES = {"torch": "torch", "jax": "jax", "flax": "jax", "optax": "jax", "jaxlib": "jax"}


def sources(package):
    return sorted(path for path in (ROOT / package).rglob("*.py") if "__pycache__" not in path.parts)


def imported(path):
    """Top-level names of every import statement in a file, at any depth."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            assert node.level == 0, f"{path}: relative import"
            names.add(node.module.split(".")[0])
    return names


def test_twin_trees_have_the_same_rooms():
    rooms = {
        tree: {str(path.relative_to(ROOT / tree)) for path in sources(tree)} - set(ONE_SIDED[tree])
        for tree in ONE_SIDED
    }
    assert rooms["torch_impl"] == rooms["jax_impl"]
    for tree, files in ONE_SIDED.items():
        for name in files:
            assert (ROOT / tree / name).exists(), f"{tree}/{name} is listed as one-sided but is not there"


def test_the_judge_s_framework_folders_have_the_same_rooms():
    rooms = [
        {path.name for path in (ROOT / "parity_tests/frameworks" / name).glob("*.py")} for name in ("torch", "jax")
    ]
    assert rooms[0] ^ rooms[1] <= set(OF_ONE_FRAMEWORK)
    assert len(rooms[0] & rooms[1]) >= 4


@pytest.mark.parametrize("package", ALLOWED)
def test_imports_flow_one_way(package):
    wrong = {
        str(path.relative_to(ROOT)): sorted(imported(path) & set(ALLOWED) - ALLOWED[package])
        for path in sources(package)
    }
    assert {path: names for path, names in wrong.items() if names} == {}


@pytest.mark.parametrize("tree", ["torch_impl", "jax_impl"])
def test_implementations_never_import_one_another(tree):
    folder = ROOT / tree / "implementations"
    names = {path.stem for path in folder.glob("*.py")} - {"__init__"}
    for path in folder.glob("*.py"):
        used = set()
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                modules = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                # "from . import loop" and "from .loop import run" count as much as the absolute forms.
                base = f"{tree}.implementations" if node.level else node.module or ""
                inner = f"{base}.{node.module}" if node.level and node.module else base
                modules = [inner, *(f"{inner}.{alias.name}" for alias in node.names)]
            else:
                continue
            parts = [module.split(".") for module in modules if module.startswith(f"{tree}.implementations.")]
            used |= {part[2] for part in parts} & names
        assert not used - {path.stem}, f"{path} imports {used}"


@pytest.mark.parametrize("tree", ["torch_impl", "jax_impl"])
def test_table_matches_the_files(tree):
    framework = tree.removesuffix("_impl")
    if not framework_available(framework):
        pytest.skip(f"{framework} is not installed here")
    registry = __import__(f"{tree}.registry", fromlist=["IMPLEMENTATIONS"])
    files = {path.stem for path in (ROOT / tree / "implementations").glob("*.py")} - {"__init__"}
    # The formulations for unequal sizes are short beside what they share, and have one file.
    assert {entry.run.__module__.rpartition(".")[2] for entry in registry.UNEQUAL_IMPLEMENTATIONS.values()} == {
        "unequal"
    }
    assert set(registry.IMPLEMENTATIONS) | {"unequal"} == files


def test_frameworks_are_imported_only_where_they_belong():
    """In parity_tests and bench, only folders named after a framework, and tests, may name one."""
    offenders = {}
    for package in ("parity_tests", "bench"):
        for path in sources(package):
            relative = path.relative_to(ROOT)
            if {"torch", "jax", "tests"} & set(path.parts[:-1]):
                continue
            if found := imported(path) & (set(FRAMEWORK_MODULES) | {"torch_impl", "jax_impl"}):
                offenders[str(relative)] = sorted(found)
    assert offenders == {}


def run_isolated(code, banned):
    """Runs code in a fresh interpreter in which the banned packages cannot be imported."""
    prelude = f"""
import sys
class Ban:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {sorted(banned)!r}:
            raise ModuleNotFoundError(f"No module named {{name!r}} (banned by the test)", name=name)
sys.meta_path.insert(0, Ban())
"""
    return subprocess.run(
        [sys.executable, "-W", "error::ImportWarning", "-c", prelude + code],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        timeout=300,
        check=False,
    )


TORCH_BAN = {"torch", "torch_impl"}
# Triton too, which only the kernels of `fused` need.
JAX_BAN = {"jax", "jaxlib", "flax", "optax", "jax_impl", "triton"}


@pytest.mark.parametrize(("framework", "banned"), [("torch", JAX_BAN), ("jax", TORCH_BAN)])
def test_each_tree_works_with_the_other_framework_unimportable(framework, banned):
    if not framework_available(framework):
        pytest.skip(f"{framework} is not installed here")
    code = f"""
import sys
from parity_tests.judge.inputs import SMOKE
from parity_tests.judge.run import run_cells
from parity_tests.judge.subjects import load_subjects
import {framework}_impl
subjects = [subject for subject in load_subjects("{framework}") if subject.implementation in ("matmul", "layer")]
rows = list(run_cells(subjects, ["float32"], SMOKE[:1]))
assert rows and all(row.status != "mismatch" for row in rows), rows
assert any(row.status == "ok" for row in rows)
assert not set(sys.modules) & set({sorted(banned)!r})
"""
    result = run_isolated(code, banned)
    assert result.returncode == 0, result.stderr


def test_neutral_code_imports_no_framework():
    code = """
import importlib, pkgutil, sys
import parity_tests.__main__, bench.__main__
rooms = [f"parity_tests.{room}" for room in ("judge", "training", "causes", "defects", "report", "pair")]
rooms += [f"bench.{room}" for room in ("plan", "study", "report")]
for room in rooms:
    for module in pkgutil.iter_modules(importlib.import_module(room).__path__, f"{room}."):
        importlib.import_module(module.name)
loaded = set(sys.modules) & {"torch", "jax", "flax", "optax", "torch_impl", "jax_impl"}
assert not loaded, loaded
"""
    result = run_isolated(code, set())
    assert result.returncode == 0, result.stderr


def code(package):
    """The files of a package that are no tests."""
    return [path for path in sources(package) if "tests" not in path.relative_to(ROOT).parts]


def lengths():
    return {
        str(path.relative_to(ROOT)): len(path.read_text().splitlines()) for package in ALLOWED for path in code(package)
    }


def test_files_stay_readable():
    assert {name: lines for name, lines in lengths().items() if lines > LONGEST} == {}


def test_a_file_is_worth_opening():
    short = {
        name
        for name, lines in lengths().items()
        if lines < SHORTEST
        and Path(name).name not in ("__init__.py", "__main__.py")
        and Path(name).parent.name != "implementations"
    }
    assert short == set(SHORT)


@pytest.mark.parametrize("package", ["parity_tests", "bench"])
def test_a_package_file_holds_more_than_a_docstring(package):
    """A folder is a package without one; only what is imported or said in it needs the file."""
    files = [path for path in code(package) if path.name == "__init__.py"]
    bare = [str(path.relative_to(ROOT)) for path in files if len(path.read_text().splitlines()) < 2]
    assert set(bare) <= {f"{package}/__init__.py"}


def test_the_house_has_room():
    assert len(lengths()) <= MOST_FILES


def functions(path):
    """The source of each function and class of a file by its name."""
    nodes = ast.walk(ast.parse(path.read_text()))
    return {node.name: ast.unparse(node) for node in nodes if isinstance(node, ast.FunctionDef | ast.ClassDef)}


@pytest.mark.parametrize("file", TWINS)
def test_twin_functions_stay_equal(file):
    trees = [functions(ROOT / tree / file) for tree in ONE_SIDED]
    copies = {name for name in trees[0].keys() & trees[1].keys() if trees[0][name] == trees[1][name]}
    # A new copy is listed as well, so that it stays one.
    assert {name for name in copies if len(trees[0][name].splitlines()) > 1} == set(TWINS[file]), f"{Path(file).stem}"


def module_name(path):
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports_between_modules():
    """Each module's imports of other modules of the house, also those within functions; not those for type checkers."""
    modules = {module_name(path): path for package in ALLOWED for path in code(package)}
    found = {}
    for name, path in modules.items():
        nodes, used = [ast.parse(path.read_text())], set()
        while nodes:
            node = nodes.pop()
            if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
                nodes += node.orelse
                continue
            nodes += ast.iter_child_nodes(node)
            if isinstance(node, ast.Import):
                used |= {alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.module:
                used |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
        found[name] = (used & set(modules)) - {name}
    return found


def test_imports_have_no_circles():
    left = imports_between_modules()
    # A module whose imports have all been taken away is in no circle; what remains is, or imports what is.
    while free := {name for name, used in left.items() if not used & set(left)}:
        left = {name: used for name, used in left.items() if name not in free}
    while unused := {name for name in left if not any(name in used for used in left.values())}:
        left = {name: used for name, used in left.items() if name not in unused}
    assert sorted(left) == []


BREACHES = {
    "a tree imports the other one": (
        "torch_impl/a.py",
        "import jax_impl.layer",
        lambda: test_imports_flow_one_way("torch_impl"),
    ),
    "the judge imports the bench": (
        "parity_tests/a.py",
        "def late():\n    from bench.plan import workloads",
        lambda: test_imports_flow_one_way("parity_tests"),
    ),
    "a neutral file imports a framework": (
        "bench/a.py",
        "if True:\n    import flax.nnx",
        lambda: test_frameworks_are_imported_only_where_they_belong(),
    ),
    "a room that only one tree has": ("jax_impl/a.py", "", lambda: test_twin_trees_have_the_same_rooms()),
    "a file that is too long": ("bench/a.py", "\n" * 401, lambda: test_files_stay_readable()),
    "a file that is too short": ("bench/a.py", "\n" * 3, lambda: test_a_file_is_worth_opening()),
    "a package file with a docstring alone": (
        "parity_tests/judge/__init__.py",
        '"""Judge."""\n',
        lambda: test_a_package_file_holds_more_than_a_docstring("parity_tests"),
    ),
    "one file too many": ("bench/a.py", "", lambda: test_the_house_has_room()),
    "a copy that changed": (
        "jax_impl/registry.py",
        "def shared(a):\n    return -a\n",
        lambda: test_twin_functions_stay_equal("registry.py"),
    ),
    "a circle, one way within a function": (
        "bench/a.py",
        "def late():\n    import bench.b",
        lambda: test_imports_have_no_circles(),
    ),
    **{
        f"an implementation imports another: {line}": (
            "jax_impl/implementations/loop.py",
            line,
            lambda: test_implementations_never_import_one_another("jax_impl"),
        )
        for line in (
            "from jax_impl.implementations.einsum import run",
            "from jax_impl.implementations import einsum",
            "import jax_impl.implementations.einsum",
            "from . import einsum",
            "from .einsum import run",
        )
    },
}


@pytest.mark.parametrize("breach", BREACHES)
def test_a_breach_of_a_rule_is_found(breach, tmp_path, monkeypatch):
    """Each search above finds what it looks for, and passes where that is not there."""
    name, text, rule = BREACHES[breach]
    for tree in ALLOWED:
        (tmp_path / tree / "implementations").mkdir(parents=True)
    for tree, files in ONE_SIDED.items():
        for file in files:
            (tmp_path / tree / file).touch()
        (tmp_path / tree / "implementations" / "loop.py").touch()
        (tmp_path / tree / "implementations" / "einsum.py").touch()
    for tree in ONE_SIDED:
        (tmp_path / tree / "registry.py").write_text("def shared(a):\n    return a\n")
    (tmp_path / "parity_tests" / "judge").mkdir()
    (tmp_path / "bench" / "b.py").write_text("from bench.a import late\n" + "\n" * SHORTEST)
    monkeypatch.setitem(globals(), "ROOT", tmp_path)
    files = {str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*.py")}
    monkeypatch.setitem(
        globals(),
        "SHORT",
        dict.fromkeys(name for name in files if name != "bench/b.py" and "implementations" not in name),
    )
    monkeypatch.setitem(globals(), "TWINS", {"registry.py": ("shared",)})
    monkeypatch.setitem(globals(), "MOST_FILES", len(files))
    rule()
    (tmp_path / name).write_text(text)
    with pytest.raises(AssertionError, match=Path(name).stem):
        rule()


@pytest.mark.parametrize("package", ALLOWED)
def test_the_searches_have_files_to_look_at(package):
    assert any(imported(path) for path in sources(package))
