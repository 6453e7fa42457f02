"""`python -m mirrorfs.lab.booted HOME ARGUMENTS`: `mirrorfs ARGUMENTS` on a host that is not quite this machine.

What is different about it stands in the directory of the host: another boot (`boot`), faults of its disk (`faults`).

The two hosts of a lab share the kernel, and with it the boot id by which a node knows that its machine was restarted. A mount
over /proc/sys would need a mount namespace for each host, and in that the other processes of the lab would not see what the
node mounts. A setting would be there in production too, where a boot id that outlives a boot makes a node promise what it has
lost, and a fault that somebody left armed ends it. So it is this program, which only a lab starts, that puts other functions
in the place of those that ask the kernel.
"""

import runpy
import sys
from pathlib import Path

from mirrorfs import keeper
from mirrorfs.lab import faults


def main() -> None:
    """Do as `python -m mirrorfs` does, on the host whose directory is the first argument."""
    home = Path(sys.argv.pop(1))
    if (home / "boot").exists():
        boot = (home / "boot").read_text()
        keeper.boot_id = lambda: boot
    if (home / "faults").is_dir():
        faults.inject(home / "faults")
    runpy.run_module("mirrorfs", run_name="__main__")


if __name__ == "__main__":
    main()
