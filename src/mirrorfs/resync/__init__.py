"""Bringing a returning node to the same tree while the application runs, inside the ordered stream of live changes.

`quick` brings over what the dirty sets of both nodes say may differ; `full` copies everything, where they cannot be trusted.
"""
