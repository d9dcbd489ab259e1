"""Layer 3: which rendezvous a job gets: from its settings to what the agent talks to."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, cast

from elastic_launch.config import LaunchConfig
from elastic_launch.errors import UsageError
from elastic_launch.parsing import is_number, parse_seconds, read_flag, split_endpoint
from elastic_launch.rendezvous.single_node import LocalRendezvous
from elastic_launch.worker_spec import Rendezvous

if TYPE_CHECKING:
    from elastic_launch.rendezvous.backends import Backend
    from elastic_launch.rendezvous.store_rendezvous import StoreRendezvous

DEFAULT_PORTS = {"c10d": 29400, "static": 29500}
"""torch's."""
TIMES = ("join_timeout", "last_call_timeout", "close_timeout", "keep_alive_interval", "store_timeout", "read_timeout")
"""Settings of ``--rdzv-conf`` that are seconds."""
OTHERS = ("keep_alive_max_attempt", "is_host", "timeout", "rank")
SECURITY = ("cacert", "ca_cert", "cert", "ssl_cert", "key", "ssl_cert_key", "user", "username", "password")
"""Settings for an etcd that has TLS or users."""
ETCD = ("protocol", "embedded", *SECURITY)


BUILT_IN = ("static", "c10d", "etcd", "etcd-v2")
"""The backends of the launcher's own; ``etcd`` and ``etcd-v2`` both mean etcd v3."""


def create_rendezvous(config: LaunchConfig, environ: Mapping[str, str], log: Callable[[str], None]) -> Rendezvous:
    """What the agent gets: a backend of the launcher's own, or the handler of a plug-in.

    Raises:
        UsageError: a setting is missing or wrong, or there is no such backend.
    """
    if config.rdzv_backend in BUILT_IN or not config.rdzv_backend:
        return create_own(config, environ, log)
    from elastic_launch.rendezvous.handler import RendezvousParameters, get_rendezvous_handler

    own = {"backend", "endpoint", "run_id", "min_nodes", "max_nodes", "local_addr"}
    timeout = config.rdzv_timeout if config.rdzv_timeout != -1 else config.rdzv_configs.get("timeout", 900)
    params = RendezvousParameters(
        config.rdzv_backend,
        config.rdzv_endpoint,
        config.run_id or "none",
        config.min_nodes,
        config.max_nodes,
        config.local_addr,
        **{name: value for name, value in config.rdzv_configs.items() if name not in own} | {"timeout": timeout},
    )
    return cast(Rendezvous, get_rendezvous_handler(params))


def create_own(config: LaunchConfig, environ: Mapping[str, str], log: Callable[[str], None]) -> Rendezvous:
    """One node meets nobody; several need a store. Raises UsageError where a setting is missing or wrong."""
    if config.max_nodes > 1:
        return create_dynamic(config, environ, log)
    host, port = "127.0.0.1", 0  # of the workers' store; 0: a free one for each round
    if config.rdzv_backend == "static" and config.rdzv_endpoint:
        host, port = split_endpoint(config.rdzv_endpoint)
    run_id = config.run_id or os.urandom(8).hex()
    return LocalRendezvous(run_id, config.nproc_per_node, config.local_addr or host, port)


def create_dynamic(config: LaunchConfig, environ: Mapping[str, str], log: Callable[[str], None]) -> StoreRendezvous:
    """The rendezvous of a job of several nodes.

    Raises:
        UsageError: a setting is missing or wrong.
    """
    from elastic_launch.core.rendezvous.messages import Settings
    from elastic_launch.core.rendezvous.records import NodeRecord  # late: 10 ms that a job of one node does not need
    from elastic_launch.rendezvous.store_link import Timeouts
    from elastic_launch.rendezvous.store_rendezvous import StoreRendezvous

    conf = config.rdzv_configs
    seconds = {name: _seconds(conf, name) for name in TIMES if conf.get(name) is not None}
    limit = config.rdzv_timeout if config.rdzv_timeout != -1 else conf.get("timeout")
    if limit is not None and "join_timeout" not in seconds:
        seconds["join_timeout"] = _seconds({"timeout": limit}, "timeout")
    if unknown := sorted(set(conf) - {*TIMES, *OTHERS, *ETCD}):
        log(f"--rdzv-conf: {', '.join(unknown)}: not known here, and ignored")
    timeouts = {name: seconds.pop(f"{name}_timeout") for name in ("store", "read") if f"{name}_timeout" in seconds}
    rank = _rank(config)
    run_id = config.run_id or "none"
    backend, port = _backend(config, run_id, rank, environ, seconds.get("join_timeout", 600.0), log)
    settings = Settings(
        run_id=run_id,
        min_nodes=config.min_nodes,
        max_nodes=config.max_nodes,
        keep_alive_max_attempt=_attempts(conf),
        policy=config.policy,
        store_port=0 if environ.get("TORCH_DISABLE_SHARE_RDZV_TCP_STORE") == "1" else port,
        **cast("dict[str, Any]", seconds),
    )
    host, pid = os.uname().nodename, os.getpid()
    record = NodeRecord(
        node=f"{host}-{pid}-{os.urandom(4).hex()}",
        host=host,
        pid=pid,
        workers=config.nproc_per_node,
        role=config.role,
        rank=rank,
        address=config.local_addr or "",
        named=bool(config.local_addr),
    )
    return StoreRendezvous(settings, record, backend, log, Timeouts(**timeouts), config.verbosity)


def _backend(
    config: LaunchConfig,
    run_id: str,
    rank: int,
    environ: Mapping[str, str],
    join_timeout: float,
    log: Callable[[str], None],
) -> tuple[Backend, int]:
    """The store, and the port on which it serves workers, too (0: it does not)."""
    from elastic_launch.rendezvous.backends import C10dBackend, EtcdBackend

    endpoint = config.rdzv_endpoint.strip()
    if not endpoint and config.rdzv_backend.startswith("etcd"):
        raise UsageError("--rdzv-backend etcd needs --rdzv-endpoint HOST:PORT, or several with commas in between")
    if not endpoint:
        raise UsageError(
            f"{config.max_nodes} nodes need a place to meet: pass --rdzv-backend c10d --rdzv-endpoint HOST:PORT, where "
            "HOST is one of them, or --master-addr with --node-rank, the same --rdzv-id and --nnodes everywhere"
        )
    if config.rdzv_backend.startswith("etcd"):
        if not config.run_id:
            raise UsageError(
                "--rdzv-backend etcd needs --rdzv-id: the cluster keeps a job's outcome under it for a day"
            )
        conf = {name: str(value) for name, value in config.rdzv_configs.items()}
        conf["read_timeout"] = str(conf.get("store_timeout", conf.get("read_timeout", 60)))  # all attempts together
        if _flag(config.rdzv_configs, "embedded"):
            # The members come with the nodes. A little less: who is missing the bridge knows best.
            conf["start_timeout"] = str(join_timeout - min(5.0, join_timeout / 2))
            return _embedded(config, endpoint, conf, environ, log), 0
        return EtcdBackend(endpoint, run_id, conf, environ), 0
    if _flag(config.rdzv_configs, "embedded"):
        raise UsageError("--rdzv-conf embedded=true: only --rdzv-backend etcd has members that agents can run")
    if any(character in endpoint for character in "/, "):
        raise UsageError(f"--rdzv-endpoint={endpoint}: must be HOST:PORT")
    host, port = split_endpoint(endpoint)
    port = port or DEFAULT_PORTS.get(config.rdzv_backend, DEFAULT_PORTS["c10d"])
    is_host = _flag(config.rdzv_configs, "is_host")
    if is_host is None and config.rdzv_backend == "static":
        is_host = rank == 0
    return C10dBackend(host, port, is_host, environ), port


def _embedded(
    config: LaunchConfig, text: str, conf: Mapping[str, str], environ: Mapping[str, str], log: Callable[[str], None]
) -> Backend:
    """etcd, with members that the agents run."""
    from elastic_launch.rendezvous.backends import EmbeddedEtcdBackend
    from elastic_launch.store.etcd.bridge import DEFAULT_PORT

    if named := [name for name in SECURITY if conf.get(name)]:
        raise UsageError(f"--rdzv-conf {named[0]}: members that agents run (embedded=true) have neither TLS nor users")
    if conf.get("protocol", "http").strip().lower() != "http":
        raise UsageError("--rdzv-conf protocol: members that agents run (embedded=true) speak http")
    members = [split_endpoint(entry) for entry in text.split(",") if entry.strip()]
    members = [(host, port or DEFAULT_PORT) for host, port in members]
    taken = [(host, used) for host, port in members for used in (port, port + 1)]
    if len(set(taken)) < len(taken):
        raise UsageError(f"--rdzv-endpoint={text}: each member needs its port and the one above for itself")
    if max(port for _, port in members) == 65535:
        raise UsageError(f"--rdzv-endpoint={text}: a member needs the port above its own, too; 65535 has none")
    if len(members) == 1:
        log(f"embedded etcd with one member, {text}: the job does not survive the loss of that host; name 3 endpoints")
    elif len(members) % 2 == 0:
        log(
            f"embedded etcd with {len(members)} members: a majority of them must live, so that {len(members) - 1} "
            "would survive as much; name 3 or 5 endpoints"
        )
    log_dir = config.logs_specs.root_log_dir if config.logs_specs else None
    return EmbeddedEtcdBackend(members, config.run_id or "none", conf, environ, log_dir, log)


def _rank(config: LaunchConfig) -> int:
    """The group rank that this node asks for; -1: none."""
    rank = str(config.rdzv_configs.get("rank", 0 if config.rdzv_backend == "static" else -1))
    if rank != "-1" and not (is_number(rank) and int(rank) < config.max_nodes):
        raise UsageError(f"--node-rank={rank}: must be a number below the number of nodes, {config.max_nodes}")
    return int(rank)


def _seconds(conf: Mapping[str, Any], name: str) -> float:
    return parse_seconds(str(conf[name]), f"--rdzv-conf {name}=", above_zero=True)


def _attempts(conf: Mapping[str, Any]) -> int:
    text = str(conf.get("keep_alive_max_attempt", 3))
    if not text.isdigit() or int(text) < 2:
        raise UsageError(f"--rdzv-conf keep_alive_max_attempt={text}: must be a number of at least 2")
    return int(text)


def _flag(conf: Mapping[str, Any], name: str) -> bool | None:
    """A setting that is yes or no; None: it is not set."""
    if conf.get(name) is None:
        return None
    flag = read_flag(conf[name])
    if flag is None:
        raise UsageError(f"--rdzv-conf {name}={conf[name]}: must be true or false")
    return flag
