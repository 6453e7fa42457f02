"""Two hosts on one machine, for trying, testing and measuring mirrorfs.

`network` makes the hosts out of network namespaces, `pair` runs a mirrorfs node on each and is the interface for Python,
`cli` is the commands.
"""
