"""What an HTML page consists of, and whether it is well-formed."""

import html.parser

_VOID = ('meta', 'link', 'input', 'br', 'img')


class Structure(html.parser.HTMLParser):
  """A parsed page, whose tags are closed in order.

  Attributes:
    ids: of its elements.
    references: ids that elements refer to.
    links: what it loads or links to.
  """

  def __init__(self, page: str):
    super().__init__()
    self._open: list[str] = []
    self.ids: list[str] = []
    self.references: list[str] = []
    self.links: list[str] = []
    self.feed(page)
    self.close()
    assert not self._open

  def handle_starttag(self, tag, attrs):
    values = dict(attrs)
    if tag not in _VOID:
      self._open.append(tag)
    self._note(values)

  def handle_startendtag(self, tag, attrs):
    self._note(dict(attrs))

  def handle_endtag(self, tag):
    assert self._open.pop() == tag

  def _note(self, values: dict[str, str | None]) -> None:
    self.ids += [values['id']] if 'id' in values else []
    self.references += [values[name] for name in ('for', 'aria-labelledby', 'aria-describedby') if name in values]
    self.links += [values[name] for name in ('src', 'href', 'xlink:href') if name in values]
