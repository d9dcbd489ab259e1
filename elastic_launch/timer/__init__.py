"""Timers for worker scripts, under torch's names: a process that stays in a scope for too long is killed.

In a worker of an agent that was started with ``TORCHELASTIC_ENABLE_FILE_TIMER=1``::

    timer.configure(timer.FileTimerClient(os.getenv("TORCHELASTIC_TIMER_FILE")))
    with timer.expires(after=60):
        train_one_step()

The client sends a request whenever the worker enters or leaves a scope. The agent reads the requests and kills the
worker. A program without an agent can start one of the servers here, which do the same in a thread. Clients and servers
of torch and of this package understand each other.

>>> import tempfile
>>> with tempfile.TemporaryDirectory() as directory:
...     server = FileTimerServer(f"{directory}/timers", "my-job")
...     with expires(after=60, scope="step", client=FileTimerClient(f"{directory}/timers")):
...         server.run_once()
...         timers = server.get_expired_timers(deadline=float("inf"))
...     server.stop()
>>> [request.scope_id for requests in timers.values() for request in requests]
['step']
"""

from __future__ import annotations

from elastic_launch.timer.client import FileTimerClient as FileTimerClient
from elastic_launch.timer.client import FileTimerRequest as FileTimerRequest
from elastic_launch.timer.client import LocalTimerClient as LocalTimerClient
from elastic_launch.timer.client import TimerClient as TimerClient
from elastic_launch.timer.client import TimerRequest as TimerRequest
from elastic_launch.timer.client import configure as configure
from elastic_launch.timer.client import expires as expires
from elastic_launch.timer.server import FileTimerServer as FileTimerServer
from elastic_launch.timer.server import LocalTimerServer as LocalTimerServer
from elastic_launch.timer.server import MultiprocessingRequestQueue as MultiprocessingRequestQueue
from elastic_launch.timer.server import RequestQueue as RequestQueue
from elastic_launch.timer.server import TimerServer as TimerServer
