"""Framework-neutral library of the parity judge: no module here imports a framework; only ``subjects`` do, on use."""
