"""Comparing both trees while the application runs, and mending what differs.

The primary walks its tree and asks the standby, in the ordered stream, what it has (`witness`). A difference counts only if
both nodes show it at one and the same point of the stream: then no change that is on its way can explain it. `asking` knows
how to be at one point, `walk` where to look, `mending` how to put things right, `verifier` when.
"""
