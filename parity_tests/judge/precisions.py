"""The one vocabulary of precisions, which every command accepts: `fp32`, `tf32`, `bf16`, `fp16`, `fp64`.

The long spellings are accepted too, and are the ones that rows and records hold.
"""

from collections.abc import Mapping
from types import MappingProxyType

# Name to the precision class of rows and records, and to the storage dtype.
PRECISIONS: Mapping[str, tuple[str, str]] = MappingProxyType(
    {
        "fp32": ("ieee_fp32", "float32"),
        "tf32": ("tf32", "float32"),
        "bf16": ("bf16", "bfloat16"),
        "fp16": ("fp16", "float16"),
        "fp64": ("fp64", "float64"),
    }
)


def short_name(name: str) -> str:
    """Return the name of the precision that a spelling means, such as `fp32` for `float32`; other text as it is."""
    return next((short for short, spellings in PRECISIONS.items() if name in spellings), name)


def precision_class(name: str) -> str:
    """Return the precision class that a spelling means, such as `ieee_fp32` for `fp32`; other text as it is."""
    return PRECISIONS.get(short_name(name), (name,))[0]


def storage_dtype(name: str) -> str:
    """Return the storage dtype that a spelling means, `bfloat16` for `bf16`; `tf32` and other text as they are."""
    return name if name == "tf32" else PRECISIONS.get(short_name(name), (name,))[-1]
