"""Layer 2: the job's store: clients, and the processes that serve it."""
