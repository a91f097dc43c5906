"""Write the reference of the public names into the layers' pages, from their docstrings.

python -m parity_tests.tests.reference
"""

import importlib
import inspect
import re
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
# By package: the modules whose public functions and classes are listed, beside its own `__all__`.
ROOMS = {
    "torch_impl": ("optimizers", "sharding"),
    "jax_impl": ("linen", "optimizers", "sharding"),
}
BEGIN, END = "<!-- reference:begin -->", "<!-- reference:end -->"


def signature(value: Any) -> str:
    """Return the names of the arguments as a call has them, with a star before those by name alone."""
    if inspect.isclass(value) and issubclass(value, Exception):
        return "message"
    parameters = list(inspect.signature(value.__init__ if inspect.isclass(value) else value).parameters.values())
    shown, named = [], False
    for parameter in parameters:
        if parameter.name in ("self", "name", "parent") and inspect.isclass(value):
            continue
        if parameter.kind is parameter.KEYWORD_ONLY and not named:
            shown.append("*")
            named = True
        shown.append(parameter.name if parameter.default is parameter.empty else f"{parameter.name}=...")
    return ", ".join(shown)


def public(package: str) -> dict[str, Any]:
    """Return the public functions and classes by the name that is imported."""
    root = importlib.import_module(package)
    found = {name: getattr(root, name) for name in root.__all__}
    for room in ROOMS[package]:
        module = importlib.import_module(f"{package}.{room}")
        found |= {
            f"{room}.{name}": value
            for name, value in vars(module).items()
            if not name.startswith("_") and getattr(value, "__module__", "") == module.__name__ and callable(value)
        }
    return found


def block(package: str) -> str:
    """Return the table of a package's public names."""
    rows = ["| name | |", "|---|---|"]
    for name, value in public(package).items():
        first = re.split(r"(?<=[.:])\n\n", inspect.getdoc(value) or "", maxsplit=1)[0]
        rows.append(f"| `{name}({signature(value)})` | {' '.join(first.split()).replace('|', chr(92) + '|')} |")
    return "\n".join((BEGIN, "", *rows, "", END))


def drawn(package: str) -> str:
    """Return a package's page with its reference drawn anew."""
    text = (ROOT / package / "README.md").read_text()
    return f"{text[: text.index(BEGIN)]}{block(package)}{text[text.index(END) + len(END) :]}"


if __name__ == "__main__":
    for package in ROOMS:
        (ROOT / package / "README.md").write_text(drawn(package))
