"""Which weights are published where, under which licence, for what."""

import dataclasses


@dataclasses.dataclass(frozen=True)
class Published:
  """A network's weights as their authors publish them.

  Attributes:
    hub: id on the Hugging Face hub; '' where the authors keep them elsewhere.
    files: names of the files to have, all of them needed.
    url: a page or file that a reader can fetch by hand, when `hub` is ''.
    licence: of the weights, as an SPDX id or a name.
    millions: of parameters, those that are used here.
    use: what the network is for in this project.
  """

  hub: str
  files: tuple[str, ...]
  licence: str
  millions: float
  use: str
  url: str = ''
