"""One short run of each family, through the command."""

from running import CONFIGS

# One epoch of 1,337 training images in batches of 32 is 41 steps.
SHORT = (
  *('data.name=digits', 'data.held_out=100', 'model.image_side=8', 'train.epochs=1', 'train.batch_size=32'),
  *('train.learning_rate=0.2', 'train.warmup_epochs=0', 'train.drops=()', 'train.devices=1'),
  *('eval.batch_size=180', 'log.every_steps=8'),
)
# Fields and number of exits.
RUNS = {
  'densenet_bc_100_12': (('model.depth=10', 'model.growth_rate=8', 'model.exits=blocks'), 3),
  'preact_resnet_110': (('model.depth=8', 'model.exits=stages'), 3),
  'msdnet_budgeted': (
    (
      *('model.num_blocks=2', 'model.growth_factors=(1,2)', 'model.bottleneck_factors=(1,2)'),
      *('model.step_mode=even', 'model.initial_channels=8'),
    ),
    2,
  ),
  'ranet_anytime': (
    (
      *('model.scales=(1,2)', 'model.growth_factors=(2,1)', 'model.bottleneck_factors=(2,1)', 'model.step=2'),
      *('model.base_blocks=1', 'model.block_step=1', 'model.initial_channels=8'),
    ),
    2,
  ),
  'fractalnet_20': (('model.columns=2', 'model.widths=(8,8)', 'model.block_dropout=(0.0,0.1)'), 3),
}


def arguments(file, workdir, *fields):
  flags = (f'--config.{field}' for field in (*SHORT, *RUNS[file][0], *fields))
  return f'--config={CONFIGS}/{file}.py', *flags, f'--workdir={workdir}'
