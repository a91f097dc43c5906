"""Each framework's own Linear as a subject, for inputs with one partition."""

from parity_tests.judge.subjects import Subject


def load_plain_linear(framework: str) -> Subject:
    """Import a framework and return its own Linear as a subject on the default device."""
    return {"torch": _torch, "jax": _jax}[framework]()


def _torch() -> Subject:
    import torch

    from parity_tests.frameworks.torch.modes import to_torch
    from parity_tests.frameworks.torch.subjects import TorchSubject, resolve_device

    def _plain_linear(inputs, device):
        _, i, o = inputs.weight.shape
        leaves = [to_torch(array, device).requires_grad_() for array in inputs.parameters.values()]
        linear = torch.nn.Linear(i, o, bias=inputs.bias is not None, device=device, dtype=leaves[0].dtype)

        def call(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
            parameters = {"weight": weight.squeeze(0).T} | ({} if bias is None else {"bias": bias.squeeze(0)})
            return torch.func.functional_call(linear, parameters, (x.squeeze(-2),)).unsqueeze(-2)

        return call, leaves

    return TorchSubject("nn.Linear", True, resolve_device("auto"), _plain_linear, table_name=None)


def _jax() -> Subject:
    import jax
    from flax import nnx

    from parity_tests.frameworks.jax.subjects import JaxSubject, resolve_device

    def _plain_linear(x: jax.Array, kernel: jax.Array, bias: jax.Array | None = None) -> jax.Array:
        _, i, o = kernel.shape
        linear = nnx.Linear(
            i,
            o,
            use_bias=bias is not None,
            param_dtype=kernel.dtype,
            precision=jax.lax.Precision.HIGHEST,
            rngs=nnx.Rngs(0),
        )
        linear.kernel = nnx.Param(kernel[0])
        if bias is not None:
            linear.bias = nnx.Param(bias[0])
        return linear(x[..., 0, :])[..., None, :]

    return JaxSubject("nnx.Linear", True, resolve_device("auto"), lambda sizes: _plain_linear, table_name=None)
