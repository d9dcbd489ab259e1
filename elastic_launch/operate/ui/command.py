"""The subcommand ``elastic-job ui``: choose the address and the token, say where the page is, and serve it."""

from __future__ import annotations

import argparse
import errno
import ipaddress
import os
import secrets
import signal
import socket
from collections.abc import Sequence
from urllib.parse import quote

from elastic_launch.env import environment
from elastic_launch.errors import UnavailableError, UsageError
from elastic_launch.operate.ui.access import Access
from elastic_launch.operate.ui.feeds import Feeds
from elastic_launch.operate.ui.server import Server

PORT = 8470
"""The port if none is given and nobody has it; otherwise any free one."""


def main(argv: Sequence[str]) -> int:
    """Serve the page until Ctrl-C."""
    parser = argparse.ArgumentParser(
        prog="elastic-job ui",
        description="Show your jobs on this host as a page in a browser, live. Ctrl-C ends it; the jobs do not notice.",
    )
    parser.add_argument("--port", type=int, metavar="N", help=f"default: {PORT}, or a free one if that is taken")
    parser.add_argument(
        "--bind", metavar="ADDR", default="127.0.0.1", help="address to serve (default: 127.0.0.1); others need a token"
    )
    parser.add_argument(
        "--token", metavar="T", help="token that browsers must present; made and printed if the address needs one"
    )
    args = parser.parse_args(argv)
    if args.port is not None and not 0 <= args.port < 1 << 16:
        raise UsageError(f"--port={args.port}: must be from 0 to 65535")
    if args.token is not None and not (args.token and all("!" <= letter <= "~" for letter in args.token)):
        raise UsageError("--token: must be ASCII characters without spaces")
    signal.signal(signal.SIGPIPE, signal.SIG_IGN)  # clients go at any time
    with _bound(args.bind, args.port, args.token) as server:
        print(f"elastic-job ui: {_link(server, args.bind)}  (Ctrl-C ends it)", flush=True)
        server.serve_forever(poll_interval=60)
    return 0


def _bound(bind: str, port: int | None, token: str | None) -> Server:
    """Return a server that listens.

    Raises:
        UsageError: there is no such address.
        UnavailableError: the port is taken, or may not be used.
    """
    try:
        family, _, _, _, (address, *_) = socket.getaddrinfo(bind, None, type=socket.SOCK_STREAM)[0]
    except (OSError, UnicodeError) as error:
        raise UsageError(f"--bind={bind}: no such address ({error})") from error
    is_local = ipaddress.ip_address(str(address).partition("%")[0]).is_loopback
    if token is None and not is_local:
        token = secrets.token_urlsafe(24)
    access = Access(token or "", (bind, os.uname().nodename))
    for attempt in (PORT, 0) if port is None else (port,):
        try:
            return Server((str(address), attempt), family, access, Feeds(environment()))
        except OSError as error:
            if error.errno == errno.EADDRINUSE and port is None and attempt:
                continue
            raise UnavailableError(f"--bind={bind}, port {attempt}: {error.strerror}; choose another") from error
    raise AssertionError("port 0 is never in use")


def _link(server: Server, bind: str) -> str:
    address, port = server.server_address[:2]
    host = os.uname().nodename if ipaddress.ip_address(str(address).partition("%")[0]).is_unspecified else bind
    host = f"[{host}]" if ":" in host else host
    return f"http://{host}:{port}/" + (f"#token={quote(server.access.token, safe='')}" if server.access.token else "")
