"""One formulation of y[..., n, o] = sum_i x[..., n, i] * W[n, i, o] + b[n, o] per file.

Each is a function (x, weight, bias) -> y. The operands have one dtype, which is that of y, and any strides; bias may be
None. They assume valid operands (`torch_impl.validation` has seen them) and know nothing of one another; what each one
supports is declared in `torch_impl.registry`.
"""
