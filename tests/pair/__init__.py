"""Two real nodes: what is lost, what is refused and what is said when nodes, cables and disks fail."""
