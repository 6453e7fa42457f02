"""The kernel session: the protocol of /dev/fuse spoken from here, without a library between.

`protocol` has its structs and flags, `requests` the table of requests and answers, `loop` the session.
"""
