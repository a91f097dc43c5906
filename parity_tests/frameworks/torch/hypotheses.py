"""What the torch side can try on itself when a pair disagrees: another epsilon, the other gelu."""

from collections.abc import Callable

from parity_tests.pair.side import Variant

_EPSILON_POSITION = {
    "native_layer_norm": 4,
    "_fused_rms_norm": 3,
    "native_group_norm": 7,
    "native_batch_norm": 7,
    "_native_batch_norm_legit": 7,
    "_native_batch_norm_legit_no_training": 6,
}
_EPSILONS = (1e-3, 1e-5, 1e-6, 1e-7, 1e-8, 1e-12)
_LARGEST_EPSILON = 1e-2  # a constant that is added and is at most this can be meant as an epsilon
_OTHER_GELU = {"none": "tanh", "tanh": "none"}
_GELU_NAME = {"none": "the exact gelu (erf)", "tanh": "the tanh approximation of gelu"}

Rewrite = Callable[[str, tuple, dict], tuple[tuple, dict]]


class Recorder:
    """Notes the epsilons and gelus that a run used, and rewrites them for a variant."""

    def __init__(self) -> None:
        """Starts empty."""
        self._epsilons: set[float] = set()
        self._gelus: set[str] = set()

    def rewrite(self, variant: str) -> Rewrite:
        """A rewriting of operations: the one that `variant` names, or one that only records."""
        kind, _, value = variant.partition("=")

        def apply(name: str, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
            position = _EPSILON_POSITION.get(name)
            if position is None and name == "add" and len(args) == 2 and _may_be_epsilon(args[1]):
                position = 1
            if position is not None:
                if not variant:
                    self._epsilons.add(args[position])
                if kind == "epsilon":
                    args = (*args[:position], float(value), *args[position + 1 :])
            if name == "gelu":
                approximate = kwargs.get("approximate", "none")
                if not variant:
                    self._gelus.add(approximate)
                if kind == "gelu":
                    kwargs = kwargs | {"approximate": _OTHER_GELU[approximate]}
            return args, kwargs

        return apply

    def variants(self) -> tuple[Variant, ...]:
        """Everything that can be tried after a recorded run."""
        used = ", ".join(f"{value:g}" for value in sorted(self._epsilons))
        found = [
            Variant(f"epsilon={value!r}", f"epsilon: the torch side uses {used}, the flax side behaves like {value:g}")
            for value in _EPSILONS
            if self._epsilons and value not in self._epsilons
        ]
        if len(self._gelus) == 1:
            (approximate,) = self._gelus
            found.append(
                Variant(
                    "gelu=other",
                    f"gelu: the torch side uses {_GELU_NAME[approximate]}, the flax side behaves like "
                    f"{_GELU_NAME[_OTHER_GELU[approximate]]}",
                )
            )
        return tuple(found)


def _may_be_epsilon(value: object) -> bool:
    return isinstance(value, float) and 0 < value <= _LARGEST_EPSILON
