"""Several weighted gradients of one batch from one backward sweep.

:class:`SharedBackward` is what optimizers and diagnostics use; ``graph`` reads autograd's graph, ``layout`` finds which sample
each row of a gradient belongs to, ``examine`` decides whether a network qualifies, ``sweep`` does the work.
"""

from ltsam_fast.shared.sweep import NotShared, SharedBackward

__all__ = ["NotShared", "SharedBackward"]
