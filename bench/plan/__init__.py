"""What is to be measured: workloads, competitors, presets and their costs. Imports no framework."""
