"""Random operations on a real directory, checked against a model: `python -m tests.random --help`."""  # noqa: A005
