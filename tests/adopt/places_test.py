"""`adopt describe` lists the places of exits with shapes and costs that were counted by hand."""

import pytest
from running import run_command

from paranet_jax.adopt.__main__ import main
from paranet_jax.adopt.places import Place, default_head, find_places, suggested
from paranet_jax.models.adopted.cifar_resnet import architecture
from paranet_jax.models.adopted.registry import ARCHITECTURES, find_architecture


@pytest.fixture
def tiny(monkeypatch):
  monkeypatch.setattr(ARCHITECTURES, 'known', {'cifar_resnet8': architecture})


# Convolutions of 3x3: images at side 32 to 16 channels; blocks of two, the first of a stage at half the side.
STEM = 32**2 * 9 * 3 * 16
BLOCKS = [2 * 32**2 * 9 * 16 * 16, 16**2 * 9 * (16 * 32 + 32 * 32), 8**2 * 9 * (32 * 64 + 64 * 64)]
# A head is a convolution to 128 channels at side 8, and a matrix.
HEADS = [8**2 * 9 * channels * 128 + 128 * 10 for channels in (16, 16, 32)]
MACS = [STEM + HEADS[0], STEM + BLOCKS[0] + HEADS[1], STEM + sum(BLOCKS[:2]) + HEADS[2]]
WHOLE = STEM + sum(BLOCKS) + 640


def test_places_have_shapes_and_shares(tiny):
  shapes = [(32, 32, 16), (32, 32, 16), (16, 16, 32)]
  assert find_places(architecture('cifar_resnet8'), 10, 'conv') == [
    Place(name, shape, macs, macs / WHOLE)
    for name, shape, macs in zip(('bn1', 'layer1.0', 'layer2.0'), shapes, MACS, strict=True)
  ]


@pytest.mark.parametrize(
  ('shares', 'head', 'chosen'),
  [
    ((0.1, 0.26, 0.3, 0.46, 0.69, 0.9), 'conv', 'bde'),
    ((0.1, 0.2, 0.3), 'linear', 'bc'),
    ((0.9,), 'conv', 'a'),
    ((0.1, 0.21, 0.33, 0.62, 0.69, 0.81), 'blocks', 'cdf'),
  ],
)
def test_the_suggestion_is_nearest_to_three_shares(shares, head, chosen):
  places = [Place(name, (1,), 1, share) for name, share in zip('abcdef', shares, strict=False)]
  assert suggested(places, head) == tuple(chosen)


def test_the_head_by_default():
  heads = {'cifar_resnet50': 'conv', 'cifar_resnet56': 'blocks', 'vit_b_16': 'class_token'}
  assert {name: default_head(find_architecture(name)) for name in heads} == heads


def test_describe(tiny):
  result = run_command(main, 'describe', '--arch=cifar_resnet8')
  assert (result.code, result.err) == (0, '')
  lines = result.out.splitlines()
  assert lines[0] == f'cifar_resnet8: {WHOLE / 1e6:.2f} M multiply-adds an image of 32 pixels'
  assert [line.split()[0] for line in lines[1:5]] == ['place', 'bn1', 'layer1.0', 'layer2.0']
  assert lines[3].split() == ['layer1.0', *'32 x 32 x 16'.split(), f'{MACS[1] / 1e6:.2f}', 'M',
                              f'{100 * MACS[1] / WHOLE:.1f}', 'suggested']  # fmt: skip
  assert lines[5:] == [
    'images: side 32, bilinear; mean 0.485 0.456 0.406, deviation 0.229 0.224 0.225',
    '--exits=bn1,layer1.0 --head=conv',
  ]


def test_describe_with_another_head(tiny):
  result = run_command(main, 'describe', '--arch=cifar_resnet8', '--head=linear')
  assert result.out.splitlines()[2].split()[6:8] == [f'{(STEM + 160) / 1e3:.1f}', 'k']
  tokens = run_command(main, 'describe', '--arch=cifar_resnet8', '--head=class_token')
  message = "head 'class_token' needs tokens, found features of height and width; set --head"
  assert tokens == (2, '', f'error: {message}\n')


@pytest.mark.parametrize(
  ('flags', 'found'),
  [
    (('--exits=layer1',), '--exits'),
    (('--weights=a', '--classes'), '--weights'),
    (('--mean=0.5,0.5,0.5',), '--mean'),
    (('--config.model.copies=2',), '--config.model.copies=2'),
    (('--config.model.copys=2', '--head=blocks'), '--config.model.copys=2'),
  ],
)
def test_describe_ignores_no_flag(tiny, flags, found):
  message = f'error: describe takes --arch and --head alone, found {found}; leave it out\n'
  assert run_command(main, 'describe', '--arch=cifar_resnet8', *flags) == (2, '', message)
