"""Run the node's health check for the agent: a command of the user's that says whether the node can take part.

``health_check_main`` runs it in a helper process. That ends all that the check has started, whatever happens to the
agent.
"""

from __future__ import annotations

import contextlib
import marshal
import select
import socket
from collections.abc import Collection, Mapping, Sequence

from elastic_launch.core.agent.messages import AgentEvent, CheckFailed, CheckPassed
from elastic_launch.core.lines import end_as_text
from elastic_launch.errors import UnavailableError, how_it_ended
from elastic_launch.host.child import Child
from elastic_launch.workers.health_check_main import KILL_PATIENCE

LAST_LINES = 10
"""Lines of a failed check's output that are shown."""
END_PATIENCE = 1.0
"""Seconds that the helper process has to end by itself after it has killed what is left."""
ATTEMPT = "ELASTIC_LAUNCH_CHECK_ATTEMPT"
"""Variable that tells the check how often it has been run before this round, including this time."""


class HealthCheck:
    """The command, and the process that runs it, if one does. A source of events for the agent's loop."""

    def __init__(self, command: Sequence[str], environ: Mapping[str, str], run_id: str, workers: int) -> None:
        """Keep what to run.

        Args:
            command: program and arguments.
            environ: the variables that the check inherits.
            run_id: the job's id, its ``TORCHELASTIC_RUN_ID``.
            workers: number of workers on this node, its ``LOCAL_WORLD_SIZE``.
        """
        self._command = list(command)
        self._environ = {**environ, "TORCHELASTIC_RUN_ID": run_id, "LOCAL_WORLD_SIZE": str(workers)}
        self._child: Child | None = None

    def start(self, attempt: int, restart_count: int) -> list[AgentEvent]:
        """Run the check; ``take`` returns the result. Returns it at once if the check cannot be started."""
        self.close()  # one that cannot be killed
        variables = {ATTEMPT: str(attempt), "TORCHELASTIC_RESTART_COUNT": str(restart_count)}
        module = "elastic_launch.workers.health_check_main"
        environ = self._environ | variables
        try:
            self._child = Child("the health check", "elastic-check", module, environ, message=self._command)
        except UnavailableError as error:
            return [CheckFailed(str(error))]
        return []

    def stop(self) -> None:
        """Have the check and its descendants killed, if it runs; ``take`` returns the result."""
        if self._child:
            with contextlib.suppress(OSError):  # the process has ended
                self._child.control.shutdown(socket.SHUT_WR)

    def descriptors(self) -> list[tuple[int, int]]:
        """Return the descriptor on which the result comes."""
        return [(self._child.fileno(), select.POLLIN)] if self._child else []

    def deadline(self) -> float | None:
        """Return None: the agent's life cycle limits the time."""
        return None

    def take(self, ready: Collection[int] = ()) -> list[AgentEvent]:
        """Return the result if there is one."""
        if self._child is None or self._child.fileno() not in ready:
            return []
        try:
            message = self._child.control.recv(1 << 20)
        except BlockingIOError:
            return []
        except OSError:
            message = b""
        child, self._child = self._child, None
        if not message:
            how = child.how_it_ended()
            child.end()
            return [CheckFailed(f"the process that runs it ended: {how}")]
        child.end(END_PATIENCE)
        error, exitcode, output, is_whole = marshal.loads(message)
        if not error and exitcode == 0:
            return [CheckPassed()]
        return [CheckFailed(error or how_it_ended(exitcode), end_as_text(output, is_whole, LAST_LINES, len(output)))]

    def close(self) -> None:
        """Kill the check and its descendants, if it runs, and wait for their end."""
        if self._child:
            self._child.end(KILL_PATIENCE + END_PATIENCE)
            self._child = None
