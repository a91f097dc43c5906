"""Arguments and options that several commands have, and the command line of a class of options."""

import dataclasses
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, get_origin, get_type_hints

import typer

from bench.measure.request import Request, option

JsonFile = Annotated[
    Path | None, typer.Option("--json", metavar="F", help="Write the result as JSON to this file too.")
]
CsvFile = Annotated[
    Path | None, typer.Option("--csv", metavar="F", help="Write the rows as comma-separated values to this file too.")
]
Directories = Annotated[list[Path], typer.Argument(metavar="DIR...", help="Directories of earlier runs.")]


def picture(shown: str) -> Any:
    """Returns the option that names the file of a picture of something."""
    return typer.Option(metavar="F", help=f"Draw {shown} (.svg, .png, .html).")


def cells_where(run: str) -> Any:
    """Returns the option that chooses cells by their conditions."""
    return typer.Option(
        metavar="FIELD=PATTERN", help=f"{run}Only cells such as direction=forward, workload=article-*; may be repeated."
    )


@dataclass(frozen=True, kw_only=True)
class RunOptions(Request):
    """The options of `bench run`: those of a request, and those of the command itself."""

    out: Annotated[Path, typer.Option(metavar="DIR", help="Directory for the records and the report.")]
    engine: str = option("local", "local, or dask: workers that own a device each.", choices=("local", "dask"))
    scheduler: str | None = option(None, "Of the dask scheduler, with --engine dask.", metavar="ADDRESS")
    resume: Annotated[bool, typer.Option("--resume", help="Continue the records in DIR; repeats nothing.")] = False
    json_file: JsonFile = None
    csv_file: CsvFile = None


def typer_option(options: type, name: str) -> Any:
    """Return the option of the command line that a field of a class of options declares."""
    return typer.Option(**options.__dataclass_fields__[name].metadata["typer"])


TorchPython = Annotated[str | None, typer_option(Request, "torch_python")]
JaxPython = Annotated[str | None, typer_option(Request, "jax_python")]


def takes(options: type) -> Callable[[Callable[[Any], None]], Callable[..., None]]:
    """Return a decorator that lets typer make a command of a function of one object of options.

    Args:
        options: a dataclass; its fields are the command's options, the required ones first.
    """
    hints = get_type_hints(options, include_extras=True)
    many = {name for name, hint in hints.items() if hint == tuple[str, ...]}

    def parameter(field: dataclasses.Field[Any]) -> inspect.Parameter:
        hint, default = hints[field.name], None if field.name in many else field.default
        if get_origin(hint) is not Annotated:
            hint = Annotated[list[str] | None if field.name in many else hint, typer_option(options, field.name)]
        default = inspect.Parameter.empty if default is dataclasses.MISSING else default
        return inspect.Parameter(field.name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=hint)

    def decorate(function: Callable[[Any], None]) -> Callable[..., None]:
        def command(**given: Any) -> None:
            function(options(**{name: tuple(value or ()) if name in many else value for name, value in given.items()}))

        parameters = sorted(map(parameter, dataclasses.fields(options)), key=lambda one: one.default is not one.empty)
        command.__name__, command.__doc__ = function.__name__, function.__doc__
        command.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
        return command

    return decorate
