"""An fsync on this node and on its peer at once."""

import os

import trio

from mirrorfs.stream import Stream


async def sync_both(descriptor: int, data_only: bool, stream: Stream | None, sequence: int) -> OSError | None:
    """Sync a file here, and wait for the peer's sync `sequence` of `stream` (0: for nothing); returns what failed here.

    Whether the peer's succeeded, the stream says.
    """
    failure: OSError | None = None

    async def sync_here() -> None:
        nonlocal failure
        try:
            await trio.to_thread.run_sync(os.fdatasync if data_only else os.fsync, descriptor)
        except OSError as error:
            failure = error
            nursery.cancel_scope.cancel()

    async with trio.open_nursery() as nursery:
        nursery.start_soon(sync_here)
        if sequence:
            assert stream is not None
            await stream.flushed(sequence)
    return failure
