"""Which cells a resumed run on a cluster need not hand out again, before any worker has said what it is."""

from bench.measure.recording import cell_hash
from bench.measure.request import Request
from bench.plan.cells import Cell
from bench.plan.competitors import Competitor
from bench.plan.selection import plan_cells
from bench.record_files import RECORDS, scan
from bench.records import Record
from bench.store import Store


def identity(source: Cell | Record) -> tuple[object, ...]:
    """What makes two cells the same whatever the device: it decides what a resumed run need not measure again."""
    name = source.workload.name if isinstance(source, Cell) else source.workload
    return name, source.direction, source.precision, source.division, source.cache, source.optimizer


def recorded_cells(store: Store, request: Request) -> set[tuple[object, ...]]:
    """Cells that are there in every process replicate, with this effort and every competitor that is asked for by name.

    The hash of a cell depends on its environment and competitors, which only a worker knows. Both are taken from its
    records, so that what is compared is the rest: the conditions, the effort and the seed.
    """
    if not store.environment_ids:
        return set()
    groups: dict[tuple[str, str], list[Record]] = {}
    for line in scan(store.directory / RECORDS):
        record = line.record().without_samples()
        if request.device in ("auto", record.device):
            groups.setdefault((record.environment_id, record.cell), []).append(record)
    planned = {
        device: {identity(cell): cell for cell in plan_cells(request.preset, device)}
        for device in {group[0].device for group in groups.values()}
    }
    found = set()
    for (environment, key), group in groups.items():
        who, replicates = identity(group[0]), {record.process_replicate for record in group}
        cell = planned[group[0].device].get(who)
        one = min(replicates)
        competitors = [
            Competitor(record.framework, record.implementation, record.mode, record.kind)
            for record in group
            if record.process_replicate == one and not record.control
        ]
        if (
            cell is not None
            and replicates >= set(range(request.preset.replicates))
            and set(request.implementations) <= {competitor.implementation for competitor in competitors}
            and key == cell_hash(cell, competitors, request.preset, seed=request.seed, environment_id=environment)
        ):
            found.add(who)
    return found
