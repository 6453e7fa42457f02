"""Files of lines of JSON that are only added to, and do not grow for ever: the events, and the audit log."""

import json
import logging
import os
from pathlib import Path
from typing import Any, Final

log = logging.getLogger(__name__)

#: Half of it is given up when it is full.
_KEPT_BYTES: Final = 1 << 20


class Lines:
    """One such file, mode 0600; a second one beside it has what was before. What cannot be written is told in the log."""

    def __init__(self, file: Path) -> None:
        self.file = file
        self._before = file.with_name(f"{file.name}.1")
        self._failed = False

    def add(self, *entries: dict[str, Any]) -> None:
        """Add them; may wait for the disk, so not in a task that others wait for."""
        try:
            self.file.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            descriptor = os.open(self.file, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
            with os.fdopen(descriptor, "wb") as out:
                out.write(b"".join(json.dumps(entry).encode() + b"\n" for entry in entries))
                full = out.tell() > _KEPT_BYTES // 2
            if full:
                self.file.replace(self._before)
            self._failed = False
        except OSError as error:
            if not self._failed:
                log.error("%s: cannot be written (%s)", self.file, error.strerror)
            self._failed = True

    def last(self, count: int) -> list[dict[str, Any]]:
        """The newest, oldest first; a line that was cut off is left out."""
        found: list[dict[str, Any]] = []
        for file in (self.file, self._before):
            try:
                text = file.read_text(errors="replace")
            except OSError:
                continue
            entries = []
            for line in text.rstrip("\n").split("\n")[-(count - len(found)) :]:
                try:
                    entry = json.loads(line)
                except ValueError:
                    continue
                if isinstance(entry, dict):
                    entries.append(entry)
            found = entries + found
            if len(found) >= count:
                break
        return found
