"""Groups, state and what a step keeps: constructing, copying and checkpointing the methods."""

from __future__ import annotations

import inspect
import weakref
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from ltsam_fast import ops
from ltsam_fast.ops.checks import check_factor, check_model
from ltsam_fast.optim.batch import Scaling
from ltsam_fast.optim.compiled import CompiledGraphs
from ltsam_fast.optim.fused import Update
from ltsam_fast.optim.loading import completed
from ltsam_fast.table import TensorTable

_CONSTANTS = 64


class Stateful(Optimizer):
    """A torch optimizer that shares groups and state with its base optimizer."""

    phases: tuple[str, ...] = ()
    """Names of the explicit phases, in the order in which they are to be called."""
    _own: tuple[str, ...] = ("rho", "adaptive", "eta", "norm_eps", "perturb", "taken", "skipped")
    """Options of a group that are not the base optimizer's."""
    _buffers: tuple[str, ...] = ()
    """Names of a parameter's state that is not the base optimizer's."""
    _published: Mapping[str, str] = MappingProxyType({})
    """What published classes call some of them."""
    _takes_shards = True
    """Whether FSDP2's parameters will do."""
    _uncapturable = ""
    """Why a CUDA graph cannot hold the step, if so."""
    _twice = False
    """Whether the losses at w are differentiated more than once."""
    _counts_passes = False
    """Whether the number of passes depends on the batch."""
    _mixes = False
    """Whether kept gradients are combined with the last pass's otherwise than by adding them."""
    _kept: tuple[str, ...] = ("base_optimizer", "_model", "max_grad_norm", "ascent_sync", "_base_only")
    """Attributes that survive copying and pickling, besides those of torch."""

    def __init__(
        self,
        params: Any,
        base_optimizer: Callable[..., Optimizer],
        rho: float = 0.05,
        adaptive: bool = False,
        *,
        model: torch.nn.Module | None = None,
        max_grad_norm: float = 0.0,
        ascent_sync: bool = False,
        **base_kwargs: Any,
    ) -> None:
        if isinstance(base_optimizer, Optimizer) or not callable(base_optimizer):
            raise TypeError(f"base_optimizer must be a class such as torch.optim.SGD, got {base_optimizer!r}")
        own = {
            "rho": rho,
            "adaptive": adaptive,
            "eta": 0.0,
            "norm_eps": 1e-12,
            "perturb": True,
            "taken": 0,
            "skipped": 0,
        }
        self.model = model
        self.max_grad_norm = check_factor("max_grad_norm", max_grad_norm)
        self.ascent_sync = ascent_sync
        if isinstance(base_optimizer, type):
            check_base(base_optimizer)
        self.base_optimizer = base_optimizer(_with_options(params, own), **base_kwargs)
        check_base(type(self.base_optimizer))
        # Where the base has an option of the same name (Adadelta's rho), it gets its own value back while it steps.
        defaults = self.base_optimizer.defaults
        self._base_only = {name: defaults[name] for name in own if name in defaults}
        self._forget()
        self._skipped: Tensor | None = None
        self._sharded = False
        super().__init__(self.base_optimizer.param_groups, own)
        self.param_groups = self.base_optimizer.param_groups
        self.state = self.base_optimizer.state
        self.defaults = {**self.base_optimizer.defaults, **own}
        self._follow_base()

    def _follow_base(self) -> None:
        """Goes on sharing groups and state where the base optimizer loads a checkpoint by itself."""
        if vars(self).get("_followed") is self.base_optimizer:
            return
        self._followed, me = self.base_optimizer, weakref.ref(self)

        def share(base: Optimizer) -> None:
            optimizer = me()
            if optimizer is None:
                return
            if len(base.param_groups) == len(optimizer.param_groups):
                for group, now in zip(base.param_groups, optimizer.param_groups, strict=True):
                    for name in now.keys() - group.keys():
                        group[name] = now[name]
            optimizer.restore()  # type: ignore[attr-defined]
            optimizer.__setstate__({"state": base.state, "param_groups": base.param_groups})
            for hook in optimizer._optimizer_load_state_dict_post_hooks.values():
                hook(optimizer)

        self.base_optimizer.register_load_state_dict_post_hook(share)

    @property
    def is_perturbed(self) -> bool:
        """Whether weights are perturbed now: between two phases, or while a closure is evaluated at w + eps."""
        return bool(self._climbed)

    @property
    def model(self) -> torch.nn.Module | None:
        """What the closures evaluate, if it is known; trainers set it when they have wrapped it."""
        return self._model

    @model.setter
    def model(self, model: torch.nn.Module | None) -> None:
        check_model(model)
        self._model = model

    def _forget(self) -> None:
        """Sets up what lives within a step only."""
        self._phase = 0
        self._climbed: list[Tensor] = []  # the parameters that are perturbed now, and where their old values are
        self._climbed_from: list[Tensor] = []
        self._climbed_groups: list[int] = []
        self._clean: list[Tensor | None] = []  # gradients kept from an earlier phase, one for each parameter
        self._backups: dict[Tensor, Tensor] = {}
        self._backed_up: list[Tensor] = []
        self._backed_up_in: list[Tensor] = []
        self._backed_up_as: list[torch.dtype] = []
        self._low_precision = False
        self._scaling = Scaling(None, [])
        self._thawed: list[tuple[Any, str, Any]] = []  # what _freeze_statistics changed
        self._tables: dict[str, TensorTable] = {}
        self._constants: dict[Any, Tensor] = {}
        self._update = Update()
        self._graphs = CompiledGraphs()

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Adds a group, as torch does; its ``rho``, ``eta`` and ``norm_eps`` must be finite and >= 0."""
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        try:
            self._check_group(group)
        except ValueError:
            self.param_groups.pop()
            raise
        if any(map(_is_sharded, group["params"])):
            if not self._takes_shards:
                self.param_groups.pop()
                raise ValueError(
                    f"params must not be sharded (FSDP2) for {type(self).__name__}: it needs whole gradients of single "
                    "samples or classes; use DistributedDataParallel"
                )
            self._sharded = True

    def _check_group(self, group: dict[str, Any]) -> None:
        """Makes a group's options plain numbers; raises ValueError if one is out of its range."""
        group |= {name: check_factor(name, group[name]) for name in ("rho", "eta", "norm_eps")}
        if group.get("maximize") and "maximize" not in self.base_optimizer.defaults:
            raise ValueError(f"maximize must be left out: {type(self.base_optimizer).__name__} only minimizes")

    def _parameters(self, ascent: bool = False) -> tuple[list[Tensor], list[int]]:
        """All parameters, or those that are to be perturbed, and the group of each."""
        params: list[Tensor] = []
        groups: list[int] = []
        for index, group in enumerate(self.param_groups):
            if not ascent or group["perturb"]:
                params += group["params"]
                groups += [index] * len(group["params"])
        return params, groups

    def _everything(self) -> list[Tensor]:
        """All weights that are known: a loss may depend on some that are not to be stepped."""
        return [*self._parameters()[0], *(self.model.parameters() if self.model is not None else ())]

    def _table(self, op: str, use: str = "") -> TensorTable:
        """The table of one op and use, kept from step to step."""
        key = op + use
        if key not in self._tables:
            self._tables[key] = TensorTable(ops.OPS[op])
        return self._tables[key]

    def _constant(self, values: tuple[float, ...]) -> Tensor:
        """A small tensor for the ops, made once: that waits for the device."""
        param = self._first
        key = (values, param.device, torch.float64 if param.dtype == torch.float64 else torch.float32)
        if key not in self._constants:
            if len(self._constants) == _CONSTANTS:  # their numbers change all the time
                del self._constants[next(iter(self._constants))]
            self._constants[key] = torch.tensor(values, device=param.device, dtype=key[2])
        return self._constants[key]

    def _begins_anew(self) -> bool:
        """Whether the next step begins something that the last one began and overflowed. Waits for the device to know that."""
        return False

    @property
    def _first(self) -> Tensor:
        """The first parameter of all; the first groups may be empty."""
        return next(param for group in self.param_groups for param in group["params"])

    @property
    def _taken(self) -> int:
        """Steps taken so far."""
        return self.param_groups[0]["taken"]  # type: ignore[no-any-return]

    def _count_step(self) -> None:
        """Counts a step, a captured graph's too."""
        for group in self.param_groups:
            group["taken"] += 1

    def _skipped_steps(self) -> Tensor | None:
        """How many of them overflowed, where the device counts; ``None``: no step had a scaler."""
        count = self.param_groups[0]["skipped"]
        if self._skipped is None and count:
            self._skipped = torch.tensor(float(count), dtype=torch.float32, device=self._first.device)
        return self._skipped

    def _note_skipped(self) -> None:
        """Brings the device's count to the groups, for a checkpoint."""
        if self._skipped is not None:
            for group in self.param_groups:
                group["skipped"] = int(self._skipped)

    def _hyper(self, name: str) -> Any:
        """An option in each group; None where the base has no such option."""
        return tuple(group.get(name) for group in self.param_groups)

    def state_dict(self) -> dict[str, Any]:
        """As torch's, with the base optimizer's state; backups and kept gradients belong to a step and are not in it.

        Raises:
            ValueError: Between two phases, when a checkpoint would hold perturbed weights.
        """
        self._check_settled("state_dict")
        self._note_skipped()
        return super().state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As torch's. What a plain base optimizer's checkpoint lacks keeps its present value.

        One of a published wrapper is taken too: its ``rho`` and ``adaptive`` count, what lives within a step is dropped, and
        the base optimizer's state, if it is missing, starts afresh, with a warning.

        Raises:
            ValueError: It does not fit. Whatever is raised, the optimizer is as it was.
        """
        self._check_settled("load_state_dict")
        before = [(one, dict(vars(one))) for one in (self, self.base_optimizer)]
        try:
            super().load_state_dict(completed(self, state_dict))
        except BaseException:
            for one, attributes in before:
                vars(one).clear()
                vars(one).update(attributes)
            raise

    def _create_buffers(self, params: list[Tensor]) -> None:
        """Makes the state that is not the base optimizer's, where it is missing."""
        for param in params:
            for name in self._buffers:
                self.state[param].setdefault(name, torch.zeros_like(param, requires_grad=False))

    def _check_settled(self, name: str) -> None:
        if self._phase or self._climbed:
            raise ValueError(f"{name}() was called between two phases: finish the step, or call restore() first")

    def _base_state(self) -> dict[Any, Any]:
        """The state without parameters that have buffers of the method only: torch's optimizers take those for theirs."""
        return {
            key: state
            for key, state in self.state.items()
            if not isinstance(state, dict) or not {*state} <= {*self._buffers}
        }

    def __getstate__(self) -> dict[str, Any]:
        self._check_settled("copy or pickle")
        self._note_skipped()
        base = object.__new__(type(self.base_optimizer))
        vars(base).update(vars(self.base_optimizer), state=self._base_state())
        kept = {name: getattr(self, name) for name in self._kept} | {"base_optimizer": base}
        return {**super().__getstate__(), **kept}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        for group in self.param_groups:
            for name, value in self.defaults.items():
                group.setdefault(name, value)
        self._forget()
        self._skipped = None
        self.base_optimizer.__setstate__({"state": self._base_state(), "param_groups": self.param_groups})
        self.base_optimizer.state = self.state
        self._sharded = any(map(_is_sharded, self._parameters()[0]))
        self._follow_base()


def _with_options(params: Any, own: dict[str, Any]) -> Any:
    """The parameters in groups, each with the options ``own`` unless it has its own; what is no such thing is left to torch."""
    if isinstance(params, Tensor):
        return params
    params = list(params)
    if params and not isinstance(params[0], dict):
        params = [{"params": params}]
    return [{**own, **group} if isinstance(group, dict) else group for group in params]


def check_base(kind: type) -> None:
    """Raises TypeError for what is no optimizer, ValueError for one that can't step with the gradients of a method."""
    if not issubclass(kind, Optimizer):
        raise TypeError(f"base_optimizer must be a class such as torch.optim.SGD, got {kind!r}")
    if issubclass(kind, torch.optim.SparseAdam):
        raise ValueError("base_optimizer must not be SparseAdam, which needs sparse gradients: use torch.optim.Adam")
    try:
        inspect.signature(kind.step).bind(None)
    except TypeError:
        raise ValueError(
            f"base_optimizer must step without a closure, which {kind.__name__} needs: use torch.optim.SGD or AdamW"
        ) from None


def _is_sharded(param: Tensor) -> bool:
    return hasattr(param, "_local_tensor")
