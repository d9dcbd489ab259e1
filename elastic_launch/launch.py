"""Layer 4: the Python API: from a ``LaunchConfig`` and something to run, to its result. Puts the parts together."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from elastic_launch.agent.agent import LocalElasticAgent
from elastic_launch.config import DEFAULT_SHUTDOWN_TIMEOUT, LaunchConfig
from elastic_launch.core.agent.worker_env import omp_num_threads
from elastic_launch.env import environment
from elastic_launch.errors import ChildFailedError, UsageError
from elastic_launch.host.console import log
from elastic_launch.job import Level
from elastic_launch.parsing import is_number
from elastic_launch.rendezvous.factory import create_rendezvous
from elastic_launch.worker_spec import WorkerSpec


class elastic_launch:  # noqa: N801 - torch's name
    """Launches a command or a function on this node: ``elastic_launch(config, train)(argument, ...)``."""

    def __init__(
        self, config: LaunchConfig, entrypoint: Callable[..., Any] | str | None, health_check_server: Any = None
    ) -> None:
        """Take the job's settings, what each worker runs, and a server as for ``LocalElasticAgent``."""
        self._config = config
        self._entrypoint = entrypoint
        self._health_check_server = health_check_server

    def __call__(self, *args: Any) -> dict[int, Any]:
        """Run to the end; see ``launch_agent``."""
        return launch_agent(self._config, self._entrypoint, list(args), self._health_check_server)


def launch_agent(
    config: LaunchConfig,
    entrypoint: Callable[..., Any] | str | None,
    args: list[Any],
    health_check_server: Any = None,
) -> dict[int, Any]:
    """Run a job's workers on this node, to the job's end.

    Returns:
        What the workers of this node returned, by global rank; None for commands.

    Raises:
        ChildFailedError: workers failed, and there was no restart left.
        SignalException: a signal ended the job.
        UsageError: a setting is wrong, or the function cannot be sent to the workers.
        LaunchError: the launcher could not do its work.
    """
    environ = environment()
    shutdown_timeout = _shutdown_timeout(config, environ)
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
        log_line_prefix_template=config.log_line_prefix_template,
        shutdown_timeout=shutdown_timeout,
        health_check_server=health_check_server,
        signals_to_handle=config.signals_to_handle,
        environ=environ,
        preload=config.preload,
        verbosity=config.verbosity,
    )
    result = agent.run(config.role)
    if result.is_failed():
        raise ChildFailedError(agent.name, result.failures, result.report)
    return result.return_values


def _share_out_cpus(config: LaunchConfig, environ: dict[str, str]) -> None:
    """Set OMP_NUM_THREADS where the user does not: without it, each worker would start a thread for every CPU."""
    if "OMP_NUM_THREADS" not in environ:
        from elastic_launch.host.devices import cpu_count

        cpus = cpu_count()
        environ["OMP_NUM_THREADS"] = str(omp_num_threads(cpus, config.nproc_per_node))
        level = Level.INFO if config.max_nodes == 1 else Level.DEBUG  # many nodes would all say it
        if config.nproc_per_node > 1 and config.verbosity >= level:
            log(
                f"OMP_NUM_THREADS={environ['OMP_NUM_THREADS']} for each worker "
                f"({cpus} CPUs, {config.nproc_per_node} workers); set it to have another number"
            )


def _shutdown_timeout(config: LaunchConfig, environ: dict[str, str]) -> float:
    if config.shutdown_timeout is not None:
        return config.shutdown_timeout
    text = environ.get("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", str(DEFAULT_SHUTDOWN_TIMEOUT))
    if not is_number(text):
        raise UsageError(f"TORCH_ELASTIC_SHUTDOWN_TIMEOUT={text!r}: must be a number of seconds, at least 0")
    return int(text)
