"""The files of the results: results.json, table1.md, table2.md, figure2.png."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from paranet_jax.experiments.markdown import table_markdown
from paranet_jax.experiments.published import EXPERIMENTS, FIGURE
from paranet_jax.experiments.results import Finished, save_results, section
from paranet_jax.host.files import write_text
from paranet_jax.runs.workdir import prepare_folder

FILES = {name: f'{name}.png' if name == FIGURE else f'{name}.md' for name in EXPERIMENTS}


def claim(workdir: Path, results: dict[str, Any]) -> None:
  """Makes the folder if need be, and says in it which protocol it is for, before anything is trained.

  Args:
    workdir: absolute.
    results: as `results.load_results` gives them.

  Raises:
    UserError: the folder cannot be written.
  """
  prepare_folder(workdir)
  save_results(workdir, results)


def write_results(workdir: Path, results: dict[str, Any], experiments: Sequence[str], finished: Finished) -> str:
  """Writes each experiment's file, and then all numbers; returns what to print.

  Args:
    results: as `results.load_results` gives them; sections of other experiments stay.
    finished: the runs and their summaries.
  """
  sections = {name: section(name, finished) for name in experiments}
  said = []
  for name, found in sections.items():
    path = workdir / FILES[name]
    if name == FIGURE:
      from paranet_jax.experiments.figure import draw_figure  # matplotlib takes a second to import.

      draw_figure(found, results['protocol'], path)
    else:
      text = table_markdown(found, results['protocol'])
      write_text(path, text)
      said.append(text)
    said.append(f'written: {path}')
  save_results(workdir, results | {'experiments': results['experiments'] | sections})
  return '\n'.join(said)
