"""`mirrorfs verify` in the foreground: follow a walk of the node through its control socket, and print what it finds."""

import json
import sys
import time
from pathlib import Path
from typing import Any, Final

from mirrorfs import control
from mirrorfs.progress_show import progress

_POLL_S: Final = 0.1


def follow(socket: Path, *, as_json: bool) -> int:
    """Print each difference on a line of its own until the walk ends; the exit status: 1 if there was one.

    Progress goes to stderr. Ctrl-C stops the walk too. Raises the MirrorfsError that ended it before its time.
    """
    lines: list[str] = []
    try:
        with progress("verify") as show:
            while True:
                found = control.request(socket, "verify-look", since=len(lines))
                lines += found["differences"]
                if not as_json:
                    for line in found["differences"]:
                        print(line, flush=True)
                if not found["running"] and not found["differences"]:
                    break
                show(_state(found))
                time.sleep(0 if found["differences"] else _POLL_S)
    except KeyboardInterrupt:
        control.request(socket, "verify-stop")
        raise
    last = found["last"]
    if as_json:
        print(json.dumps({**last, "differences": lines}))
    else:
        if last["found"] > len(lines):
            print(f"and at {last['found'] - len(lines)} more paths")
        print(_summary(last), file=sys.stderr)
    return 1 if last["found"] else 0


def _summary(last: dict[str, Any]) -> str:
    looked = f"{last['files']} files, {_in_mib(last['bytes'])} compared"
    if not last["found"]:
        return f"both trees are equal ({looked})"
    return f"differences: {last['found']}, of them repaired: {last['repaired']} ({looked})"


def _state(found: dict[str, Any]) -> str:
    return f"verify: {found['files']} files, {_in_mib(found['bytes'])} compared, differences: {found['found']}"


def _in_mib(count_bytes: int) -> str:
    return f"{count_bytes / (1 << 20):.1f} MiB"
