"""``elastic-job``: look at running jobs, and stop or restart them. A program of its own, which asks their agents."""
