"""Signals for a script at an exact point: in a process of its own it waits for one before the n-th call of a function.

python tests/pausing.py SCRIPT FUNCTION N FLAGS...    # FUNCTION may be a method: RunLog.write
"""

import importlib
import signal
import subprocess
import sys
import threading
from pathlib import Path


def interrupt(script, cwd, flags, function: str, n: int, number: signal.Signals) -> tuple[int, str]:
    """Run the script up to the n-th call of the function, send it the signal there; its exit code and stderr."""
    command = [sys.executable, __file__, script.__file__, function, str(n), *map(str, flags)]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    process = subprocess.Popen(command, cwd=cwd, **pipes)
    watchdog = threading.Timer(600, process.kill)
    watchdog.start()
    try:
        assert "paused\n" in process.stdout, f"ended before call {n} of {function}: {process.communicate()}"
        process.send_signal(number)
        _, err = process.communicate(timeout=300)
    finally:
        watchdog.cancel()
        process.kill()
    return process.returncode, err


def main(path: str, function: str, n: str, *flags: str) -> int:
    sys.path.insert(0, str(Path(path).parent))
    script = importlib.import_module(Path(path).stem)
    *owner, name = function.split(".")
    owner = getattr(script, owner[0]) if owner else script
    original, calls = getattr(owner, name), []

    def pausing(*args, **kwargs):
        calls.append(None)
        if len(calls) == int(n):
            print("paused", flush=True)
            sys.stdin.read()  # until the signal has been sent
        return original(*args, **kwargs)

    setattr(owner, name, pausing)
    script.LOG_EVERY, script.SAVE_EVERY = 1, 0  # steps, and Atari's seconds between checkpoints: as often as can be
    sys.argv = [path, *flags]
    return script.main()


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
