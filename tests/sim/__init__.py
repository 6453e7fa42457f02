"""A deterministic simulator of the pair: two real nodes, everything outside them simulated. See docs/SIMULATOR.md."""
