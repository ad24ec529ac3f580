"""A whole dense block as one function with a hand-written backward pass: low memory, quick to compile.

Every layer that reads a feature channel in a DenseNet starts with batch normalization, and a channel's batch mean and
variance do not depend on the reader. So each channel is normalized once, when it is computed, and stored normalized; a
reader then applies only its own scale and shift. The features of a block share one buffer x [B, H, W, C]. Layer i reads
the first C_i channels and adds k:

    a = relu(scale1 x[:C_i] + shift1)      z = a W1       z^ = (z - mean) / std
    h = relu(scale2 z^ + shift2)           y = h * W2     x[C_i : C_i + k] = (y - mean) / std

In the backward pass, g is the gradient with respect to the buffer, accumulated in place from the last layer to the
first. Only x, z^ and the standard deviations are stored; a and h are recomputed. With E[.] the mean over the batch:

    dy  = (g_y - E[g_y] - y^ E[g_y y^]) / std            where g_y = g[C_i : C_i + k], complete when layer i is reached
    dW2 = h^T dy,  u2 = [h > 0] (dy * W2^T),  dscale2 = sum u2 z^,  dshift2 = sum u2
    dz  = scale2 (u2 - E[u2] - z^ E[u2 z^]) / std
    dW1 = a^T dz,  u1 = [a > 0] (dz W1^T),    dscale1 = sum u1 x,   dshift1 = sum u1,   g[:C_i] += scale1 u1

Layers run in segments. A segment of one layer is unrolled; a longer one is a `lax.scan` whose layers all read the full
width of the segment, with zero weights for channels not computed yet: less to compile, slightly more to compute.

On CPUs with AVX2 or AVX-512 the passes of a layer are C++ kernels (`native_dense.py`), which keep z instead of z^; in
inference a whole block is one (`native_inference.py`).
"""

import functools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax
from jaxtyping import Float

from paranet_jax.models.layers import native_dense, native_inference
from paranet_jax.models.layers.backend import PLAIN, backend
from paranet_jax.models.layers.native_dense import Passes
from paranet_jax.models.layers.native_inference import LARGE_BATCH, Kernels, differentiable, in_float32, is_concrete

EPSILON = 1e-5

MANY_PIXELS = 4096
"""Pixels in a batch from which `conv3x3` on a CPU is a matrix product (measured: faster at 4,096, not at 1,024)."""

SCAN_LAYERS = {'cpu': 4, 'gpu': 1, 'tpu': 16}
"""Layers per segment, by backend.

Measured once on PN3-ddd's training step. CPU (2 cores of an AMD EPYC, batch 64): 4 and 8 layers compile in 11 and 8 s
and train equally fast (154 and 153 images/s). TPU (ahead of time for v5e:2x2, batch 256): 8 and 16 layers compile to 80
and 61 MB. GPU: not measured, so unrolled.
"""


class Layer(NamedTuple):
  """Parameters of one dense layer with bottleneck width W, or of a segment's layers, padded and stacked on a new axis.

  In training, scales and shifts apply to normalized values. In inference they include the running statistics, and
  scale2 is folded into kernel1 and otherwise unused.
  """

  scale1: Float[Array, '*segment C']
  shift1: Float[Array, '*segment C']
  kernel1: Float[Array, '*segment C W']
  scale2: Float[Array, '*segment W']
  shift2: Float[Array, '*segment W']
  kernel2: Float[Array, '*segment 3 3 W k']


class Moments(NamedTuple):
  """Batch mean and biased variance of each channel, float32."""

  mean: Float[Array, '... C']
  var: Float[Array, '... C']


def _normalize(x: Float[Array, '... C'], axis_name: str | None) -> tuple[Float[Array, '... C'], Moments]:
  """(x - mean) / sqrt(var + eps) over the batch on all devices of the axis; the moments pass no gradient."""
  wide = _wide(x)
  axes = tuple(range(x.ndim - 1))
  mean, mean_of_squares = _across(jnp.stack([wide.mean(axes), jnp.square(wide).mean(axes)]), axis_name)
  var = jnp.maximum(mean_of_squares - jnp.square(mean), 0)
  return ((wide - mean) * lax.rsqrt(var + EPSILON)).astype(x.dtype), Moments(mean, var)


normalize = jax.custom_vjp(_normalize, nondiff_argnums=(1,))


def _normalize_forward(x, axis_name):
  x_hat, moments = normalize(x, axis_name)
  return (x_hat, moments), (x_hat, moments.var)


def _normalize_backward(axis_name, residuals, cotangents):
  x_hat, var = residuals
  return (normalize_backward(cotangents[0], x_hat, var, axis_name),)


normalize.defvjp(_normalize_forward, _normalize_backward)


def normalize_backward(
  g: Float[Array, '... C'], x_hat: Float[Array, '... C'], var: Float[Array, ' C'], axis_name: str | None
) -> Float[Array, '... C']:
  """Gradient with respect to x, from g, that with respect to `normalize`'s output x_hat."""
  wide, x_hat = _wide(g), _wide(x_hat)
  axes = tuple(range(g.ndim - 1))
  mean, mean_product = _across(jnp.stack([wide.mean(axes), (wide * x_hat).mean(axes)]), axis_name)
  return (lax.rsqrt(var + EPSILON) * (wide - mean - x_hat * mean_product)).astype(g.dtype)


def affine_relu(
  x: Float[Array, '... C'], scale: Float[Array, ' C'], shift: Float[Array, ' C']
) -> Float[Array, '... C']:
  """relu(scale x + shift), computed in float32 and returned in x's dtype."""
  # Rounding scale and shift to bfloat16 would bias a whole channel and flip values near 0 on or off.
  return jax.nn.relu(_wide(x) * scale + shift).astype(x.dtype)


def conv3x3(x: Float[Array, 'B H W C'], kernel: Float[Array, '3 3 C K']) -> Float[Array, 'B H W K']:
  """3x3 convolution with zero padding."""
  # With few output channels, XLA's CPU convolution takes twice as long as one product for all nine shifts and their
  # sum, except on small batches.
  if backend() == 'cpu' and x[..., 0].size >= MANY_PIXELS:
    return _conv3x3_by_product(x, kernel.astype(x.dtype))
  return _convolution(x, kernel.astype(x.dtype))


def product(x: Float[Array, '... C'], kernel: Float[Array, 'C K']) -> Float[Array, '... K']:
  """x @ kernel in x's dtype, added up in float32 or wider.

  A bfloat16 product that is returned in bfloat16 misses the matrix units of CPUs: on 2 cores of an Intel Xeon with AMX
  and jaxlib 0.10.2, 35 to 200 GFLOP/s, against 400 to 1,100 if it is returned in float32.
  """
  return jnp.matmul(x, kernel.astype(x.dtype), preferred_element_type=_wide_dtype(x)).astype(x.dtype)


def conv1x1(x: Float[Array, 'B H W C'], kernel: Float[Array, 'C K']) -> Float[Array, 'B H W K']:
  """1x1 convolution."""
  return _convolution(x, kernel.astype(x.dtype)[None, None]) if backend() == PLAIN else product(x, kernel)


def image_conv3x3(x: Float[Array, 'B H W C'], kernel: Float[Array, '3 3 C K']) -> Float[Array, 'B H W K']:
  """`conv3x3` of an image. With so few channels XLA's CPU convolution is many times slower than a matrix product."""
  if backend() != 'cpu':
    return conv3x3(x, kernel)
  features = kernel.shape[-1]
  return product(_shifts(x), kernel.reshape(-1, features)).reshape(*x.shape[:-1], features)


def dense_block_inference(
  x: Float[Array, 'B H W C'], layers: Sequence[Layer], passes: Passes | Kernels | None = None
) -> Float[Array, 'B H W C+n*k']:
  """Runs the block's n layers on raw features, with the running statistics folded in.

  Args:
    x: raw features.
    layers: as for `dense_block_training`.
    passes: kernels to use; None: `inference_kernels` decides.
  """
  passes = passes or _chosen(inference_kernels, x, layers)
  if passes is None:
    return _inference(x, layers)
  return differentiable(functools.partial(_native_inference, passes), _inference, x, list(layers))


def _inference(x, layers):
  channels = [layer.scale1.shape[0] for layer in layers]
  plain = backend() == PLAIN
  x = x if plain else _widen(x, channels[-1] + layers[-1].kernel2.shape[-1])
  for width, layer in zip(channels, layers, strict=True):
    a = affine_relu(x[..., :width], layer.scale1, layer.shift1)
    h = jax.nn.relu(_wide(conv1x1(a, layer.kernel1)) + layer.shift2).astype(x.dtype)
    new = conv3x3(h, layer.kernel2)
    x = jnp.concatenate([x, new], axis=-1) if plain else lax.dynamic_update_slice_in_dim(x, new, width, axis=-1)
  return x


def dense_block_training(
  x: Float[Array, 'B H W C'],
  layers: Sequence[Layer],
  scan_layers: int,
  axis_name: str | None,
  passes: Passes | None = None,
) -> tuple[Float[Array, 'B H W C+n*k'], Moments, Moments]:
  """Runs the block's n layers with batch statistics.

  Args:
    x: normalized features.
    layers: in order; layer i (from 0) reads C + i k channels.
    scan_layers: layers per segment; 1 unrolls every layer. Kernels in C++ have no segments.
    axis_name: device axis over which statistics are shared.
    passes: kernels to use; None: `kernels` decides.

  Returns:
    Normalized features; the moments [n, k] of the new channels and [n, bn_size k] of the bottlenecks, which pass no
    gradient.
  """
  passes = passes or _chosen(kernels, x, layers)
  if passes is not None:
    return _native_block(axis_name, passes, x, list(layers))
  return _block(axis_name, x, _pack(layers, scan_layers))


def kernels(shape: tuple[int, ...], num_layers: int, width: int, growth: int, dtype: Any) -> Passes | None:
  """The kernels for a block on this backend; None: XLA does it.

  Args:
    shape: of its input, [B, H, W, C].
    num_layers: n.
    width: of the bottlenecks.
    growth: k, channels that a layer adds.
    dtype: of its input.
  """
  if backend() != 'cpu' or _macs(shape, num_layers, width, growth) < native_dense.MIN_MACS:
    return None
  return native_dense.passes(width, growth, dtype)


def inference_kernels(
  shape: tuple[int, ...], num_layers: int, width: int, growth: int, dtype: Any
) -> Passes | Kernels | None:
  """As `kernels`, for a block in inference: those for 16 images at once where they divide the batch.

  Small batches gain as much as large ones, so the network decides, and not the batch.
  """
  large = (max(shape[0], LARGE_BATCH), *shape[1:])
  if backend() != 'cpu' or _macs(large, num_layers, width, growth) < native_inference.MIN_MACS:
    return None
  whole = native_inference.block_kernels(shape, num_layers, width, growth, dtype)
  return whole or native_dense.passes(width, growth, dtype)


def _macs(shape, num_layers, width, growth):
  read = num_layers * shape[-1] + growth * (num_layers * (num_layers - 1) // 2)
  return math.prod(shape[:-1]) * width * (read + 9 * growth * num_layers)


def _chosen(choose, x, layers):
  if not is_concrete(x.shape) or not in_float32(leaf for layer in layers for leaf in layer):
    return None
  width, growth = layers[0].kernel2.shape[2:]
  return choose(x.shape, len(layers), width, growth, x.dtype)


def _pack(layers: Sequence[Layer], scan_layers: int) -> list[Layer]:
  return [_stack(layers[first : first + scan_layers]) for first in range(0, len(layers), scan_layers)]


def _stack(layers: Sequence[Layer]) -> Layer:
  # As wide as the segment's output, so that nothing is sliced inside a segment.
  width = layers[-1].scale1.shape[0] + layers[-1].kernel2.shape[-1]

  def stack(name):
    leaves = [getattr(layer, name) for layer in layers]
    if name in ('scale1', 'shift1', 'kernel1'):
      leaves = [_pad_end(leaf, 0, width) for leaf in leaves]
    return jnp.stack(leaves)

  return Layer(*map(stack, Layer._fields))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _block(axis_name, x, segments):
  return _block_forward(axis_name, x, segments)[0]


def _block_forward(axis_name, x, segments):
  image_shape, kept = x.shape[:-1], []
  x = _flat(x)
  for segment in segments:
    step = functools.partial(_layer_forward, axis_name, image_shape)
    x = _widen(x, segment.scale1.shape[1])
    x, outputs = _scan(step, x, (_offsets(segment), segment))
    kept.append(outputs)
  z_hats = [z_hat for z_hat, _, _ in kept]
  new, inner = (jax.tree.map(lambda *parts: jnp.concatenate(parts), *(outputs[i] for outputs in kept)) for i in (1, 2))
  return (x.reshape(*image_shape, -1), new, inner), (x, z_hats, new.var, inner.var, segments)


def _layer_forward(axis_name, image_shape, x, inputs):
  offset, layer = inputs
  a = affine_relu(x, layer.scale1, layer.shift1)
  z_hat, inner = normalize(product(a, layer.kernel1), axis_name)
  h = affine_relu(z_hat, layer.scale2, layer.shift2)
  y = _flat(conv3x3(h.reshape(*image_shape, -1), layer.kernel2))
  y_hat, new = normalize(y, axis_name)
  return lax.dynamic_update_slice_in_dim(x, y_hat, offset, axis=-1), (z_hat, new, inner)


def _block_backward(axis_name, residuals, cotangents):
  x, z_hats, new_var, inner_var, segments = residuals
  image_shape = cotangents[0].shape[:-1]
  g, end, gradients = _flat(cotangents[0]), new_var.shape[0], []
  for z_hat, segment in zip(reversed(z_hats), reversed(segments), strict=True):
    length, width = segment.scale1.shape
    step = functools.partial(_layer_backward, axis_name, image_shape, x[:, :width])
    var = new_var[end - length : end], inner_var[end - length : end]
    g, gradient = _scan(step, g[:, :width], (_offsets(segment), segment, z_hat, *var), reverse=True)
    # A transpose inside the loop would make its matrix product slow.
    gradients.append(gradient._replace(kernel1=gradient.kernel1.swapaxes(1, 2)))
    end -= length
  length, width = segments[0].scale1.shape
  g = g[:, : width - length * segments[0].kernel2.shape[-1]]
  return g.reshape(*image_shape, -1), gradients[::-1]


def _layer_backward(axis_name, image_shape, x, g, inputs):
  offset, layer, z_hat, new_var, inner_var = inputs
  growth = layer.kernel2.shape[-1]
  g_y = lax.dynamic_slice_in_dim(g, offset, growth, axis=-1)
  y_hat = lax.dynamic_slice_in_dim(x, offset, growth, axis=-1)
  dy = normalize_backward(g_y, y_hat, new_var, axis_name)

  h = affine_relu(z_hat, layer.scale2, layer.shift2)
  dh, dkernel2 = _conv3x3_backward(h, layer.kernel2, dy.reshape(*image_shape, growth))
  u2, dscale2, dshift2 = _affine_relu_backward(h, z_hat, dh)
  dz = normalize_backward(_times(u2, layer.scale2), z_hat, inner_var, axis_name)

  a = affine_relu(x, layer.scale1, layer.shift1)
  dkernel1 = _product_over_batch(dz, a)
  u1, dscale1, dshift1 = _affine_relu_backward(a, x, product(dz, layer.kernel1.T))
  g = g + _times(u1, layer.scale1)
  return g, Layer(dscale1, dshift1, dkernel1, dscale2, dshift2, dkernel2)


def _affine_relu_backward(activation, x, g):
  # Without the barrier, XLA's CPU compiler fuses the sums with the computation of u, and both become slow.
  u = lax.optimization_barrier(jnp.where(activation > 0, g, 0))
  return u, jnp.sum(_wide(u) * _wide(x), 0), jnp.sum(_wide(u), 0)


def _native_inference(passes, x, layers):
  used = [(layer.scale1, layer.shift1, layer.kernel1, layer.shift2, layer.kernel2) for layer in layers]
  return passes.inference(x, used)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _native_block(axis_name, passes, x, layers):
  return _native_forward(axis_name, passes, x, layers)[0]


def _native_forward(axis_name, passes, x, layers):
  image_shape = x.shape[:-1]
  size = image_shape[1:]
  x = _widen(_flat(x), layers[-1].scale1.shape[0] + layers[-1].kernel2.shape[-1])
  kept = []
  for layer in layers:
    z, z_means = passes.bottleneck(x, layer.scale1, layer.shift1, layer.kernel1)
    z_means = _across(z_means, axis_name)
    y, y_means = passes.convolve(z, z_means, layer.scale2, layer.shift2, layer.kernel2, *size)
    y_means = _across(y_means, axis_name)
    x = passes.append(x, y, y_means, layer.scale1.shape[0])
    kept.append((z, z_means, y_means))
  inner, new = (_moments(jnp.stack([means[i] for means in kept])) for i in (1, 2))
  return (x.reshape(*image_shape, -1), new, inner), (x, kept, layers)


def _native_backward(axis_name, passes, residuals, cotangents):
  x, kept, layers = residuals
  image_shape = cotangents[0].shape[:-1]
  g, gradients = _flat(cotangents[0]), []
  for (z, z_means, y_means), layer in zip(reversed(kept), reversed(layers), strict=True):
    offset = layer.scale1.shape[0]
    g_means = _across(passes.append_means(g, x, layer.kernel2.shape[-1], offset), axis_name)
    second = z, z_means, layer.scale2, layer.shift2, layer.kernel2, offset, *image_shape[1:]
    u, u_means, dkernel2 = passes.convolve_backward(g, x, g_means, y_means, *second)
    dshift2, dscale2 = u_means * len(g)
    u_means = _across(u_means, axis_name)
    first = layer.scale1, layer.shift1, layer.kernel1, layer.scale2
    g, dscale1, dshift1, dkernel1 = passes.bottleneck_backward(g, x, z, z_means, u, u_means, *first)
    gradients.append(Layer(dscale1, dshift1, dkernel1, dscale2, dshift2, dkernel2))
  return g[:, : layers[0].scale1.shape[0]].reshape(*image_shape, -1), gradients[::-1]


def _moments(means):
  """From the means [n, 2, C] of values and of their squares."""
  mean, mean_of_squares = means[:, 0], means[:, 1]
  return Moments(mean, jnp.maximum(mean_of_squares - jnp.square(mean), 0))


def _convolution(x, kernel):
  return lax.conv_general_dilated(x, kernel, (1, 1), 'SAME', dimension_numbers=('NHWC', 'HWIO', 'NHWC'))


def _conv3x3_by_product(x, kernel):
  _, height, width, channels = x.shape
  growth = kernel.shape[-1]
  products = product(x, kernel.transpose(2, 0, 1, 3).reshape(channels, 9 * growth))
  products = jnp.pad(products, ((0, 0), (1, 1), (1, 1), (0, 0)))
  parts = []
  for index in range(9):
    row, column = divmod(index, 3)
    shifted = products[:, row : row + height, column : column + width]
    parts.append(shifted[..., index * growth : (index + 1) * growth])
  return sum(parts[1:], parts[0])


def _conv3x3_backward(x, kernel, g):
  """Gradients of `conv3x3`, its input flattened: [N, C], [3, 3, C, K], [B, H, W, K] -> [N, C], [3, 3, C, K]."""
  channels, growth = kernel.shape[2:]
  kernel = kernel.astype(g.dtype)
  if backend() != 'cpu':
    dx, dkernel = jax.vjp(_convolution, x.reshape(*g.shape[:-1], channels), kernel)[1](g)
    return _flat(dx), _wide(dkernel)
  # Inside a loop, XLA's CPU code for a convolution's gradient is many times slower than these two matrix products.
  shifts = _shifts(g)
  flipped = kernel[::-1, ::-1].transpose(0, 1, 3, 2).reshape(9 * growth, channels)
  dkernel = _product_over_batch(shifts, x).reshape(3, 3, growth, channels)
  return product(shifts, flipped), dkernel[::-1, ::-1].transpose(0, 1, 3, 2)


def _shifts(x):
  """[B, H, W, C] -> [B H W, 9 C]: each pixel's 3x3 neighborhood, zero-padded."""
  batch, height, width, channels = x.shape
  padded = jnp.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))
  out = jnp.zeros((batch, height, width, 9 * channels), x.dtype)
  for index in range(9):
    row, column = divmod(index, 3)
    shifted = padded[:, row : row + height, column : column + width]
    out = lax.dynamic_update_slice_in_dim(out, shifted, index * channels, axis=-1)
  return _flat(out)


def _product_over_batch(first, second):
  """first^T second: [N, C], [N, D] -> [C, D], float32 or wider."""
  dimensions = (((0,), (0,)), ((), ()))
  return lax.dot_general(first, second, dimensions, preferred_element_type=_wide_dtype(first))


def _offsets(segment):
  """Index of the first channel that each layer of a segment adds."""
  length, width = segment.scale1.shape
  growth = segment.kernel2.shape[-1]
  return width - growth * length + growth * jnp.arange(length)


def _scan(step, carry, inputs, reverse=False):
  """`lax.scan`, unrolled if there is one step."""
  if inputs[0].shape[0] > 1:
    return lax.scan(step, carry, inputs, reverse=reverse)
  carry, outputs = step(carry, jax.tree.map(lambda leaf: leaf[0], inputs))
  return carry, jax.tree.map(lambda leaf: leaf[None], outputs)


def _times(u, scale):
  return (_wide(u) * scale).astype(u.dtype)


def _wide(x):
  return x.astype(_wide_dtype(x))


def _wide_dtype(x):
  """The dtype for sums: float32, or float64 if x is float64."""
  return jnp.float64 if x.dtype == jnp.float64 else jnp.float32


def _flat(x):
  return x.reshape(-1, x.shape[-1])


def _widen(x, channels):
  return _pad_end(x, x.ndim - 1, channels)


def _pad_end(x, axis, size):
  """Zero-pads x at the end of an axis to a size."""
  # jnp.pad would add a function to the program on each of hundreds of calls.
  padding = [(0, size - x.shape[axis] if i == axis else 0, 0) for i in range(x.ndim)]
  return lax.pad(x, jnp.zeros((), x.dtype), padding)


def _across(moments: Array, axis_name: str | None) -> Array:
  return moments if axis_name is None else lax.pmean(moments, axis_name)


_block.defvjp(_block_forward, _block_backward)
_native_block.defvjp(_native_forward, _native_backward)
