# Made by `python -m tests.stubs` from the options that the methods declare.
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.optim import Optimizer

from ltsam_fast.optim.methods.cc_sam import CCSAM as _CCSAM
from ltsam_fast.optim.methods.esam import ESAM as _ESAM
from ltsam_fast.optim.methods.focal_sam import FocalSAM as _FocalSAM
from ltsam_fast.optim.methods.friendly_sam import FriendlySAM as _FriendlySAM
from ltsam_fast.optim.methods.gnm import GNM as _GNM
from ltsam_fast.optim.methods.gsam import GSAM as _GSAM
from ltsam_fast.optim.methods.imb_sam import ImbSAM as _ImbSAM
from ltsam_fast.optim.methods.look_sam import LookSAM as _LookSAM
from ltsam_fast.optim.methods.micro_batch_sam import MicroBatchSAM as _MicroBatchSAM
from ltsam_fast.optim.methods.momentum_sam import MomentumSAM as _MomentumSAM
from ltsam_fast.optim.methods.sam import SAM as _SAM
from ltsam_fast.optim.methods.sparse_sam import SparseSAM as _SparseSAM
from ltsam_fast.optim.methods.sse_sam import SSESAM as _SSESAM
from ltsam_fast.optim.methods.tail_momentum_sam import TailMomentumSAM as _TailMomentumSAM
from ltsam_fast.optim.methods.vasso import VaSSO as _VaSSO
from ltsam_fast.optim.methods.wsam import WSAM as _WSAM
from ltsam_fast.optim.optimizer import SharpnessAware as SharpnessAware
from ltsam_fast.optim.registry import create as create
from ltsam_fast.optim.registry import list_methods as list_methods

class CCSAM(_CCSAM):
    scope: str
    head: Any | None
    noise_ratio: float
    flat_ratio: float
    def __init__(
        self,
        params: Any,
        base_optimizer: Callable[..., Optimizer],
        rho: float = 0.05,
        adaptive: bool = False,
        *,
        scope: str = "head",
        head: Any | None = None,
        noise_ratio: float = 1e-06,
        flat_ratio: float = 0.5,
        class_counts: Any | None = None,
        max_grad_norm: float = 0.0,
        ascent_sync: bool = False,
        plan: str = "auto",
        active: Any = "all",
        rho_schedule: Any = "constant",
        total_steps: int | None = None,
        model: torch.nn.Module | None = None,
        **base_kwargs: Any,
    ) -> None: ...

class ESAM(_ESAM):
    beta: float
    gamma: float
    granularity: str
    seed: int
    def __init__(
        self,
        params: Any,
        base_optimizer: Callable[..., Optimizer],
        rho: float = 0.05,
        adaptive: bool = False,
        *,
        beta: float = 0.6,
        gamma: float = 0.5,
        granularity: str = "element",
        seed: int = 0,
        class_counts: Any | None = None,
        max_grad_norm: float = 0.0,
        ascent_sync: bool = False,
        plan: str = "auto",
        active: Any = "all",
        rho_schedule: Any = "constant",
        total_steps: int | None = None,
        model: torch.nn.Module | None = None,
        **base_kwargs: Any,
    ) -> None: ...

class FocalSAM(_FocalSAM):
    gamma: float | Sequence[float] | torch.Tensor
    lam: float
    def __init__(
        self,
        params: Any,
        base_optimizer: Callable[..., Optimizer],
        rho: float = 0.05,
        adaptive: bool = False,
        *,
        gamma: float | Sequence[float] | torch.Tensor = 1.0,
        lam: float = 0.5,
        class_weights: Any | None = None,
        class_counts: Any | None = None,
        max_grad_norm: float = 0.0,
        ascent_sync: bool = False,
        plan: str = "auto",
        active: Any = "all",
        rho_schedule: Any = "constant",
        total_steps: int | None = None,
        model: torch.nn.Module | None = None,
        **base_kwargs: Any,
    ) -> None: ...

class FriendlySAM(_FriendlySAM):
    sigma: float
    lmbda: float
    def __init__(
        self,
        params: Any,
        base_optimizer: Callable[..., Optimizer],
        rho: float = 0.05,
        adaptive: bool = False,
        *,
        sigma: float = 1.0,
        lmbda: float = 0.9,
        class_counts: Any | None = None,
        max_grad_norm: float = 0.0,
        ascent_sync: bool = False,
        plan: str = "auto",
        active: Any = "all",
        rho_schedule: Any = "constant",
        total_steps: int | None = None,
        model: torch.nn.Module | None = None,
        **base_kwargs: Any,
    ) -> None: ...

class GNM(_GNM):
    dis_mul: float
    clip: float
    decay_every: int | None
    seed: int
    def __init__(
        self,
        params: Any,
        base_optimizer: Callable[..., Optimizer],
        rho: float = 0.05,
        adaptive: bool = False,
        *,
        dis_mul: float = 0.1,
        clip: float = 1.0,
        decay_every: int | None = None,
        seed: int = 0,
        class_counts: Any | None = None,
        max_grad_norm: float = 0.0,
        ascent_sync: bool = False,
        plan: str = "auto",
        active: Any = "all",
        rho_schedule: Any = "constant",
        total_steps: int | None = None,
        model: torch.nn.Module | None = None,
        **base_kwargs: Any,
    ) -> None: ...

class GSAM(_GSAM):
    alpha: float
    rho_min: float | None
    rho_max: float | None
    lr_min: float
    def __init__(
        self,
        params: Any,
        base_optimizer: Callable[..., Optimizer],
        rho: float = 0.05,
        adaptive: bool = False,
        *,
        alpha: float = 0.4,
        rho_min: float | None = None,
        rho_max: float | None = None,
        lr_min: float = 0.0,
        class_counts: Any | None = None,
        max_grad_norm: float = 0.0,
        ascent_sync: bool = False,
        plan: str = "auto",
        active: Any = "all",
        rho_schedule: Any = "constant",
        total_steps: int | None = None,
        model: torch.nn.Module | None = None,
        **base_kwargs: Any,
    ) -> None: ...

class ImbSAM(_ImbSAM):
    eta: float
    tail_classes: Any | None
    tail_weight: float
    def __init__(
        self,
        params: Any,
        base_optimizer: Callable[..., Optimizer],
        rho: float = 0.05,
        adaptive: bool = False,
        *,
        eta: float = 20,
        tail_classes: Any | None = None,
        tail_weight: float = 1.0,
        class_weights: Any | None = None,
        class_counts: Any | None = None,
        max_grad_norm: float = 0.0,
        ascent_sync: bool = False,
        plan: str = "auto",
        active: Any = "all",
        rho_schedule: Any = "constant",
        total_steps: int | None = None,
        model: torch.nn.Module | None = None,
        **base_kwargs: Any,
    ) -> None: ...

class LookSAM(_LookSAM):
    k: int
    alpha: float
    def __init__(
        self,
        params: Any,
        base_optimizer: Callable[..., Optimizer],
        rho: float = 0.05,
        adaptive: bool = False,
        *,
        k: int = 5,
        alpha: float = 0.7,
        class_counts: Any | None = None,
        max_grad_norm: float = 0.0,
        ascent_sync: bool = False,
        plan: str = "auto",
        active: Any = "all",
        rho_schedule: Any = "constant",
        total_steps: int | None = None,
        model: torch.nn.Module | None = None,
        **base_kwargs: Any,
    ) -> None: ...

class MicroBatchSAM(_MicroBatchSAM):
    m: int
    def __init__(
        self,
        params: Any,
        base_optimizer: Callable[..., Optimizer],
        rho: float = 0.05,
        adaptive: bool = False,
        *,
        m: int = 32,
        class_counts: Any | None = None,
        max_grad_norm: float = 0.0,
        ascent_sync: bool = False,
        plan: str = "auto",
        active: Any = "all",
        rho_schedule: Any = "constant",
        total_steps: int | None = None,
        model: torch.nn.Module | None = None,
        **base_kwargs: Any,
    ) -> None: ...

class MomentumSAM(_MomentumSAM):
    rho: float
    direction: str
    def __init__(
        self,
        params: Any,
        base_optimizer: Callable[..., Optimizer],
        rho: float = 0.05,
        adaptive: bool = False,
        *,
        direction: str = "momentum",
        class_counts: Any | None = None,
        max_grad_norm: float = 0.0,
        ascent_sync: bool = False,
        plan: str = "auto",
        active: Any = "all",
        rho_schedule: Any = "constant",
        total_steps: int | None = None,
        model: torch.nn.Module | None = None,
        **base_kwargs: Any,
    ) -> None: ...

class SAM(_SAM):
    unified_lambda: Any
    loss_budget: float | None
    renormalize: bool
    def __init__(
        self,
        params: Any,
        base_optimizer: Callable[..., Optimizer],
        rho: float = 0.05,
        adaptive: bool = False,
        *,
        unified_lambda: Any = 1.0,
        loss_budget: float | None = None,
        renormalize: bool = False,
        class_counts: Any | None = None,
        max_grad_norm: float = 0.0,
        ascent_sync: bool = False,
        plan: str = "auto",
        active: Any = "all",
        rho_schedule: Any = "constant",
        total_steps: int | None = None,
        model: torch.nn.Module | None = None,
        **base_kwargs: Any,
    ) -> None: ...

class SSESAM(_SSESAM):
    eta: float
    tail_rho: float | None
    switch_step: int | None
    def __init__(
        self,
        params: Any,
        base_optimizer: Callable[..., Optimizer],
        rho: float = 0.05,
        adaptive: bool = False,
        *,
        eta: float = 100,
        tail_rho: float | None = None,
        switch_step: int | None = None,
        class_weights: Any | None = None,
        class_counts: Any | None = None,
        max_grad_norm: float = 0.0,
        ascent_sync: bool = False,
        plan: str = "auto",
        active: Any = "all",
        rho_schedule: Any = "constant",
        total_steps: int | None = None,
        model: torch.nn.Module | None = None,
        **base_kwargs: Any,
    ) -> None: ...

class SparseSAM(_SparseSAM):
    sparsity: float
    mask: str
    refresh_every: int
    drop_rate: float
    num_samples: int
    seed: int
    def __init__(
        self,
        params: Any,
        base_optimizer: Callable[..., Optimizer],
        rho: float = 0.05,
        adaptive: bool = False,
        *,
        sparsity: float = 0.5,
        mask: str = "fisher",
        refresh_every: int = 100,
        drop_rate: float = 0.5,
        num_samples: int = 16,
        seed: int = 0,
        class_counts: Any | None = None,
        max_grad_norm: float = 0.0,
        ascent_sync: bool = False,
        plan: str = "auto",
        active: Any = "all",
        rho_schedule: Any = "constant",
        total_steps: int | None = None,
        model: torch.nn.Module | None = None,
        **base_kwargs: Any,
    ) -> None: ...

class TailMomentumSAM(_TailMomentumSAM):
    decay: float
    def __init__(
        self,
        params: Any,
        base_optimizer: Callable[..., Optimizer],
        rho: float = 0.05,
        adaptive: bool = False,
        *,
        decay: float = 0.9,
        gamma: float | Sequence[float] | torch.Tensor = 1.0,
        lam: float = 0.5,
        class_weights: Any | None = None,
        class_counts: Any | None = None,
        max_grad_norm: float = 0.0,
        ascent_sync: bool = False,
        plan: str = "auto",
        active: Any = "all",
        rho_schedule: Any = "constant",
        total_steps: int | None = None,
        model: torch.nn.Module | None = None,
        **base_kwargs: Any,
    ) -> None: ...

class VaSSO(_VaSSO):
    theta: float
    def __init__(
        self,
        params: Any,
        base_optimizer: Callable[..., Optimizer],
        rho: float = 0.05,
        adaptive: bool = False,
        *,
        theta: float = 0.4,
        class_counts: Any | None = None,
        max_grad_norm: float = 0.0,
        ascent_sync: bool = False,
        plan: str = "auto",
        active: Any = "all",
        rho_schedule: Any = "constant",
        total_steps: int | None = None,
        model: torch.nn.Module | None = None,
        **base_kwargs: Any,
    ) -> None: ...

class WSAM(_WSAM):
    gamma: float
    decouple: bool
    def __init__(
        self,
        params: Any,
        base_optimizer: Callable[..., Optimizer],
        rho: float = 0.05,
        adaptive: bool = False,
        *,
        gamma: float = 0.9,
        decouple: bool = True,
        class_counts: Any | None = None,
        max_grad_norm: float = 0.0,
        ascent_sync: bool = False,
        plan: str = "auto",
        active: Any = "all",
        rho_schedule: Any = "constant",
        total_steps: int | None = None,
        model: torch.nn.Module | None = None,
        **base_kwargs: Any,
    ) -> None: ...
