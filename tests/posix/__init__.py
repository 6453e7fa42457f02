"""The behaviour that POSIX and Linux promise to applications, tried on any directory."""
# ruff: noqa: A005  the name collides with nothing: it is only ever imported as tests.posix
