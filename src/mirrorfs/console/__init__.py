"""The console: a web page, its HTTP API and the metrics, served by the controller of a node."""
