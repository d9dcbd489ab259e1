"""An elastic launcher for distributed training, with torchrun's command line and Python names.

Each public name is imported when it is first used, because importing all of them would slow down the command line.
"""

from __future__ import annotations

TYPE_CHECKING = False  # mypy knows this name; importing typing would cost every worker milliseconds
if TYPE_CHECKING:
    from elastic_launch.agent.agent import LocalElasticAgent as LocalElasticAgent
    from elastic_launch.config import LaunchConfig as LaunchConfig
    from elastic_launch.config import LogsDest as LogsDest
    from elastic_launch.config import LogsSpecs as LogsSpecs
    from elastic_launch.config import Std as Std
    from elastic_launch.config import to_map as to_map
    from elastic_launch.errors import ChildFailedError as ChildFailedError
    from elastic_launch.errors import LaunchError as LaunchError
    from elastic_launch.errors import ProcessFailure as ProcessFailure
    from elastic_launch.errors import RendezvousClosedError as RendezvousClosedError
    from elastic_launch.errors import RendezvousConnectionError as RendezvousConnectionError
    from elastic_launch.errors import RendezvousError as RendezvousError
    from elastic_launch.errors import RendezvousGracefulExitError as RendezvousGracefulExitError
    from elastic_launch.errors import RendezvousStateError as RendezvousStateError
    from elastic_launch.errors import RendezvousTimeoutError as RendezvousTimeoutError
    from elastic_launch.errors import SignalException as SignalException
    from elastic_launch.errors import UsageError as UsageError
    from elastic_launch.launch import elastic_launch as elastic_launch
    from elastic_launch.launch import launch_agent as launch_agent
    from elastic_launch.logs.job_files import DefaultLogsSpecs as DefaultLogsSpecs
    from elastic_launch.multiprocessing import PContext as PContext
    from elastic_launch.multiprocessing import RunProcsResult as RunProcsResult
    from elastic_launch.multiprocessing import start_processes as start_processes
    from elastic_launch.rendezvous.handler import RendezvousHandler as RendezvousHandler
    from elastic_launch.rendezvous.handler import RendezvousInfo as RendezvousInfo
    from elastic_launch.rendezvous.handler import RendezvousParameters as RendezvousParameters
    from elastic_launch.rendezvous.handler import RendezvousStoreInfo as RendezvousStoreInfo
    from elastic_launch.rendezvous.registry import RendezvousHandlerCreator as RendezvousHandlerCreator
    from elastic_launch.rendezvous.registry import RendezvousHandlerRegistry as RendezvousHandlerRegistry
    from elastic_launch.rendezvous.registry import get_rendezvous_handler as get_rendezvous_handler
    from elastic_launch.rendezvous.registry import rendezvous_handler_registry as rendezvous_handler_registry
    from elastic_launch.store.etcd.server import EtcdServer as EtcdServer
    from elastic_launch.worker_spec import RunResult as RunResult
    from elastic_launch.worker_spec import Worker as Worker
    from elastic_launch.worker_spec import WorkerGroup as WorkerGroup
    from elastic_launch.worker_spec import WorkerSpec as WorkerSpec
    from elastic_launch.worker_spec import WorkerState as WorkerState
    from elastic_launch.workers.error_handler import ErrorHandler as ErrorHandler
    from elastic_launch.workers.error_handler import get_error_handler as get_error_handler
    from elastic_launch.workers.error_handler import record as record

__version__ = "0.1.0"

_NAMES = {
    "agent.agent": "LocalElasticAgent",
    "config": "LaunchConfig LogsDest LogsSpecs Std to_map",
    "errors": "ChildFailedError LaunchError ProcessFailure SignalException UsageError RendezvousError "
    "RendezvousTimeoutError RendezvousConnectionError RendezvousStateError RendezvousClosedError "
    "RendezvousGracefulExitError",
    "launch": "elastic_launch launch_agent",
    "logs.job_files": "DefaultLogsSpecs",
    "multiprocessing": "PContext RunProcsResult start_processes",
    "rendezvous.handler": "RendezvousHandler RendezvousInfo RendezvousParameters RendezvousStoreInfo",
    "rendezvous.registry": "RendezvousHandlerCreator RendezvousHandlerRegistry get_rendezvous_handler "
    "rendezvous_handler_registry",
    "store.etcd.server": "EtcdServer",
    "worker_spec": "RunResult Worker WorkerGroup WorkerSpec WorkerState",
    "workers.error_handler": "ErrorHandler get_error_handler record",
}
"""The public names, by the module that defines them."""
_MODULES = {name: module for module, names in _NAMES.items() for name in names.split()}

__all__ = list(_MODULES)


def __getattr__(name: str) -> object:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)
