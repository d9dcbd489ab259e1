"""What the agent decides: its life cycle, restarts, root causes and the failure report."""
