"""Times the other side: `transformers.generate` and `accelerate` offload.

Every run is one process and prints one JSON line, so that the peak resident
set (VmHWM, mapped file pages included) belongs to one setting alone. Nothing
here imports flexjax. The commands and their results are in README.md.
"""

import argparse
import json
import pathlib
import time

import torch

VOCAB = 50272
OPT_1_3B = {
  'hidden_size': 2048,
  'num_hidden_layers': 24,
  'ffn_dim': 8192,
  'num_attention_heads': 32,
  'word_embed_proj_dim': 2048,
}
INIT_STD = 0.02


def config_of(model):
  """Returns the OPT configuration of a preset, without an eos to stop at."""
  from transformers import OPTConfig

  # OPTConfig's own defaults are OPT-125M.
  sizes = {'opt-125m': {}, 'opt-1.3b': OPT_1_3B}[model]
  return OPTConfig(vocab_size=VOCAB, eos_token_id=None, **sizes)


def peak_rss_bytes():
  """Returns VmHWM, the largest resident set this process has had."""
  for line in pathlib.Path('/proc/self/status').read_text().splitlines():
    if line.startswith('VmHWM'):
      return int(line.split()[1]) * 1024
  raise RuntimeError('No VmHWM in /proc/self/status.')


class StepClock:
  """Notes when each step's tokens arrive; `generate` takes it as streamer."""

  def __init__(self):
    self.times = []

  def put(self, _):
    self.times.append(time.perf_counter())  # The first call is the prompt.

  def end(self):
    pass


def timed_generate(model, ids, gen_len, flags):
  """Returns (prefill seconds, decode seconds) of one greedy generate."""
  # Parameters that are loaded in inference mode lose requires_grad, and torch
  # then copies the head's weight once for each sequence of the batch.
  mode = torch.no_grad if flags.grad == 'no_grad' else torch.inference_mode
  clock = StepClock()
  start = time.perf_counter()
  with mode():
    out = model.generate(
      ids,
      attention_mask=torch.ones_like(ids),
      do_sample=False,
      max_new_tokens=gen_len,
      cache_implementation='static' if flags.cache == 'static' else None,
      disable_compile=True,  # Compilation is asked for explicitly below.
      streamer=clock,
    )
  end = time.perf_counter()
  assert out.shape[1] == ids.shape[1] + gen_len, out.shape
  return clock.times[1] - start, end - clock.times[1]


def measure(model, flags):
  """Prints the median of `repeats` generates after `warmups` of them."""
  model.eval()
  model.generation_config.eos_token_id = None
  torch.manual_seed(1)
  ids = torch.randint(4, VOCAB, (flags.batch_size, flags.prompt_len))
  for _ in range(flags.warmups):
    timed_generate(model, ids, flags.warmup_len or flags.gen_len, flags)
  cpu_start = time.process_time()
  runs = [
    timed_generate(model, ids, flags.gen_len, flags)
    for _ in range(flags.repeats)
  ]
  cpu_seconds = time.process_time() - cpu_start
  wall_seconds = sum(map(sum, runs))
  prefill, decode = sorted(runs, key=sum)[len(runs) // 2]
  tokens = flags.batch_size * flags.gen_len
  steps = max(flags.gen_len - 1, 1)
  result = {
    'tokens_per_s': round(tokens / (prefill + decode), 2),
    'prefill_seconds': round(prefill, 3),
    'decode_seconds': round(decode, 3),
    'seconds_per_step': round(decode / steps, 4),
    'all_seconds': [round(sum(run), 2) for run in runs],
    # Well under `threads`: others used the machine, do not count the run.
    'busy_cores': round(cpu_seconds / wall_seconds, 2),
    'peak_rss_gib': round(peak_rss_bytes() / 2**30, 3),
    'settings': vars(flags),
  }
  print(json.dumps(result), flush=True)


def compile_forward(model, mode):
  """Compiles the forward pass; 'freeze' also prepacks the weights."""
  if mode == 'none':
    return
  if mode == 'freeze':
    from torch._inductor import config as inductor

    inductor.freezing = True
  model.forward = torch.compile(model.forward)


def run_transformers(flags):
  """OPT with random float32 weights, all in memory."""
  from transformers import OPTForCausalLM

  torch.manual_seed(0)
  config = config_of(flags.model)
  config._attn_implementation = flags.attention
  model = OPTForCausalLM(config).to(getattr(torch, flags.dtype))
  compile_forward(model, flags.compile)
  measure(model, flags)


def run_checkpoint(flags):
  """Writes a seeded random bfloat16 checkpoint, one layer per shard."""
  from accelerate import init_empty_weights
  from accelerate.utils import OffloadedWeightsLoader, offload_state_dict
  from safetensors.torch import save_file
  from transformers import OPTForCausalLM

  folder = pathlib.Path(flags.checkpoint)
  folder.mkdir(parents=True, exist_ok=True)
  config = config_of(flags.model)
  config.dtype = torch.bfloat16
  with init_empty_weights():
    shapes = {k: v.shape for k, v in OPTForCausalLM(config).named_parameters()}
  shards = {}
  del shapes['lm_head.weight']  # It is tied; empty weights forget that.
  for name in shapes:
    layer = (
      name.split('.layers.')[1].split('.')[0] if '.layers.' in name else ''
    )
    shards.setdefault(layer, []).append(name)
  torch.manual_seed(0)
  weight_map = {}
  for number, names in enumerate(shards.values(), 1):
    file = f'model-{number:05}-of-{len(shards):05}.safetensors'
    tensors = {}
    for name in names:
      fill = INIT_STD * torch.randn(shapes[name])
      if name.endswith('.bias'):
        fill = torch.zeros(shapes[name])
      elif 'layer_norm' in name:
        fill = torch.ones(shapes[name])
      tensors[name] = fill.to(torch.bfloat16)
      weight_map[name] = file
    save_file(tensors, folder / file, metadata={'format': 'pt'})
  # The whole of it again, as the folder of .dat files of `disk_offload`.
  files = {
    name: {'safetensors_file': str(folder / file), 'weight_name': name}
    for name, file in weight_map.items()
  }
  files['lm_head.weight'] = files['model.decoder.embed_tokens.weight']
  offload_state_dict(
    pathlib.Path(flags.offload_dir) / 'all', OffloadedWeightsLoader(index=files)
  )
  index = {'metadata': {}, 'weight_map': weight_map}
  (folder / 'model.safetensors.index.json').write_text(json.dumps(index))
  config.save_pretrained(folder)


def device_map_of(config, cpu_layers, ends):
  """Keeps the first `cpu_layers` in memory; `ends` places the embeddings."""
  places = {
    f'model.decoder.layers.{i}': 'cpu' if i < cpu_layers else 'disk'
    for i in range(config.num_hidden_layers)
  }
  for name in ('embed_tokens', 'embed_positions', 'final_layer_norm'):
    places[f'model.decoder.{name}'] = ends
  return places | {'lm_head': ends}


def run_accelerate(flags):
  """OPT from disk with `accelerate`, by one of its three ways."""
  import accelerate
  from transformers import OPTForCausalLM

  config = config_of(flags.model)
  config.dtype = torch.bfloat16
  config._attn_implementation = flags.attention
  places = device_map_of(config, flags.cpu_layers, flags.ends)
  dat = pathlib.Path(flags.offload_dir) / f'{flags.cpu_layers}-{flags.ends}'
  if flags.offload == 'mmap':  # Reads the safetensors where they lie.
    model = OPTForCausalLM.from_pretrained(
      flags.checkpoint,
      config=config,
      dtype=torch.bfloat16,
      device_map=places,
      offload_folder=dat,
    )
    measure(model, flags)
    return
  with accelerate.init_empty_weights():
    model = OPTForCausalLM(config).to(torch.bfloat16)
  model.tie_weights()
  if flags.offload == 'dat':
    model = accelerate.load_checkpoint_and_dispatch(
      model,
      flags.checkpoint,
      device_map=places,
      offload_folder=dat,
      dtype=torch.bfloat16,
    )
  else:  # Everything on disk; `checkpoint` has written the folder.
    model = accelerate.disk_offload(
      model,
      pathlib.Path(flags.offload_dir) / 'all',
      execution_device=torch.device('cpu'),
    )
  measure(model, flags)


def main():
  parser = argparse.ArgumentParser(description=__doc__)
  add = parser.add_argument
  add('what', choices=('transformers', 'checkpoint', 'accelerate'))
  add('--model', default='opt-125m', choices=('opt-125m', 'opt-1.3b'))
  add('--dtype', default='float32')
  add('--batch_size', type=int, default=16)
  add('--prompt_len', type=int, default=128)
  add('--gen_len', type=int, default=32)
  add('--warmups', type=int, default=1)
  add('--warmup_len', type=int, default=0, help='0: as long as gen_len')
  add('--repeats', type=int, default=3)
  add('--threads', type=int, default=2)
  add('--attention', default='sdpa', choices=('sdpa', 'eager'))
  add('--cache', default='dynamic', choices=('dynamic', 'static'))
  add('--compile', default='none', choices=('none', 'default', 'freeze'))
  add('--grad', default='no_grad', choices=('no_grad', 'inference'))
  add('--checkpoint', default='/tmp/opt-1.3b')
  add('--offload_dir', default='/tmp/opt-1.3b-offload')
  add('--offload', default='mmap', choices=('mmap', 'dat', 'disk_offload'))
  add('--cpu_layers', type=int, default=0)
  add('--ends', default='cpu', choices=('cpu', 'disk'))
  flags = parser.parse_args()
  torch.set_num_threads(flags.threads)
  globals()[f'run_{flags.what}'](flags)


if __name__ == '__main__':
  main()
