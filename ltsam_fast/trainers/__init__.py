"""The optimizers in Lightning, Hugging Face's Trainer and Accelerate.

Import a trainer's module by name: ``ltsam_fast.trainers.lightning``, ``.hugging_face`` or ``.accelerate``.

A trainer calls one forward, one backward and one step. These methods need several passes over the same batch, and per-sample
losses. So the micro-batches of a step are stored until the trainer calls for the step, and the optimizer runs its passes over
them: one perturbation per step, for any number of micro-batches.

Where the optimizer's ``plan``, or the method, evaluates some samples of a batch, these are taken from the tensors that are as
long as the labels; all others, such as a mask of shape (1, L, L), stay whole. A batch that holds other things than tensors,
numbers and strings in tuples, lists, mappings and dataclasses is evaluated as a whole.
"""
