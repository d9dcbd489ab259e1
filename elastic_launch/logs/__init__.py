"""The workers' output, on its way to files and to the launcher's own streams."""

from elastic_launch.logs.pump import LogPump
from elastic_launch.logs.source import Duplicates, Route

__all__ = ["Duplicates", "LogPump", "Route"]
