"""Three early exits for a ResNet-56 that was trained on CIFAR-10 with PyTorch: `--config.init_from=resnet56.th`."""

from paranet_jax.base_config import base_config


def get_config():
  config = base_config('ResNet-56-adopted', family='adopted')
  config.data.name = 'cifar10'
  config.model.arch = 'cifar_resnet56'
  config.model.exits = 'layer1,layer2,layer3.4'
  return config
