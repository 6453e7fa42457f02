"""What `mirrorfs promote --dry-run` says."""

from typing import Any


def in_words(found: dict[str, Any]) -> str:
    """A preview (`preview.Preview.describe`, or that of a controller) as text."""
    name = found["node"]
    if found["does"] == "nothing":
        return f"{name} is the primary already: nothing would happen"
    lines = [f"{name} would become the primary: {_how(found)}"]
    if found["against"]:
        lines.append(f"against it   {found['against']}")
    lines.append(f"missing      {found['missing'] or 'nothing that was acknowledged'}")
    lines.append(f"open files   {_open(found['open'])}")
    lines += [f"             {path}" for path in (found["open"] or {"paths": []})["paths"]]
    lines.append(f"time         {_time(found)}")
    return "\n".join(lines)


def _how(found: dict[str, Any]) -> str:
    moves = ", services and addresses move" if "services" in found else ""
    if found["does"] == "switch-over":
        return f"the two swap roles{moves}"
    return f"alone, the other node is not connected as a primary{', services and addresses are started' if moves else ''}"


def _open(open_files: dict[str, Any] | None) -> str:
    if open_files is None:
        return "not known: the other node cannot be asked"
    count = open_files["files"]
    if not count:
        return f"none on {open_files['node']}"
    return f"{count} on {open_files['node']}, {open_files['writing']} for writing: these fail from then on (EROFS)"


def _time(found: dict[str, Any]) -> str:
    parts = [f"role {found['role_s'] * 1000:.0f} ms (as measured now)"]
    services = found.get("services")
    if services is not None:
        parts.append(f"services down {_last(services['stop_s'])}")
        parts.append(f"services up {_last(services['start_s'])}")
    return ", ".join(parts)


def _last(took_s: float | None) -> str:
    return "not known, it was not done yet" if took_s is None else f"{took_s:.1f} s (as the last time)"
