"""DIVE: objects and classes read off an image by inverting a frozen conditional diffusion model, as a thin library.

The notebooks in `notebooks/` tell the story; the modules here hold what two of them need or what deserves a test.
One concept per module; import the module that you need (`from dive_lib import scenes`).  Nothing is imported here,
so that light commands (the runner, the test of the environment) start without loading PyTorch.

On a processor every operation has one thread, since how many it has decides how its sums are rounded. What takes long
runs in parts of a batch (`batch_parts`) or in copies of the process (`side_by_side`), each on a core: so results do not
depend on how many cores there are.
"""

import os
import sys
import warnings

import threadpoolctl

os.environ |= {f"{library}_NUM_THREADS": "1" for library in ("OMP", "OPENBLAS", "MKL")}
if "torch" in sys.modules:
    sys.modules["torch"].set_num_threads(1)
if "numpy" in sys.modules:  # it has read the environment
    threadpoolctl.threadpool_limits(1)

# tqdm, which diffusers imports, asks for a widget that no notebook here uses; `dive_lib.progress` shows progress.
warnings.filterwarnings("ignore", message="IProgress not found")

__version__ = "0.1.0"
