"""Runs programs that a model wrote, on Linux, where nothing of the machine can be reached.

Two processes inside own user, mount, pid, network, ipc and uts namespaces: the tester (pid 1; it holds the benchmark's
tests and the channel of the verdict) and the candidate (it holds the model's program). They exchange plain data only,
so a program cannot print, exit or compare its way to a pass: it has to return the right values.
"""

from hcx.evals.sandbox.runner import Limits, Sandbox, Verdict

__all__ = ["Limits", "Sandbox", "Verdict"]
