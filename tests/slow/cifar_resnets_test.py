"""ResNets that others trained with PyTorch keep their accuracy and logits here, on CIFAR-10 as JPEG files."""

import io
import os
import tarfile
from pathlib import Path

import jax
import numpy as np
import pytest
import resnet_weights
from PIL import Image

from paranet_jax.models.resnet import ResNet
from paranet_jax.weights.cifar_resnet import read_cifar_resnet

DATA = Path(os.environ.get('PARANET_DATA_DIR', '')).parent
IMAGES, WEIGHTS = DATA / 'cifar10_jpeg.tar.gz', DATA / 'cifar_resnets'
FIXTURES = Path(__file__).resolve().parents[1] / 'fixtures' / 'pytorch'
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
BATCH = 500


def read_test_images():
  """Normalized images and labels of the 10,000 files, whose classes are folders in alphabetical order."""
  images, classes = [], []
  with tarfile.open(IMAGES) as archive:
    for member in archive:
      parts = Path(member.name).parts
      if member.isfile() and 'test' in parts:
        images.append(np.asarray(Image.open(io.BytesIO(archive.extractfile(member).read())).convert('RGB')))
        classes.append(parts[-2])
  names = sorted(set(classes))
  return (np.stack(images) / np.float32(255) - MEAN) / STD, np.array([names.index(name) for name in classes])


@pytest.mark.skipif(
  not (IMAGES.is_file() and WEIGHTS.is_dir()),
  reason='needs cifar10_jpeg.tar.gz and cifar_resnets/ beside the folder of PARANET_DATA_DIR',
)
def test_accuracy_and_logits_are_those_of_pytorch():
  images, labels = read_test_images()
  assert images.shape == (10_000, 32, 32, 3)
  # In PyTorch, on these files.
  for depth, accuracy in ((20, 0.8103), (56, 0.8320)):
    fields, variables = read_cifar_resnet(WEIGHTS / f'resnet{depth}.th')
    network = jax.jit(ResNet(**fields).apply)
    (logits,) = network(variables, resnet_weights.images())
    np.testing.assert_allclose(logits, np.load(FIXTURES / f'logits_of_trained_{depth}.npy'), rtol=0, atol=1e-4)
    batches = images.astype(np.float32).reshape(-1, BATCH, 32, 32, 3)
    found = np.concatenate([network(variables, batch)[0].argmax(1) for batch in batches])
    assert (found == labels).mean() == pytest.approx(accuracy, abs=2e-4)
