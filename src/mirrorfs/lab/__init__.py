"""Two hosts on one machine, for trying, testing and measuring mirrorfs.

`network` makes the hosts out of network namespaces, `pair` runs a mirrorfs node on each and is the interface for Python,
`disks` gives them disks whose power can be cut, `cli` is the commands.
"""
