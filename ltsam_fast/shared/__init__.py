"""Several weighted gradients of one batch from one backward sweep.

:class:`SharedBackward` is what optimizers and diagnostics use; ``graph`` reads autograd's graph, ``layout`` finds which sample
each row of a gradient belongs to, ``examine`` decides whether a network qualifies, ``products``
forms gradients of weights, and ``sweep`` runs it all.
"""

from ltsam_fast.shared.not_shared import NotShared
from ltsam_fast.shared.products import Weighting
from ltsam_fast.shared.shared_backward import SharedBackward

__all__ = ["NotShared", "SharedBackward", "Weighting"]
