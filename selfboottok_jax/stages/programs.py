"""The train step of a task as compiled programs, one for each of its phases."""

import contextlib
import dataclasses
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
import ml_collections
from jax.experimental.compilation_cache import compilation_cache
from jax.extend import core
from jax.sharding import Mesh
from jaxtyping import Array, PyTree

from selfboottok_jax import stages
from selfboottok_jax.evaluation import cost
from selfboottok_jax.training import optim, sharding
from selfboottok_jax.training import state as state_lib


class TrainPrograms:
  """The train step, traced when this is made and compiled when first needed.

  A compiled program refuses other shapes, so nothing is ever traced again by
  accident. What does not fit together is found in the trace: nothing is
  allocated and nothing written by then.

  Attributes:
    state: shapes, types and shardings of the state.
    frozen: those of the frozen parameters.
    batch: those of a batch.
    compile_seconds: seconds of compilation by first step of a phase; None where
      the program was read back from the compilation cache.
    on_compile: called whenever a program was compiled.
  """

  def __init__(
    self,
    config: ml_collections.ConfigDict,
    task: stages.Task,
    mesh: Mesh,
  ):
    """Traces the step of every phase.

    Args:
      config: gives the optimizer's settings, seed and batch size.
      task: the losses; its frozen parameters may be shapes alone.
      mesh: the devices.

    Raises:
      ConfigError: the batch does not divide into `train.accumulate` parts.
    """
    self._task, self._mesh = task, mesh
    # The same settings for every group, each with a state of its own.
    self._optimizers = {
      group: optim.build_optimizer(steps=config.train.steps, **config.optimizer)
      for group in task.groups
    }
    self._seed, self._ema_limit = config.train.seed, config.train.ema
    self._accumulate = config.train.accumulate
    sharding.check_accumulation(config.data.batch_size, self._accumulate, mesh)
    self._batch_size = config.data.batch_size
    abstract = jax.eval_shape(self._init)
    self.state = state_lib.place_abstractly(abstract, mesh)
    self._shardings = jax.tree.map(lambda leaf: leaf.sharding, self.state)
    self.frozen = sharding.place_abstractly(task.frozen, mesh)
    self.batch = abstract_batch(task, config.data.batch_size, mesh)
    with jax.set_mesh(mesh):
      self._traced = {
        first: self._jit(first).trace(self.state, self.frozen, self.batch)
        for first in task.milestones
      }
    self._compiled: dict[int, Any] = {}
    self._called: set[int] = set()
    self.compile_seconds: dict[int, float | None] = {}
    self.on_compile: Callable[[], None] = lambda: None

  def init(self) -> state_lib.TrainState:
    """Initialises a state, each leaf on the devices that will hold it."""
    return jax.jit(self._init, out_shardings=self._shardings)()

  def __call__(
    self, state: state_lib.TrainState, frozen: PyTree, batch: PyTree, step: int
  ) -> tuple[state_lib.TrainState, dict[str, jax.Array]]:
    """Makes one update; `state` is donated, its buffers are reused.

    `step` is the number of updates made so far. The caller counts it: reading
    it from the state would make the host wait for the device.
    """
    first = max(first for first in self._traced if first <= step)
    program = self.compile(first)
    # The first call puts the program's constants on the device. From then on a
    # transfer in the step would be a bug that slows every update.
    guard = 'disallow' if first in self._called else 'allow'
    self._called.add(first)
    with jax.transfer_guard(guard):
      return program(state, frozen, batch)

  def compile(self, first: int) -> Any:
    """Compiles the phase that begins at step `first`, unless that is done."""
    if first not in self._compiled:
      with jax.set_mesh(self._mesh):
        lowered = self._traced[first].lower()
        hits, began = _CacheHits.count, time.monotonic()
        self._compiled[first] = lowered.compile()
        seconds = time.monotonic() - began
        was_read = _CacheHits.count > hits
        self.compile_seconds[first] = None if was_read else seconds
      self.on_compile()
    return self._compiled[first]

  def jaxpr(self, first: int) -> core.ClosedJaxpr:
    """The trace of the phase that begins at step `first`; shapes are global."""
    return self._traced[first].jaxpr

  def unoptimized(self, first: int) -> str:
    """The phase's program as XLA is given it, before anything is split."""
    with jax.set_mesh(self._mesh):
      return self._traced[first].lower().as_text(dialect='hlo')

  def card(self) -> cost.Card:
    """The cost card of the newest compiled phase, else of the last phase.

    Raises:
      ValueError: the program has an operation that `flops` cannot count.
    """
    first = max(self._compiled or self._traced)
    rows = cost.count(
      self._traced[first].jaxpr,
      self._task.components(self.state.params),
      self._batch_size,
    )
    card = cost.Card(rows, first)
    if first not in self._compiled:
      return card
    memory = cost.measure_memory(
      self._compiled[first], self.state, self.frozen, self.batch
    )
    return dataclasses.replace(
      card,
      memory=memory,
      compile_seconds=self.compile_seconds[first],
      devices=describe_devices(self._mesh),
    )

  def _init(self) -> state_lib.TrainState:
    params, stats = self._task.init(jax.random.key(self._seed))
    return state_lib.init_state(
      params, stats, self._optimizers, self._task.ema_groups
    )

  def _jit(self, first: int) -> Any:
    step = state_lib.make_train_step(
      self._task.losses(first),
      self._optimizers,
      seed=self._seed,
      ema_limit=self._ema_limit,
      accumulate=self._accumulate,
    )
    return jax.jit(
      step,
      out_shardings=(self._shardings, sharding.replicated(self._mesh)),
      # Old and new state never exist side by side in memory.
      donate_argnums=0,
    )


class _CacheHits:
  """Counts the programs that this process read back from the cache."""

  count = 0

  @classmethod
  def listen(cls, event: str, **_: Any) -> None:
    cls.count += event == '/jax/compilation_cache/cache_hits'


jax.monitoring.register_event_listener(_CacheHits.listen)


@contextlib.contextmanager
def no_compilation_cache() -> Iterator[None]:
  """Compiles anew inside the block, so that compile times are true."""
  switch = 'jax_enable_compilation_cache'
  before = getattr(jax.config, switch)

  def use(enabled: bool) -> None:
    jax.config.update(switch, enabled)
    # JAX decides once, at the first program, whether it uses the cache.
    compilation_cache.reset_cache()

  use(False)
  try:
    yield
  finally:
    use(before)


def abstract_batch(
  task: stages.Task, batch_size: int, mesh: Mesh
) -> dict[str, jax.ShapeDtypeStruct]:
  """Shapes, types and shardings of a batch."""
  rows = sharding.batch_sharding(mesh)
  return {
    name: jax.ShapeDtypeStruct(
      (batch_size, *leaf.shape), leaf.dtype, sharding=rows
    )
    for name, leaf in task.example.items()
  }


def kept_bytes(
  task: stages.Task, step_fn: TrainPrograms, mesh: Mesh, first: int
) -> float:
  """Bytes that a device keeps from the forward to the backward pass.

  Those of the first group's loss, found in its trace: nothing is compiled.
  Parameters are not among them.

  Args:
    task: gives the loss; it may be of another model than `step_fn`, with the
      same parameters, whose blocks are rematerialised otherwise.
    step_fn: gives the shapes of the state and of the batch.
    mesh: the devices.
    first: first step of a phase.
  """
  group, loss = next(iter(task.losses(first).items()))

  def keep(
    state: state_lib.TrainState, frozen: PyTree, batch: dict[str, Array]
  ) -> Any:
    inputs = state_lib.LossInputs(
      params=state.params,
      frozen=frozen,
      batch=batch,
      stats=state.stats,
      carry={},
      step=state.step,
      rng=jax.random.key(0),
    )
    # What a reverse pass needs is held by the function that makes it.
    return jax.vjp(lambda p: loss(p, inputs)[0], state.params[group])[1]

  with jax.set_mesh(mesh):
    traced = jax.make_jaxpr(keep)(step_fn.state, step_fn.frozen, step_fn.batch)
  program = traced.jaxpr
  given = set(program.invars)
  # Weights that were cast for the products are kept as they are placed, and
  # activations where their images are.
  weights = {leaf.shape for leaf in jax.tree.leaves(step_fn.state.params)}
  kept: list[Any] = [
    variable.aval
    for variable in program.outvars
    if not isinstance(variable, core.Literal) and variable not in given
  ]
  return sum(
    a.size
    * a.dtype.itemsize
    / (mesh.shape['fsdp'] if a.shape in weights else mesh.size)
    for a in kept
  )


def describe_devices(mesh: Mesh) -> str:
  """Number, kind and arrangement of the devices, in words."""
  kind = mesh.devices.flat[0].device_kind
  shape = ' x '.join(f'{name} {size}' for name, size in mesh.shape.items())
  return f'{mesh.size} x {kind} (mesh: {shape})'
