"""The process of one job: ends with the sweep that started it, then becomes the training itself.

`python sweeps/job.py train.py model=...` is `python train.py model=...`, except that Linux sends it SIGTERM when the
process that started it is gone: a sweep that was killed leaves nothing running that would write into the same folders.
Where that process is not the sweep's (submitit), the job's lock keeps two of them out of one folder.
"""

import ctypes
import fcntl
import os
import signal
import sys
import time

PR_SET_PDEATHSIG = 1
LOCK_WAIT_S = 10.0


def take(lock: str, ticket: str) -> None:
    """Hold the job's lock for as long as the training lives; a job that the sweep has submitted again ends here."""
    file = os.open(lock, os.O_RDWR | os.O_CREAT, 0o644)
    deadline = time.monotonic() + LOCK_WAIT_S
    while True:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            break
        except BlockingIOError:  # a sweep that looks holds it for a moment, another job for as long as it trains
            if time.monotonic() > deadline:
                sys.exit(f"error: another process trains in this job's folder (it holds {lock}).")
            time.sleep(0.1)
    if os.read(file, 100).decode() != ticket:
        sys.exit("error: the sweep was started again in the meantime and has submitted this job anew.")
    os.set_inheritable(file, True)


if __name__ == "__main__":
    parent = os.environ.pop("CONDCONV_SWEEP_PROCESS", None)
    if parent is not None and sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
        if parent != "any" and os.getppid() != int(parent):  # it went before the request was made
            sys.exit(1)
    lock, ticket = (os.environ.pop(f"CONDCONV_SWEEP_{name}", None) for name in ("LOCK", "TICKET"))
    if lock is not None:  # before the log, which is the other process's if there is one
        take(lock, ticket or "")
    log = os.environ.pop("CONDCONV_SWEEP_LOG", None)
    if log is not None:
        file = os.open(log, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
        os.dup2(file, 1)
        os.dup2(file, 2)
    # submitit announces the end of a SLURM allocation with it; SLURM's own SIGTERM, a little later, is what we obey.
    signal.signal(signal.SIGUSR2, signal.SIG_IGN)
    os.execv(sys.executable, [sys.executable, *sys.argv[1:]])
