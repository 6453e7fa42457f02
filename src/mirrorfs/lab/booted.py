"""`python -m mirrorfs.lab.booted BOOT ARGUMENTS`: `mirrorfs ARGUMENTS` in another boot of the machine.

The two hosts of a lab share the kernel, and with it the boot id by which a node knows that its machine was restarted. A mount
over /proc/sys would need a mount namespace for each host, and in that the other processes of the lab would not see what the
node mounts. A setting would be there in production too, where a boot id that outlives a boot makes a node promise what it has
lost. So it is this program, which only a lab starts, that puts another function in the place of the one that asks the kernel.
"""

import runpy
import sys

from mirrorfs import keeper


def main() -> None:
    """Do as `python -m mirrorfs` does, in the boot that the first argument names."""
    boot = sys.argv.pop(1)
    keeper.boot_id = lambda: boot
    runpy.run_module("mirrorfs", run_name="__main__")


if __name__ == "__main__":
    main()
