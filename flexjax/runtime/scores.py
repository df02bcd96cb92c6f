"""What scoring a text says of each of its tokens."""

import dataclasses


@dataclasses.dataclass(frozen=True)
class Score:
  """Log-probabilities of one text.

  Attributes:
    index: its number among the texts, from 0.
    token_ids: its tokens, a leading `</s>` included.
    logprobs: natural logarithm of each token's probability given those
      before it; None for the first, which has none before it.
    greedy: whether each token is the likeliest one given those before it;
      None for the first.
    top: of each token, the likeliest ones in its place, best first, as (id,
      log-probability); None for the first. Empty unless asked for.
  """

  index: int
  token_ids: list[int]
  logprobs: list[float | None]
  greedy: list[bool | None]
  top: list[list[tuple[int, float]] | None] = dataclasses.field(
    default_factory=list
  )

  @classmethod
  def of(
    cls,
    index: int,
    ids: list[int],
    logprobs: list[float],
    greedy: list[bool],
    best: list[list[int]] | None = None,
    best_logprobs: list[list[float]] | None = None,
  ) -> 'Score':
    """Makes a score of what is known of every token but the first.

    `best` and `best_logprobs` are of the likeliest tokens in its place.
    """
    top: list[list[tuple[int, float]] | None] = []
    if best is not None and best_logprobs is not None:
      pairs = zip(best, best_logprobs, strict=True)
      top = [None, *(list(zip(*pair, strict=True)) for pair in pairs)]
    return cls(index, ids, [None, *logprobs], [None, *greedy], top)
