"""The plan of a run: workloads, competitors, presets and their costs. Imports no framework."""
