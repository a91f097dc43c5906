"""A side that lives in another interpreter, for frameworks that cannot be imported together."""

import re
from collections.abc import Mapping
from types import TracebackType
from typing import Any, Self

import numpy as np

from parity_tests.interpreters.interpreter import DEFAULT_TIMEOUT_S, Interpreter
from parity_tests.interpreters.process import ProcessError
from parity_tests.pair.exchange import packed, unpacked
from parity_tests.pair.side import Arrays, Constants, Ensemble, ParameterSpec, Variant

_LACKS = re.compile(r"No module named '(torch|jax|jaxlib|flax|numpy|ml_dtypes|safetensors|einops|scipy)\b")
_SHOWN = {"torch": ("torch",), "jax": ("jax", "flax")}


class RemoteError(RuntimeError):
    """The other interpreter refused a call; carries its one sentence."""


class RemoteSide:
    """Speaks to `pair.worker`; see `side.Side` for the methods. Use as a context, which ends the process.

    Args:
        framework: `torch` or `jax`.
        spec: `package.module:factory`, where the factory builds single parts.
        python: the interpreter, which needs that framework, numpy, ml_dtypes, safetensors, einops and scipy.
        device: `cpu`, `cuda` or `auto`.
        timeout_s: seconds that one answer may take.

    Raises:
        ValueError: if the interpreter cannot be started, or cannot build the side; one sentence.
    """

    def __init__(
        self,
        framework: str,
        spec: str,
        python: str,
        device: str = "cpu",
        timeout_s: float = DEFAULT_TIMEOUT_S,
    ) -> None:
        self.framework = framework
        try:
            self._process = Interpreter(
                "parity_tests.pair.worker",
                [framework, spec, device],
                who=f"the {framework} interpreter",
                python=python,
                timeout_s=timeout_s,
            )
        except ProcessError as error:
            raise ValueError(
                f"{framework}_python: expected an interpreter, got {python!r}: {error}; check the path."
            ) from None
        try:
            hello = self._receive()
            self.name, self._runs_in = hello["name"], _told(framework, hello["environment"])
        except (ProcessError, RemoteError) as error:
            self.close()
            hint = f"; install it there: {python} -m pip install 'partitioned-linear[{framework},pair]'"
            hint = hint if _LACKS.search(str(error)) else ""
            raise ValueError(
                f"pair: the {framework} side of {spec} cannot be built in {python}: {error}{hint}"
            ) from None
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> Self:
        """Returns itself."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Ends the process."""
        self.close()

    def close(self) -> None:
        """Ends the process."""
        self._process.end()

    def parameters(self, inputs: tuple[np.ndarray, ...]) -> dict[str, ParameterSpec]:
        """See `side.Side`."""
        line, groups = self._call("parameters", {}, inputs)
        values = groups.get("values", {})
        return {n: ParameterSpec(values[n], n in line["trainable"], n in line["frozen"]) for n in line["order"]}

    def outline(self, parameters: Arrays, inputs: tuple[np.ndarray, ...]) -> dict[str, np.ndarray]:
        """See `side.Side`."""
        return self._values("outline", parameters, inputs)

    def round_trip(self, parameters: Arrays) -> dict[str, np.ndarray]:
        """See `side.Side`."""
        return self._values("round_trip", parameters, ())

    def forward(self, parameters: Arrays, inputs: tuple[np.ndarray, ...]) -> dict[str, np.ndarray]:
        """See `side.Side`."""
        return self._values("forward", parameters, inputs)

    def vjp(self, parameters: Arrays, inputs: tuple[np.ndarray, ...], cotangents: Arrays) -> dict[str, np.ndarray]:
        """See `side.Side`."""
        return self._values("vjp", parameters, inputs, cotangents)

    def truth(
        self,
        parameters: Arrays,
        inputs: tuple[np.ndarray, ...],
        cotangents: Arrays | None = None,
        variant: str = "",
    ) -> dict[str, np.ndarray]:
        """See `side.Side`."""
        return self._values("truth", parameters, inputs, cotangents, variant=variant)

    def ensemble(
        self, parameters: Arrays, inputs: tuple[np.ndarray, ...], cotangents: Arrays | None, dtype: str, seed: int
    ) -> Ensemble:
        """See `side.Side`."""
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
        """See `side.Side`."""
        line, groups = self._call("constants", parameters, inputs, cotangents, buffers=dict(buffers), computed=computed)
        return Constants(
            groups.get("spread", {}), tuple(line["stored"]), tuple(line["literals"]), members=line["members"]
        )

    def variants(self) -> tuple[Variant, ...]:
        """See `side.Side`."""
        return tuple(Variant(*entry) for entry in self._call("variants", {}, ())[0]["variants"])

    def notes(self) -> tuple[str, ...]:
        """See `side.Side`."""
        return (self._runs_in, *self._call("notes", {}, ())[0]["notes"])

    def is_random(self, parameters: Arrays, inputs: tuple[np.ndarray, ...]) -> bool:
        """See `side.Side`."""
        return bool(self._call("is_random", parameters, inputs)[0]["is_random"])

    def unexercised(self, parameters: Arrays, inputs: tuple[np.ndarray, ...]) -> tuple[str, ...]:
        """See `side.Side`."""
        return tuple(self._call("unexercised", parameters, inputs)[0]["sentences"])

    def wider_operations(self, parameters: Arrays, inputs: tuple[np.ndarray, ...], dtype: str) -> tuple[str, ...]:
        """See `side.Side`."""
        return tuple(self._call("wider_operations", parameters, inputs, dtype=dtype)[0]["sentences"])

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
        numbered = {str(position): array for position, array in enumerate(inputs)}
        groups = {"parameters": parameters, "inputs": numbered, "cotangents": cotangents or {}}
        self._process.send({"method": method, "cotangents": cotangents is not None, **scalars}, packed(groups))
        line = self._receive()
        return line, unpacked(line["payload"])

    def _receive(self) -> dict[str, Any]:
        # A ProcessError is no RemoteError: a refusal skips a dtype, a dead interpreter must end the check.
        line = self._process.receive()
        if "error" in line:
            raise RemoteError(f"{line['kind']}: {line['error']}")
        return line


def _told(framework: str, environment: dict[str, Any]) -> str:
    versions = [
        f"{name} {environment['packages'][name]}" for name in _SHOWN[framework] if environment["packages"][name]
    ]
    side = {"torch": "torch", "jax": "flax"}[framework]
    return f"the {side} side ran in an interpreter of its own: Python {environment['python']}, {', '.join(versions)}"
