"""Images of a data set, decoded on all cores at once: a GPU would wait for one core's JPEGs."""

from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor

import torch

from dive_lib.provenance import cores

EACH = 8  # images that are worth a thread


def stacked(load: Callable[[int], torch.Tensor], indices: Iterable[int]) -> torch.Tensor:
    """(n, ...) load(i) of all indices, in their order; raises what the first of them raises that fails.

    In threads, since Pillow decodes and resamples outside the interpreter's lock: as many as this process may use
    cores, with one thread each for what torch does in them.
    """
    indices = [int(i) for i in indices]
    threads = min(cores(), len(indices) // EACH)
    if threads < 2:
        return torch.stack([load(i) for i in indices])
    with ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        return torch.stack(list(pool.map(load, indices)))
