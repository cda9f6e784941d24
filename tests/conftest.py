"""Eight virtual CPU devices, a compilation cache shared by all runs, parsed absl flags (grain reads them)."""

import os
import tempfile
from pathlib import Path

import jax
from absl import flags

jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_num_cpu_devices", 8)
CACHE = os.environ.get("JAX_COMPILATION_CACHE_DIR", str(Path(tempfile.gettempdir()) / "vgjax-test-cache"))
os.environ["JAX_COMPILATION_CACHE_DIR"] = CACHE  # the programs that tests start use it too
jax.config.update("jax_compilation_cache_dir", CACHE)
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.2)
flags.FLAGS.mark_as_parsed()
