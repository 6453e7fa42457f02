"""Writes what completes the command line: `packaging/completions.py ROOT` makes files for bash, zsh and fish below ROOT.

They are typer's, and ask `mirrorfs` itself what may follow, so they know what this version knows.
"""

import sys
from pathlib import Path
from typing import Final

from typer._completion_shared import get_completion_script

_NAME: Final = "mirrorfs"
_VARIABLE: Final = "_MIRRORFS_COMPLETE"
#: Where each shell of Debian looks for those of packages.
_PLACES: Final = {
    "bash": "usr/share/bash-completion/completions/mirrorfs",
    "zsh": "usr/share/zsh/vendor-completions/_mirrorfs",
    "fish": "usr/share/fish/vendor_completions.d/mirrorfs.fish",
}
#: zsh loads the file at the first TAB and runs it for an answer; typer's only says who will give it, from the second on.
_ZSH_AT_ONCE: Final = '\n[[ $zsh_eval_context[-1] == loadautofunc ]] && _mirrorfs_completion "$@"'


def main() -> None:
    """Write all of them below the directory that is given; ends with exit status 2 if none is."""
    if len(sys.argv) != 2:
        print("usage: completions.py ROOT", file=sys.stderr)
        sys.exit(2)
    write(Path(sys.argv[1]))


def write(root: Path) -> list[Path]:
    """Write all of them below the root of a file system; returns their paths."""
    written = []
    for shell, place in _PLACES.items():
        path = root / place
        path.parent.mkdir(parents=True, exist_ok=True)
        text = get_completion_script(prog_name=_NAME, complete_var=_VARIABLE, shell=shell)
        path.write_text(text + (_ZSH_AT_ONCE if shell == "zsh" else "") + "\n", encoding="utf-8")
        written.append(path)
    return written


if __name__ == "__main__":
    main()
