"""Draws the packages by what imports what, read from the source. `python docs/drawings/packages.py`."""

import ast
from collections.abc import Iterator
from pathlib import Path

from svg import Canvas, Palette, write

ROOT = Path(__file__).parents[2] / 'paranet_jax'
GROUPS = {
  'commands': (
    *('main', 'adopt', 'calibrate', 'predict', 'export', 'plan', 'experiments', 'ensemble', 'pack', 'doctor', 'report'),
    'command_line',
  ),
  'training loop': ('train', 'seeds'),
  'task': ('task', 'feed', 'evaluation'),
  'steps': ('steps', 'frozen', 'devices'),
  'config': ('config', 'base_config'),
  'objective': ('losses', 'optim', 'costs', 'dtype_timing'),
}
"""Modules drawn as one box; any other package or module has its own."""
PURPOSES = {
  'commands': 'one package or module per command',
  'training loop': 'the loop; several seeds',
  'early': 'early exit: plan, policies, runtime',
  'runs': 'workdirs and checkpoints',
  'task': 'what a run needs, built once; batches; evaluation',
  'steps': 'pure training and evaluation steps',
  'config': 'fields, defaults, checks',
  'objective': 'losses, optimizer, multiply-adds, timing',
  'models': 'networks and their registry',
  'data': 'data sets, batches, augmentation',
  'weights': 'tensors from PyTorch files',
  'targets': 'what each exit learns from',
  'display': 'tables, curves, metrics',
  'host': 'files, errors, signals, processes: every box but portable may import it, so no arrows are drawn',
  'portable': 'copied into every bundle',
}
ROW, HEIGHT, MARGIN, WIDTH = 96, 50, 16, 1000


def draw(palette: Palette) -> str:
  """The drawing in this palette."""
  edges = _reduced(_imports())
  levels = _levels(edges)
  canvas = Canvas(
    WIDTH, MARGIN * 2 + ROW * len(levels) - ROW + HEIGHT, 'The packages of paranet_jax by imports', palette
  )
  boxes = {}
  for row, names in enumerate(levels):
    boxes |= _row(names, MARGIN + row * ROW)
  for upper, imported in edges.items():
    lowers = imported - {'host'}
    for number, lower in enumerate(sorted(lowers, key=lambda name: boxes[name][0])):
      _edge(canvas, boxes[upper], boxes[lower], (number + 1) / (len(lowers) + 1))
  for name, (x, y, width) in boxes.items():
    color = 1 if name == 'commands' else 2 if (ROOT / name).is_dir() else 0
    canvas.box(x, y, width, HEIGHT, color)
    canvas.text(x + width / 2, y + 21, name, bold=True)
    canvas.text(x + width / 2, y + 39, PURPOSES[name], soft=True, size=11)
  return canvas.svg()


def _row(names: list[str], y: float) -> dict[str, tuple[float, float, float]]:
  widths = [max(110.0, 6.3 * len(PURPOSES[name]) + 18) for name in names]
  if names == ['host']:
    widths = [WIDTH - 2 * MARGIN]
  space = (WIDTH - sum(widths)) / (len(names) + 1)
  boxes, x = {}, space
  for name, width in zip(names, widths, strict=True):
    boxes[name] = (x, y, width)
    x += width + space
  return boxes


def _edge(canvas: Canvas, upper: tuple, lower: tuple, share: float) -> None:
  x, y = upper[0] + upper[2] * share, upper[1] + HEIGHT
  end, bottom = lower[0] + lower[2] / 2, lower[1] - 2
  bend = min(40, (bottom - y) / 2)
  canvas.arrow(f'M{x:.0f} {y} C{x:.0f} {y + bend:.0f} {end:.0f} {bottom - bend:.0f} {end:.0f} {bottom}')


def _imports() -> dict[str, set[str]]:
  """The boxes that each box imports."""
  group = {module: name for name, modules in GROUPS.items() for module in modules}
  edges: dict[str, set[str]] = {}
  for path in sorted(ROOT.rglob('*.py')):
    module = path.relative_to(ROOT).with_suffix('').parts[0]
    if module != '__init__':
      name = group.get(module, module)
      found = {group.get(imported, imported) for imported in _imported(ast.parse(path.read_text()))}
      edges.setdefault(name, set()).update(found - {name, '__version__'})
  return edges


def _imported(tree: ast.AST) -> Iterator[str]:
  for node in ast.walk(tree):
    if isinstance(node, ast.ImportFrom) and node.module == 'paranet_jax':
      yield from (alias.name for alias in node.names)
    elif isinstance(node, ast.ImportFrom) and (node.module or '').startswith('paranet_jax.'):
      yield node.module.split('.')[1]
    elif isinstance(node, ast.Import):
      yield from (alias.name.split('.')[1] for alias in node.names if alias.name.startswith('paranet_jax.'))


def _reachable(edges: dict[str, set[str]], name: str) -> set[str]:
  return edges[name].union(*(_reachable(edges, lower) for lower in edges[name]))


def _reduced(edges: dict[str, set[str]]) -> dict[str, set[str]]:
  """Without the imports that a longer path implies."""
  return {
    name: {lower for lower in lowers if not any(lower in _reachable(edges, other) for other in lowers)}
    for name, lowers in edges.items()
  }


def _levels(edges: dict[str, set[str]]) -> list[list[str]]:
  """The boxes from top to bottom, each below all that import it."""
  depth = dict.fromkeys(edges, 0)
  for _ in edges:
    for upper, lowers in edges.items():
      for lower in lowers:
        depth[lower] = max(depth[lower], depth[upper] + 1)
  return [[name for name in edges if depth[name] == row] for row in range(max(depth.values()) + 1)]


if __name__ == '__main__':
  write('packages', draw)
