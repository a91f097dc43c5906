"""Sweeps of invented records, as large as wanted, in files as a run leaves them."""

import itertools

import numpy as np

from bench.store import Store

FINGERPRINT = {
    "git": {"commit": "0123456789abcdef", "dirty": False},
    "cpu_model": "a processor",
    "affinity": [0, 1],
    "system": "a system",
    "device": "cpu",
    "division": "matched",
    "gpus": None,
    "frameworks": {
        "torch": {"python": "3.11", "versions": {"torch": "2.13"}, "default_switches": {}},
        "jax": {"python": "3.11", "versions": {"jax": "0.10"}, "default_switches": {}},
    },
}
NAMES = (
    ("torch", "matmul", "eager"),
    ("torch", "loop", "eager"),
    ("jax", "matmul", "jit"),
    *(("torch", f"form-{k}", "eager") for k in range(8)),
    *(("jax", f"form-{k}", "jit") for k in range(9)),
)
GRID = [2**k for k in range(10)]


def sizes(count):
    """Distinct sizes on a log grid: batch, partitions, in, out."""
    grid = itertools.product(GRID, GRID, GRID, GRID)
    return [(4 * b, n, 2 * i, o) for b, n, i, o in itertools.islice(grid, count)]


def cell_records(make_record, number, size, *, rounds=10, competitors=20, noise=0.01, warm_up=1):
    """The records of one cell: `form-0` of torch is 20% faster than the rest, which are alike."""
    rng = np.random.default_rng(number)
    names = NAMES[:competitors]
    batch, n, i, o = size
    shared = {
        "cell": f"{number:016x}",
        "cell_size": len(names) + 1,
        "workload": f"sweep-b{batch}-n{n}-i{i}-o{o}",
        "batch": batch,
        "num_partitions": n,
        "in_features": i,
        "out_features": o,
        "environment_id": "e0",
        "calls_per_block": 10,
        "warm_up_block_latency_s": tuple((0.03 + 1e-6 * rng.random(warm_up)).tolist()),
    }
    records = []
    for k, (framework, implementation, mode) in enumerate((*names, names[0])):
        factor = 0.8 if implementation == "form-0" and framework == "torch" else 1.0
        blocks = 0.02 * factor * np.exp(noise * rng.standard_normal(2 * rounds))
        records.append(
            make_record(
                key=f"{number:08x}{k:08x}",
                framework=framework,
                implementation=implementation,
                mode=mode,
                control=k == len(names),
                baseline=k in (0, len(names)),
                compile_s=1.0 if mode == "jit" else None,
                block_latency_s=tuple(blocks.tolist()),
                latency_s=float(np.median(blocks)) / 10,
                **shared,
            )
        )
    return records


def write_sweep(directory, make_record, count, **options):
    """Stores so many cells as a run would."""
    store = Store(directory, resume=False)
    store.add_environment("e0", FINGERPRINT)
    for number, size in enumerate(sizes(count)):
        store.append(cell_records(make_record, number, size, **options))
    return store
