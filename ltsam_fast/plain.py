"""The methods as usually published: a Python loop over the parameters, and every pass over the whole batch.

Benchmarks and the demo compare :mod:`ltsam_fast.optim` with these classes, and tests use them as a reference. For training use
:mod:`ltsam_fast.optim`.

Every class has ``step(losses, targets)``, which runs the forwards and backwards of the authors' code: ``losses()`` does a
forward pass and returns the per-sample losses, shape (B,), and ``targets`` are their classes, shape (B,), int64, which
class-wise methods need. Every parameter costs a norm, a clone, a multiplication, an addition and an assignment; the base
optimizer has torch's default implementation. All restore the weights from a copy; the code of ImbSAM and SSE-SAM subtracts the
perturbation instead, which saves the clone.

Sources: Foret et al., "Sharpness-Aware Minimization for Efficiently Improving Generalization", ICLR 2021 (arXiv 2010.01412),
Algorithm 1; Kwon et al., "ASAM", ICML 2021 (arXiv 2102.11600), here with eta = 0; the others name theirs. Passes and order are
those of the authors' code.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import Optimizer

Losses = Callable[[], Tensor]
Kept = list[tuple[Tensor, Tensor]]


class SGD(torch.optim.SGD):
    """torch's SGD, with the ``step`` of the other classes: what all methods are compared with."""

    def step(self, losses: Losses, targets: Tensor | None = None) -> None:  # type: ignore[override]
        """One forward, one backward and torch's own step."""
        self.zero_grad()
        losses().mean().backward()
        super().step()


class _Plain(Optimizer):
    """Perturbs and restores the weights, and holds the base optimizer; its arguments are described in :class:`SAM`."""

    def __init__(
        self,
        params: Any,
        base_optimizer: Callable[..., Optimizer],
        rho: float = 0.05,
        adaptive: bool = False,
        class_counts: Any = None,  # ignored: all methods take the same arguments
        **kwargs: Any,
    ) -> None:
        if not 0 <= rho < float("inf"):
            raise ValueError(f"rho must be a finite number >= 0, got {rho!r}")
        super().__init__(params, {"rho": rho, "adaptive": adaptive, "perturb": True, **kwargs})
        self.base_optimizer = base_optimizer(self.param_groups, **kwargs)
        # One list for both, so that schedulers change the base optimizer's learning rate.
        self.param_groups = self.base_optimizer.param_groups
        self._backups: Kept = []

    def _params(self) -> list[Tensor]:
        return [p for group in self.param_groups for p in group["params"]]

    def _perturbed(self) -> list[tuple[dict[str, Any], Tensor]]:
        """The parameters that are perturbed, with their groups."""
        return [(group, p) for group in self.param_groups if group["perturb"] for p in group["params"]]

    @torch.no_grad()
    def _perturb(self, rho: float | None = None) -> None:
        """w <- w + eps,  eps = rho T g / (|T' g| + 1e-12);  T = T' = 1, adaptive: T = w^2, T' = |w|; ``rho`` or the group's."""
        found = [(group, p, p.grad) for group, p in self._perturbed() if p.grad is not None]
        norms = [(p.abs() * grad if group["adaptive"] else grad).norm(p=2) for group, p, grad in found]
        norm = torch.stack([one.to(norms[0].device) for one in norms]).norm(p=2)
        for group, p, grad in found:
            scale = (group["rho"] if rho is None else rho) / (norm + 1e-12)
            self._backups.append((p, p.data.clone()))
            step = p.pow(2) * grad if group["adaptive"] else grad
            p.add_(step * scale.to(p))

    @torch.no_grad()
    def _restore(self) -> None:
        for p, backup in self._backups:
            p.data = backup
        self._backups = []

    def _clone_gradients(self) -> Kept:
        return [(p, p.grad.clone()) for p in self._params() if p.grad is not None]

    @torch.no_grad()
    def _descend(self, kept: Iterable[tuple[Tensor, Tensor]] = ()) -> None:
        """Restores the weights, adds ``kept`` to the gradients, takes the base optimizer's step and clears them."""
        self._restore()
        for p, grad in kept:
            p.grad = grad if p.grad is None else p.grad + grad
        self.base_optimizer.step()
        self.zero_grad()


class SAM(_Plain):
    """SAM, or ASAM with ``adaptive=True``, with the phases of the common PyTorch implementations.

    Args:
        params: Parameters or groups, as for any torch optimizer; floating point, any device. A group may have its own
            ``rho`` and ``adaptive``, and one with ``perturb=False`` is not perturbed; the norm is one for all groups.
        base_optimizer: The class of the base optimizer, e.g. ``torch.optim.SGD``.
        rho: Radius, in units of the weights, finite and >= 0.
        adaptive: Scale the perturbation by the weights.
        **kwargs: Options of ``base_optimizer``.

    Raises:
        ValueError: ``rho`` is negative or not finite.

    >>> w = torch.nn.Parameter(torch.tensor([3.0]))
    >>> opt = SAM([w], torch.optim.SGD, rho=1.0, lr=0.5)
    >>> (w**2 / 2).sum().backward()
    >>> opt.first_step(zero_grad=True)
    >>> (w**2 / 2).sum().backward()  # the gradient at w + eps = 4
    >>> opt.second_step(zero_grad=True)
    >>> w.item()
    1.0
    """

    @torch.no_grad()
    def first_step(self, zero_grad: bool = False) -> None:
        """Perturbs the weights along the current gradients."""
        self._perturb()
        if zero_grad:
            self.zero_grad()

    @torch.no_grad()
    def second_step(self, zero_grad: bool = False) -> None:
        """Restores the weights and takes the base optimizer's step with the current gradients."""
        self._restore()
        self.base_optimizer.step()
        if zero_grad:
            self.zero_grad()

    def step(self, losses: Losses, targets: Tensor | None = None) -> None:  # type: ignore[override]
        """Takes both phases: two forwards and two backwards."""
        losses().mean().backward()
        self.first_step(zero_grad=True)
        losses().mean().backward()
        self.second_step(zero_grad=True)


class FocalSAM(_Plain):
    """Focal-SAM with the three phases of the published code, where the caller weights the losses.

    Let v be the sample weights of the sharp loss (:func:`ltsam_fast.ops.focal_weights` of their classes). Call backward on
    mean((1 - v) * losses) before the first phase, on mean(v * losses) before the second and, at the perturbed weights, before
    the third. That is what :meth:`step` does; it needs class counts.

    Source: "Focal-SAM: Focal Sharpness-Aware Minimization for Long-Tailed Classification", ICML 2025 (arXiv 2505.01660),
    Algorithm 1.

    Args:
        params: As for :class:`SAM`.
        base_optimizer: As for :class:`SAM`.
        class_counts: Numbers of training samples, one per class.
        gamma: Focus on the tail.
        lam: Weight of the sharpness.
        **kwargs: ``rho``, ``adaptive``, and options of ``base_optimizer``.
    """

    def __init__(
        self,
        params: Any,
        base_optimizer: Callable[..., Optimizer],
        *,
        class_counts: Any = (1,),
        gamma: float = 1.0,
        lam: float = 0.5,
        **kwargs: Any,
    ) -> None:
        super().__init__(params, base_optimizer, **kwargs)
        counts = torch.as_tensor(class_counts, dtype=torch.double)
        self.class_weights = lam * (1 - counts / counts.sum()) ** gamma

    @torch.no_grad()
    def first_step(self) -> None:
        """Stores a clone of the clean loss's gradients and clears them."""
        self._clean_grads = self._clone_gradients()
        self.zero_grad()

    @torch.no_grad()
    def second_step(self) -> None:
        """Perturbs the weights along the sharp loss's gradients and clears them."""
        self._perturb()
        self.zero_grad()

    @torch.no_grad()
    def third_step(self) -> None:
        """Restores the weights, adds the stored gradients to the current ones, takes the base's step and clears them."""
        self._descend(self._clean_grads)

    def step(self, losses: Losses, targets: Tensor) -> None:  # type: ignore[override]
        """Takes the three phases: two forwards and three backwards, of which the first two share a graph."""
        at_w = losses()
        sharp = self.class_weights.to(at_w)[targets]
        ((1 - sharp) * at_w).mean().backward(retain_graph=True)
        self.first_step()
        (sharp * at_w).mean().backward()
        self.second_step()
        (sharp * losses()).mean().backward()
        self.third_step()


class ImbSAM(FocalSAM):
    """ImbSAM: the passes of Focal-SAM, with a sharp loss that counts the classes with fewer than ``eta`` samples.

    Source: Zhou et al., "ImbSAM: A Closer Look at Sharpness-Aware Minimization in Class-Imbalanced Recognition", ICCV 2023
    (arXiv 2308.07815); the tail's weight is 1, as in the paper.
    """

    def __init__(
        self,
        params: Any,
        base_optimizer: Callable[..., Optimizer],
        *,
        class_counts: Any,
        eta: float = 20,
        **kwargs: Any,
    ) -> None:
        super().__init__(params, base_optimizer, **kwargs)
        self.class_weights = (torch.as_tensor(class_counts) < eta).float()


class SSESAM(_Plain):
    """SSE-SAM: head and tail are perturbed one after the other; from ``switch_step`` on the head's radius is 0.

    The published code runs four forwards and four backwards in both stages.

    Source: "SSE-SAM: Balancing Head and Tail Classes Gradually through Stage-Wise SAM", AAAI 2025 (arXiv 2412.13715).
    """

    def __init__(
        self,
        params: Any,
        base_optimizer: Callable[..., Optimizer],
        *,
        class_counts: Any,
        eta: float = 100,
        switch_step: int | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(params, base_optimizer, **kwargs)
        self.tail = (torch.as_tensor(class_counts) < eta).float()
        self.switch_step, self.number = switch_step, 0

    def step(self, losses: Losses, targets: Tensor) -> None:  # type: ignore[override]
        """Four forwards and four backwards."""
        tail = self.tail.to(targets.device)[targets]
        second_stage = self.switch_step is not None and self.number >= self.switch_step
        kept: Kept = []
        for weights, rho in ((1 - tail, 0.0 if second_stage else None), (tail, None)):
            (weights * losses()).mean().backward(retain_graph=True)
            self._perturb(rho)
            self.zero_grad()
            (weights * losses()).mean().backward(retain_graph=True)
            self._restore()
            if weights is not tail:
                kept = self._clone_gradients()
                self.zero_grad()
        self._descend(kept)
        self.number += 1


class CCSAM(_Plain):
    """CC-SAM's first stage: every class has a perturbation, and a radius, of its own.

    ``scope="head"`` is the published code: one forward and backward of the network, and for each class in the batch a gradient
    of the classifier and a forward of it on that class's features. ``scope="all"`` perturbs the whole network, as in the
    paper's abstract: for each class a gradient at w, and a forward and backward of the whole batch.

    Source: Zhou et al., "Class-Conditional Sharpness-Aware Minimization for Deep Long-Tailed Recognition", CVPR 2023.

    Args:
        params: As for :class:`SAM`.
        base_optimizer: As for :class:`SAM`.
        class_counts: Numbers of training samples, one per class.
        head: The classifier: a linear layer. Its loss is cross entropy.
        scope: "head" or "all".
        noise_ratio: Factor of all radii.
        flat_ratio: Share of the perturbed loss.
        **kwargs: Options of ``base_optimizer``.
    """

    def __init__(
        self,
        params: Any,
        base_optimizer: Callable[..., Optimizer],
        *,
        class_counts: Any,
        head: nn.Module,
        scope: str = "head",
        noise_ratio: float = 1e-6,
        flat_ratio: float = 0.5,
        **kwargs: Any,
    ) -> None:
        super().__init__(params, base_optimizer, **kwargs)
        self.class_counts, self.head, self.scope = list(class_counts), head, scope
        self.noise_ratio, self.flat_ratio = noise_ratio, flat_ratio
        within = set(head.parameters())
        self._in_scope = [p for _, p in self._perturbed() if scope == "all" or p in within]

    def step(self, losses: Losses, targets: Tensor) -> None:  # type: ignore[override]
        """One backward through everything that is left when each class has been at its own weights."""
        features: list[Tensor] = []
        hook = self.head.register_forward_pre_hook(lambda _, inputs: features.append(inputs[0]))
        at_w = losses()
        hook.remove()
        share = self.flat_ratio / len(at_w)
        total = (1 - self.flat_ratio) * at_w.mean()
        for k in targets.unique().tolist():
            rows = targets == k
            self._perturb_for(k, torch.autograd.grad(at_w[rows].mean(), self._in_scope, retain_graph=True))
            if self.scope == "all":
                (share * losses()[rows].sum()).backward()
            else:
                logits = self.head(features[0][rows])
                total = total + share * F.cross_entropy(logits, targets[rows], reduction="sum")
            self._restore()
        total.backward()
        self._descend()

    @torch.no_grad()
    def _perturb_for(self, k: int, grads: tuple[Tensor, ...]) -> None:
        """w <- w + delta_k. The tensors are new ones, so that the graph of the pass at w stays valid."""
        weights = torch.stack([p.norm() for p in self._in_scope]).norm() + 1e-12
        size = sum(p.numel() for p in self._in_scope)
        rare = (max(self.class_counts[k], 2) - 1) ** 0.25
        for p, grad in zip(self._in_scope, grads, strict=True):
            norm = grad.norm()
            radius = self.noise_ratio * weights.sqrt() / norm.sqrt() / math.sqrt(2) / rare / size**0.25
            self._backups.append((p, p.data))
            p.data = p.data + radius * math.sqrt(size) * grad / norm


class GNM(_Plain):
    """GNM: Gaussian noise, drawn on the CPU as published, in place of an ascent gradient; one forward and one backward.

    Source: GNM-PT, "Gaussian Neighborhood Minimization Prompt Tuning", NeurIPS 2024 (arXiv 2410.21042), eqs. 1-3 of its poster.
    """

    dis_mul = 0.1
    """Factor of the noise."""

    def step(self, losses: Losses, targets: Tensor | None = None) -> None:  # type: ignore[override]
        """One forward and one backward, at the noisy weights."""
        normal = torch.distributions.Normal(0.0, 1 / 3)
        with torch.no_grad():
            for group, p in self._perturbed():
                self._backups.append((p, p.data.clone()))
                p.add_(group["rho"] * self.dis_mul * normal.sample(p.shape).clamp(-1, 1).to(p.device))
        losses().mean().backward()
        self._descend()


class MomentumSAM(_Plain):
    """Momentum-SAM, "Sharpness Aware Minimization without Computational Overhead", arXiv 2401.12033, Algorithm 1.

    The arguments are those of :class:`SAM`; ``base_optimizer`` is SGD with momentum. The authors' code leaves the weights
    perturbed between steps.
    """

    def step(self, losses: Losses, targets: Tensor | None = None) -> None:  # type: ignore[override]
        """Perturbs along the momentum, downhill; one forward, one backward, one step."""
        for p in self._params():
            momentum = self.base_optimizer.state[p].get("momentum_buffer")
            p.grad = None if momentum is None else -momentum
        if any(p.grad is not None for p in self._params()):
            self._perturb()
        self.zero_grad()
        losses().mean().backward()
        self._descend()


class FriendlySAM(SAM):
    """Friendly SAM: the running mean of the gradient is left out of the perturbation.

    Source: Li et al., "Friendly Sharpness-Aware Minimization", CVPR 2024 (arXiv 2403.12350).
    """

    sigma, lmbda = 1.0, 0.9
    """How much of the mean is left out, and its decay."""

    @torch.no_grad()
    def first_step(self, zero_grad: bool = False) -> None:
        """Perturbs the weights along the current gradients without their mean."""
        for _, p in self._perturbed():
            assert p.grad is not None
            grad, state = p.grad.clone(), self.state[p]
            mean = state.get("grad_mean")
            if mean is not None:
                p.grad -= self.sigma * mean
            state["grad_mean"] = grad if mean is None else mean * self.lmbda + grad * (1 - self.lmbda)
        super().first_step(zero_grad)


class GSAM(SAM):
    """GSAM: also keeps the gap between the perturbed and the plain loss small.

    Source: Zhuang et al., "Surrogate Gap Minimization Improves Sharpness-Aware Training", ICLR 2022 (arXiv 2203.08065).
    """

    alpha = 0.4
    """How much of the part of the gradient at w that the other does not have is left out."""

    @torch.no_grad()
    def first_step(self, zero_grad: bool = False) -> None:
        """Perturbs the weights, and keeps the gradients."""
        self._clean_grads = self._clone_gradients()
        super().first_step(zero_grad)

    @torch.no_grad()
    def second_step(self, zero_grad: bool = False) -> None:
        """Decomposes the kept gradients against the current ones and steps."""
        both = [(p, grad, p.grad) for p, grad in self._clean_grads if p.grad is not None]
        dot = torch.stack([(clean * grad).sum() for _, clean, grad in both]).sum()
        square = torch.stack([grad.norm() for *_, grad in both]).norm() ** 2
        for p, clean, grad in both:
            p.grad = grad - self.alpha * (clean - dot / square * grad)
        super().second_step(zero_grad)
