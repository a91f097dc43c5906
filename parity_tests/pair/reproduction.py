"""What reproduces one row of a pair's check: a command where the pair has a name, else the call with that row's seed.

Everything that a check draws follows from the seed and from names, in every process and whatever other dtypes are
judged beside it: a call with the same seed and one dtype repeats the row to the bit.
"""

import shlex
from collections.abc import Callable, Mapping
from typing import Any

from parity_tests.interpreters.interpreter import DEFAULT_TIMEOUT_S
from parity_tests.pair.report import PairRow

# What the command line has an option for, or what changes no row that it leaves in.
_OF_COMMAND = {"seed", "dtypes", "device", "torch_python", "jax_python", "timeout_s", "semantic", "state", "name"}
# What a call that is written down must repeat, beside the seed and the dtype.
_SCALARS = ("gradients", "semantic", "state", "scale", "not_compared", "device", "torch_python", "jax_python")
_SCALARS += ("timeout_s",)


def reproduction(
    spec: str | None, given: Mapping[str, Any], arguments: Mapping[str, Any], defaults: Mapping[str, Any]
) -> Callable[[PairRow], str]:
    """Returns what writes down how a row is reproduced.

    A pair of objects has no name that another process could find: there the text is the call itself, with `...` for
    the modules, rules and inputs that the caller holds.

    Args:
        spec: `package.module:factory`, or None for objects.
        given: what the caller passed beside it, complete.
        arguments: what was run, a factory's own arguments included.
        defaults: of the same arguments.
    """
    changed = {name for name, value in given.items() if value is not defaults[name]}
    if spec is not None and changed <= _OF_COMMAND:
        return lambda row: command_of(spec, arguments, row.dtype)
    scalars = {name: arguments[name] for name in _SCALARS if arguments[name] != defaults[name]}
    options = "".join(f", {name}={value!r}" for name, value in scalars.items())
    objects = changed - _OF_COMMAND - set(_SCALARS)
    held = "".join([*([] if spec is None else [f"pair={spec!r}, "]), *(["..., "] if objects else [])])

    def call(row: PairRow) -> str:
        seed_and_dtype = f"seed={arguments['seed']}, dtypes=({row.dtype!r},)"
        return f"check_pair({held}{seed_and_dtype}{options})" + (f"  # {row.tensor}" if row.tensor else "")

    return call


def command_of(spec: str, arguments: Mapping[str, Any], dtype: str) -> str:
    """The command that repeats a named pair's check in one dtype."""
    words = ["python", "-m", "parity_tests", "run", "--pair", spec, "--seed", str(arguments["seed"])]
    words += ["--device", arguments["device"]]
    for option in ("torch_python", "jax_python"):
        if arguments[option] is not None:
            words += [f"--{option.replace('_', '-')}", arguments[option]]
    if arguments["timeout_s"] != DEFAULT_TIMEOUT_S:
        words += ["--timeout-s", f"{arguments['timeout_s']:g}"]
    return shlex.join([*words, "--dtype", dtype])
