"""Runnable examples, one for each way to train: ``python -m ltsam_fast.examples.plain_loop``, and likewise the others.

All of them train on long-tailed digits, on the CPU if need be, in seconds. ``--method`` takes any method of the demo.
"""
