"""DIVE: objects and classes read off an image by inverting a frozen conditional diffusion model, as a thin library.

The notebooks in `notebooks/` tell the story; the modules here hold what two of them need or what deserves a test.
One concept per module; import the module that you need (`from dive_lib import scenes`).  Nothing is imported here,
so that light commands (the runner, the test of the environment) start without loading PyTorch.
"""

import warnings

# tqdm, which diffusers imports, asks for a widget that no notebook here uses; `dive_lib.progress` shows progress.
warnings.filterwarnings("ignore", message="IProgress not found")

__version__ = "0.1.0"
