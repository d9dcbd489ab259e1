"""The agent: one node's part of a job, its loop, its workers, and what it reports."""
