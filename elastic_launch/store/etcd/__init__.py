"""The etcd v3 store: the bridge that each agent runs, and members that agents run themselves."""
