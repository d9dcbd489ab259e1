"""The health check server: one small process that answers HTTP."""
