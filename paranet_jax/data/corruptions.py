"""Corruptions of images that a camera, a lens or a network makes, for measuring what they do to a trained run.

The kinds follow Hendrycks and Dietterich, "Benchmarking Neural Network Robustness to Common Corruptions and
Perturbations", 2019; the strengths are our own.
"""

import io
from collections.abc import Callable

import numpy as np
from jaxtyping import Float, UInt8
from PIL import Image

Images = UInt8[np.ndarray, 'N H W C']
Corruption = Callable[[Images, np.random.Generator], Images]
"""From images, and a source of chance, to as many corrupted ones."""


def _rounded(images: Float[np.ndarray, 'N H W C']) -> Images:
  return np.clip(np.rint(images), 0, 255).astype(np.uint8)


def brightness(factor: float) -> Corruption:
  """Pixel values times a factor."""
  return lambda images, rng: _rounded(images * np.float32(factor))


def contrast(factor: float) -> Corruption:
  """Distances from the mean pixel value of the image times a factor."""

  def corrupt(images: Images, rng: np.random.Generator) -> Images:
    mean = images.mean(axis=(1, 2, 3), keepdims=True, dtype=np.float32)
    return _rounded(mean + np.float32(factor) * (images - mean))

  return corrupt


def noise(deviation: float) -> Corruption:
  """Gaussian noise with this standard deviation, in units of 1/255."""
  return lambda images, rng: _rounded(images + rng.normal(0, deviation, images.shape))


def dead_pixels(share: float) -> Corruption:
  """This share of the pixels is black or white."""

  def corrupt(images: Images, rng: np.random.Generator) -> Images:
    chance = rng.random((*images.shape[:3], 1))
    return np.where(chance < share / 2, 0, np.where(chance < share, 255, images)).astype(np.uint8)

  return corrupt


def blur(width: int) -> Corruption:
  """The mean of width x width pixels, an odd number each; those at the border are repeated."""

  def corrupt(images: Images, rng: np.random.Generator) -> Images:
    margin = width // 2
    height, side = images.shape[1:3]
    padded = np.pad(images.astype(np.float64), ((0, 0), (margin, margin), (margin, margin), (0, 0)), mode='edge')
    places = [(i, j) for i in range(width) for j in range(width)]
    return _rounded(np.sum([padded[:, i : i + height, j : j + side] for i, j in places], axis=0) / width**2)

  return corrupt


def pixelate(factor: int) -> Corruption:
  """Images of a factor fewer pixels in each direction, enlarged again without smoothing."""

  def corrupt(images: Images, rng: np.random.Generator) -> Images:
    height, width = images.shape[1:3]
    rows, columns = (np.arange(size) // factor * factor for size in (height, width))
    return images[:, rows][:, :, columns]

  return corrupt


def jpeg(quality: int) -> Corruption:
  """Encoded as JPEG and decoded."""

  def corrupt(images: Images, rng: np.random.Generator) -> Images:
    found = np.empty_like(images)
    for image, out in zip(images, found, strict=True):
      encoded = io.BytesIO()
      Image.fromarray(image[..., 0] if image.shape[-1] == 1 else image).save(encoded, 'JPEG', quality=quality)
      out[...] = np.asarray(Image.open(encoded)).reshape(image.shape)
    return found

  return corrupt


CORRUPTIONS: dict[str, Corruption] = {
  'brightness, 0.6 times': brightness(0.6),
  'brightness, 0.3 times': brightness(0.3),
  'brightness, 1.5 times': brightness(1.5),
  'contrast, 0.5 times': contrast(0.5),
  'contrast, 0.25 times': contrast(0.25),
  'noise, deviation 8 of 255': noise(8),
  'noise, deviation 20 of 255': noise(20),
  'noise, deviation 40 of 255': noise(40),
  'dead pixels, 5 %': dead_pixels(0.05),
  'blur, 3 x 3 pixels': blur(3),
  'blur, 5 x 5 pixels': blur(5),
  'half the resolution': pixelate(2),
  'JPEG, quality 10': jpeg(10),
}
"""What a hard day may look like, by name."""
