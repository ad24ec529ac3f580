# %% [markdown]
# # Your own backbone
#
# Turns a plain Flax convolutional network into an early-exit classifier: `StagedModel` adds an exit after some of its
# stages, and `register_family` makes it known to the toolkit, so that training, calibration and early exit work as
# for the built-in networks: `python examples/own_backbone.py`.

# %%
from pathlib import Path

import flax.linen as nn

import paranet_jax
from paranet_jax.base_config import base_config
from paranet_jax.calibrate.calibration import calibrate
from paranet_jax.calibrate.flags import parse
from paranet_jax.data.load import load_dataset
from paranet_jax.host.fields import Field, tuple_of
from paranet_jax.models.registry import Family, register_family
from paranet_jax.models.staged import StagedModel
from paranet_jax.train import train_and_evaluate

workdir = Path('runs/own_backbone').absolute()

# %% [markdown]
# ## The backbone
#
# A stage maps features to features. `axis_name` shares batch statistics when training on several devices.


# %%
class Stage(nn.Module):
  features: int

  @nn.compact
  def __call__(self, x, train, axis_name=None):
    x = nn.Conv(self.features, (3, 3), strides=2, use_bias=False)(x)
    x = nn.BatchNorm(use_running_average=not train, momentum=0.9, axis_name=axis_name)(x)
    return nn.relu(x)


# %% [markdown]
# ## The family
#
# `fields` are the fields of `config.model` that it adds, with their defaults and checks; `build` makes the model from
# them. To use the family from the commands too, put it into a package with an entry point: see `register_family`.


# %%
def build(name, fields):
  stages = [Stage(width) for width in fields['widths']]
  return StagedModel(stages, exits=range(1, len(stages) + 1), num_classes=fields['num_classes'], dtype=fields['dtype'])


register_family(
  Family('own', example=__file__, build=build, fields={'widths': Field((16, 32, 64), tuple_of(int, 1))}, fix='widths')
)

# %% [markdown]
# ## Train, calibrate, exit early

# %%
config = base_config('OwnBackbone', family='own')
config.model.image_side = 8
config.data.name = 'digits'
config.data.held_out = 300
config.train.epochs = 3.0
config.train.schedule = 'cosine'
config.train.devices = 1
config.eval.every_epochs = 3.0
summary = train_and_evaluate(config, workdir)

# %%
flags = [f'--workdir={workdir}', '--threshold=0.9']
calibrated = calibrate(parse(flags), command=' '.join(flags))

# %%
test = load_dataset(config.data, image_side=config.model.image_side, channels=config.model.channels).test
early = paranet_jax.EarlyExit.load(workdir)
labels, probabilities, exits, macs = early.predict(test.images)
accuracy = (labels == test.labels).mean()
last = summary['exits'][-1]
print(f'last exit alone: {last["accuracy"]:.2%} at {last["macs_alone"] / 1e6:.2f} M multiply-adds an image')
print(f'early exit:      {accuracy:.2%} at {macs.mean() / 1e6:.2f} M multiply-adds an image')
for number in early.plan.exits:
  print(f'exit {number}: {(exits == number).mean():.1%} of the images')
