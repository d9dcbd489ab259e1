"""The control socket of an agent: who asks it, how a job looks and what is to become of it."""
