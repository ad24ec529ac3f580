# %% [markdown]
# # Train, calibrate, plot
#
# Trains a tiny ParaNet on handwritten digits, chooses when images exit, and plots accuracy against cost, in a minute
# or two on two CPU cores and without a network. Open it as a notebook (jupytext, VS Code, PyCharm), or run it:
# `python examples/train_calibrate_plot.py`.

# %%
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
from scipy.special import softmax

import paranet_jax
from paranet_jax.base_config import base_config
from paranet_jax.calibrate.calibration import calibrate
from paranet_jax.calibrate.flags import parse
from paranet_jax.costs import exit_costs
from paranet_jax.train import train_and_evaluate

workdir = Path('runs/example').absolute()

# %% [markdown]
# ## Train
#
# A configuration starts as the paper's training of a network. 300 images stay out of training: calibration needs
# them. Running this cell again resumes the run, or returns at once if it has finished.

# %%
config = base_config('PN3-ddd')
config.model.layers_per_block = 1
config.model.growth_rate = 6
config.model.image_side = 8
config.data.name = 'digits'
config.data.held_out = 300
config.train.epochs = 8.0
config.train.batch_size = 128
config.train.schedule = 'cosine'
config.train.devices = 1
config.eval.every_epochs = 8.0
summary = train_and_evaluate(config, workdir)

# %% [markdown]
# ## Calibrate
#
# `calibrate` takes the flags of `python -m paranet_jax.calibrate`. This budget is the cost of the second exit.

# %%
run = paranet_jax.load(workdir)
macs = np.array([cost['macs'] for cost in exit_costs(run.model, run.image_shape)])
flags = [f'--workdir={workdir}', f'--budget={macs[1]}']
calibrated = calibrate(parse(flags), command=' '.join(flags))
plan = calibrated.plan
print(f'chosen: {plan.test["accuracy"]:.2%} at {plan.test["cost_macs"] / 1e6:.2f} M multiply-adds an image')

# %% [markdown]
# ## Plot accuracy against cost
#
# The logits of the test images are at hand, so we can try every threshold: an image exits where its calibrated
# probability reaches the threshold, and at the last exit otherwise.

# %%
logits, labels = calibrated.test  # [exits, images, classes], [images]
probabilities = softmax(logits / np.array(plan.temperatures)[:, None, None], axis=-1)
confidence, correct = probabilities.max(-1), probabilities.argmax(-1) == labels

costs, accuracies = [], []
for threshold in np.linspace(0, 1, 101):
  confident = confidence >= threshold
  confident[-1] = True
  exits = confident.argmax(0)  # The first exit that is confident.
  costs.append(macs[exits].mean())
  accuracies.append(correct[exits, np.arange(len(labels))].mean())

figure, axes = plt.subplots(layout='constrained')
axes.plot(np.array(costs) / 1e6, 100 * np.array(accuracies), label='one threshold for all exits')
axes.plot(macs / 1e6, 100 * correct.mean(1), 'o', label='one exit for all images')
axes.plot(plan.test['cost_macs'] / 1e6, 100 * plan.test['accuracy'], '*', markersize=15, label='calibrated')
axes.set(xlabel='mean cost (M multiply-adds an image)', ylabel='test accuracy (%)')
axes.legend()
figure.savefig(workdir / 'accuracy_against_cost.png')

# %% [markdown]
# ## Predict

# %%
early = paranet_jax.EarlyExit.load(workdir)
image = np.zeros(run.image_shape, np.uint8)
print(early.predict_one(image))
for answer in early.anytime(image):
  print(f'exit {answer.exit}: {early.class_names[answer.label]}, {answer.probabilities.max():.3f}')
