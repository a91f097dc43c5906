"""The pages' Python blocks run, each in a fresh process as a reader would paste it; what they name is there."""

import importlib
import re
import shlex
import signal
from pathlib import Path

import pytest
import typer

from parity_tests.judge.subjects import FRAMEWORKS, framework_available
from parity_tests.tests.forked import run_python
from parity_tests.tests.reference import drawn

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = ("torch_impl", "jax_impl", "parity_tests", "bench")
FILES = [*ROOT.glob("*.md"), *(path for package in PACKAGES for path in (ROOT / package).rglob("*.md"))]
PAGES = {str(path.relative_to(ROOT)): path.read_text() for path in sorted(FILES)}
README = PAGES["README.md"]
BLOCKS = {
    f"{page}: {block.splitlines()[0]}, {k}": block
    for page, text in PAGES.items()
    for k, block in enumerate(re.findall(r"^```python\n(.*?)^```", text, flags=re.S | re.M))
}
# A command may go on in the next line, and may stand in a sentence.
COMMANDS = sorted(
    {
        command
        for text in PAGES.values()
        for found in re.findall(
            r"^    (?:\w+=\S+ )*python -m (.*?)(?:  +#.*)?$|`python -m ([^`]+)`",
            re.sub(r"\\\n +", " ", text),
            flags=re.M,
        )
        for command in found
        if re.match(r"(bench|parity_tests) \w", command)
    }
)
# Of the page that a newcomer reads first, in lines.
MOST_LINES = 250
MOST_LINES_OF = {
    "I use Flax": 30,
    "I use PyTorch": 20,
    "I port a model between the two": 35,
    "I port a model of my own": 35,
    "I choose a framework or a formulation": 35,
}
# Columns of a screen.
WIDTH = 120


def test_there_are_pages_blocks_and_commands_for_all():
    assert {"README.md", "CHANGELOG.md", "CONTRIBUTING.md", *(f"{package}/README.md" for package in PACKAGES)} <= set(
        PAGES
    )
    for package in ("torch_impl", "jax_impl", "parity_tests.pair"):
        assert any(package in block for block in BLOCKS.values()), package
    for package in ("bench", "parity_tests"):
        assert sum(command.startswith(f"{package} ") for command in COMMANDS) >= 5, package


@pytest.mark.parametrize("name", BLOCKS)
def test_block_runs(name, tmp_path):
    for framework in FRAMEWORKS:
        if re.search(rf"\b{framework}\b|{framework}_impl", BLOCKS[name]) and not framework_available(framework):
            pytest.skip(f"{framework} is not installed here")
    result = run_python("-c", BLOCKS[name], cwd=tmp_path)  # one block writes a file where it runs
    assert result.returncode == 0, result.stderr


def test_a_block_that_fails_is_noticed():
    assert "NameError: name 'torch'" in run_python("-c", "torch.ones(3)").stderr
    assert run_python("-c", "import sys; sys.exit(3)").returncode == 3
    assert run_python("-c", "import time; time.sleep(60)", timeout=1).returncode == -signal.SIGALRM
    warned = run_python("-c", "import warnings; warnings.warn('old', DeprecationWarning)")
    assert (warned.returncode, "DeprecationWarning: old" in warned.stderr) == (1, True)


@pytest.mark.parametrize("page", PAGES)
def test_linked_files_and_make_targets_exist(page):
    makefile = (ROOT / "Makefile").read_text()
    for target in re.findall(r"(?:^    |`)make ([a-z-]+)", PAGES[page], flags=re.M):
        assert re.search(rf"^{target}:", makefile, flags=re.M), target
    folder = (ROOT / page).parent
    for link in re.findall(r"\]\(([\w./-]+)\)", PAGES[page]):
        assert (folder / link).exists(), link
    for file in re.findall(r"`([\w*]+/[\w/*]+\.py)`", PAGES[page]):
        assert [*folder.glob(file), *ROOT.glob(file)], file


@pytest.mark.parametrize("command", COMMANDS)
def test_commands_are_accepted(command):
    package, subcommand, *arguments = shlex.split(command)
    application = typer.main.get_command(importlib.import_module(f"{package}.__main__").app)
    known = application.commands[subcommand]  # pyright: ignore[reportAttributeAccessIssue]
    needed = [parameter for parameter in known.params if parameter.required]
    if not arguments and needed:
        return  # Named, not called.
    known.make_context(subcommand, arguments)


def test_a_wrong_option_is_noticed():
    with pytest.raises(Exception, match="--presett"):
        test_commands_are_accepted("bench run --out a --presett seed")


def test_the_recommendation_is_the_one_that_the_first_page_shows():
    (command,) = [command for command in COMMANDS if command.startswith("bench recommend bench/results/")]
    result = run_python("-m", *command.split())
    found = re.match(r"Recommended: (.*)\n", result.stdout)
    assert found, result.stderr
    assert f"(here `{found[1]}`, " in README


def test_the_first_page_is_short():
    assert len(README.splitlines()) <= MOST_LINES
    sections = dict(re.findall(r"^## (.*?)\n(.*?)(?=^## |\Z)", README, flags=re.S | re.M))
    assert {name: len(sections[name].splitlines()) for name in MOST_LINES_OF if
            len(sections[name].splitlines()) > MOST_LINES_OF[name]} == {}  # fmt: skip


def test_the_first_page_fits_a_screen_and_names_no_hashes():
    # A link takes the width of its words.
    lines = re.sub(r"\]\([^)]*\)", "]", README).splitlines()
    assert [line for line in lines if len(line) > WIDTH and not line.startswith("![")] == []
    assert [word for word in re.findall(r"\b[0-9a-f]{7,40}\b", README) if not word.isdigit()] == []
    # What is generated has pages of its own, but for sentences about speeds, which nobody may write by hand.
    generated = re.findall(r"<!-- (\w+):", README)
    assert set(generated) <= {"headlines"}, generated


@pytest.mark.parametrize("framework", FRAMEWORKS)
def test_every_implementation_is_described(framework):
    if not framework_available(framework):
        pytest.skip(f"{framework} is not installed here")
    names = importlib.import_module(f"{framework}_impl").implementation_names()
    for page in ("README.md", f"{framework}_impl/README.md"):
        assert [name for name in names if f"| `{name}` |" not in PAGES[page]] == [], page


@pytest.mark.parametrize(("package", "framework"), [("torch_impl", "torch"), ("jax_impl", "jax")])
def test_the_reference_is_that_of_the_docstrings(package, framework):
    if not framework_available(framework):
        pytest.skip(f"{framework} is not installed here")
    assert PAGES[f"{package}/README.md"] == drawn(package), "stale: run python -m parity_tests.tests.reference"
    assert PAGES[f"{package}/README.md"].count("\n| `") >= len(importlib.import_module(package).__all__)
