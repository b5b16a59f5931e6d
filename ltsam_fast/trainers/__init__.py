"""The optimizers under other people's training loops: Lightning, Hugging Face's Trainer and Accelerate.

A trainer calls one forward, one backward and one step; these methods need several passes over the same batch, and losses of
single samples. So the batches of a step are kept until the trainer wants it taken (gradient accumulation keeps several), and
the optimizer then runs its passes over them itself: one perturbation a step, however many micro-batches.

Each trainer has a module of its own, to be imported by name: ``ltsam_fast.trainers.lightning``, ``.hugging_face``,
``.accelerate``.
"""
