"""Exceptions for bad input: the command line turns one into one line."""


class InputError(ValueError):
  """A request that cannot be carried out, said in one line for its author."""


class UnusableWeights(InputError):
  """A checkpoint holds numbers that the format asked for cannot have."""
