"""From noise to the codes that a tokenizer decodes, as one function."""

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Integer, PyTree

from selfboottok_jax.flow import guidance
from selfboottok_jax.flow import noise as noise_lib
from selfboottok_jax.flow import path as path_lib
from selfboottok_jax.inference import sampling as sampling_lib
from selfboottok_jax.models import sit


def make_codes(
  model: sit.SiT,
  sampling: sampling_lib.Sampling,
  params: PyTree,
  latents: PyTree,
  labels: Int[Array, ' b'],
  indices: Int[Array, ' b'],
  seed: Integer[Array, ''],
  scales: Float[Array, ' 2'],
  interval: guidance.Interval,
  *,
  path: path_lib.Path,
  latent_dim: int,
) -> Float[Array, 'b k e']:
  """Samples codes; traceable in everything but model and sampling.

  With traced scales and a traced interval one program serves a sweep of them.

  Args:
    model: the network.
    sampling: how; of its guidance counts only whether there is any, and in
      which channels.
    params: of the network.
    latents: statistics that undo the normalisation.
    labels: classes.
    indices: numbers of the samples, which their noise belongs to.
    seed: of the noise.
    scales: of guidance, of the tokens and of the class token.
    interval: (low, high), the times at which guidance acts.
    path: that the network was trained on.
    latent_dim: channels of a latent, see `Sampling.guided_channels`.

  Returns:
    Codes in float32.
  """
  shapes = {'tokens': (model.num_tokens, model.token_dim)}
  scale = {'tokens': scales[0]}
  if sampling.guided_channels:
    # Of patches of latents, the channel is the last of their axes.
    channel = np.arange(model.token_dim) % latent_dim
    is_guided = channel < sampling.guided_channels
    scale['tokens'] = jnp.where(is_guided, scales[0], 1.0)
  if model.cls_dim:
    shapes['cls'] = (model.cls_dim,)
    scale['cls'] = scales[1]
  start, noise = noise_lib.make_noise(seed, indices, shapes)

  def velocity(state, t, labels):
    out = model.apply(
      {'params': params}, state['tokens'], t, labels, state.get('cls')
    )
    moves = {'tokens': out.tokens, 'cls': out.cls}
    return {name: moves[name] for name in state}

  state = guidance.sample(
    velocity,
    start,
    labels,
    null_label=model.num_classes,
    scale=1.0 if sampling.is_unguided else scale,
    interval=interval,
    sampler=sampling.sampler,
    times=sampling.times,
    path=path,
    **({'noise': noise} if sampling.sampler == 'sde' else {}),
  )
  return path_lib.denormalise_codes(state['tokens'], latents)
