"""SSE-SAM: sharpness of head and tail apart, later of the tail alone."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ltsam_fast.ops.checks import check_count, check_factor, tail_of
from ltsam_fast.optim.batch import Batch, Scaling, mean_loss
from ltsam_fast.optim.class_wise import ClassWise
from ltsam_fast.optim.gradients import _swap_gradients


class SSESAM(ClassWise):
    r"""Stage-wise saddle-escaping sharpness-aware minimization.

    .. code-block:: text

        head, tail losses: (1/B) sum of l_j over n_{y_j} >= eta, and over n_{y_j} < eta
        stage 1:  eps_h = rho * g_h / (|g_h| + 1e-12),  eps_t = tail_rho * g_t / (|g_t| + 1e-12)
                  w <- base_step(w, g_h(w + eps_h) + g_t(w + eps_t))
        stage 2:  w <- base_step(w, g_h(w) + g_t(w + eps_t))

    Stage 1 takes three forwards and four backwards (the published code four and four), 60 bytes moved per fp32 parameter
    with SGD and momentum; stage 2 two and three, 44 bytes.

    Args:
        params: Parameters or groups, as for any torch optimizer.
        base_optimizer: The class that takes the step, e.g. ``torch.optim.SGD``.
        rho: The head's radius in stage 1, in units of the weights, >= 0.
        adaptive: Scale the perturbations by the weights, as ASAM does.
        class_counts: C numbers of training samples. Without them only the three phases of stage 2 can be used, and the
            losses are weighed by the caller.
        eta: Classes with fewer samples than this are tail.
        tail_rho: The tail's radius in both stages; ``None``: each group's ``rho``.
        switch_step: The number of steps of stage 1 (the published recipe: 0.7 of all); ``None``: stage 2 never comes.
        model: If given, running statistics of normalization layers see the unperturbed pass only.
        max_grad_norm: Clip the final gradient to this norm, inside the update; 0: do not.
        **base_kwargs: Options of ``base_optimizer``; and ``shared_backward`` (False, True or "auto", with ``model``): the
            gradients at w from one backward sweep, see :class:`ltsam_fast.optim.sharing.Sharing`.

    Raises:
        ValueError: ``rho``, ``tail_rho``, ``class_counts`` or ``eta`` is negative or not finite.
        TypeError: ``base_optimizer`` is not a class.

    Differences from the published code: both ascent gradients come from one forward; restoring is a copy; 1e-12 is added to
    the norm, not 1e-16; stage 2 does not run the head's idle perturbation. ``ltsam_fast.compat.SSESAM`` has its calls.

    Source: "SSE-SAM: Balancing Head and Tail Classes Gradually through Stage-Wise SAM", AAAI 2025 (arXiv 2412.13715).

    >>> _ = torch.manual_seed(0)
    >>> model = torch.nn.Linear(3, 2)
    >>> opt = SSESAM(model.parameters(), torch.optim.SGD, class_counts=[90, 10], eta=20, switch_step=70, lr=0.1)
    >>> x, y = torch.randn(8, 3), torch.randint(0, 2, (8,))
    >>> loss = opt.step(lambda: torch.nn.functional.cross_entropy(model(x), y, reduction="none"), targets=y)
    """

    _kept = (*ClassWise._kept, "tail_rho", "switch_step")

    def __init__(
        self,
        params: Any,
        base_optimizer: Callable[..., torch.optim.Optimizer],
        rho: float = 0.05,
        adaptive: bool = False,
        *,
        class_counts: Any = None,
        eta: float = 100,
        tail_rho: float | None = None,
        switch_step: int | None = None,
        model: torch.nn.Module | None = None,
        max_grad_norm: float = 0.0,
        **base_kwargs: Any,
    ) -> None:
        tail = tail_of(class_counts, eta, None)
        self.tail_rho = None if tail_rho is None else check_factor("tail_rho", tail_rho)
        self.switch_step = None if switch_step is None else check_count("switch_step", switch_step, least=0)
        self._climbing_for_head = False
        super().__init__(params, base_optimizer, rho, adaptive, model=model, max_grad_norm=max_grad_norm, **base_kwargs)
        if tail is not None:
            self._weigh(~tail, tail)

    def _forget(self) -> None:
        super()._forget()
        self._climbing_for_head = False

    def _hyper(self, name: str) -> Any:
        values = super()._hyper(name)
        if name == "rho" and not self._climbing_for_head and self.tail_rho is not None:
            return (self.tail_rho,) * len(values)
        return values

    def _whole_step(self, parts: list[Batch], scaling: Scaling) -> Tensor:
        if self.switch_step is not None and self._taken >= self.switch_step:
            return super()._whole_step(parts, scaling)
        params, _ = self._parameters()
        nothing: list[Tensor | None] = [None] * len(params)
        size = sum(part.size for part in parts)
        head = list(nothing)
        weights = []
        for part in parts:
            with self._local():
                losses = self._evaluate(part)
                u, v = (x if x is not None else torch.zeros_like(losses) for x in self._cotangents(part.labels, losses))
                head = self._backward_both(losses, scaling(u / size), scaling(v / size), head)
                weights.append((u, v))
        tail = _swap_gradients(params, head)
        done = nothing
        for number, grads in enumerate((None, tail)):
            if grads is not None:  # weights are perturbed for the head now, and its gradient is complete
                done = _swap_gradients(params, grads)
            self._climbing_for_head = number == 0
            self._climb(*scaling.signals)
            self._put_aside(done)
            for part, weight in zip(parts, weights, strict=True):
                with self._local(last=number == 1 and part is parts[-1]):
                    torch.autograd.backward(part.evaluate(at_w=False), scaling(weight[number] / size))
        self._descend(*scaling.signals)
        return mean_loss(parts)
