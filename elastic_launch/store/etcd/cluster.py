"""Layer 2: calls to the members of an etcd cluster: one at a time, another when that one fails, until a deadline.

Runs in the bridge's process only, in its asyncio loop. gRPC and etcd3's stubs are handed in (``store.etcd.protobuf``).

A call that failed may have been done all the same, and may even be done later, when a member that was frozen wakes up.
So what changes something must take effect once, however often it is sent: ``store.etcd.keys`` sees to that.
"""

from __future__ import annotations

import asyncio
import random
from typing import Any, NamedTuple

FIRST_PATIENCE, LONGEST_PATIENCE = 2.0, 16.0
"""Seconds for an attempt at a call, which double: a member that is frozen, or cut off, costs the first. A cluster that
is merely slow gets more."""

PING_INTERVAL = 6.0
"""Seconds between pings on a connection without traffic. etcd takes offence below 5."""

_LONGEST_PAUSE = 1.0
_SIGN_IN = "pass user=NAME,password=... in --rdzv-conf"


class EtcdError(Exception):
    """There is no way to go on. The message is one line: what, where, and what to do next."""


class Settings(NamedTuple):
    """How to reach a cluster; plain values, since they come from another process."""

    endpoints: tuple[str, ...]
    """``HOST:PORT`` of members."""
    secure: bool
    cacert: bytes | None
    """PEM; None: the authorities that gRPC knows."""
    cert: bytes | None
    key: bytes | None
    user: str | None
    password: str | None
    read_timeout: float
    """Seconds for a call, all attempts together."""
    start_timeout: float
    """The same as long as no call was answered."""
    cluster_id: int = 0
    """Members of another cluster are not to be used; 0: there is no knowing."""


class Member:
    """A connection to one member, made when it is first used."""

    def __init__(self, grpc: Any, etcdrpc: Any, endpoint: str, settings: Settings) -> None:
        self.endpoint = endpoint
        self.trouble = ""
        """Why it failed last."""
        self.hopeless = False
        """Whether that will be so again: it is no etcd, or its certificate does not fit."""
        options = [
            ("grpc.keepalive_time_ms", int(PING_INTERVAL * 1000)),
            ("grpc.keepalive_timeout_ms", int(FIRST_PATIENCE * 1000)),
            ("grpc.http2.ping_timeout_ms", int(FIRST_PATIENCE * 1000)),
            ("grpc.keepalive_permit_without_calls", 0),
            ("grpc.initial_reconnect_backoff_ms", 100),
            ("grpc.min_reconnect_backoff_ms", int(FIRST_PATIENCE * 1000)),  # it is also the time to connect
            ("grpc.max_reconnect_backoff_ms", int(_LONGEST_PAUSE * 1000)),
            ("grpc.max_receive_message_length", -1),
            ("grpc.enable_http_proxy", 0),
            ("grpc.use_local_subchannel_pool", 1),
        ]
        if settings.secure:
            credentials = grpc.ssl_channel_credentials(settings.cacert, settings.key, settings.cert)
            channel = grpc.aio.secure_channel(endpoint, credentials, options)
        else:
            channel = grpc.aio.insecure_channel(endpoint, options)
        kv, lease = etcdrpc.KVStub(channel), etcdrpc.LeaseStub(channel)
        self.calls = {
            "Range": kv.Range,
            "Txn": kv.Txn,
            "LeaseGrant": lease.LeaseGrant,
            "Authenticate": etcdrpc.AuthStub(channel).Authenticate,
        }
        self.keep_alive = lease.LeaseKeepAlive
        self.watch = etcdrpc.WatchStub(channel).Watch


class Cluster:
    """The members, of which one is current."""

    def __init__(self, grpc: Any, etcdrpc: Any, settings: Settings) -> None:
        self.etcdrpc = etcdrpc
        self.settings = settings
        self.rpc_error: type[Exception] = grpc.aio.AioRpcError
        self.end_of_stream: Any = grpc.aio.EOF
        self._code = grpc.StatusCode
        try:
            self._members = [Member(grpc, etcdrpc, endpoint, settings) for endpoint in settings.endpoints]
        except ValueError as error:  # OpenSSL's words about a key
            raise EtcdError(f"cannot use cacert, cert and key of --rdzv-conf: {error}") from error
        random.shuffle(self._members)  # the agents of a job spread over the members
        self._current = 0
        self.moved = asyncio.Event()
        """Set, and replaced, when the current member is another."""
        self._met = False
        self._token: str | None = None
        self._signing_in = asyncio.Lock()

    @property
    def member(self) -> Member:
        """The current member."""
        return self._members[self._current]

    @property
    def where(self) -> str:
        """What messages call the cluster."""
        return f"etcd at {','.join(self.settings.endpoints)}"

    def metadata(self) -> tuple[tuple[str, str], ...]:
        """What goes with each call."""
        return (("token", self._token),) if self._token else ()

    async def call(self, name: str, request: Any) -> Any:
        """Have a request answered by a member; it may be sent several times.

        Raises:
            EtcdError: it is refused, or no member answered within ``read_timeout``.
        """
        attempts = Attempts(self)
        while True:
            member, metadata = self.member, self.metadata()
            try:
                response = await member.calls[name](request, timeout=attempts.patience(), metadata=metadata)
            except self.rpc_error as error:
                await attempts.failed(member, metadata, error)
            else:
                if self.settings.cluster_id in (0, response.header.cluster_id):
                    self._met = True
                    return response
                member.hopeless = not self._met
                self.leave(member, "it is a member of another cluster: does another job use the same endpoints?")
                if all(other.hopeless for other in self._members):
                    raise EtcdError(f"{self.where} is of no use: {self._troubles()}")
                await attempts.pause()

    async def keep_alive(self, lease: int) -> int:
        """Renew a lease. Returns the seconds that it has, 0 if there is none. Raises as ``call``."""
        attempts = Attempts(self)
        while True:
            member, metadata = self.member, self.metadata()
            request = self.etcdrpc.LeaseKeepAliveRequest(ID=lease)
            stream = member.keep_alive(iter((request,)), timeout=attempts.patience(), metadata=metadata)
            try:
                async for response in stream:
                    return int(response.TTL)
                self.leave(member, "it ended the stream")
                await attempts.pause()
            except self.rpc_error as error:
                await attempts.failed(member, metadata, error)
            finally:
                stream.cancel()

    def leave(self, member: Member, why: str) -> None:
        """Go on with the next member, unless others have left this one already."""
        member.trouble = why
        if member is self.member:
            self._current = (self._current + 1) % len(self._members)
            self.moved.set()
            self.moved = asyncio.Event()

    async def judge(self, member: Member, metadata: tuple[tuple[str, str], ...], error: Any) -> None:
        """Do what helps against an error: sign in again, or go to the next member.

        Raises:
            EtcdError: nothing does.
        """
        code, why = error.code(), " ".join((error.details() or "").split()) or error.code().name
        if code is self._code.UNAUTHENTICATED or "revision in header is old" in why or "invalid auth token" in why:
            if metadata == self.metadata():
                await self.sign_in(stale=metadata)
            return
        if "user name is empty" in why:
            raise EtcdError(f"etcd at {member.endpoint} wants a user: {_SIGN_IN}")
        if code is self._code.PERMISSION_DENIED:
            raise EtcdError(
                f"etcd at {member.endpoint} denies user={self.settings.user} the job's keys ({why}): "
                "grant the user's role reading and writing below the job's prefix"
            )
        if "requested lease not found" in why:
            raise EtcdError(f"the job's keys in {self.where} are gone: expired with their lease")
        member.hopeless = not self._met and (
            code is self._code.UNIMPLEMENTED or (code is self._code.UNAVAILABLE and _is_mismatch(why))
        )
        passing = (
            self._code.UNAVAILABLE,
            self._code.DEADLINE_EXCEEDED,
            self._code.INTERNAL,
            self._code.CANCELLED,
            self._code.UNKNOWN,
            self._code.ABORTED,
        )
        if code not in passing and "too many requests" not in why and not member.hopeless:
            raise EtcdError(f"etcd at {member.endpoint} refuses: {why} ({code.name})")
        self.leave(member, _cause(why, self.settings))
        if all(other.hopeless for other in self._members):
            raise EtcdError(f"{self.where} is of no use: {self._troubles()}")

    @property
    def patience(self) -> float:
        """Seconds for a call that begins now."""
        return self.settings.read_timeout if self._met else self.settings.start_timeout

    def unreachable(self) -> EtcdError:
        """The error for the case that no member answers."""
        again = "lost for" if self._met else "cannot be reached within"
        name = " (read_timeout of --rdzv-conf)" if self.patience == self.settings.read_timeout else ""
        return EtcdError(f"{self.where} {again} {self.patience:g} s{name}: {self._troubles()}")

    def _troubles(self) -> str:
        told = [member for member in self._members if member.trouble]
        if len(self._members) == 1 and told:
            return told[0].trouble
        return "; ".join(f"{member.endpoint}: {member.trouble}" for member in told)

    async def sign_in(self, stale: tuple[tuple[str, str], ...] = ()) -> None:
        """Get a token for user and password, where there are some.

        Raises:
            EtcdError: they are wrong.
        """
        settings = self.settings
        async with self._signing_in:
            if self.metadata() != stale:
                return  # somebody else just did
            if settings.user is None:
                raise EtcdError(f"{self.where} wants a user: {_SIGN_IN}")
            request = self.etcdrpc.AuthenticateRequest(name=settings.user, password=settings.password or "")
            attempts = Attempts(self)
            while True:
                member = self.member
                try:
                    response = await member.calls["Authenticate"](request, timeout=attempts.patience())
                except self.rpc_error as error:
                    why = str(error.details())  # type: ignore[attr-defined]
                    if "authentication is not enabled" in why:
                        return  # then nobody needs a token
                    if "authentication failed" in why:
                        raise EtcdError(
                            f"etcd at {member.endpoint} does not accept user={settings.user} with this password: "
                            f"{_SIGN_IN}"
                        ) from None
                    await attempts.failed(member, self.metadata(), error)
                else:
                    self._token = response.token
                    return


class Attempts:
    """The attempts at one call: how long each may take, and the pauses in between."""

    def __init__(self, cluster: Cluster) -> None:
        self._cluster = cluster
        self._loop = asyncio.get_running_loop()
        self._end = self._loop.time() + cluster.patience
        self._count = 0

    def patience(self) -> float:
        """Seconds for the next attempt."""
        rounds = self._count // len(self._cluster.settings.endpoints)
        seconds = min(LONGEST_PATIENCE, FIRST_PATIENCE * (1 << min(rounds, 10)))
        return max(0.05, min(seconds, self._end - self._loop.time()))

    async def failed(self, member: Member, metadata: tuple[tuple[str, str], ...], error: Any) -> None:
        """Judge an error and make a pause. Raises EtcdError when it is final, or the time is up."""
        await self._cluster.judge(member, metadata, error)
        await self.pause()

    async def pause(self) -> None:
        """Wait before the next attempt, once every member has failed. Raises EtcdError when the time is up."""
        self._count += 1
        now = self._loop.time()
        if now >= self._end:
            raise self._cluster.unreachable()
        rounds = self._count // len(self._cluster.settings.endpoints)
        if rounds:
            longest = min(_LONGEST_PAUSE, 0.05 * (1 << min(rounds, 10)), self._end - now)
            await asyncio.sleep(random.uniform(longest / 2, longest))


def _is_mismatch(why: str) -> bool:
    """Whether an endpoint's failure says that it speaks something else, or is not who it should be."""
    lowered = why.lower()
    return any(word in lowered for word in ("ssl", "tls", "certificate", "http1", "http/1", "http/2"))


def _cause(why: str, settings: Settings) -> str:
    """gRPC's words about a failed connection, with what to do about it."""
    lowered = why.lower()
    if "certificate" in lowered and "verify" in lowered:
        return f"its certificate is not one of the authority in cacert of --rdzv-conf ({_short(why)})"
    if any(word in lowered for word in ("ssl", "tls", "handshake")) or (settings.secure and "socket closed" in lowered):
        return f"no TLS connection: check protocol, cacert, cert and key of --rdzv-conf ({_short(why)})"
    if any(word in lowered for word in ("http1", "http/1", "http/2")):
        return f"it is no etcd, but perhaps another HTTP server ({_short(why)})"
    if "socket closed" in lowered:
        return f"it closes the connection: it may want protocol=https in --rdzv-conf ({_short(why)})"
    return _short(why)


def _short(text: str) -> str:
    return text if len(text) <= 300 else f"{text[:300]} ..."
