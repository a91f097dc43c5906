"""One side of a pair in an interpreter of its own: ``python -m parity_tests.pair.worker torch package.module:factory``.

Reads requests and writes replies as JSON lines; arrays go through safetensors files that the lines name.
"""

import json
import os
import sys
from pathlib import Path
from typing import Any, TextIO

import numpy as np

from parity_tests.harness.failures import first_line
from parity_tests.harness.records import environment
from parity_tests.pair.exchange import read_groups, write_groups
from parity_tests.pair.loading import build, load_factory
from parity_tests.pair.side import CANNOT_RUN, Arrays, ParameterSpec, Side, make_side


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
        line = {"trainable": [name for name, spec in specs.items() if spec.trainable], "order": list(specs)}
        return line, {"values": {name: spec.value for name, spec in specs.items()}}
    if method == "variants":
        return {"variants": [[variant.name, variant.sentence] for variant in side.variants()]}, {}
    if method == "notes":
        return {"notes": list(side.notes())}, {}
    if method == "is_random":
        return {"is_random": side.is_random(parameters, inputs)}, {}
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


def serve(side: Side, requests: TextIO, replies: TextIO) -> None:
    """Answers until the requests end."""
    for text in requests:
        request = json.loads(text)
        folder = Path(request["folder"])
        try:
            line, groups = _reply(side, request, read_groups(folder / "request.safetensors"))
            write_groups(folder / "reply.safetensors", groups)
        except CANNOT_RUN as error:
            # The caller decides what a refusal means; the worker stays there for the next request.
            line = {"error": first_line(error), "kind": type(error).__name__}
        replies.write(json.dumps(line) + "\n")
        replies.flush()


def main(framework: str, spec: str, device: str) -> None:
    """Builds the side and serves it on the standard streams; what the module prints goes to standard error."""
    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    try:
        side = make_side(framework, build(load_factory(spec, (framework,)), (framework,)), device)
    except (ImportError, TypeError, ValueError) as error:
        replies.write(json.dumps({"error": first_line(error), "kind": type(error).__name__}) + "\n")
        return
    replies.write(json.dumps({"name": side.name, "environment": environment()}) + "\n")
    replies.flush()
    serve(side, sys.stdin, replies)


if __name__ == "__main__":
    main(*sys.argv[1:4])
