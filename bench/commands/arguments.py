"""Arguments and options that several commands have, with their help."""

from pathlib import Path
from typing import Annotated, Any

import typer

JsonFile = Annotated[
    Path | None, typer.Option("--json", metavar="F", help="Write the result as JSON to this file too.")
]
CsvFile = Annotated[
    Path | None, typer.Option("--csv", metavar="F", help="Write the rows as comma-separated values to this file too.")
]
Directories = Annotated[list[Path], typer.Argument(metavar="DIR...", help="Directories of earlier runs.")]
TorchPython = Annotated[str | None, typer.Option(metavar="P", help="Interpreter with torch; default: this one.")]
JaxPython = Annotated[str | None, typer.Option(metavar="P", help="Interpreter with jax and flax; default: this one.")]


def picture(shown: str) -> Any:
    """Returns the option that names the file of a picture of something."""
    return typer.Option(metavar="F", help=f"Draw {shown} (.svg, .png, .html).")


def cells_where(run: str) -> Any:
    """Returns the option that chooses cells by their conditions."""
    return typer.Option(
        metavar="FIELD=PATTERN", help=f"{run}Only cells such as direction=forward, workload=article-*; may be repeated."
    )
