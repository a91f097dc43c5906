"""The stopwatch: every implementation of both frameworks, and what users write instead, timed against each other.

Its rooms, in the order in which data passes through them:

- `commands`: the bodies of the commands: options, checks of usage, printing, exit statuses.
- `plan`: workloads, competitors, presets and their costs; imports no framework.
- `measure`: a coordinator, one worker process per framework, timers, memory and the environment. `measure.torch` and
  `measure.jax` are imported only in that framework's worker.
- `study`: pure functions over records: statistics, rankings, claims, comparisons; measures nothing.
- `report`: tables, Markdown, JSON, CSV and pictures; derives nothing.
"""
