"""The paper's measurements, and the systems in its Figure 2. Accuracies are percentages on the CIFAR-100 test set.

The paper (arXiv 1808.08308) does not say how many runs its standard deviations cover, and gives none for PN3-ddd.
"""

from typing import NamedTuple


class Row(NamedTuple):
  """One accuracy in the paper; `std` is None where it gives none."""

  network: str
  exit: int
  accuracy: float
  std: float | None


class Table(NamedTuple):
  """One table of the paper.

  Attributes:
    question: what the table answers.
    rows: in the paper's order.
    treated, control: the networks whose difference answers the question.
  """

  title: str
  question: str
  rows: tuple[Row, ...]
  treated: str
  control: str

  @property
  def networks(self) -> tuple[str, ...]:
    """Each network once, in the order of the rows."""
    return tuple(dict.fromkeys(row.network for row in self.rows))


TABLES = {
  'table1': Table(
    title='Table 1: cascading',
    question='Is the cascade (PN3) better than none (PN3cut)?',
    rows=(
      Row('PN3cut-ddd', 1, 50.39, 0.248),
      Row('PN3cut-ddd', 2, 65.584, 0.132),
      Row('PN3cut-ddd', 3, 74.582, 0.234),
      Row('PN3-ddd', 1, 48.23, None),
      Row('PN3-ddd', 2, 65.63, None),
      Row('PN3-ddd', 3, 76.24, None),
    ),
    treated='PN3-ddd',
    control='PN3cut-ddd',
  ),
  'table2': Table(
    title='Table 2: logit matching',
    question="Does the second pipeline learn more from the third one's logits (x3d) than from the labels (xdx)?",
    rows=(Row('PN3-xdx', 2, 65.674, 0.346), Row('PN3-x3d', 2, 67.024, 0.311)),
    treated='PN3-x3d',
    control='PN3-xdx',
  ),
}

FIGURE = 'figure2'
FIGURE_NETWORK = 'PN3-ddd'  # "We calculate FLOP counts for each of the pipelines in PN3-ddd" (section 4.3).
FIGURE_MACS = (3_413_088, 23_538_720, 125_943_456)  # For its exits, by our count (docs/paper.md); the paper gives none.

EXPERIMENTS = (*TABLES, FIGURE)


class Curve(NamedTuple):
  """A published system: accuracy against cumulative multiply-adds an image, in millions."""

  label: str
  source: str
  macs_millions: tuple[float, ...]
  accuracy: tuple[float, ...]


# The paper shows its points only in a picture, so these stand in for its ensembles and its MSDNet. Its FractalNet is
# omitted: accuracy against cost has not been published for it.
CURVES = (
  Curve(
    'MSDNet, 7 exits',
    'Huang et al. 2018, accuracies from a rerun by others; costs as counted by this repository',
    (13.26, 23.25, 35.76, 44.81, 55.62, 66.53, 75.49),
    (63.05, 65.41, 67.81, 69.20, 69.87, 70.63, 71.53),
  ),
  Curve('ensemble of ResNets', 'Huang et al. 2018, their figure', (12, 39, 80, 135), (61.0, 68.1, 71.0, 72.9)),
  Curve('ensemble of DenseNets', 'Huang et al. 2018, their figure', (10, 30, 62, 106), (49.3, 61.0, 66.0, 69.4)),
)
