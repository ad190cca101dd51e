"""Images of a data set, decoded on all cores at once: a GPU would wait for one core's JPEGs."""

import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor

import torch

from dive_lib.provenance import cores

WORTH = 0.001  # seconds that an image must take to be worth handing to a thread


def stacked(load: Callable[[int], torch.Tensor], indices: Iterable[int]) -> torch.Tensor:
    """(n, ...) load(i) of all indices, in their order; raises what the first of them raises that fails.

    Where the first takes long, the others are loaded in threads, since Pillow decodes and resamples outside the
    interpreter's lock: as many as this process may use cores, with one thread each for what torch does in them.
    """
    indices = [int(i) for i in indices]
    start = time.perf_counter()
    images = [load(i) for i in indices[:1]]
    threads = min(cores(), len(indices) - 1) if time.perf_counter() - start > WORTH else 1
    if threads < 2:
        return torch.stack(images + [load(i) for i in indices[1:]])
    with ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        return torch.stack(images + list(pool.map(load, indices[1:])))
