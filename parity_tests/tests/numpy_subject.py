"""A subject of the judge that needs no framework, for the tests of the judge itself."""

import math

import numpy as np

from parity_tests.judge.dtypes import FORMATS, numpy_dtype


class NumpySubject:
    """Right in NumPy, but for what a test asks it to do; torch's name lends it a default mode."""

    framework, implementation, mode, isolates_partitions = "torch", "numpy", "eager", True

    def __init__(self, flushes=False, fused=True, operand=np.asarray, spoil=lambda inputs, outputs: outputs):
        self._flushes, self._fused, self._operand, self._spoil = flushes, fused, operand, spoil

    def unsupported_reason(self, case, dtype):
        """Every case and dtype is taken."""
        return None

    def _stored(self, value, dtype):
        stored = value.astype(numpy_dtype(dtype))
        lost = self._flushes & (np.abs(stored.astype(np.float64)) < FORMATS[dtype].smallest_normal)
        return np.where(lost, np.zeros_like(stored), stored)

    def vjp(self, inputs):
        """y, dx, dW and db, computed one format wider and rounded once."""
        wide = np.longdouble if inputs.dtype == "float64" else np.float64
        x, w, dy = (self._operand(a.astype(wide)) for a in (inputs.x, inputs.weight, inputs.cotangent))
        x, dy = x.reshape(math.prod(x.shape[:-2]), *x.shape[-2:]), dy.reshape(math.prod(dy.shape[:-2]), *dy.shape[-2:])
        y = np.einsum("bni,nio->bno", x, w)
        if inputs.bias is not None:
            y = (y if self._fused else self._stored(y, inputs.dtype).astype(wide)) + inputs.bias.astype(wide)
        outputs = {
            "y": y.reshape(inputs.cotangent.shape),
            "dx": np.einsum("bno,nio->bni", dy, w).reshape(inputs.x.shape),
            "dweight": np.einsum("bni,bno->nio", x, dy),
        }
        if inputs.bias is not None:
            outputs["dbias"] = dy.sum(0)
        return self._spoil(inputs, {name: self._stored(value, inputs.dtype) for name, value in outputs.items()})

    def forward(self, inputs):
        """The y of `vjp`."""
        return self.vjp(inputs)["y"]
