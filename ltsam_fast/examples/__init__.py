"""Examples, one for each way to train: type ``python -m ltsam_fast.examples.plain_loop``, for instance.

Each trains on long-tailed digits in seconds, on the CPU too. ``--method`` takes any method of the demo except ``sgd``.
"""
