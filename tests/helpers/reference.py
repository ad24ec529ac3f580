"""ParaNet once more, plainly and independently: numpy in float64, straight from the paper, with nothing rearranged.

Takes the variables of `paranet_jax.models.paranet.ParaNet`.
"""

import numpy as np

PN3 = [(198_460, 3_413_088), (987_704, 23_538_720), (3_405_684, 125_943_456)]
"""Parameters and multiply-adds of the paper's PN3 up to each exit, counted by hand."""
PN3CUT = [(198_460, 3_413_088), (792_872, 20_862_912), (2_057_028, 98_678_304)]


def paranet(variables, images, *, blocks, halvings, cascade, pool=np.max, pool_first=False, stride=1, train=False):
  """Logits of every exit and the updated batch statistics.

  Args:
    images: [B, S, S, C].
    blocks, halvings: one number a pipeline.
    cascade: the blocks (p, b) that also read block (p - 1, b - 1).
    pool: np.max or np.mean, how the entry halves, or `overlapping_max`.
    pool_first: halve the image before the stem.
    stride: of the stem.
  """
  norm = _Norm(variables, train)
  features, logits = {}, []
  for pipeline, num_blocks in enumerate(blocks, 1):
    name, times = f'pipeline_{pipeline}_stem', halvings[pipeline - 1]
    x = _entry(variables['params'], norm, images, name, times, pool, pool_first, stride)
    for index in range(1, num_blocks + 1):
      if index > 1:
        x = _transition(variables['params'], norm, x, f'pipeline_{pipeline}_transition_{index - 1}')
      if (pipeline, index) in cascade:
        x = np.concatenate([x, features[pipeline - 1, index - 1]], axis=-1)
      x = features[pipeline, index] = _block(variables['params'], norm, x, f'pipeline_{pipeline}_block_{index}')
    classifier = variables['params'][f'exit_{pipeline}']['classifier']
    pooled = np.mean(norm(x, f'exit_{pipeline}', 'norm'), axis=(1, 2))
    logits.append(pooled @ np.float64(classifier['kernel']) + np.float64(classifier['bias']))
  return logits, norm.statistics


class _Norm:
  """Batch normalization and ReLU."""

  def __init__(self, variables, train):
    self._params, self._train = variables['params'], train
    self.statistics = _float64(variables['batch_stats'])

  def __call__(self, x, *path):
    statistics, params = _at(self.statistics, path), _at(self._params, path)
    mean, var = statistics['mean'], statistics['var']
    if self._train:
      mean, var = np.mean(x, axis=(0, 1, 2)), np.var(x, axis=(0, 1, 2))
      statistics['mean'] = 0.9 * statistics['mean'] + 0.1 * mean
      statistics['var'] = 0.9 * statistics['var'] + 0.1 * var
    return np.maximum((x - mean) / np.sqrt(var + 1e-5) * params['scale'] + params['bias'], 0)


def _entry(params, norm, x, name, halvings, pool, pool_first, stride):
  x = np.float64(x)
  if pool_first:
    x = _halve(x, halvings, pool)
  x = _convolve(x, params[name]['kernel'])[:, ::stride, ::stride]
  if f'{name}_norm' in params:
    x = norm(x, f'{name}_norm')
  return x if pool_first else _halve(x, halvings, pool)


def _transition(params, norm, x, name):
  """In the paper's order: convolve, then pool."""
  return _halve(_convolve(norm(x, name, 'norm'), params[name]['conv']['kernel']), 1, np.mean)


def _block(params, norm, x, name):
  for index in range(1, len(params[name]) + 1):
    layer = f'layer_{index}'
    y = _convolve(norm(x, name, layer, 'norm1'), params[name][layer]['conv1']['kernel'])
    y = _convolve(norm(y, name, layer, 'norm2'), params[name][layer]['conv2']['kernel'])
    x = np.concatenate([x, y], axis=-1)
  return x


def _convolve(x, kernel):
  """Stride 1, zero padding to the same side: a sum over the kernel's shifts."""
  kernel = np.float64(kernel)
  side, reach = x.shape[1], kernel.shape[0] // 2
  padded = np.pad(x, ((0, 0), (reach, reach), (reach, reach), (0, 0)))
  return sum(
    padded[:, row : row + side, column : column + side] @ kernel[row, column]
    for row in range(kernel.shape[0])
    for column in range(kernel.shape[1])
  )


def overlapping_max(x):
  """3x3 windows of stride 2, padded by one on every side: the form of `nn.MaxPool2d(3, 2, 1)`."""
  padded = np.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)), constant_values=-np.inf)
  windows = np.lib.stride_tricks.sliding_window_view(padded, (3, 3), axis=(1, 2))
  return windows[:, ::2, ::2].max(axis=(-2, -1))


def _halve(x, times, pool):
  for _ in range(times):
    if pool is overlapping_max:
      x = overlapping_max(x)
      continue
    batch, side, _, channels = x.shape
    x = pool(x.reshape(batch, side // 2, 2, side // 2, 2, channels), axis=(2, 4))
  return x


def _at(tree, path):
  for key in path:
    tree = tree[key]
  return tree


def _float64(tree):
  return {key: _float64(value) if isinstance(value, dict) else np.float64(value) for key, value in tree.items()}
