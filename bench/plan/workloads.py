"""The shapes that are timed: the catalogue with the source of each, and the points of sweeps, whose names tell sizes.

Sizes that a project's configuration leaves open (tokens in flight, number of features) are chosen here, and the source
says so.
"""

import operator
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from difflib import get_close_matches
from itertools import product
from types import MappingProxyType

from parity_tests.judge.inputs import Case

# Layout to the two axes of (b, n, features) that change places in memory; None where the axes are in order.
#   contiguous       (b, n, i): the partition axis before the features; (b, sum of i) where the sizes are unequal
#   partition_major  (n, b, i): what a batched product takes
#   time_series      (b, i, n): (batch, time, channel), whose contraction axis is strided
#   flat             (b, n*i): the features of one partition after those of another, in x and y
#   shared           (b, i): one input for all partitions; y is (b, n, o)
AXES: Mapping[str, tuple[int, int] | None] = MappingProxyType(
    {"contiguous": None, "partition_major": (0, 1), "time_series": (1, 2), "flat": None, "shared": None}
)
LAYOUTS: tuple[str, ...] = tuple(AXES)
FLAT, SHARED = "flat", "shared"
# One size for all partitions, or one for each.
Size = int | tuple[int, ...]
# Sizes that a heading names one by one.
_NAMED = 4


def size_text(size: Size) -> str:
    """Write one size for all partitions, or those of each: `32`, `(1, 4, 9)`, `1..42 (102 in all)`."""
    if isinstance(size, int):
        return str(size)
    if len(size) <= _NAMED:
        return f"({', '.join(map(str, size))})"
    return f"{min(size)}..{max(size)} ({sum(size)} in all)"


def _total(num_partitions: int, size: Size) -> int:
    # Records of any numbers are read: no list of n of them is made.
    return num_partitions * size if isinstance(size, int) else sum(size)


def weights_of(num_partitions: int, in_features: Size, out_features: Size) -> int:
    """Return the numbers in the matrices of all partitions."""
    if isinstance(in_features, int):
        return in_features * _total(num_partitions, out_features)
    if isinstance(out_features, int):
        return out_features * sum(in_features)
    return sum(map(operator.mul, in_features, out_features))


@dataclass(frozen=True)
class Workload:
    """One shape of `y[b, n, o] = sum_i x[b, n, i] * W[n, i, o] + b[n, o]`.

    Attributes:
        name: short and unique.
        batch: rows that one partition sees, `b`.
        num_partitions: `n`.
        in_features: `i`, per partition; one for each where they are unequal.
        out_features: `o`, likewise.
        source: where the sizes come from.
        layout: how x lies in memory: `contiguous` (`[B, n, in]`), `partition_major` (`[n, B, in]`),
            `time_series` (`[B, L, C]` with L = in and C = n, so that the contraction axis is strided), `flat`
            (`[B, n*in]`) or `shared` (`[B, in]`, one input for all partitions). Unequal sizes have the first.

    Raises:
        ValueError: for a size below 1, another number of sizes, or a layout that is unknown or not for these sizes.
    """

    name: str
    batch: int
    num_partitions: int
    in_features: Size
    out_features: Size
    source: str
    layout: str = "contiguous"

    def __post_init__(self) -> None:
        """Refuse what cannot be measured."""
        for name in ("batch", "num_partitions", "in_features", "out_features"):
            value = getattr(self, name)
            if not isinstance(value, int):
                # JSON has lists.
                object.__setattr__(self, name, tuple(value))
                if len(value) != self.num_partitions:
                    raise ValueError(
                        f"{name}: expected one size, or n = {self.num_partitions} of them, got {len(value)}; give each "
                        f"partition its size."
                    )
            if (least := value if isinstance(value, int) else min(value)) < 1:
                raise ValueError(f"{name}: expected at least 1, got {least}; give a positive size.")
        if self.layout not in LAYOUTS:
            raise ValueError(f"layout: expected one of {', '.join(LAYOUTS)}, got {self.layout!r}; choose one of these.")
        if self.unequal and self.layout != LAYOUTS[0]:
            raise ValueError(f"layout: expected {LAYOUTS[0]} for unequal sizes, got {self.layout}; choose that one.")

    @property
    def unequal(self) -> bool:
        """True if sizes are given as sequences."""
        return not (isinstance(self.in_features, int) and isinstance(self.out_features, int))

    @property
    def case_of_sizes(self) -> Case:
        """The correctness case with the same sizes, each partition with an input of its own."""
        return Case(self.name, (self.batch,), self.num_partitions, self.in_features, self.out_features)

    @property
    def inputs(self) -> int:
        """Numbers in one row of x."""
        return self._total(self.in_features) // (self.num_partitions if self.layout == SHARED else 1)

    @property
    def outputs(self) -> int:
        """Numbers in one row of y."""
        return self._total(self.out_features)

    @property
    def weights(self) -> int:
        """Numbers in W."""
        return weights_of(self.num_partitions, self.in_features, self.out_features)

    def _total(self, size: Size) -> int:
        return _total(self.num_partitions, size)

    @property
    def shape(self) -> str:
        """The sizes as text, for example `B=128, n=32, 32->32`."""
        return f"B={self.batch}, n={self.num_partitions}, {size_text(self.in_features)}->{size_text(self.out_features)}"

    @property
    def elements(self) -> int:
        """Numbers in x, W, b and y together."""
        return self.batch * (self.inputs + self.outputs) + self.weights + self.outputs

    def case(self) -> Case:
        """Return the correctness case with the same sizes.

        Partitions that share one input are one map from it to all of their outputs.
        """
        return self.case_of_sizes if self.layout != SHARED else self.dense_case()

    def dense_case(self) -> Case:
        """Return the case of the article's yardstick: one dense map over all features, which is another function."""
        return Case(f"{self.name}/dense", (self.batch,), 1, self.inputs, self.outputs)


SWEEP_SOURCE = "a sweep around the source article's base (B=128, n=32, 32->32)"
_BASE = {"batch": 128, "num_partitions": 32, "in_features": 32, "out_features": 32}
# One spelling for one shape: no leading zeros.
_NAME = re.compile(r"sweep-b([1-9]\d*)-n([1-9]\d*)-i([1-9]\d*)-o([1-9]\d*)")


def sweep_workload(batch: int, num_partitions: int, in_features: int, out_features: int) -> Workload:
    """Return the workload of one point; its name tells its sizes, for example `sweep-b128-n32-i32-o32`."""
    name = f"sweep-b{batch}-n{num_partitions}-i{in_features}-o{out_features}"
    return Workload(name, batch, num_partitions, in_features, out_features, SWEEP_SOURCE)


def parse_sweep(name: str) -> Workload | None:
    """Return the workload that a sweep's name means, or None if it is no such name."""
    found = _NAME.fullmatch(name)
    return sweep_workload(*map(int, found.groups())) if found else None


def log_grid(low: int, high: int, factor: int = 2) -> tuple[int, ...]:
    """Return sizes from `low` to at most `high`, each `factor` times the one before.

    Raises:
        ValueError: if the grid has no end or no beginning.
    """
    if low < 1 or high < low or factor < 2:
        raise ValueError(f"grid: expected 1 <= low <= high and factor >= 2, got {low}, {high}, {factor}; change these.")
    sizes = [low]
    while sizes[-1] * factor <= high:
        sizes.append(sizes[-1] * factor)
    return tuple(sizes)


def sweep(
    *,
    batch: Sequence[int] = (),
    num_partitions: Sequence[int] = (),
    in_features: Sequence[int] = (),
    out_features: Sequence[int] = (),
) -> tuple[Workload, ...]:
    """Return every combination of the given sizes; an axis that is not given stays at the article's base."""
    axes = (batch, num_partitions, in_features, out_features)
    values = [tuple(axis) or (base,) for axis, base in zip(axes, _BASE.values(), strict=True)]
    return tuple(dict.fromkeys(sweep_workload(*sizes) for sizes in product(*values)))


def _names(workloads: Iterable[Workload]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(workload.name for workload in workloads))


def preset_sweep() -> tuple[str, ...]:
    """Return the names of the ready-made sweep: each axis alone, then a coarse grid of batch, count and size."""
    lines = (
        *sweep(batch=(*log_grid(1, 4096, 4), 128)),
        *sweep(num_partitions=log_grid(1, 512, 2)),
        *sweep(in_features=log_grid(2, 1024, 2)),
        *sweep(out_features=log_grid(2, 1024, 2)),
    )
    coarse = [
        sweep_workload(batch, n, size, size) for batch, n, size in product((1, 128, 2048), (2, 32, 256), (8, 32, 128))
    ]
    return _names((*lines, *coarse))


_ARTICLE = "the source article (sizes per partition; the article states totals over partitions)"
_LTSF = "cure-lab/LTSF-Linear, NLinear and DLinear with individual=True (a ModuleList loop)"
_PATCHTST = "PatchTST, Flatten_Head with individual=True (one head a channel over 42 patches of 128)"
_RTDL = "rtdl-num-embeddings, one linear map a feature"
_RECURRENTGEMMA = "google-deepmind/recurrentgemma, block-diagonal gates of the RG-LRU"
_DEEPSEEK_V4 = "DeepSeek-V4 in transformers and MaxText, GroupedLinear of the output projection; 512 tokens chosen here"
_DEEPSEEK_V3 = "DeepSeek-V3 inference/model.py, matrices of latent attention absorbed; 128 decoded tokens chosen here"
_SHARED = "there all partitions share one input, here each has its own"
_HORIZONS = (96, 192, 336, 720)


def _article() -> Iterator[Workload]:
    yield Workload("article-base", 128, 32, 32, 32, f"{_ARTICLE}: claims 1 and 2")
    yield Workload("article-batch-1", 1, 32, 32, 32, f"{_ARTICLE}: the smallest batch of claim 1")
    yield Workload("article-batch-2048", 2048, 32, 32, 32, f"{_ARTICLE}: claim 3")
    yield Workload("article-n8", 128, 8, 128, 128, f"{_ARTICLE}: claim 4")
    yield Workload("article-in8096", 128, 32, 253, 32, f"{_ARTICLE}: claim 5")
    yield Workload("article-in256", 128, 32, 8, 32, f"{_ARTICLE}: claim 6")
    yield Workload("article-out8096", 128, 32, 32, 253, f"{_ARTICLE}: claim 7")
    yield Workload("article-out256", 128, 32, 32, 8, f"{_ARTICLE}: claim 8")


def _time_series() -> Iterator[Workload]:
    """Yield long-horizon forecasting: one map a channel, from the last 336 steps to the next ones."""
    for data, channels, batch in (
        ("electricity", 321, 16),
        ("traffic", 862, 16),
        ("weather", 21, 16),
        ("exchange", 8, 8),
        ("ett", 7, 32),
    ):
        for horizon in _HORIZONS:
            source = f"{_LTSF}, batch {batch}; {data.capitalize()}, horizon {horizon}"
            yield Workload(f"{data}-336-{horizon}", batch, channels, 336, horizon, source)
    source = f"{_LTSF}, batch 32; Electricity, horizon 96"
    yield Workload("electricity-336-96-batch-32", 32, 321, 336, 96, source)
    for data, channels, batch in (("electricity", 321, 32), ("traffic", 862, 24)):
        for horizon in _HORIZONS:
            source = f"{_PATCHTST}; {data.capitalize()}, horizon {horizon}, batch {batch}"
            yield Workload(f"patchtst-{data}-{horizon}", batch, channels, 5376, horizon, source)


def _tabular() -> Iterator[Workload]:
    """Yield one map a feature of a table, and products of pairs of features."""
    for n, i, o, batch in ((8, 149, 264, 256), (54, 208, 118, 1024), (93, 147, 61, 512), (200, 77, 45, 1024)):
        source = f"{_RTDL}; {n} features, sizes tuned by the project, batch {batch}"
        yield Workload(f"rtdl-{n}-{i}-{o}", batch, n, i, o, source)
    yield Workload("periodic-96-24", 256, 100, 96, 24, f"{_RTDL}, after periodic activations; 100 features, batch 256")
    yield Workload("fibinet", 4096, 325, 4, 4, "DeepCTR-Torch, FiBiNET bilinear interaction; 26 fields, 325 pairs")
    saint = "somepago/saint, a small perceptron a feature, width 32, batch 256; 32 features chosen here"
    yield Workload("saint-1-100", 256, 32, 1, 100, f"{saint}; first layer of the embedding")
    yield Workload("saint-100-32", 256, 32, 100, 32, f"{saint}; second layer of the embedding")
    yield Workload("saint-32-160", 256, 32, 32, 160, f"{saint}; first layer of the heads")
    yield Workload("tabm", 256, 32, 512, 512, "TabM, packed ensemble of 32 members, width 512, batch 256")


def _ensembles() -> Iterator[Workload]:
    """Yield reinforcement learning: several critics or dynamics models at once."""
    yield Workload("redq", 256, 10, 256, 256, f"REDQ, ten critics of width 256, batch 256; {_SHARED}")
    sac = "CORL, SAC-N with 500 critics of width 256 (VectorizedLinear), batch 256"
    yield Workload("sac-n-14-256", 256, 500, 14, 256, f"{sac}; first layer; {_SHARED}")
    yield Workload("sac-n-256-256", 256, 500, 256, 256, f"{sac}; inner layers")
    yield Workload("sac-n-256-1", 256, 500, 256, 1, f"{sac}; last layer")
    yield Workload("pets", 256, 7, 200, 200, "mbrl-lib, PETS and MBPO dynamics (EnsembleLinearLayer), batch 256")


def _language() -> Iterator[Workload]:
    """Yield sequence models; rows are batch times tokens."""
    for size, n in (("2b", 10), ("9b", 16)):
        for name, tokens in (("", 2048), ("-8192", 8192)):
            source = f"{_RECURRENTGEMMA}, {size.upper()}; {tokens} tokens"
            yield Workload(f"recurrentgemma-{size}-gates{name}", tokens, n, 256, 256, source)
    for tokens in (1024, 256):
        source = f"{_RECURRENTGEMMA}, 2B; {tokens} tokens"
        yield Workload(f"recurrentgemma-2b-gates-{tokens}", tokens, 10, 256, 256, source)
    source = f"audiocraft, MusicGen output heads of four codebooks; 512 rows chosen here; {_SHARED}"
    yield Workload("musicgen-heads", 512, 4, 2048, 2048, source)
    yield Workload("deepseek-v4-flash", 512, 8, 4096, 1024, f"{_DEEPSEEK_V4}; Flash, 8 groups")
    yield Workload("deepseek-v4-pro", 512, 16, 4096, 1024, f"{_DEEPSEEK_V4}; Pro, 16 groups")
    yield Workload("deepseek-v3-absorb-up", 128, 128, 128, 512, f"{_DEEPSEEK_V3}; queries into the latent space")
    yield Workload("deepseek-v3-absorb-down", 128, 128, 512, 128, f"{_DEEPSEEK_V3}; out of the latent space")
    xlstm = "xLSTM; 8 sequences of 256 tokens, the 8 chosen here"
    yield Workload("xlstm-qkv", 2048, 64, 4, 4, f"{xlstm}; headwise q, k and v projections")
    yield Workload("xlstm-slstm-gates", 2048, 4, 32, 32, f"{xlstm}; headwise gates of the sLSTM")


# UCI Adult: workclass, education, marital status, occupation, relationship, race, sex and native country, where an
# unknown value is a category of its own.
_ADULT = (9, 16, 7, 15, 6, 5, 2, 42)
# UCI Census-Income (KDD): the distinct values of its nominal attributes in the order of census-income.names.
_CENSUS = (9, 52, 47, 17, 3, 7, 24, 15, 5, 10, 2, 3, 6, 8, 6, 6, 51, 38, 8, 10, 9, 10, 3, 4, 5)
_CENSUS += (43, 43, 43, 5, 3, 3, 3, 2)


def _unequal() -> Iterator[Workload]:
    """Yield maps whose partitions differ in size."""
    saint = "somepago/saint, width 32, batch 256"
    # The token that stands for the whole row has one category.
    cards = (1, *_ADULT)
    source = f"{saint}; second layer of the heads of categorical features, 5 widths to the categories of UCI Adult"
    yield Workload("saint-160-card", 256, len(cards), 160, cards, source)
    source = "one linear map of each one-hot feature to width 32, batch 1024 chosen here; categories of UCI Adult"
    yield Workload("adult-card-32", 1024, len(_ADULT), _ADULT, 32, source)
    source = (
        "one linear map of each one-hot feature to width 32, batch 1024 chosen here; categories of UCI Census-Income"
    )
    yield Workload("census-card-32", 1024, len(_CENSUS), _CENSUS, 32, source)
    source = "NVIDIA/cuEquivariance's linear layer 32x0e + 32x1o -> 16x0e + 48x1o, with 4 times as many channels"
    source += ", each component a segment; 2048 rows, and weights for each component, chosen here"
    yield Workload("cuequivariance-segments", 2048, 4, 128, (64, 192, 192, 192), source)


def _layouts(known: dict[str, Workload]) -> Iterator[Workload]:
    """Yield the same sizes where the project keeps x in another order."""
    for name, layout, why in (
        ("electricity-336-96", "time_series", "x is the project's own [B, L, C]"),
        ("sac-n-256-256", "partition_major", "x is the project's own [n, B, in]"),
        ("pets", "partition_major", "x is the project's own [n, B, in]"),
        ("recurrentgemma-2b-gates-1024", FLAT, "x and y are the project's own flat [B, n*features]"),
        ("xlstm-qkv", FLAT, "x and y are the project's own flat [B, n*features]"),
        ("musicgen-heads", SHARED, "one input for all heads, as in the project"),
        ("redq", SHARED, "one input for all critics, as in the project"),
        ("sac-n-14-256", SHARED, "one input for all critics, as in the project"),
    ):
        found = known[name]
        renamed = f"{name}-{layout.replace('_', '-')}"
        source = found.source.removesuffix(f"; {_SHARED}")
        yield replace(found, name=renamed, layout=layout, source=f"{source}; {why}")


def catalogue() -> tuple[Workload, ...]:
    """Return every workload that has a source, the article's settings first."""
    found = (*_article(), *_time_series(), *_tabular(), *_ensembles(), *_language(), *_unequal())
    return (*found, *_layouts({workload.name: workload for workload in found}))


__all__ = ["LAYOUTS", "WORKLOADS", "UnknownWorkloadError", "Workload", "sweep", "workload"]

WORKLOADS: Mapping[str, Workload] = MappingProxyType({found.name: found for found in catalogue()})


class UnknownWorkloadError(ValueError):
    """A name that is neither in the catalogue nor a point of a sweep."""


def workload(name: str) -> Workload:
    """Return the workload that a name of the catalogue, or `sweep-b<B>-n<n>-i<in>-o<out>`, means.

    Raises:
        UnknownWorkloadError: with the names that look alike.
    """
    found = WORKLOADS.get(name) or parse_sweep(name)
    if found is None:
        close = get_close_matches(name, WORKLOADS, n=3, cutoff=0.5)
        alike = f"perhaps {' or '.join(close)}; " if close else ""
        raise UnknownWorkloadError(
            f"expected a name of the catalogue or sweep-b<B>-n<n>-i<in>-o<out>, got {name!r}; {alike}see `bench list`."
        )
    return found
