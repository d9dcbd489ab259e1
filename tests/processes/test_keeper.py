"""The keeper's own steps, without an agent."""

from __future__ import annotations

import errno
import marshal
import os
from collections.abc import Sequence
from typing import TYPE_CHECKING

import pytest

from elastic_launch.workers.keeper_main import Keeper

if TYPE_CHECKING:
    from elastic_launch.workers.keeper_main import SpawnOrder


def test_workers_are_all_forked_before_the_first_has_executed_its_command(monkeypatch: pytest.MonkeyPatch) -> None:
    keeper = Keeper.__new__(Keeper)
    keeper.received_descriptors = [7, 8]
    pipes = [os.pipe() for _ in range(3)]
    given: list[list[int]] = []

    def start_worker(order: SpawnOrder, descriptors: Sequence[int]) -> tuple[int, int]:
        rank = order[0]
        given.append(list(descriptors))
        if rank == 3:
            raise OSError(errno.EAGAIN, "no more processes")
        if rank == 2:
            os.write(pipes[1][1], marshal.dumps((errno.ENOENT, "no such command")))
            for _, writing in pipes:
                os.close(writing)
        return 1000 + rank, pipes[rank][0]

    reaped = []
    monkeypatch.setattr(keeper, "start_worker", start_worker)
    orders: list[SpawnOrder] = [(rank, [], {}, [0] if rank < 2 else [], []) for rank in range(4)]
    with monkeypatch.context() as while_executing:
        while_executing.setattr(os, "waitpid", lambda pid, options: reaped.append(pid))
        started, failed = keeper.execute(orders)
    assert (started, reaped, given) == ({0: 1000, 2: 1002}, [1001], [[7], [8], [], []])
    assert failed == {1: (errno.ENOENT, "no such command"), 3: (errno.EAGAIN, "no more processes")}
