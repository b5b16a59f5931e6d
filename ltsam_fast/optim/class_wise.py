"""What Focal-SAM, ImbSAM and SSE-SAM share: class weights u and v, and phases for which the caller weighs the losses."""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import Tensor

from ltsam_fast.ops.checks import check_class_weights, tail_of
from ltsam_fast.optim.closures import ClassWeights, pilot_of
from ltsam_fast.optim.optimizer import SharpnessAware
from ltsam_fast.optim.options import option


class ClassWise(SharpnessAware):
    r"""Base of the methods that weigh the classes: u in the clean loss, v in the sharp one.

    .. code-block:: text

        g_a(w) = grad (1/B) sum_j a[y_j] l_j(w)
        eps    = rho * g_v(w) / (|g_v(w)| + 1e-12)
        w     <- base_step(w, g_u(w) + g_v(w + eps))

    The first two backwards share a graph; where u or v is zero for every class its passes are not run at all. Given the
    network as ``model``, and a closure that takes an index, samples with weight 0 are not evaluated, and u and v without a
    sample in common are two sub-batches. Others share a backward sweep: 7 units instead of 8 where SAM takes 6.

    Without ``class_counts``, or weights of one's own, only the phases can be used, and the losses are weighed by the caller.
    Weights of one's own, u and v, take the place of the method's: of the classes with ``class_weights=(u, v)``, of the samples
    with ``step(closure, weights=(u, v))``.
    """

    several_gradients = True
    takes_weights = True
    class_weights = option(
        None,
        "Weights of one's own, C numbers each of the clean and of the sharp loss, in place of those that follow from "
        "``class_counts`` and other options. u may be negative, as Focal-SAM's with ``lam > 1``.",
        check=check_class_weights,
        accepts="a pair (u, v) of lists of finite numbers, of one length, those of v >= 0, not all 0",
        optional=True,
    )
    weight_options: tuple[str, ...] = ()
    """The options that the class weights follow from, if they are not given."""

    def make_class_weights(self) -> tuple[Tensor, Tensor] | None:
        """The class weights u and v, shape (C,), as the options are now; None without class counts."""
        raise NotImplementedError

    def check_options(self, options: Any) -> None:
        """Raises ValueError if options do not go together."""
        super().check_options(options)
        for name in ("class_counts", "tail_classes"):
            if options["class_weights"] is not None and options.get(name) is not None:
                raise ValueError(
                    f"class_weights and {name} were both given: leave out one, for u and v follow from either"
                )

    open_ended = False
    """Whether the last entries of u and v stand for all further classes."""

    def _known(self) -> tuple[Any, ...]:
        """What is known of the class weights: the options, u and v, those that are not all zero, and the pilot of a sweep."""
        values = [self.param_groups[0][name] for name in ("class_weights", *self.weight_options)]
        options = [
            list(value) if isinstance(value, list) else value for value in values
        ]  # they may be changed in place
        known = vars(self).get("_class_weights")
        if known is None or known[0] != options:
            given = self.class_weights
            made = (
                self.make_class_weights()
                if given is None
                else [torch.tensor(one, dtype=torch.float64) for one in given]
            )
            if made is None:
                known = (options, (None, None), (None, None), None)
            else:
                u, v = (one.double() for one in made)
                # Where all are zero the step is one with a gradient of zeros, and not none.
                nothing = not (bool(u.any()) or bool(v.any()))
                weights = tuple(
                    ClassWeights(one, self.open_ended) if nothing or bool(one.any()) else None for one in (u, v)
                )
                known = (options, (u, v), weights, pilot_of(u, v))
            self._class_weights, self.weights_now = known, known[2]
        return known

    @property
    def clean_weights(self) -> Tensor | None:
        """u, shape (C,), float64."""
        return self._known()[1][0]  # type: ignore[no-any-return]

    @property
    def sharp_weights(self) -> Tensor | None:
        """v, shape (C,), float64."""
        return self._known()[1][1]  # type: ignore[no-any-return]

    @property
    def pilot(self) -> int | None:
        """Which of u and v can weigh the sweep that both share."""
        return self._known()[3]  # type: ignore[no-any-return]

    def classes(self) -> int:
        """The number of classes that there are weights for."""
        weights = self._known()[1][1]
        if weights is None:
            raise ValueError(
                "class_counts must be given to the constructor for step(closure, targets), or class_weights=(u, v), or weights "
                "of the samples to step(closure, weights=(u, v)); the phases need none"
            )
        return 2**62 if self.open_ended else len(weights)

    def first_step(self, scaler: torch.amp.GradScaler | None = None) -> None:  # type: ignore[override]
        """Keeps the gradients of the clean loss, sum_j u l_j / B, and clears them.

        Args:
            scaler: The GradScaler that scaled the losses, for the whole step: see :meth:`SharpnessAware.step`.

        Raises:
            ValueError: It is not this phase's turn.
        """
        self._advance("first_step", True, scaler)

    def second_step(self) -> None:  # type: ignore[override]
        """Ascends along the gradients of the sharp loss, sum_j v l_j / B, and clears them.

        Raises:
            ValueError: It is not this phase's turn, or no parameter has a gradient.
        """
        self._advance("second_step", True)

    def third_step(self) -> None:
        """Restores w and steps with the kept gradients plus those of the sharp loss at w + eps, and clears them.

        Raises:
            ValueError: It is not this phase's turn.
        """
        self._advance("third_step", True)


class TailWise(ClassWise):
    """Base of the methods that tell head and tail apart, by ``eta``: with them ASAM's constant is called ``asam_eta``."""

    asam_eta = option(0.0, "ASAM's constant: ``|w|`` becomes ``|w| + asam_eta``.", ge=0, per_group=True, keyword=False)
    asam_constant = "asam_eta"

    def tail(self, options: Any) -> Tensor | None:
        """Which classes are tail, shape (C,), bool; None if that is not known."""
        return tail_of(options["class_counts"], options["eta"], options.get("tail_classes"))

    def tail_of_steps(self) -> Tensor | None:
        """The same of the present options; warns where the method is the base optimizer's then."""
        tail, counts = self.tail(self.param_groups[0]), self.class_counts
        if tail is not None and not tail.any() and self.eta and self.param_groups[0].get("tail_classes") is None:
            warnings.warn(
                f"eta = {self.eta} leaves no class in the tail, which {type(self).__name__} is about: the smallest has "
                f"{min(counts):g} samples",
                stacklevel=2,
            )
        return tail

    def check_options(self, options: Any) -> None:
        """Raises ValueError if options do not go together."""
        super().check_options(options)
        self.tail(options)
