"""The places of tables in the pages of docs/, between two marks."""

from paranet_jax.host.errors import UserError


def put(page: str, begin: str, text: str, end: str, what: str) -> str:
  """The page with this text in place of what is between two marks, with an empty line before and after it.

  Args:
    what: for the error, such as 'the table deploy in docs/speed.md'.

  Raises:
    UserError: a mark is missing.
  """
  before, mark, rest = page.partition(f'{begin}\n')
  _, found, after = rest.partition(end)
  if not mark or not found:
    raise UserError(f'expected the marks of {what}, found none; put them in')
  return f'{before}{mark}\n{text}\n\n{end}{after}'
