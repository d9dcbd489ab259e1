"""How nodes find each other and agree on who has which rank."""

BUILT_IN = ("static", "c10d", "etcd", "etcd-v2")
"""Names of the built-in backends. Both ``etcd`` and ``etcd-v2`` mean etcd v3."""
