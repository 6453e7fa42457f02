"""mirrorfs: a file system mirrored between two Linux servers, for applications that must not lose a write."""

__version__ = "0.1.0"
