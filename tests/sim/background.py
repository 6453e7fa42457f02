"""Runs of the simulator beside the other tests: most of these wait, and leave the processor to whoever can use it."""

import os
import signal
import subprocess
import sys
import tempfile
from typing import Final

#: Fewer than this take only some rows of the tables, by chance.
_ENOUGH: Final = 20_000


class Background:
    """`python -m tests.sim` over so many sites, on what processor time is left."""

    def __init__(self) -> None:
        seeds = int(os.environ.get("MIRRORFS_SITE_SEEDS", "1000"))
        command = [sys.executable, "-m", "tests.sim", "--scenario", "failover", "--seeds", str(seeds), "--jobs", "0", "--idle"]
        if seeds >= _ENOUGH:
            command.append("--coverage")
        self._output = tempfile.TemporaryFile()  # noqa: SIM115  (closed by `end`)
        self._process = subprocess.Popen(command, stdout=self._output, stderr=subprocess.STDOUT, start_new_session=True)

    def wait(self) -> tuple[int, str]:
        """Its exit status and all that it said."""
        status = self._process.wait()
        self._output.seek(0)
        return status, self._output.read().decode()

    def end(self) -> None:
        """It is not needed any more."""
        if self._process.poll() is None:
            os.killpg(self._process.pid, signal.SIGTERM)
            self._process.wait()
        self._output.close()
