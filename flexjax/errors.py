"""The one exception for bad input: the command line turns it into one line."""


class InputError(ValueError):
  """A request that cannot be carried out, said in one line for its author."""
