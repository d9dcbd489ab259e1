"""The agent: runs one node's part of a job."""
