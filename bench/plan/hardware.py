"""What hardware can do by its data sheet: dense products without sparsity, and memory traffic."""

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

# How far over the measured rate of a large product no product can be, where no data sheet tells: a large one reaches
# most of the peak, unless the device was disturbed just then.
OVER_THE_CEILING = 4.0


@dataclass(frozen=True)
class DataSheet:
    """Peak rates of a device.

    Attributes:
        flops_per_s: precision class to operations a second, a multiply-add counting as two.
        bytes_per_s: memory bandwidth.
        source: where the figures come from.
    """

    flops_per_s: Mapping[str, float]
    bytes_per_s: float
    source: str


def _sheet(fp64: float, fp32: float, tf32: float, half: float, terabytes_per_s: float, source: str) -> DataSheet:
    rates = {"fp64": fp64, "ieee_fp32": fp32, "tf32": tf32, "bf16": half, "fp16": half}
    tera = {name: rate * 1e12 for name, rate in rates.items()}
    return DataSheet(MappingProxyType(tera), terabytes_per_s * 1e12, source)


# By a part of the name that the driver reports; the longest part that fits decides.
_SHEETS: Mapping[str, DataSheet] = MappingProxyType(
    {
        "H200": _sheet(67, 67, 494.7, 989.4, 4.8, "NVIDIA H200 SXM data sheet"),
        "H100 80GB HBM3": _sheet(67, 67, 494.7, 989.4, 3.35, "NVIDIA H100 SXM data sheet"),
        "H100 PCIe": _sheet(51, 51, 378, 756, 2.0, "NVIDIA H100 PCIe data sheet"),
        "A100-SXM4-80GB": _sheet(19.5, 19.5, 156, 312, 2.039, "NVIDIA A100 80GB SXM data sheet"),
        "A100-SXM4-40GB": _sheet(19.5, 19.5, 156, 312, 1.555, "NVIDIA A100 40GB SXM data sheet"),
    }
)


def data_sheet(device_name: str) -> DataSheet | None:
    """The data sheet of a device by the name that its driver reports, or None for an unknown one.

    No processor of a CPU kind is listed: what it can do depends on a clock that it does not tell.
    """
    fitting = [part for part in _SHEETS if part.lower() in device_name.lower()]
    return _SHEETS[max(fitting, key=len)] if fitting else None


def peak_rates(device_name: str, precision: str, observed: str | None = None) -> dict[str, float]:
    """`flops_per_s` and `bytes_per_s` of a device; empty for an unknown one.

    Args:
        device_name: as its driver reports it.
        precision: the class that was asked for.
        observed: the class that was seen. Where it is a faster one, as with a framework whose default is TF32, its rate
            is what bounds the products.
    """
    sheet = data_sheet(device_name)
    if sheet is None:
        return {}
    rates = sheet.flops_per_s
    return {"flops_per_s": max(rates[precision], rates.get(observed or "", 0.0)), "bytes_per_s": sheet.bytes_per_s}
