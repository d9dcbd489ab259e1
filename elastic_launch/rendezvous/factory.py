"""Create the rendezvous of a job: from its settings to the object that the agent talks to."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, cast

from elastic_launch.config import DEFAULT_JOIN_TIMEOUT, LaunchConfig
from elastic_launch.core.text import counted, is_loopback, visible
from elastic_launch.env import TOKEN_FILE
from elastic_launch.errors import LaunchError, RendezvousStateError, UsageError
from elastic_launch.host import former
from elastic_launch.host.console import YELLOW, in_colour
from elastic_launch.parsing import is_number, parse_seconds, read_flag, split_endpoint
from elastic_launch.rendezvous import BUILT_IN
from elastic_launch.rendezvous.single_node import SingleNodeRendezvous
from elastic_launch.worker_spec import Rendezvous, WorkerSpec

if TYPE_CHECKING:
    from elastic_launch.core.rendezvous.messages import Settings
    from elastic_launch.core.rendezvous.records import NodeRecord
    from elastic_launch.rendezvous.backends.c10d import C10dBackend
    from elastic_launch.rendezvous.backends.etcd import EtcdBackend
    from elastic_launch.rendezvous.handler import RendezvousParameters
    from elastic_launch.rendezvous.store_rendezvous import StoreRendezvous

Conf = Mapping[str, Any]
"""Settings of ``--rdzv-conf``."""
Environ = Mapping[str, str]
"""Variables of the processes that a backend starts."""
Logger = Callable[[str], None]
"""Prints a line on the console."""

LONGEST_DEADLINE = 1800
"""Longest keep-alive deadline with etcd, where a heartbeat vanishes after twice this time."""
_MIN_INTERVAL = 0.01
"""Shortest time between two heartbeats, in seconds: below, agents would do nothing else."""
DEFAULT_PORTS = {"c10d": 29400, "static": 29500}
"""Ports for endpoints that name none, by backend; torch's defaults."""


NO_TOKEN = f"--store-gate: needs a token: --token-file FILE, or {TOKEN_FILE}; elastic-job token FILE makes one"
"""The error if there is a gate, but no token that it could ask for."""


def create_rendezvous(config: LaunchConfig, environ: Environ, log: Logger) -> Rendezvous:
    """Create the rendezvous of a job: that of a built-in backend, or a third-party handler.

    Args:
        config: the job's settings.
        environ: variables of the processes that a backend starts.
        log: prints a line on the console.

    Raises:
        UsageError: a setting is missing or wrong, or the backend is unknown.
        LaunchError: the backend's package is broken.
    """
    if config.rdzv_backend in BUILT_IN or not config.rdzv_backend:
        return create_built_in(config, environ, log)
    option, path = _token_file(config, environ)
    if path:
        raise UsageError(f"{option}={path}: --rdzv-backend {config.rdzv_backend} cannot use a token")
    if config.store_gate:
        raise UsageError(f"--store-gate: --rdzv-backend {config.rdzv_backend} has no gate")
    # Late, because only third-party backends need them.
    from elastic_launch.rendezvous.handler import RendezvousParameters
    from elastic_launch.rendezvous.registry import get_rendezvous_handler

    own = {"backend", "endpoint", "run_id", "min_nodes", "max_nodes", "local_addr"}
    settings = {name: value for name, value in config.rdzv_configs.items() if name not in own}
    params = RendezvousParameters(
        config.rdzv_backend,
        config.rdzv_endpoint,
        config.run_id or "none",
        config.min_nodes,
        config.max_nodes,
        config.local_addr,
        **settings,
    )
    return cast(Rendezvous, get_rendezvous_handler(params))


def adapt(handler: Any, spec: WorkerSpec, environ: Environ, log: Logger) -> Rendezvous:
    """Create the rendezvous that the agent talks to, for a handler of torch's interface.

    Args:
        handler: from ``get_rendezvous_handler``, or the user's own.
        spec: the agent's workers.
        environ: variables of the processes that a backend starts.
        log: prints a line on the console.

    Raises:
        LaunchError: it is not a handler.
        UsageError: a parameter of the built-in backend is missing or wrong.
    """
    from elastic_launch.rendezvous.registry import BuiltInHandler

    if isinstance(handler, BuiltInHandler):
        return create_built_in(launch_config(handler.params, spec), environ, log)
    # The handler comes from outside, and need not be a subclass of ours.
    if not hasattr(handler, "next_rendezvous"):
        raise LaunchError(f"rdzv_handler={handler!r}: must be a rendezvous handler; it has no next_rendezvous()")
    from elastic_launch.core.rendezvous.records import NodeRecord
    from elastic_launch.rendezvous.third_party import ThirdPartyRendezvous
    from elastic_launch.rendezvous.third_party_tasks import HandlerTasks

    node = NodeRecord(os.urandom(8).hex(), host_name(), os.getpid(), spec.local_world_size, spec.role)
    max_pause = spec.get_policy().backoff_limit
    warn = in_colour(log, YELLOW)
    return ThirdPartyRendezvous(HandlerTasks(handler, check_own(node), spec.local_addr, warn, max_pause=max_pause))


def host_name() -> str:
    """Return the name of this host, as other nodes and the user get to see it."""
    return visible(os.uname().nodename)


def check_own(record: NodeRecord) -> NodeRecord:
    """Return this node's own record if the other nodes will accept it.

    Raises:
        UsageError: they would not: an option that goes into it breaks a rule.
    """
    from elastic_launch.core.rendezvous.records import decode, encode

    try:
        return decode(type(record), encode(record), "this node's record")
    except RendezvousStateError as error:
        raise UsageError(f"the options of this node cannot be told to the others: {error}") from error


def launch_config(params: RendezvousParameters, spec: WorkerSpec) -> LaunchConfig:
    """Return the settings of a job that was described by parameters of torch's interface."""
    policy = spec.get_policy()
    return LaunchConfig(
        min_nodes=params.min_nodes,
        max_nodes=params.max_nodes,
        nproc_per_node=spec.local_world_size,
        run_id=params.run_id,
        role=spec.role,
        rdzv_endpoint=params.endpoint,
        rdzv_backend=params.backend,
        rdzv_configs=params.config,
        max_restarts=policy.max_restarts,
        restart_window=policy.window,
        restart_backoff=f"{policy.backoff}:{policy.backoff_limit}",
        fatal_exit_codes=",".join(map(str, policy.fatal_exit_codes)),
        node_failure_limit=policy.node_failure_limit,
        crash_loop=policy.crash_loop,
        local_addr=params.local_addr or spec.local_addr,
    )


def create_built_in(config: LaunchConfig, environ: Environ, log: Logger) -> Rendezvous:
    """Create the rendezvous of a built-in backend. A job of one node needs no store; one of several nodes does.

    Raises:
        UsageError: a setting is missing or wrong.
    """
    if config.max_nodes > 1:
        return create_store_rendezvous(config, environ, log)
    _, token = _token(config, environ)  # it is of no use, but the user may be mistaken about it
    if config.store_gate and not token:
        raise UsageError(NO_TOKEN)
    host, port = "127.0.0.1", 0  # of the workers' store; 0: a free port for each round
    if config.rdzv_backend == "static" and config.rdzv_endpoint:
        host, port = split_endpoint(config.rdzv_endpoint)
    run_id = config.run_id or os.urandom(8).hex()
    backend = config.rdzv_backend or "static"
    address = config.local_addr or host
    return SingleNodeRendezvous(run_id, config.nproc_per_node, address, port, backend, _patience(config))


def _patience(config: LaunchConfig) -> float:
    """Return how long a single node may be unfit: ``join_timeout``, which it needs for nothing else."""
    if not config.health_check:
        return DEFAULT_JOIN_TIMEOUT
    given = {name: config.rdzv_configs.get(name) for name in ("join_timeout", "timeout")}
    values = [_seconds(str(text), f"--rdzv-conf {name}=") for name, text in given.items() if text is not None]
    return next(iter(values), DEFAULT_JOIN_TIMEOUT)


def _token_file(config: LaunchConfig, environ: Environ) -> tuple[str, str]:
    """Return what names the file with the job's token, and its path; that is empty if the job has none."""
    if config.token_file:
        return "--token-file", config.token_file
    return TOKEN_FILE, environ.get(TOKEN_FILE, "")


def _token(config: LaunchConfig, environ: Environ) -> tuple[str, bytes]:
    """Return the path of the file with the job's token, and the token; both are empty if it has none.

    Raises:
        UsageError: the file that is to hold it does not, or others may read it.
    """
    option, path = _token_file(config, environ)
    if not path:
        return "", b""
    from elastic_launch.host import token  # late: few jobs have one

    return os.path.abspath(path), token.read(path, option)


def create_store_rendezvous(config: LaunchConfig, environ: Environ, log: Logger) -> StoreRendezvous:
    """Create the rendezvous of a job of several nodes, which meet over a store.

    Raises:
        UsageError: a setting is missing or wrong.
    """
    # Late: they take 10 ms, which a job of one node saves.
    from elastic_launch.core.rendezvous.messages import Settings
    from elastic_launch.core.rendezvous.records import NodeRecord
    from elastic_launch.rendezvous.store_link import Timeouts
    from elastic_launch.rendezvous.store_rendezvous import StoreRendezvous

    warn = in_colour(log, YELLOW)
    token_file, token = _token(config, environ)
    conf = _read_conf(config, warn)
    rank = _rank(config)
    given = {name: conf[name] for name in Settings._fields if name in conf}
    settings = Settings(config.run_id or "none", config.min_nodes, config.max_nodes, policy=config.policy, **given)
    timeouts = Timeouts(**{name: conf[f"{name}_timeout"] for name in ("store", "read") if f"{name}_timeout" in conf})
    backend: C10dBackend | EtcdBackend
    if config.rdzv_backend.startswith("etcd"):
        if config.store_gate:
            raise UsageError(
                f"--store-gate: --rdzv-backend {config.rdzv_backend} has no gate; use c10d or static, or etcd with TLS"
            )
        backend = _etcd_backend(config, conf, settings, environ, warn, token)
    else:
        gate_key = _gate_key(config, token, settings.run_id)
        backend = _c10d_backend(config, conf, rank, environ, gate_key)
        if environ.get("TORCH_DISABLE_SHARE_RDZV_TCP_STORE") != "1":
            settings = settings._replace(store_port=backend.port)
        elif gate_key:
            raise UsageError(
                "--store-gate: with TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 a worker serves the workers' store, without a "
                "gate; unset it"
            )
    host, pid = host_name(), os.getpid()
    node = f"{host}-{pid}-{os.urandom(4).hex()}"
    record = NodeRecord(node, host, pid, config.nproc_per_node, config.role, rank)
    record = record._replace(space=former.space(), started=former.start_time(pid))
    if config.local_addr:
        record = record._replace(address=config.local_addr, named=True)
    signer = None
    if token:
        from elastic_launch.rendezvous.signing import Signer  # late: it imports hmac

        signer = Signer(token, settings.run_id, warn)
        backend.settings = {**backend.settings, "token_file": token_file}  # for elastic-job, which reads the store
        if config.store_gate:
            backend.settings = {**backend.settings, "store_gate": "true"}
    return StoreRendezvous(
        settings,
        check_own(record),
        backend,
        log,
        timeouts,
        config.verbosity,
        config.rdzv_backend or "c10d",
        signer=signer,
    )


def _gate_key(config: LaunchConfig, token: bytes, run_id: str) -> bytes:
    """Return the key of the gate of the job's store; empty: it has none.

    Raises:
        UsageError: the job has no token.
    """
    if not config.store_gate:
        return b""
    if not token:
        raise UsageError(NO_TOKEN)
    from elastic_launch.store.challenge import gate_key  # late: few jobs have a gate

    return gate_key(token, run_id)


def _c10d_backend(config: LaunchConfig, conf: Conf, rank: int, environ: Environ, gate_key: bytes) -> C10dBackend:
    from elastic_launch.rendezvous.backends.c10d import C10dBackend

    if conf.get("embedded"):
        raise UsageError("--rdzv-conf embedded=true: needs --rdzv-backend etcd")
    endpoint = config.rdzv_endpoint.strip()
    if not endpoint:
        raise UsageError(
            f"{config.max_nodes} nodes need a rendezvous endpoint: pass --rdzv-backend c10d --rdzv-endpoint HOST:PORT, "
            "where HOST is one of them, or --master-addr and --node-rank; use the same --rdzv-id and --nnodes on each"
        )
    if any(character in endpoint for character in "/, "):
        raise UsageError(f"--rdzv-endpoint={endpoint}: must be HOST:PORT")
    host, port = split_endpoint(endpoint)
    is_host = conf.get("is_host")
    if is_host is None and config.rdzv_backend == "static":
        is_host = rank == 0
    port = port or DEFAULT_PORTS.get(config.rdzv_backend, DEFAULT_PORTS["c10d"])
    # With static, the host may call itself localhost where the others use a name, as Kubeflow has it.
    is_local = is_host is None and not config.local_addr and (host == "localhost" or is_loopback(host))
    return C10dBackend(host, port, is_host, environ, is_local, gate_key)


def _etcd_backend(
    config: LaunchConfig, conf: Conf, settings: Settings, environ: Environ, log: Logger, token: bytes
) -> EtcdBackend:
    from elastic_launch.rendezvous.backends.etcd import EmbeddedEtcdBackend, EtcdBackend, wants_certificates
    from elastic_launch.store.etcd.bridge import has_password, is_secure, parse_settings

    endpoint = config.rdzv_endpoint.strip()
    if not endpoint:
        raise UsageError("--rdzv-backend etcd needs --rdzv-endpoint HOST:PORT, or several, separated by commas")
    if not config.run_id:
        raise UsageError("--rdzv-backend etcd needs --rdzv-id: the cluster keeps a job's outcome under it for a day")
    if settings.keep_alive_deadline > LONGEST_DEADLINE:
        raise UsageError(
            "--rdzv-conf keep_alive_interval x keep_alive_max_attempt: with etcd at most "
            f"{LONGEST_DEADLINE} s, not {settings.keep_alive_deadline:g} s"
        )
    texts = {name: str(value) for name, value in config.rdzv_configs.items() if value is not None}
    if "store_timeout" in conf:
        texts["read_timeout"] = str(conf["store_timeout"])  # the bridge has one limit for all attempts together
        texts["timeout_setting"] = "store_timeout"
    if not conf.get("embedded"):
        parse_settings(endpoint, texts)  # here, before anything is started
        if has_password(texts) and not is_secure(texts):
            log("protocol=http: the password for etcd crosses the network unencrypted")
        return EtcdBackend(endpoint, config.run_id, texts, environ)
    # The members start with the nodes. Less than join_timeout, because the bridge knows best what is missing, and may
    # start late.
    texts["start_timeout"] = str(settings.join_timeout - min(10.0, settings.join_timeout / 2))
    members = _embedded_members(endpoint, texts, log)
    log_dir = config.logs_specs.root_log_dir if config.logs_specs else None
    token = token if wants_certificates(texts) else b""
    backend = EmbeddedEtcdBackend(members, config.run_id, texts, environ, log_dir, log, token)
    if token:
        backend.settings = {**backend.settings, "embedded": "true"}  # for elastic-job, which makes certificates, too
    return backend


def _embedded_members(endpoint: str, conf: Mapping[str, str], log: Logger) -> list[tuple[str, int]]:
    """Return host and client port of each member of an embedded etcd; warn about numbers that gain nothing."""
    from elastic_launch.rendezvous.backends.etcd import split_members
    from elastic_launch.store.etcd.bridge import TLS_FILES, given_settings, is_secure, parse_settings

    if users := [name for name in ("user", "username", "password", "password_file") if name in conf]:
        raise UsageError(f"--rdzv-conf {users[0]}: embedded etcd (embedded=true) has no users; it can have TLS")
    parse_settings(endpoint, conf)  # here, before anything is started
    files = given_settings(conf)
    if is_secure(conf) and (missing := [name for name in TLS_FILES if name not in files]):
        raise UsageError(
            f"--rdzv-conf: embedded etcd (embedded=true) with TLS needs cacert, cert and key; {missing[0]} is missing"
        )
    members = split_members(endpoint)
    used = [(host, port + above) for host, port in members for above in (0, 1)]
    if len(set(used)) < len(used):
        raise UsageError(f"--rdzv-endpoint={endpoint}: each member needs two ports of its own, PORT and PORT + 1")
    if max(port for _, port in used) > 65535:
        raise UsageError(f"--rdzv-endpoint={endpoint}: each member needs PORT + 1, too, so PORT must be below 65535")
    if len(members) == 1:
        log(f"embedded etcd with one member, {endpoint}: the job does not survive the loss of that host; use 3")
    elif len(members) % 2 == 0:
        log(f"embedded etcd with {len(members)} members survives no more losses than with one less; use 3 or 5")
    return members


def _rank(config: LaunchConfig) -> int:
    """Return the group rank that this node asks for; -1: any."""
    rank = str(config.rdzv_configs.get("rank", 0 if config.rdzv_backend == "static" else -1))
    if rank != "-1" and not (is_number(rank) and int(rank) < config.max_nodes):
        raise UsageError(f"--node-rank={rank}: must be a number below the number of nodes, {config.max_nodes}")
    return int(rank)


def _seconds(text: str, option: str) -> float:
    return parse_seconds(text, option, above_zero=True)


def _interval(text: str, option: str) -> float:
    if (seconds := _seconds(text, option)) < _MIN_INTERVAL:
        raise UsageError(f"{option}{text!r}: must be at least {_MIN_INTERVAL:g} seconds")
    return seconds


def _attempts(text: str, option: str) -> int:
    if not is_number(text) or int(text) < 2:
        raise UsageError(f"{option}{text}: must be a number of at least 2")
    return int(text)


def _flag(text: str, option: str) -> bool:
    if (flag := read_flag(text)) is None:
        raise UsageError(f"{option}{text}: must be true or false")
    return flag


SETTINGS: dict[str, Callable[[str, str], Any]] = {
    # Durations, in seconds.
    "join_timeout": _seconds,  # how long a node waits for a round to form; default 600
    "timeout": _seconds,  # another name for join_timeout
    "last_call_timeout": _seconds,  # how long a round with min_nodes waits for more after the last arrival; default 30
    "close_timeout": _seconds,  # how long the node that hosts the store waits for the others at the end; default 30
    "store_timeout": _seconds,  # how long to try to reach a store that was lost; default 60
    "read_timeout": _seconds,  # how long a connection to the store, or a reply, may take; default 60
    "keep_alive_interval": _interval,  # time between two heartbeats of a node; default 5
    # Others.
    "keep_alive_max_attempt": _attempts,  # intervals without a heartbeat until a node is lost, at least 2; default 3
    "is_host": _flag,  # whether this node hosts the c10d store; default: if the endpoint is an address of this host
    "embedded": _flag,  # whether the agents run etcd's members; default false
}
"""Settings of ``--rdzv-conf``, with the functions that read a text; the option is for their error messages."""
ETCD_SECURITY = (
    *("cacert", "ca_cert", "cert", "ssl_cert", "key", "ssl_cert_key"),
    *("user", "username", "password", "password_file"),
)
"""Settings for an etcd cluster with TLS or users: files, and names."""
OTHER_SETTINGS = {"rank", "protocol", *ETCD_SECURITY}
"""Settings that are read elsewhere: the rank of ``--node-rank``, and those of ``EtcdBridge``."""


def _read_conf(config: LaunchConfig, log: Logger) -> dict[str, Any]:
    """Return the settings of ``--rdzv-conf`` that were given, as values. Log the unknown ones.

    Raises:
        UsageError: a value is wrong.
    """
    given = {name: value for name, value in config.rdzv_configs.items() if value is not None}
    if unknown := sorted(given.keys() - SETTINGS.keys() - OTHER_SETTINGS):
        # With an inline password they may be parts of it.
        names = "" if "password" in given else f": {', '.join(unknown)}"
        log(f"--rdzv-conf: ignoring {counted(len(unknown), 'unknown setting')}{names}")
    values = {name: read(str(given[name]), f"--rdzv-conf {name}=") for name, read in SETTINGS.items() if name in given}
    if "timeout" in values:
        values.setdefault("join_timeout", values["timeout"])
    return values
