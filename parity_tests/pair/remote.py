"""A side that lives in another interpreter, for frameworks that cannot be imported together."""

import json
import os
import subprocess
import tempfile
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np

import parity_tests
from parity_tests.pair.exchange import read_groups, write_groups
from parity_tests.pair.side import Arrays, Constants, Ensemble, ParameterSpec, Variant

_SHOWN = {"torch": ("torch",), "jax": ("jax", "flax")}
_ROOT = Path(parity_tests.__file__).resolve().parent.parent


class RemoteError(RuntimeError):
    """The other interpreter refused a call; carries its one sentence."""


class RemoteSide:
    """Speaks to ``pair.worker``; see ``side.Side`` for the methods. Use as a context, which ends the process.

    Args:
        framework: ``torch`` or ``jax``.
        spec: ``package.module:factory``, where the factory builds single parts.
        python: the interpreter, which needs that framework, numpy, ml_dtypes, safetensors, einops and scipy.
        device: ``cpu``, ``cuda`` or ``auto``.

    Raises:
        ValueError: if the interpreter cannot be started, or cannot build the side; one sentence.
    """

    def __init__(self, framework: str, spec: str, python: str, device: str = "cpu") -> None:
        self.framework = framework
        self._folder = tempfile.TemporaryDirectory(prefix="pair-")
        path = [str(_ROOT), str(Path.cwd()), *filter(None, [os.environ.get("PYTHONPATH")])]
        command = [python, "-m", "parity_tests.pair.worker", framework, spec, device]
        try:
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
                env=os.environ | {"PYTHONPATH": os.pathsep.join(path)},
            )
        except OSError as error:
            self._folder.cleanup()
            raise ValueError(
                f"{framework}_python: expected an interpreter, got {python!r} ({error.strerror}); check the path."
            ) from None
        try:
            hello = self._receive()
            self.name, self._runs_in = hello["name"], _told(framework, hello["environment"])
        except (ConnectionError, RemoteError) as error:
            self.close()
            raise ValueError(f"pair: the {framework} side of {spec} cannot be built in {python}: {error}") from None

    def __enter__(self) -> Self:
        """Returns itself."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Ends the process."""
        self.close()

    def close(self) -> None:
        """Ends the process and removes the exchanged files."""
        for stream in (self._process.stdin, self._process.stdout):
            if stream is not None:
                stream.close()
        try:
            self._process.wait(timeout=10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._folder.cleanup()

    def parameters(self, inputs: tuple[np.ndarray, ...]) -> dict[str, ParameterSpec]:
        """See ``side.Side``."""
        line, groups = self._call("parameters", {}, inputs)
        values = groups.get("values", {})
        return {name: ParameterSpec(values[name], name in line["trainable"]) for name in line["order"]}

    def outline(self, parameters: Arrays, inputs: tuple[np.ndarray, ...]) -> dict[str, np.ndarray]:
        """See ``side.Side``."""
        return self._values("outline", parameters, inputs)

    def round_trip(self, parameters: Arrays) -> dict[str, np.ndarray]:
        """See ``side.Side``."""
        return self._values("round_trip", parameters, ())

    def forward(self, parameters: Arrays, inputs: tuple[np.ndarray, ...]) -> dict[str, np.ndarray]:
        """See ``side.Side``."""
        return self._values("forward", parameters, inputs)

    def vjp(self, parameters: Arrays, inputs: tuple[np.ndarray, ...], cotangents: Arrays) -> dict[str, np.ndarray]:
        """See ``side.Side``."""
        return self._values("vjp", parameters, inputs, cotangents)

    def truth(
        self,
        parameters: Arrays,
        inputs: tuple[np.ndarray, ...],
        cotangents: Arrays | None = None,
        variant: str = "",
    ) -> dict[str, np.ndarray]:
        """See ``side.Side``."""
        return self._values("truth", parameters, inputs, cotangents, variant=variant)

    def ensemble(
        self, parameters: Arrays, inputs: tuple[np.ndarray, ...], cotangents: Arrays | None, dtype: str, seed: int
    ) -> Ensemble:
        """See ``side.Side``."""
        line, groups = self._call("ensemble", parameters, inputs, cotangents, dtype=dtype, seed=seed)
        centre, spread, kinks = (groups.get(name, {}) for name in ("centre", "spread", "kinks"))
        return Ensemble(centre, spread, kinks, line["members"], tuple(line["notes"]))

    def constants(
        self,
        parameters: Arrays,
        inputs: tuple[np.ndarray, ...],
        cotangents: Arrays | None,
        buffers: Mapping[str, str],
        computed: bool,
    ) -> Constants:
        """See ``side.Side``."""
        line, groups = self._call("constants", parameters, inputs, cotangents, buffers=dict(buffers), computed=computed)
        return Constants(
            groups.get("spread", {}), tuple(line["stored"]), tuple(line["literals"]), members=line["members"]
        )

    def variants(self) -> tuple[Variant, ...]:
        """See ``side.Side``."""
        return tuple(Variant(*entry) for entry in self._call("variants", {}, ())[0]["variants"])

    def notes(self) -> tuple[str, ...]:
        """See ``side.Side``."""
        return (self._runs_in, *self._call("notes", {}, ())[0]["notes"])

    def is_random(self, parameters: Arrays, inputs: tuple[np.ndarray, ...]) -> bool:
        """See ``side.Side``."""
        return bool(self._call("is_random", parameters, inputs)[0]["is_random"])

    def _values(
        self,
        method: str,
        parameters: Arrays,
        inputs: tuple[np.ndarray, ...],
        cotangents: Arrays | None = None,
        **scalars: Any,
    ) -> dict[str, np.ndarray]:
        return self._call(method, parameters, inputs, cotangents, **scalars)[1].get("values", {})

    def _call(
        self,
        method: str,
        parameters: Arrays,
        inputs: tuple[np.ndarray, ...],
        cotangents: Arrays | None = None,
        **scalars: Any,
    ) -> tuple[dict[str, Any], dict[str, dict[str, np.ndarray]]]:
        folder = Path(self._folder.name)
        numbered = {str(position): array for position, array in enumerate(inputs)}
        groups = {"parameters": parameters, "inputs": numbered, "cotangents": cotangents or {}}
        write_groups(folder / "request.safetensors", groups)
        request = {"method": method, "folder": str(folder), "cotangents": cotangents is not None, **scalars}
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps(request) + "\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            raise self._ended() from None
        line = self._receive()
        return line, read_groups(folder / "reply.safetensors")

    def _ended(self) -> ConnectionError:
        # Not a RemoteError: a refusal skips a dtype, a dead interpreter must end the check.
        return ConnectionError(
            f"the {self.framework} interpreter ended with status {self._process.wait()}; what it wrote to standard "
            "error says why"
        )

    def _receive(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        text = self._process.stdout.readline()
        if not text:
            raise self._ended()
        line = json.loads(text)
        if "error" in line:
            raise RemoteError(f"{line['kind']}: {line['error']}")
        return line


def _told(framework: str, environment: dict[str, Any]) -> str:
    versions = [
        f"{name} {environment['packages'][name]}" for name in _SHOWN[framework] if environment["packages"][name]
    ]
    side = {"torch": "torch", "jax": "flax"}[framework]
    return f"the {side} side ran in an interpreter of its own: Python {environment['python']}, {', '.join(versions)}"
