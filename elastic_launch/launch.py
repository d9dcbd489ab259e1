"""Run a job from Python: its settings are a ``LaunchConfig``, and its workers run a command or a function."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from elastic_launch.agent.agent import LocalElasticAgent
from elastic_launch.config import DEFAULT_SHUTDOWN_TIMEOUT, SIGNALS_VARIABLE, LaunchConfig
from elastic_launch.env import environment
from elastic_launch.errors import ChildFailedError
from elastic_launch.host.console import log
from elastic_launch.job import Level
from elastic_launch.parsing import parse_command
from elastic_launch.rendezvous.factory import create_rendezvous
from elastic_launch.worker_spec import WorkerSpec

_FIELDS = tuple(LaunchConfig.__dataclass_fields__)


class elastic_launch:  # noqa: N801 - torch's name
    """Runs a command or a function in the workers of this node.

    >>> from elastic_launch import LaunchConfig, elastic_launch
    >>> config = LaunchConfig(min_nodes=1, max_nodes=1, nproc_per_node=2, verbosity=0)
    >>> elastic_launch(config, "test")("-n", "text")
    {0: None, 1: None}
    """

    def __init__(
        self, config: LaunchConfig, entrypoint: Callable[..., Any] | str | None, health_check_server: Any = None
    ) -> None:
        """Keep what to run; calling the object runs it.

        Args:
            config: the settings of the job.
            entrypoint: the program or the function that each worker runs.
            health_check_server: an object whose ``start()`` and ``stop()`` are called around the run.
        """
        self._config = config
        self._entrypoint = entrypoint
        self._health_check_server = health_check_server

    def __call__(self, *args: Any) -> dict[int, Any]:
        """Run the job to its end; ``args`` are the arguments of the entry point. See ``launch_agent``."""
        return launch_agent(self._config, self._entrypoint, list(args), self._health_check_server)


def launch_agent(
    config: LaunchConfig,
    entrypoint: Callable[..., Any] | str | None,
    args: list[Any],
    health_check_server: Any = None,
) -> dict[int, Any]:
    """Run the workers of this node to the end of the job.

    Args:
        config: the settings of the job; torch's ``LaunchConfig`` will do.
        entrypoint: the program or the function that each worker runs.
        args: the arguments of the entry point; strings for a program.
        health_check_server: an object whose ``start()`` and ``stop()`` are called around the run.

    Returns:
        The return value of each worker of this node by global rank; None for programs.

    Raises:
        ChildFailedError: workers failed, and no restart was left.
        SignalException: a signal ended the job.
        UsageError: a setting is wrong, or the function cannot be pickled.
        LaunchError: the launcher could not do its work.
    """
    if not isinstance(config, LaunchConfig):  # torch's
        config = LaunchConfig(**{name: getattr(config, name) for name in _FIELDS if hasattr(config, name)})
    environ = environment()
    environ[SIGNALS_VARIABLE] = config.signals_to_handle
    _share_out_cpus(config, environ)
    spec = WorkerSpec(
        role=config.role,
        local_world_size=config.nproc_per_node,
        rdzv_handler=create_rendezvous(config, environ, log),
        entrypoint=entrypoint,
        args=tuple(args),
        max_restarts=config.max_restarts,
        monitor_interval=config.monitor_interval,
        local_addr=config.local_addr,
        event_log_handler=config.event_log_handler,
        numa_options=config.numa_options,
        duplicate_stdout_filters=config.duplicate_stdout_filters,
        duplicate_stderr_filters=config.duplicate_stderr_filters,
        virtual_local_rank=config.virtual_local_rank,
        policy=config.policy,
    )
    agent = LocalElasticAgent(
        spec,
        config.logs_specs,
        config.start_method,
        config.exit_barrier_timeout,
        log_line_prefix_template=config.log_line_prefix_template,
        shutdown_timeout=DEFAULT_SHUTDOWN_TIMEOUT if config.shutdown_timeout is None else config.shutdown_timeout,
        health_check_server=health_check_server,
        signals_to_handle=config.signals_to_handle,
        environ=environ,
        preload=config.preload,
        standby=config.standby,
        verbosity=config.verbosity,
        events=config.events,
        hang_native=config.hang_native,
        health_check=parse_command(config.health_check),
        health_check_timeout=config.health_check_timeout,
    )
    result = agent.run(config.role)
    if result.is_failed():
        raise ChildFailedError(agent.name, result.failures, result.report)
    return result.return_values


def threads_per_worker(cpus: int, workers: int) -> int:
    """Return the OMP_NUM_THREADS of a worker if the user sets none: its share of the CPUs, at least 1."""
    return max(1, cpus // workers)


def _share_out_cpus(config: LaunchConfig, environ: dict[str, str]) -> None:
    """Set OMP_NUM_THREADS unless it is set. Without it, each worker would start a thread for every CPU."""
    if "OMP_NUM_THREADS" not in environ:
        from elastic_launch.host.devices import cpu_count

        cpus = cpu_count()
        environ["OMP_NUM_THREADS"] = str(threads_per_worker(cpus, config.nproc_per_node))
        level = Level.INFO if config.max_nodes == 1 else Level.DEBUG  # otherwise every node would print it
        if config.nproc_per_node > 1 and config.verbosity >= level:
            log(
                f"OMP_NUM_THREADS={environ['OMP_NUM_THREADS']} for each worker "
                f"({cpus} CPUs, {config.nproc_per_node} workers); set it to override"
            )
