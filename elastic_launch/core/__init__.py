"""Decisions: pure functions of events and the time, without processes, sockets, clocks, files or environment."""
