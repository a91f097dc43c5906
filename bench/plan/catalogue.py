"""The catalogue: the source article's settings and the shapes that real projects run, each with the place it is from.

Sizes that a project's configuration leaves open (tokens in flight, number of features) are chosen here, and the
source says so.
"""

from collections.abc import Iterator
from dataclasses import replace

from bench.plan.shapes import Workload

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
    """Long-horizon forecasting: one map a channel, from the last 336 steps to the next ones."""
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
    """One map a feature of a table, and products of pairs of features."""
    for n, i, o, batch in ((8, 149, 264, 256), (54, 208, 118, 1024), (93, 147, 61, 512), (200, 77, 45, 1024)):
        source = f"{_RTDL}; {n} features, sizes tuned by the project, batch {batch}"
        yield Workload(f"rtdl-{n}-{i}-{o}", batch, n, i, o, source)
    yield Workload("periodic-96-24", 256, 100, 96, 24, f"{_RTDL}, after periodic activations; 100 features, batch 256")
    yield Workload("fibinet", 4096, 325, 4, 4, "DeepCTR-Torch, FiBiNET bilinear interaction; 26 fields, 325 pairs")
    saint = "somepago/saint, a small perceptron a feature, width 32, batch 256; 32 features chosen here"
    yield Workload("saint-1-100", 256, 32, 1, 100, f"{saint}; first layer of the embedding")
    yield Workload("saint-100-32", 256, 32, 100, 32, f"{saint}; second layer of the embedding")
    yield Workload(
        "saint-32-160",
        256,
        32,
        32,
        160,
        f"{saint}; first layer of the heads, whose second layer has unequal sizes and is no workload of this map",
    )
    yield Workload("tabm", 256, 32, 512, 512, "TabM, packed ensemble of 32 members, width 512, batch 256")


def _ensembles() -> Iterator[Workload]:
    """Reinforcement learning: several critics or dynamics models at once."""
    yield Workload("redq", 256, 10, 256, 256, f"REDQ, ten critics of width 256, batch 256; {_SHARED}")
    sac = "CORL, SAC-N with 500 critics of width 256 (VectorizedLinear), batch 256"
    yield Workload("sac-n-14-256", 256, 500, 14, 256, f"{sac}; first layer; {_SHARED}")
    yield Workload("sac-n-256-256", 256, 500, 256, 256, f"{sac}; inner layers")
    yield Workload("sac-n-256-1", 256, 500, 256, 1, f"{sac}; last layer")
    yield Workload("pets", 256, 7, 200, 200, "mbrl-lib, PETS and MBPO dynamics (EnsembleLinearLayer), batch 256")


def _language() -> Iterator[Workload]:
    """Sequence models; rows are batch times tokens."""
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


def _layouts(known: dict[str, Workload]) -> Iterator[Workload]:
    """The same sizes where the project keeps x in another order."""
    for name, layout, why in (
        ("electricity-336-96", "time_series", "x is the project's own [B, L, C]"),
        ("sac-n-256-256", "partition_major", "x is the project's own [n, B, in]"),
        ("pets", "partition_major", "x is the project's own [n, B, in]"),
    ):
        found = known[name]
        renamed = f"{name}-{layout.replace('_', '-')}"
        yield replace(found, name=renamed, layout=layout, source=f"{found.source}; {why}")


def catalogue() -> tuple[Workload, ...]:
    """Every workload that has a source, the article's settings first."""
    found = (*_article(), *_time_series(), *_tabular(), *_ensembles(), *_language())
    return (*found, *_layouts({workload.name: workload for workload in found}))
