"""ParaNet once more, plainly and independently: numpy in float64, straight from the paper, with nothing rearranged.

Takes the variables of `paranet_jax.models.paranet.ParaNet`.
"""

import numpy as np

PN3 = [(198_460, 3_413_088), (987_704, 23_538_720), (3_405_684, 125_943_456)]
"""Parameters and multiply-adds of the paper's PN3 up to each exit, counted by hand."""
PN3CUT = [(198_460, 3_413_088), (792_872, 20_862_912), (2_057_028, 98_678_304)]

# Cumulative parameters and multiply-adds of every exit.
SHIPPED = {
  'pn3_ddd': ('PN3-ddd', PN3),
  'paranet': ('PN3-ddd', PN3),
  'paranet:PN3cut-33d': ('PN3cut-33d', PN3CUT),
  'paranet:PN1-d': ('PN1-d', [(198_460, 44_332_128)]),
  'paranet:PN2cut-2d': ('PN2cut-2d', [(198_460, 11_596_896), (792_872, 79_283_136)]),
  'quickstart': ('PN3-ddd', [(22_618, 995_928), (85_748, 3_598_704), (240_270, 13_401_096)]),
  'pn4_imagenet': (
    'PN4-dddd',
    [(602_088, 134_526_976), (2_403_600, 354_600_448), (6_983_288, 970_756_096), (18_702_880, 3_338_039_808)],
  ),
  # Other families: summed layer by layer from the papers' descriptions (see the tests of the models).
  'densenet_bc_100_12': ('DenseNet-BC-100-12', [(800_032, 261_404_568)]),
  'resnet_110': ('ResNet-110', [(1_733_812, 252_893_440)]),
  'preact_resnet_110': ('PreAct-ResNet-110', [(1_733_812, 252_893_440)]),
  'densenet_mc': (
    'DenseNet-MC',
    [
      *((39_868, 30_974_560), (134_168, 109_289_696), (441_908, 238_616_128), (682_512, 290_076_608)),
      *((1_338_156, 359_115_808), (1_725_064, 379_989_152), (2_032_828, 395_586_528)),
    ],
  ),
  'resnet_mc': (
    'ResNet-MC',
    [
      *((20_852, 19_318_336), (41_240, 38_194_304), (123_516, 65_329_408), (201_056, 84_206_976)),
      *((522_180, 111_345_280), (824_616, 130_226_048), (979_084, 139_669_632)),
    ],
  ),
  'msdnet_anytime': (
    'MSDNet-anytime',
    [
      *((430_756, 13_256_192), (873_168, 23_252_992), (1_377_500, 35_166_720), (1_823_492, 50_574_336)),
      *((2_274_616, 60_503_552), (2_787_948, 72_202_240), (3_363_488, 85_670_400), (3_864_948, 99_483_648)),
      *((4_378_040, 109_548_032), (4_955_644, 121_086_976)),
    ],
  ),
  'msdnet_budgeted': (
    'MSDNet-budgeted',
    [
      *((297_748, 5_917_184), (646_872, 12_645_376), (1_009_796, 24_502_784), (1_487_648, 40_169_472)),
      (2_078_924, 58_087_936),
    ],
  ),
  'ranet_anytime': (
    'RANet-anytime',
    [
      *((482_052, 15_749_632), (1_097_000, 31_196_160), (1_511_586, 44_496_768), (1_914_854, 50_198_912)),
      *((2_223_662, 60_372_544), (2_523_154, 63_371_328), (2_952_906, 89_603_200), (3_354_710, 94_339_200)),
    ],
  ),
  'fractalnet_20': (
    'FractalNet-20',
    [(3_963_556, 67_880_960), (13_371_492, 296_194_048), (33_770_788, 845_371_392), (33_770_788, 1_647_583_232)],
  ),
  # The network of 853,018 parameters (published as 0.85 M), and 19,978, 38,410 and 75,274 more for the heads.
  'adopted': (
    'ResNet-56-adopted',
    [(62_490, 44_090_624), (263_332, 87_738_880), (690_094, 111_333_120), (986_680, 130_208_128)],
  ),
}


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
    x = halve(x, halvings, pool)
  x = convolve(x, params[name]['kernel'])[:, ::stride, ::stride]
  if f'{name}_norm' in params:
    x = norm(x, f'{name}_norm')
  return x if pool_first else halve(x, halvings, pool)


def _transition(params, norm, x, name):
  """In the paper's order: convolve, then pool."""
  return halve(convolve(norm(x, name, 'norm'), params[name]['conv']['kernel']), 1, np.mean)


def _block(params, norm, x, name):
  for index in range(1, len(params[name]) + 1):
    layer = f'layer_{index}'
    y = convolve(norm(x, name, layer, 'norm1'), params[name][layer]['conv1']['kernel'])
    y = convolve(norm(y, name, layer, 'norm2'), params[name][layer]['conv2']['kernel'])
    x = np.concatenate([x, y], axis=-1)
  return x


def convolve(x, kernel):
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


def halve(x, times, pool):
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
