"""What `torch_impl/coming_from.md` says of other layers: their parameters come along, and the outputs are equal."""

import os

import numpy as np
import pytest

os.environ.setdefault("KERAS_BACKEND", "torch")
pytest.importorskip("torch", reason="torch is not installed here")
pytest.importorskip("flax", reason="flax is not installed here")

import jax
import jax.numpy as jnp
import torch
from flax import linen, nnx

import jax_impl
import torch_impl
from jax_impl import linen as linen_impl

N, I, O = 16, 6, 5  # noqa: E741
X = np.random.default_rng(0).standard_normal((3, N, I)).astype(np.float32)
STACKED = {"weight": "n o i", "bias": "n o"}


def arrays(parameters):
    return {name: np.array(value) for name, value in parameters.items()}


def close(found, expected):
    np.testing.assert_allclose(np.asarray(found), np.asarray(expected), rtol=1e-4, atol=1e-5)


def in_torch(parameters, axes=None, **layout):
    layer = torch_impl.PartitionedLinear(N, I, O, **layout)
    torch_impl.import_parameters(layer, parameters, axes=axes)
    return lambda x: layer(torch.tensor(x)).detach()


def in_flax(parameters, axes=None, **layout):
    layer = jax_impl.PartitionedLinear(N, I, O, rngs=nnx.Rngs(5), **layout)
    jax_impl.import_parameters(layer, arrays(parameters), axes=axes)
    return layer


def spread(values):
    return float(np.std(np.asarray(values)))


def test_a_list_of_linears_and_its_stack():
    linears = [torch.nn.Linear(I, O) for _ in range(N)]
    expected = torch.stack([linear(torch.tensor(X[:, k])) for k, linear in enumerate(linears)], 1).detach()
    close(torch_impl.PartitionedLinear.from_linears(linears)(torch.tensor(X)).detach(), expected)
    stacked, _ = torch.func.stack_module_state(linears)
    layer = in_torch({name: value.detach() for name, value in stacked.items()}, STACKED, partition_axis=0)
    close(layer(X.swapaxes(0, 1)), expected.mT.mT.swapaxes(0, 1))


def test_a_grouped_convolution():
    old = torch.nn.Conv1d(N * I, N * O, 1, groups=N)
    x = np.random.default_rng(1).standard_normal((3, N * I, 4)).astype(np.float32)
    found = in_torch(old.state_dict(), {"weight": "(n o) i 1", "bias": "(n o)"}, in_axis=-2, partition_axis=-2)(x)
    close(found, old(torch.tensor(x)).detach())


def test_einmix_of_both_frameworks():
    pytest.importorskip("einops", reason="einops is not installed here")
    from einops.layers.flax import EinMix as FlaxEinMix
    from einops.layers.torch import EinMix

    pattern, sizes = "b n i -> b n o", {"weight_shape": "n i o", "bias_shape": "n o", "n": N, "i": I, "o": O}
    axes = {"weight": "n i o", "bias": "1 n o"}
    old = EinMix(pattern, **sizes)
    close(in_torch(old.state_dict(), axes)(X), old(torch.tensor(X)).detach())

    sizes = {"sizes": {"n": N, "i": I, "o": O}, "weight_shape": "n i o", "bias_shape": "n o"}
    mix = FlaxEinMix(pattern, **sizes)
    variables = mix.init(jax.random.key(0), X)
    drawn = variables["params"]["weight"]
    assert (drawn >= 0).all()
    assert (linen_impl.PartitionedLinear(O).init(jax.random.key(0), X)["params"]["kernel"] < 0).any()
    close(in_flax(variables["params"], axes)(X), mix.apply(variables, X))


# NumPy deprecates how Keras converts a tensor of torch.
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_einsum_dense_of_keras():
    keras = pytest.importorskip("keras", reason="keras is not installed here")
    old = keras.layers.EinsumDense("bni,nio->bno", output_shape=(N, O), bias_axes="no")
    expected = keras.ops.convert_to_numpy(old(X))
    weight, bias = (np.array(keras.ops.convert_to_numpy(value)) for value in old.weights)
    close(in_torch({"weight": weight, "bias": bias})(X), expected)
    close(in_flax({"weight": weight, "bias": bias})(X), expected)


def test_einsum_and_its_initial_values():
    old = nnx.Einsum("bni,nio->bno", (N, I, O), (N, O), rngs=nnx.Rngs(0))
    new = jax_impl.PartitionedLinear(N, I, O, rngs=nnx.Rngs(0))
    close(in_flax({"weight": old.kernel[...], "bias": old.bias[...]})(X), old(X))
    assert spread(new.kernel[...]) / spread(old.kernel[...]) == pytest.approx(N**0.5, rel=0.2)


def test_an_initialiser_with_an_axis_of_maps_is_told():
    def make(**axes):
        kernel_init = jax.nn.initializers.lecun_normal(**axes)
        return jax_impl.PartitionedLinear(N, I, O, kernel_init=kernel_init, rngs=nnx.Rngs(0))

    assert spread(make().kernel[...]) == pytest.approx(I**-0.5, rel=0.2)
    for axis in (0, (0,), -3):
        with pytest.raises(ValueError, match=r"`kernel_init`: expected .* got one with batch_axis=.*; leave"):
            make(batch_axis=axis)

    def boxed(**axes):
        init = linen.with_partitioning(jax.nn.initializers.lecun_normal(**axes), ("n", None, None))
        return linen_impl.PartitionedLinear(O, kernel_init=init).init(jax.random.key(0), X)

    assert boxed()["params"]["kernel"].names == ("n", None, None)
    with pytest.raises(ValueError, match="`kernel_init`"):
        boxed(batch_axis=0)


def test_general_layers_of_flax():
    major = X.swapaxes(0, 1)
    general = nnx.LinearGeneral(I, O, axis=-1, batch_axis={0: N}, rngs=nnx.Rngs(0))
    parameters = {"weight": general.kernel[...], "bias": general.bias[...]}
    layer = in_flax(parameters, partition_axis=0)
    close(layer(major), general(major))
    fresh = jax_impl.PartitionedLinear(N, I, O, rngs=nnx.Rngs(0)).kernel[...]
    assert spread(fresh) / spread(general.kernel[...]) == pytest.approx(N**0.5, rel=0.2)

    dense = linen.DenseGeneral(O, axis=-1, batch_dims=0)
    variables = dense.init(jax.random.key(0), major)
    assert spread(fresh) / spread(variables["params"]["kernel"]) == pytest.approx(N**0.5, rel=0.2)
    layer = linen_impl.PartitionedLinear(O, partition_axis=0)
    close(layer.apply(variables, major), dense.apply(variables, major))


def test_an_ensemble_of_equinox():
    eqx = pytest.importorskip("equinox", reason="equinox is not installed here")
    old = eqx.filter_vmap(lambda key: eqx.nn.Linear(I, O, key=key))(jax.random.split(jax.random.key(0), N))
    expected = jax.vmap(lambda x: eqx.filter_vmap(lambda linear, x: linear(x))(old, x))(jnp.asarray(X))
    close(in_flax({"weight": old.weight, "bias": old.bias}, STACKED)(X), expected)
