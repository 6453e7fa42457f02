"""Who may use the console: people with a password, programs with a token, and the role of each.

A file of mode 0600 among the node's keys: `{"users": {NAME: {"role", "salt", "hash"}}, "tokens": {NAME: {"role", "hash"}}}`.
Passwords are kept as scrypt of a salt each; tokens, which are 256 random bits, as their SHA-256. The console looks at it
once a second: a user that is removed, or has a new password, is out.
"""

import hashlib
import json
import os
import re
import secrets
from pathlib import Path
from typing import Any, Final

from mirrorfs.console.roles import Role
from mirrorfs.errors import MirrorfsError, UsageError
from mirrorfs.files import Version, version, write_durably

#: RFC 7914 with 32 MiB: a tenth of a second, and for somebody who has the file as much for each guess.
_SCRYPT: Final = {"n": 1 << 15, "r": 8, "p": 1, "maxmem": 64 << 20, "dklen": 32}
_SHORTEST: Final = 10
_LONGEST: Final = 1024
_NAME: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9._@-]{0,62}")


Content = dict[str, dict[str, dict[str, str]]]


class Users:
    """The users and tokens of one node, as the file had them when it was last looked at (`refresh`)."""

    def __init__(self, keys: Path) -> None:
        """`keys` is the directory of the node's keys."""
        self.file = keys / "console-users.json"
        self._read_as: Version | None = None
        self._content: Content = {"users": {}, "tokens": {}}

    def refresh(self) -> None:
        """Look at the file; may wait for the disk. Raises MirrorfsError if it cannot be read: then nobody is known."""
        try:
            if (now := version(self.file)) != self._read_as:
                self._content = _checked(json.loads(self.file.read_text()))
                self._read_as = now
        except FileNotFoundError:
            self._content, self._read_as = {"users": {}, "tokens": {}}, None
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            self._content, self._read_as = {"users": {}, "tokens": {}}, None
            raise MirrorfsError(f"{self.file}: cannot be read ({error}): remove it and make the users anew") from None

    # ---- for the command line

    def add(self, name: str, password: str, role: Role) -> None:
        """Make a user, or give one a new password and role: who is logged in by that name is out. Raises UsageError for a name
        or password that will not do, MirrorfsError if the file cannot be written."""
        self._check_name(name)
        if not _SHORTEST <= len(password) <= _LONGEST:
            raise UsageError(f"the password has {len(password)} characters: use {_SHORTEST} to {_LONGEST}")
        salt = secrets.token_bytes(16)
        self.refresh()
        self._content["users"][name] = {"role": str(role), "salt": salt.hex(), "hash": _hash(password, salt).hex()}
        self._save()

    def add_token(self, name: str, role: Role) -> str:
        """Make a token for a program, and return it: it is kept nowhere. Raises as `add` does."""
        self._check_name(name)
        token = secrets.token_urlsafe(32)
        self.refresh()
        self._content["tokens"][name] = {"role": str(role), "hash": _token_hash(token)}
        self._save()
        return token

    def remove(self, name: str) -> None:
        """Remove the user and the token of that name; UsageError if there is neither."""
        self.refresh()
        if not [part.pop(name) for part in self._content.values() if name in part]:
            raise UsageError(f"{name}: there is no such user and no such token")
        self._save()

    def listing(self) -> list[tuple[str, str, Role]]:
        """Name, kind ("user" or "token") and role of each."""
        self.refresh()
        return [
            (name, kind, Role(entry["role"]))
            for kind, part in (("user", "users"), ("token", "tokens"))
            for name, entry in sorted(self._content[part].items())
        ]

    # ---- for the console

    @property
    def is_empty(self) -> bool:
        """Whether nobody can log in."""
        return not self._content["users"]

    def check(self, name: str, password: str) -> Role | None:
        """The role of a user with this password, None if there is none. Takes a tenth of a second, also for no user."""
        entry = self._content["users"].get(name)
        salt = bytes.fromhex(entry["salt"]) if entry else bytes(16)
        found = _hash(password[:_LONGEST], salt)
        if entry is None or not secrets.compare_digest(found, bytes.fromhex(entry["hash"])):
            return None
        return Role(entry["role"])

    def role_of(self, name: str, proof: str) -> Role | None:
        """The role that a user has now; None if he is none any more, or has another password than when `proof_of` was asked."""
        entry = self._content["users"].get(name)
        return None if entry is None or entry["salt"] != proof else Role(entry["role"])

    def proof_of(self, name: str) -> str:
        """What is another one after a change of the password; empty for no user."""
        entry = self._content["users"].get(name)
        return "" if entry is None else entry["salt"]

    def of_token(self, token: str) -> tuple[str, Role] | None:
        """Name and role of a token, None if it is none."""
        found = _token_hash(token)
        for name, entry in self._content["tokens"].items():
            if secrets.compare_digest(entry["hash"], found):
                return name, Role(entry["role"])
        return None

    # ---- the file

    def _check_name(self, name: str) -> None:
        if not _NAME.fullmatch(name):
            raise UsageError(f"{name!r} is not a name: use 1 to 63 of A-Z a-z 0-9 . _ @ -, beginning with a letter or digit")

    def _save(self) -> None:
        try:
            self.file.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            write_durably(self.file, json.dumps(self._content, indent=1).encode(), 0o600)
        except OSError as error:
            raise MirrorfsError(f"{self.file}: cannot be written ({os.strerror(error.errno or 0)}), are you root?") from None
        self._read_as = None


def _checked(content: Any) -> Content:
    for entry in content["users"].values():
        Role(entry["role"]), bytes.fromhex(entry["salt"]), bytes.fromhex(entry["hash"])
    for entry in content["tokens"].values():
        Role(entry["role"]), str(entry["hash"])
    return {"users": dict(content["users"]), "tokens": dict(content["tokens"])}


def _hash(password: str, salt: bytes) -> bytes:
    return hashlib.scrypt(password.encode(errors="surrogatepass"), salt=salt, **_SCRYPT)


def _token_hash(token: str) -> str:
    return hashlib.sha256(token.encode(errors="surrogatepass")).hexdigest()
