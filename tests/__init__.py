"""The tests, in rooms.

| room | what is tested there |
|---|---|
| decisions | what needs no process: decisions, values, the command line; what is read of the host, on made-up trees |
| simulation | the rendezvous and the agent's decisions on a virtual clock, in random schedules |
| processes | one launcher, with real workers, pipes, terminals and signals |
| cluster | several launchers on this host, and on hosts made of namespaces |
| stores | the job's stores and what serves them |
| compat | torch's names, signatures and behaviour; the examples in docstrings |

No test module imports another. Helpers are in ``support``, fixtures in files named conftest.py.
"""
