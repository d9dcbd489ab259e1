"""The job's store: clients, and the processes that serve it."""
