"""Layer 2: timers for worker scripts: whoever is longer in a scope than it allows is killed. The names are torch's.

    timer.configure(timer.FileTimerClient(os.getenv("TORCHELASTIC_TIMER_FILE")))
    with timer.expires(after=60):
        train_one_step()

Runs in workers and in programs that use it as a library, never in the agent, whose side is ``watchdog``. A client
tells; a server, in a thread of the program that starts it, watches and kills. Clients and servers of torch's and these
understand each other.
"""

from __future__ import annotations

from elastic_launch.timer.client import (
    FileTimerClient,
    FileTimerRequest,
    LocalTimerClient,
    TimerClient,
    TimerRequest,
    configure,
    expires,
)
from elastic_launch.timer.server import (
    FileTimerServer,
    LocalTimerServer,
    MultiprocessingRequestQueue,
    RequestQueue,
    TimerServer,
)

__all__ = [
    "FileTimerClient",
    "FileTimerRequest",
    "FileTimerServer",
    "LocalTimerClient",
    "LocalTimerServer",
    "MultiprocessingRequestQueue",
    "RequestQueue",
    "TimerClient",
    "TimerRequest",
    "TimerServer",
    "configure",
    "expires",
]
