"""Calls to an etcd cluster: one member is asked, and the next one when it fails or takes long, until a deadline.

Runs in the bridge's process only, in its asyncio loop. gRPC and etcd3's stubs are passed in, from ``etcd.protobuf``.

A call that failed may have taken effect. It may even take effect later, when a frozen member resumes. So every change
must take effect once, no matter how often it is sent. ``etcd.keys`` makes sure of that.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import random
from typing import Any, NamedTuple

from elastic_launch.core.store_requests import ANSWER_LIMIT

FIRST_ATTEMPT, LONGEST_ATTEMPT = 2.0, 16.0
"""Seconds for the first attempt at a call, and at most. The time doubles once all members have failed, so a cluster
that is merely slow gets more time."""

HEDGE = 0.5
"""Seconds without an answer after which a request is sent to another member as well. So a member that is frozen or cut
off costs half a second, and one that is merely slow is not given up. The members are asked in turn, and each of them
again: what was on its way to a leader that is lost is never answered, not even when there is another leader."""
SLOW = 2.0
"""If answers usually take long, because of a slow link, so many times that time must have passed instead."""

PING_INTERVAL = 6.0
"""Seconds between pings on an idle connection. etcd closes connections that send pings more often than every 5 s."""

_TLS = ("ssl", "tls", "certificate")
_OTHER_PROTOCOL = ("http1", "http/1", "http/2")
"""Words of gRPC's errors that show why there is no connection."""

MAX_ANSWER = ANSWER_LIMIT + (1 << 20)
"""Most bytes of an answer: as much as an agent accepts, and something for keys and versions."""
MAX_SHORT_ANSWER = 1 << 16
"""Most bytes of an answer that consists of a few numbers, or of a token."""
_SHORT = {"etcdserverpb.Lease": ("LeaseGrant", "LeaseRevoke", "LeaseKeepAlive"), "etcdserverpb.Auth": ("Authenticate",)}
"""Methods with such answers. gRPC has a bound for each method and one for the channel, but none for each call."""
_SERVICE_CONFIG = {
    "methodConfig": [
        {
            "name": [{"service": service, "method": name} for service, names in _SHORT.items() for name in names],
            "maxResponseMessageBytes": MAX_SHORT_ANSWER,
        }
    ]
}

RETURN_INTERVAL = 3.0
"""Seconds between two looks whether this host's own member serves, while another one is used."""

_LONGEST_PAUSE = 1.0
_CREDENTIALS = "pass user=NAME,password_file=FILE in --rdzv-conf"


class EtcdError(Exception):
    """The bridge cannot go on. The message is one line: what happened, where, and what to do next."""

    def __init__(self, message: str, why: str = "") -> None:
        super().__init__(message)
        self.why = why
        """etcd's own words, if it refuses a request; empty otherwise."""


class EtcdSettings(NamedTuple):
    """How to reach a cluster. Plain values, because they come from another process."""

    endpoints: tuple[str, ...]
    """``HOST:PORT`` of members."""
    secure: bool
    """Whether to use TLS."""
    cacert: bytes | None
    """Certificates of the authorities to trust, as PEM; None trusts those that gRPC knows."""
    cert: bytes | None
    """The client's certificate, as PEM; None if there is none."""
    key: bytes | None
    """The client's private key, as PEM; None if there is none."""
    user: str | None
    password: str | None
    read_timeout: float
    """Seconds for a call, including all attempts."""
    start_timeout: float
    """Seconds for a call, as long as no call has been answered."""
    cluster_id: int = 0
    """Members of other clusters are not used; 0 accepts any."""
    preferred: str = ""
    """The endpoint to use first: this host's own member. Empty: any, so that the agents of a job spread."""
    timeout_setting: str = "read_timeout"
    """The setting of ``--rdzv-conf`` that ``read_timeout`` comes from."""


def in_order(settings: EtcdSettings) -> list[str]:
    """The endpoints in the order in which they are used: at random, but this host's own member is the first.

    Then the loss of another host costs the agent of this one nothing.
    """
    shuffled = random.sample(settings.endpoints, len(settings.endpoints))
    return sorted(shuffled, key=lambda endpoint: endpoint != settings.preferred)


class MemberChannel:
    """A gRPC channel to one member, which connects when it is first used."""

    def __init__(self, grpc: Any, etcdrpc: Any, endpoint: str, settings: EtcdSettings) -> None:
        self.endpoint = endpoint
        self.last_error = ""
        """Why it has not answered since it last did; empty: it has."""
        self.is_unusable = False
        """Whether the last error is permanent: it is not etcd, or its certificate is wrong."""
        options = [
            ("grpc.keepalive_time_ms", int(PING_INTERVAL * 1000)),
            ("grpc.keepalive_timeout_ms", int(FIRST_ATTEMPT * 1000)),
            ("grpc.http2.ping_timeout_ms", int(FIRST_ATTEMPT * 1000)),
            ("grpc.keepalive_permit_without_calls", 0),
            ("grpc.initial_reconnect_backoff_ms", 100),
            ("grpc.min_reconnect_backoff_ms", int(FIRST_ATTEMPT * 1000)),  # also limits the time to connect
            ("grpc.max_reconnect_backoff_ms", int(_LONGEST_PAUSE * 1000)),
            ("grpc.max_receive_message_length", MAX_ANSWER),
            ("grpc.service_config", json.dumps(_SERVICE_CONFIG)),
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
            "LeaseRevoke": lease.LeaseRevoke,
            "LeaseLeases": lease.LeaseLeases,
            "Authenticate": etcdrpc.AuthStub(channel).Authenticate,
        }
        self.keep_alive = lease.LeaseKeepAlive
        self.watch = etcdrpc.WatchStub(channel).Watch


class Cluster:
    """The members of a cluster, one of which is current."""

    def __init__(self, grpc: Any, etcdrpc: Any, settings: EtcdSettings) -> None:
        self.etcdrpc = etcdrpc
        self.settings = settings
        self.rpc_error: type[Exception] = grpc.aio.AioRpcError
        self.end_of_stream: Any = grpc.aio.EOF
        self._code = grpc.StatusCode
        try:
            self._members = [MemberChannel(grpc, etcdrpc, endpoint, settings) for endpoint in in_order(settings)]
        except ValueError as error:  # OpenSSL does not accept a key
            raise EtcdError(f"cannot use cacert, cert and key of --rdzv-conf: {error}") from error
        self._current = 0
        self.switched = asyncio.Event()
        """Set, and replaced, when another member becomes current."""
        self._has_answered = False
        self._usual = 0.0
        """Seconds that answers to ``call`` have taken of late."""
        self._by_id: dict[int, MemberChannel] = {}
        """The members that have answered, by etcd's ids."""
        self._left: set[asyncio.Future[Any]] = set()
        """Calls whose answers are no longer needed. They are not cancelled: etcd before 3.5.5 crashes if a transaction
        that only reads is cancelled while it is carried out."""
        self._token: str | None = None
        self._signing_in = asyncio.Lock()

    @property
    def member(self) -> MemberChannel:
        """The current member."""
        return self._members[self._current]

    @property
    def where(self) -> str:
        """The name of the cluster in messages."""
        return f"etcd at {','.join(self.settings.endpoints)}"

    def metadata(self) -> tuple[tuple[str, str], ...]:
        """The gRPC metadata of each call."""
        return (("token", self._token),) if self._token else ()

    async def call(self, name: str, request: Any, attempts: Attempts | None = None) -> Any:
        """Have a member answer a request, which may be sent several times; ``attempts`` counts the failed ones.

        Raises:
            EtcdError: The request is refused, or no member has answered within ``call_timeout``.
        """
        attempts = attempts or Attempts(self)
        while True:
            if answer := await self._ask(name, request, attempts):
                member, response = answer
                if self._is_ours(response):
                    self._has_answered = True
                    member.last_error = ""
                    self._by_id[response.header.member_id] = member
                    return response
                member.is_unusable = not self._has_answered
                self.switch_from(member, "it is a member of another cluster; does another job use the same endpoints?")
                self._check_members()
            await attempts.pause()

    async def _ask(self, name: str, request: Any, attempts: Attempts) -> tuple[MemberChannel, Any] | None:
        """Ask the current member, and from time to time another one as well, until one answers.

        Returns:
            The first to answer, and the answer; None: all that were asked have failed. Raises EtcdError.
        """
        metadata, first = self.metadata(), self.member
        in_turn = [*self._members[self._current :], *self._members[: self._current]]
        asked: dict[asyncio.Future[Any], tuple[MemberChannel, float]] = {}
        hedge = min(FIRST_ATTEMPT, max(HEDGE, SLOW * self._usual))
        clock, count, next_at = asyncio.get_running_loop().time, 0, 0.0
        try:
            while True:
                if count < len(in_turn) or clock() >= next_at:
                    member = in_turn[count % len(in_turn)]
                    call = member.calls[name](request, timeout=attempts.timeout(), metadata=metadata)
                    asked[asyncio.ensure_future(call)] = member, clock()
                    count += 1
                    next_at = clock() + hedge * 2 ** min(10, max(0, count // len(in_turn) - 1))
                patience = max(0.0, next_at - clock()) if self._has_answered else None
                done, _ = await asyncio.wait(asked, timeout=patience, return_when="FIRST_COMPLETED")
                attempts.count += not done  # the request may take effect at several members
                for task in done:
                    (member, asked_at), error = asked.pop(task), task.exception()
                    if error is None:
                        self._usual += (clock() - asked_at - self._usual) / 4
                        if member is not first:
                            self.switch_from(first, f"no answer within {hedge:g} s")
                        return member, task.result()
                    if not isinstance(error, self.rpc_error):
                        raise error
                    await self.recover(member, metadata, error)
                    attempts.has_lost = True
                if not asked:
                    return None
        finally:
            for task, (member, _) in asked.items():
                self._left.add(task)
                attempts.left.append(task)
                task.add_done_callback(self._forget)
                if self.settings.preferred and member is self._members[0]:
                    task.add_done_callback(self._return)

    def _forget(self, task: asyncio.Future[Any]) -> None:
        self._left.discard(task)
        if not task.cancelled():
            task.exception()  # nobody wants to know

    def _return(self, task: asyncio.Future[Any]) -> None:
        """Go back to this host's own member, whose answer is late: what only has to be read there is there at once."""
        has_answered = not task.cancelled() and task.exception() is None and self._is_ours(task.result())
        if has_answered and self.member is not self._members[0]:
            self._use(0)

    async def ask(self, member_id: int, name: str, request: Any) -> Any:
        """Ask the member that gave an earlier answer, once, for what it answers from memory.

        Returns:
            The answer; None if it does not give any. A load balancer may have another member answer.
        """
        if member := self._by_id.get(member_id):
            with contextlib.suppress(self.rpc_error):
                return await member.calls[name](request, timeout=FIRST_ATTEMPT, metadata=self.metadata())
        return None

    async def keep_alive(self, lease: int) -> int:
        """Renew a lease. Returns the seconds that it has left, 0 if it does not exist. Raises EtcdError."""
        attempts = Attempts(self)
        while True:
            member, metadata = self.member, self.metadata()
            request = self.etcdrpc.LeaseKeepAliveRequest(ID=lease)
            stream = member.keep_alive(iter((request,)), timeout=attempts.timeout(), metadata=metadata)
            try:
                async for response in stream:
                    return int(response.TTL)
                self.switch_from(member, "it ended the stream")
                await attempts.pause()
            except self.rpc_error as error:
                await attempts.failed(member, metadata, error)
            finally:
                stream.cancel()

    def switch_from(self, member: MemberChannel, why: str) -> None:
        """Make the next member the current one, unless that has happened already."""
        member.last_error = why
        if member is self.member:
            self._use((self._current + 1) % len(self._members))

    def _use(self, index: int) -> None:
        self._current = index
        self.switched.set()
        self.switched = asyncio.Event()

    async def return_to_own(self) -> None:
        """Go back to this host's own member whenever that serves, forever. It may begin to serve after others."""
        own = self._members[0]
        while True:
            await asyncio.sleep(RETURN_INTERVAL)
            if own is not self.member:
                with contextlib.suppress(self.rpc_error):
                    request = self.etcdrpc.RangeRequest(key=b"\0")  # answered only with a majority
                    response = await own.calls["Range"](request, timeout=FIRST_ATTEMPT, metadata=self.metadata())
                    if self._is_ours(response):
                        self._use(0)

    async def recover(self, member: MemberChannel, metadata: tuple[tuple[str, str], ...], error: Any) -> None:
        """Prepare another attempt after an error: sign in again, or switch to the next member.

        Raises:
            EtcdError: Another attempt would not help.
        """
        code, why = error.code(), " ".join((error.details() or "").split()) or error.code().name
        if code is self._code.UNAUTHENTICATED or "revision in header is old" in why or "invalid auth token" in why:
            if metadata == self.metadata():
                await self.sign_in(stale=metadata)
            return
        if "user name is empty" in why:
            raise EtcdError(f"etcd at {member.endpoint} requires a user: {_CREDENTIALS}")
        if code is self._code.PERMISSION_DENIED:
            raise EtcdError(
                f"etcd at {member.endpoint} denies user={self.settings.user} access to the job's keys ({why}): "
                "grant the user's role permission to read and write below the job's prefix",
                why,
            )
        if "requested lease not found" in why:
            raise EtcdError(f"the job's keys in {self.where} are gone: their lease has expired", why)
        if code is self._code.RESOURCE_EXHAUSTED and "larger than max" in why:
            raise EtcdError(
                f"etcd at {member.endpoint} answers with more than was asked for ({why}): does something else write "
                "to the job's keys?"
            )
        is_late = code is self._code.DEADLINE_EXCEEDED or why == "context deadline exceeded"  # as etcd itself says it
        if is_late and member.last_error:
            self.switch_from(member, member.last_error)  # that says more: the last attempt ends with the call
            return
        member.is_unusable = not self._has_answered and (
            code is self._code.UNIMPLEMENTED or (code is self._code.UNAVAILABLE and self._is_mismatch(why))
        )
        transient = (
            self._code.UNAVAILABLE,
            self._code.DEADLINE_EXCEEDED,
            self._code.INTERNAL,
            self._code.CANCELLED,
            self._code.UNKNOWN,
            self._code.ABORTED,
        )
        if code not in transient and "too many requests" not in why and not member.is_unusable:
            raise EtcdError(f"etcd at {member.endpoint} refuses the request: {why} ({code.name})", why)
        self.switch_from(member, self._explain(why))
        self._check_members()

    def _is_ours(self, response: Any) -> bool:
        return self.settings.cluster_id in (0, response.header.cluster_id)

    def is_over(self, attempt: asyncio.Future[Any]) -> bool:
        """Whether an attempt has been carried out, or refused because there was nothing to do."""
        if not attempt.done() or attempt.cancelled():
            return False
        error = attempt.exception()
        if isinstance(error, self.rpc_error):
            return bool(error.code() is self._code.NOT_FOUND)  # type: ignore[attr-defined]
        return error is None

    def _check_members(self) -> None:
        """Raise EtcdError if no member can be used."""
        if all(member.is_unusable for member in self._members):
            raise EtcdError(f"{self.where} cannot be used: {self._errors()}")

    def _is_mismatch(self, why: str) -> bool:
        """Whether a failure shows that the endpoint speaks another protocol, or has a wrong certificate."""
        words = (*_OTHER_PROTOCOL, *(_TLS if self.settings.secure else ()))
        return any(word in why.lower() for word in words)

    def _explain(self, why: str) -> str:
        """gRPC's error message about a failed connection, with a hint at what to do.

        gRPC speaks of a handshake whenever a new connection breaks, with or without TLS.
        """
        lowered, short = why.lower(), why if len(why) <= 300 else f"{why[:300]} ..."
        is_cut = "socket closed" in lowered or "handshake" in lowered
        if self.settings.secure and "certificate" in lowered and "verify" in lowered:
            return f"its certificate is not signed by the authority in cacert of --rdzv-conf ({short})"
        if self.settings.secure and not self._has_answered and (is_cut or any(word in lowered for word in _TLS)):
            return f"no TLS connection: check protocol, cacert, cert and key of --rdzv-conf ({short})"
        if any(word in lowered for word in _OTHER_PROTOCOL):
            return f"it is not etcd; perhaps another HTTP server ({short})"
        if is_cut and not self.settings.secure and not self._has_answered:
            return f"it closes the connection: it may need protocol=https in --rdzv-conf ({short})"
        return short

    @property
    def call_timeout(self) -> float:
        """Seconds for a call that begins now, including all attempts."""
        return self.settings.read_timeout if self._has_answered else self.settings.start_timeout

    def unreachable(self) -> EtcdError:
        """The error to raise if no member has answered in time."""
        what = "has not answered for" if self._has_answered else "cannot be reached within"
        name = self.settings.timeout_setting
        setting = f" ({name} of --rdzv-conf)" if self.call_timeout == self.settings.read_timeout else ""
        return EtcdError(f"{self.where} {what} {self.call_timeout:g} s{setting}: {self._errors()}")

    def _errors(self) -> str:
        failed = [member for member in self._members if member.last_error]
        if len(self._members) == 1 and failed:
            return failed[0].last_error
        return "; ".join(f"{member.endpoint}: {member.last_error}" for member in failed)

    async def sign_in(self, stale: tuple[tuple[str, str], ...] = ()) -> None:
        """Get a token for user and password. Does nothing if another task has just replaced the ``stale`` one.

        Raises:
            EtcdError: User and password are missing or wrong.
        """
        settings = self.settings
        async with self._signing_in:
            if self.metadata() != stale:
                return
            if settings.user is None:
                raise EtcdError(f"{self.where} requires a user: {_CREDENTIALS}")
            request = self.etcdrpc.AuthenticateRequest(name=settings.user, password=settings.password or "")
            attempts = Attempts(self)
            while True:
                member = self.member
                try:
                    response = await member.calls["Authenticate"](request, timeout=attempts.timeout())
                except self.rpc_error as error:
                    why = str(error.details())  # type: ignore[attr-defined]
                    if "authentication is not enabled" in why:
                        return  # no token is needed
                    if "authentication failed" in why:
                        raise EtcdError(
                            f"etcd at {member.endpoint} does not accept user={settings.user} with this password: "
                            f"{_CREDENTIALS}"
                        ) from None
                    await attempts.failed(member, self.metadata(), error)
                else:
                    self._token = response.token
                    return


class Attempts:
    """The attempts at one call: how long each may take, and the pauses between them."""

    def __init__(self, cluster: Cluster) -> None:
        self._cluster = cluster
        self._loop = asyncio.get_running_loop()
        self._end = self._loop.time() + cluster.call_timeout
        self.count = 0
        """Number of attempts that have failed."""
        self.left: list[asyncio.Future[Any]] = []
        """Those whose answers were not waited for."""
        self.has_lost = False
        """Whether one has failed that may take effect later."""

    async def are_over(self) -> bool:
        """Wait for the answers to all attempts, but not for long. Returns whether none can take effect later."""
        if self.left and not self.has_lost:
            await asyncio.wait(self.left, timeout=HEDGE)
        return not self.has_lost and all(self._cluster.is_over(task) for task in self.left)

    def timeout(self) -> float:
        """Seconds for the next attempt."""
        rounds = self.count // len(self._cluster.settings.endpoints)
        seconds = min(LONGEST_ATTEMPT, FIRST_ATTEMPT * (1 << min(rounds, 10)))
        return max(0.05, min(seconds, self._end - self._loop.time()))

    async def failed(self, member: MemberChannel, metadata: tuple[tuple[str, str], ...], error: Any) -> None:
        """Prepare the next attempt. Raises EtcdError if the error is permanent, or if the time is up."""
        await self._cluster.recover(member, metadata, error)
        await self.pause()

    async def pause(self) -> None:
        """Pause before the next attempt, once all members have failed. Raises EtcdError if the time is up."""
        self.count += 1
        now = self._loop.time()
        if now >= self._end:
            raise self._cluster.unreachable()
        rounds = self.count // len(self._cluster.settings.endpoints)
        if rounds:
            longest = min(_LONGEST_PAUSE, 0.05 * (1 << min(rounds, 10)), self._end - now)
            await asyncio.sleep(random.uniform(longest / 2, longest))
