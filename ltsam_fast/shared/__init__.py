"""Several weighted gradients of one batch from one backward pass: use :class:`SharedBackward`.

``autograd_graph`` reads autograd's graph, ``layout`` finds which sample each row of a gradient belongs to, ``qualify`` decides
whether a network qualifies, ``products`` forms gradients of weights and counts multiplications, and ``shared_backward`` runs
the pass.
"""

from ltsam_fast.shared.not_shared import NotShared
from ltsam_fast.shared.products import Weighting
from ltsam_fast.shared.shared_backward import SharedBackward

__all__ = ["NotShared", "SharedBackward", "Weighting"]
