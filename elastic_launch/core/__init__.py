"""Layer 1: decisions. Pure functions of events and ``now``; no process, socket, clock, file or environment."""
