"""The decisions about a job's progress. Pure: no I/O, no clock."""
