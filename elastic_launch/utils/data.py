"""Layer 2: reading data in a job that is started again: a sampler that goes on in mid-epoch, an iterator over epochs.

Runs in workers; the one module but the store's host that imports torch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TypeVar

import torch
from torch.utils.data import Dataset
from torch.utils.data.distributed import DistributedSampler

__all__ = ["CyclingIterator", "ElasticDistributedSampler"]

_T = TypeVar("_T")


class ElasticDistributedSampler(DistributedSampler[_T]):
    """Splits a data set among the ranks, shuffled anew for each ``set_epoch``, from ``start_index`` on.

    A worker that was started again passes the number of samples that all ranks together have read before, so the rest
    of the epoch is read with however many ranks there are now. Which samples come before ``start_index`` does not
    depend on the epoch: it is the data set's own order that is cut.
    """

    def __init__(
        self, dataset: Dataset[_T], num_replicas: int | None = None, rank: int | None = None, start_index: int = 0
    ) -> None:
        """Make a sampler.

        Args:
            dataset: what is read; it has a length.
            num_replicas: how many ranks read; default: the process group's.
            rank: which of them this is; default: the process group's.
            start_index: the index that reading starts with.

        Raises:
            ValueError: ``start_index`` is not one of the data set, or there is no process group to ask.
            TypeError: the data set has no length.
        """
        super().__init__(dataset, num_replicas=num_replicas, rank=rank)
        size = len(dataset)  # type: ignore[arg-type]  # torch's type has no length, its subclasses have
        if not 0 <= start_index < size:
            raise ValueError(f"start_index={start_index}: must be at least 0 and less than the data set's size, {size}")
        self.start_index = start_index
        self.num_samples = -(-(size - start_index) // self.num_replicas)
        self.total_size = self.num_samples * self.num_replicas

    def __iter__(self) -> Iterator[_T]:
        generator = torch.Generator()
        generator.manual_seed(self.epoch)
        size = len(self.dataset)  # type: ignore[arg-type]
        order = (torch.randperm(size - self.start_index, generator=generator) + self.start_index).tolist()
        # All ranks get equally many; what is missing for that is read twice.
        order = (order * -(-self.total_size // len(order)))[: self.total_size]
        return iter(order[self.rank :: self.num_replicas])

    def __len__(self) -> int:
        return self.num_samples


class CyclingIterator(Iterator[_T]):
    """Iterates over epochs as if they were one: through ``generator_fn(epoch)`` for each epoch from the start to n."""

    def __init__(self, n: int, generator_fn: Callable[[int], Iterator[_T]], start_epoch: int = 0) -> None:
        """Make an iterator.

        Args:
            n: the number of epochs, those before ``start_epoch`` included.
            generator_fn: gives the iterator of an epoch; the first is asked for at once.
            start_epoch: the first epoch.
        """
        self._last = n - 1
        self._epoch = start_epoch
        self._generator_fn = generator_fn
        self._iterator = generator_fn(start_epoch)

    def __next__(self) -> _T:
        while True:
            try:
                return next(self._iterator)
            except StopIteration:
                if self._epoch >= self._last:
                    raise
            self._epoch += 1
            self._iterator = self._generator_fn(self._epoch)
