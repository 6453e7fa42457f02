"""What decides: pure values and functions. Nothing here knows trio, the operating system, sockets, clocks or chance."""
