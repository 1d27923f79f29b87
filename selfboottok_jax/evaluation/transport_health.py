"""Health of the transport between local tokens and latents, Eq. (12)."""

import dataclasses
from typing import Any

import jax
from jaxtyping import Array, Float, PyTree

from selfboottok_jax.models import aligners
from selfboottok_jax.models import tokenizer as tokenizer_lib
from selfboottok_jax.objectives import transport
from selfboottok_jax.pretrained import contract

METRIC = 'transport'
PROTOCOLS = {
  'transport_token_spread': 'deviation of the tokens over that of the latents',
  'transport_plan_spread': 'share of the latents that a token draws on',
  'transport_marginal_error': "distance of the plan's marginals from uniform",
}


@dataclasses.dataclass(frozen=True, eq=False)
class Health:
  """Statistics of each image's transport plan, as the training solves it.

  Attributes:
    network: makes the latents.
    head: carries tokens to the width of the latents; None where they have it.
    head_params: its parameters.
    relative_epsilon: see `transport.transport_loss`.
    num_iterations: likewise.
  """

  network: contract.FeatureNetwork
  head: aligners.Projector | None
  head_params: PyTree
  relative_epsilon: float
  num_iterations: int

  @property
  def params(self) -> PyTree:
    """Parameters of all parts."""
    return {'network': self.network.params, 'head': self.head_params}

  def __call__(
    self,
    params: PyTree,
    images: Float[Array, 'b h w 3'],
    output: tokenizer_lib.TokenizerOutput,
  ) -> dict[str, Float[Array, ' b']]:
    """Computes the numbers of PROTOCOLS for each image in [-1, 1]."""
    patches = self.network(params['network'], images).patches
    tokens: Any = output.tokens['local2d']
    if self.head is not None:
      tokens = self.head.apply({'params': params['head']}, tokens)

    def solve(
      patches: Float[Array, 'n e'], tokens: Float[Array, 'k e']
    ) -> tuple[Array, Array, Array]:
      found = transport.transport_loss(
        patches[None],
        tokens[None],
        relative_epsilon=self.relative_epsilon,
        num_iterations=self.num_iterations,
      )
      return found.spread, found.plan_spread, found.marginal_error

    # Image by image: the loss itself is a mean that counts padding.
    values = jax.vmap(solve)(patches, tokens)
    return dict(zip(PROTOCOLS, values, strict=True))
