"""Reading data in a job that may restart: a sampler that resumes within an epoch, and an iterator over epochs.

For workers: this module imports torch.
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
    """Divides the samples from ``start_index`` on among the ranks, in an order that depends on the epoch.

    After a restart, pass the number of samples that all ranks together had read: the rest of the epoch is divided among
    the ranks of the new round. The samples before ``start_index`` are the first of the data set, in every epoch.

    >>> dataset = list(range(10))
    >>> samplers = [ElasticDistributedSampler(dataset, num_replicas=2, rank=rank, start_index=4) for rank in (0, 1)]
    >>> sorted(index for sampler in samplers for index in sampler)
    [4, 5, 6, 7, 8, 9]
    """

    def __init__(
        self, dataset: Dataset[_T], num_replicas: int | None = None, rank: int | None = None, start_index: int = 0
    ) -> None:
        """Create a sampler.

        Args:
            dataset: a data set that has a length.
            num_replicas: number of ranks; None for that of the process group.
            rank: this rank; None for that of the process group.
            start_index: the index of the first sample to read.

        Raises:
            ValueError: ``start_index`` is not an index of the data set, or a number is None without a process group.
            TypeError: the data set has no length.
        """
        super().__init__(dataset, num_replicas=num_replicas, rank=rank)
        size = len(dataset)  # type: ignore[arg-type]  # only subclasses of torch's type have a length
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
        # All ranks read the same number of samples, so some samples may be read twice.
        order = (order * -(-self.total_size // len(order)))[: self.total_size]
        return iter(order[self.rank :: self.num_replicas])

    def __len__(self) -> int:
        return self.num_samples


class CyclingIterator(Iterator[_T]):
    """Iterates over the samples of several epochs in a row.

    >>> list(CyclingIterator(3, lambda epoch: iter([epoch, epoch * 10]), start_epoch=1))
    [1, 10, 2, 20]
    """

    def __init__(self, n: int, generator_fn: Callable[[int], Iterator[_T]], start_epoch: int = 0) -> None:
        """Create an iterator.

        Args:
            n: number of epochs, including those before ``start_epoch``.
            generator_fn: returns the iterator over an epoch, from 0; called at once for the first epoch.
            start_epoch: the first epoch to iterate over.
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
