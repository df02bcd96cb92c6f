"""Machines that are not there, for planning and predicting."""

from flexjax.hardware import LINKS, Curve, Family, Hardware

GIB = 2**30


def line(per_s: float, latency: float = 1e-5, top: float = 1e12) -> Curve:
  """A constant rate after a latency."""
  return Curve(tuple((x, latency + x / per_s) for x in (1e3, 1e6, 1e9, top)))


def roofline(d: float, flops: float, bandwidth: float) -> Curve:
  """An MLP of width `d` with 16-bit weights."""
  rows = [4**n for n in range(10)]
  weights = 16 * d * d / bandwidth
  return Curve(
    tuple((m, 1e-5 + max(weights, 16 * m * d * d / flops)) for m in rows)
  )


def machine(
  *,
  device=16 * GIB,
  host=200 * GIB,
  disk=1500 * GIB,
  unified=False,
  link=12e9,
  drive=2e9,
  flops=50e12,
  bandwidth=250e9,
  dispatch=1e-4,
  contention=None,
) -> Hardware:
  """A machine of a few rates, near enough to a T4 box unless told."""
  rates = {'disk_to_host': drive, 'host_to_disk': drive / 2}
  links = {name: line(rates.get(name, link)) for name in LINKS}
  dtypes = ('float32', 'bfloat16')
  mlp = Family(
    tuple((d, roofline(d, flops, bandwidth)) for d in (64, 1024, 8192))
  )
  scores = Family(((64, line(flops / 256)), (128, line(flops / 256))))
  return Hardware(
    name='imagined',
    source='made up',
    platform='cpu' if unified else 'gpu',
    unified=unified,
    device_memory=device,
    host_memory=host,
    disk_space=disk,
    links=links,
    mlp=dict.fromkeys(dtypes, mlp),
    prefill_attention=dict.fromkeys(dtypes, scores),
    decode_attention=dict.fromkeys(dtypes, line(bandwidth)),
    host_attention=dict.fromkeys(dtypes, line(bandwidth / 10)),
    expand=dict.fromkeys(('4', '8'), line(bandwidth / 3)),
    pack=dict.fromkeys(('4', '8'), line(bandwidth / 10)),
    row_write={'device': line(bandwidth / 2), 'host': line(link)},
    pick=line(bandwidth / 4),
    dispatch={'compute': dispatch, 'read': dispatch / 2, 'write': dispatch / 2},
    contention=contention or {},
  )
