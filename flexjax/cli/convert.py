"""flexjax convert: writes a checkpoint's weights into the disk tier, once.

  flexjax convert --model=DIR_OR_HUB_ID --disk_dir=/nvme/flexjax
  flexjax convert --model=DIR_OR_HUB_ID --weight_bits=4 --disk_dir=/nvme/small

Works layer by layer: at most one layer is in memory at a time, and a
conversion that was killed goes on where it stopped. The folder is a model of
its own: --model=/nvme/small runs it without the checkpoint.
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
      weight_bits=FLAGS.weight_bits,
      group_size=FLAGS.group_size,
      rounding=FLAGS.rounding,
      random_weights=FLAGS.random_weights,
      weights_seed=FLAGS.weights_seed,
      on_group=lambda done, total: status.update(
        f'converting: {done} of {total} weight groups'
      ),
      on_profile=lambda done, total: status.update(
        f'looking at layers before packing: {done} of {total}'
      ),
    )
  console.print(report, soft_wrap=True)
