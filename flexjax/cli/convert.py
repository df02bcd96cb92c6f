"""flexjax convert: writes a checkpoint's weights into the disk tier, once.

  flexjax convert --model=DIR_OR_HUB_ID --disk_dir=/nvme/flexjax

Works layer by layer: memory stays small whatever the model's size, and a
conversion that was killed goes on where it stopped.
"""

import rich.console
from absl import flags

from flexjax.cli import flags as shared
from flexjax.errors import InputError
from flexjax.runtime.convert import convert

FLAGS = flags.FLAGS


def define() -> None:
  shared.define_model()


def run() -> None:
  if not FLAGS.disk_dir:
    raise InputError('convert needs --disk_dir')
  console = rich.console.Console(stderr=True)
  with console.status('converting') as status:
    report = convert(
      FLAGS.model,
      FLAGS.disk_dir,
      dtype=FLAGS.dtype,
      random_weights=FLAGS.random_weights,
      weights_seed=FLAGS.weights_seed,
      on_group=lambda done, total: status.update(
        f'converting: {done} of {total} weight groups'
      ),
    )
  console.print(report, soft_wrap=True)
