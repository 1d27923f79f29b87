"""Eight fake devices, checked types and shapes, one compilation cache."""

import os
import pathlib

os.environ.setdefault('JAX_PLATFORMS', 'cpu')

import jax
import jaxtyping

_CACHE = pathlib.Path(__file__).parents[1] / '.cache' / 'jax'

jax.config.update('jax_num_cpu_devices', 8)
jax.config.update('jax_numpy_rank_promotion', 'raise')
jax.config.update('jax_compilation_cache_dir', str(_CACHE))
jax.config.update('jax_persistent_cache_min_compile_time_secs', 0.2)
jax.config.update('jax_persistent_cache_min_entry_size_bytes', -1)

# Held for the whole run: annotations are checked wherever tests go.
jaxtyping.install_import_hook('selfboottok_jax', 'beartype.beartype')
