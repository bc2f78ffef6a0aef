"""The process of one job: ends with the sweep that started it, then becomes the training itself.

`python sweeps/job.py train.py model=...` is `python train.py model=...`, except that Linux sends it SIGTERM when the
process that started it is gone: a sweep that was killed leaves nothing running that would write into the same folders.
"""

import ctypes
import os
import signal
import sys

PR_SET_PDEATHSIG = 1

if __name__ == "__main__":
    parent = os.environ.pop("CONDCONV_SWEEP_PROCESS", None)
    if parent is not None and sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
        if parent != "any" and os.getppid() != int(parent):  # it went before the request was made
            sys.exit(1)
    log = os.environ.pop("CONDCONV_SWEEP_LOG", None)
    if log is not None:
        file = os.open(log, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
        os.dup2(file, 1)
        os.dup2(file, 2)
    # submitit announces the end of a SLURM allocation with it; SLURM's own SIGTERM, a little later, is what we obey.
    signal.signal(signal.SIGUSR2, signal.SIG_IGN)
    os.execv(sys.executable, [sys.executable, *sys.argv[1:]])
