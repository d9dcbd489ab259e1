"""Helpers for scripts: free ports, the sampler, and the iterator over epochs."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from typing import Any

import pytest

from elastic_launch.utils import get_free_port, get_socket_with_port


def test_socket_listens_on_a_free_port() -> None:
    with get_socket_with_port() as sock:
        address = sock.getsockname()
        assert address[1] > 0
        with socket.create_connection(address[:2]):
            pass
        with socket.socket(sock.family) as other, pytest.raises(OSError, match="in use"):
            other.bind(address)


def test_free_port_can_be_bound() -> None:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", get_free_port()))


def test_sampler_reads_the_same_as_torchs() -> None:
    from torch.distributed.elastic.utils.data import elastic_distributed_sampler as torchs

    from elastic_launch.utils.data import ElasticDistributedSampler

    for size, replicas, start, epoch in [(10, 3, 0, 0), (10, 3, 4, 2), (10, 4, 3, 1), (7, 7, 0, 3), (9, 2, 8, 0)]:
        samples: list[int] = []
        for rank in range(replicas):
            dataset: Any = list(range(size))
            ours = ElasticDistributedSampler(dataset, replicas, rank, start_index=start)
            theirs = torchs.ElasticDistributedSampler(dataset, replicas, rank, start)
            ours.set_epoch(epoch)
            samples += ours
            assert len(ours) == len(list(ours))
            if size - start >= replicas:  # otherwise torch's raises an AssertionError
                theirs.set_epoch(epoch)
                assert (len(ours), list(ours)) == (len(theirs), list(theirs))
        assert set(samples) == set(range(start, size))


def test_sampler_gives_each_rank_the_same_number() -> None:
    from elastic_launch.utils.data import ElasticDistributedSampler

    dataset: Any = [0, 1]
    shares = [list(ElasticDistributedSampler(dataset, 5, rank)) for rank in range(5)]
    assert [len(share) for share in shares] == [1] * 5
    for start in (2, 3, -1):
        with pytest.raises(ValueError, match="less than the data set's size, 2"):
            ElasticDistributedSampler(dataset, 2, 0, start_index=start)


def test_iterator_cycles_through_the_epochs() -> None:
    from elastic_launch.utils.data import CyclingIterator

    asked: list[int] = []

    def epoch(number: int) -> Iterator[int]:
        asked.append(number)
        return iter([] if number == 1 else [number, number + 10])

    iterator = CyclingIterator(3, epoch)
    assert asked == [0]
    assert list(iterator) == [0, 10, 2, 12]
    assert list(iterator) == []
    assert asked == [0, 1, 2]
    assert list(CyclingIterator(3, epoch, start_epoch=2)) == [2, 12]
    assert list(CyclingIterator(2, epoch, start_epoch=5)) == [5, 15]
