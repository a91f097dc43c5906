"""Where cells are measured: in this process, or handed to workers that each own one device.

An engine is a function of a request, a store, notes and a progress callback; every one measures with `run_sweep`.
"""

from bench.engines.base import ENGINES, EngineError

__all__ = ["ENGINES", "EngineError"]
