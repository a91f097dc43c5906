"""One side of a pair in an interpreter of its own, see `interpreters`; it serves what `remote` asks for.

Arrays go beside the messages, as the bytes of safetensors files.
"""

from typing import Any

import numpy as np

from parity_tests.interpreters.interpreter import Channel
from parity_tests.judge.records import environment
from parity_tests.pair.exchange import packed, unpacked
from parity_tests.pair.loading import build, load_factory
from parity_tests.pair.side import CANNOT_RUN, Arrays, ParameterSpec, Side, make_side
from parity_tests.report.text import first_line


def _reply(
    side: Side, request: dict[str, Any], groups: dict[str, dict[str, np.ndarray]]
) -> tuple[dict, dict[str, Arrays]]:
    """Calls one method; returns what goes into the line and what goes into the file."""
    method = request["method"]
    inputs = tuple(array for _, array in sorted(groups.get("inputs", {}).items(), key=lambda item: int(item[0])))
    parameters = groups.get("parameters", {})
    cotangents = groups.get("cotangents", {}) if request.get("cotangents") else None
    if method == "parameters":
        specs: dict[str, ParameterSpec] = side.parameters(inputs)
        line = {kind: [name for name, spec in specs.items() if getattr(spec, kind)] for kind in ("trainable", "frozen")}
        line["order"] = list(specs)
        return line, {"values": {name: spec.value for name, spec in specs.items()}}
    if method == "variants":
        return {"variants": [[variant.name, variant.sentence] for variant in side.variants()]}, {}
    if method == "notes":
        return {"notes": list(side.notes())}, {}
    if method == "is_random":
        return {"is_random": side.is_random(parameters, inputs)}, {}
    if method == "unexercised":
        return {"sentences": list(side.unexercised(parameters, inputs))}, {}
    if method == "wider_operations":
        return {"sentences": list(side.wider_operations(parameters, inputs, request["dtype"]))}, {}
    if method == "round_trip":
        return {}, {"values": side.round_trip(parameters)}
    if method in ("outline", "forward"):
        return {}, {"values": getattr(side, method)(parameters, inputs)}
    if method == "vjp":
        return {}, {"values": side.vjp(parameters, inputs, cotangents or {})}
    if method == "truth":
        return {}, {"values": side.truth(parameters, inputs, cotangents, request["variant"])}
    if method == "constants":
        moved = side.constants(parameters, inputs, cotangents, request["buffers"], request["computed"])
        line = {"stored": list(moved.stored), "literals": list(moved.literals), "members": moved.members}
        return line, {"spread": moved.spread}
    found = side.ensemble(parameters, inputs, cotangents, request["dtype"], request["seed"])
    line = {"members": found.members, "notes": list(found.notes)}
    return line, {"centre": found.centre, "spread": found.spread, "kinks": found.kinks}


def main(channel: Channel, framework: str, spec: str, device: str) -> None:
    """Builds the side and answers requests until the connection ends.

    Args:
        channel: to the parent.
        framework: `torch` or `jax`.
        spec: `package.module:factory`.
        device: `cpu`, `cuda` or `auto`.
    """
    try:
        side = make_side(framework, build(load_factory(spec, (framework,)), (framework,)), device)
    except (ImportError, TypeError, ValueError) as error:
        channel.send({"error": first_line(error), "kind": type(error).__name__})
        return
    channel.send({"name": side.name, "environment": environment()})
    while (request := channel.receive()) is not None:
        try:
            line, groups = _reply(side, request, unpacked(request["payload"]))
            arrays = packed(groups)
        except CANNOT_RUN as error:
            # The caller decides what a refusal means; the worker stays there for the next request.
            channel.send({"error": first_line(error), "kind": type(error).__name__})
        else:
            channel.send(line, arrays)
