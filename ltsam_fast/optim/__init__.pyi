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
from ltsam_fast.optim.methods.m_sam import MSAM as _MSAM
from ltsam_fast.optim.methods.sam import SAM as _SAM
from ltsam_fast.optim.methods.sparse_sam import SparseSAM as _SparseSAM
from ltsam_fast.optim.methods.sse_sam import SSESAM as _SSESAM
from ltsam_fast.optim.methods.vasso import VaSSO as _VaSSO
from ltsam_fast.optim.methods.wsam import WSAM as _WSAM
from ltsam_fast.optim.optimizer import SharpnessAware as SharpnessAware

class CCSAM(_CCSAM):
    class_counts: Any | None
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
        class_counts: Any | None = None,
        scope: str = "head",
        head: Any | None = None,
        noise_ratio: float = 1e-06,
        flat_ratio: float = 0.5,
        max_grad_norm: float = 0.0,
        ascent_sync: bool = False,
        plan: str = "auto",
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
        max_grad_norm: float = 0.0,
        ascent_sync: bool = False,
        plan: str = "auto",
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
        class_counts: Any | None = None,
        class_weights: Any | None = None,
        max_grad_norm: float = 0.0,
        ascent_sync: bool = False,
        plan: str = "auto",
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
        max_grad_norm: float = 0.0,
        ascent_sync: bool = False,
        plan: str = "auto",
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
        max_grad_norm: float = 0.0,
        ascent_sync: bool = False,
        plan: str = "auto",
        model: torch.nn.Module | None = None,
        **base_kwargs: Any,
    ) -> None: ...

class GSAM(_GSAM):
    alpha: float
    rho_min: float | None
    rho_max: float | None
    lr_min: float
    lr_max: float | None
    lr_seen: float
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
        max_grad_norm: float = 0.0,
        ascent_sync: bool = False,
        plan: str = "auto",
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
        class_counts: Any | None = None,
        class_weights: Any | None = None,
        max_grad_norm: float = 0.0,
        ascent_sync: bool = False,
        plan: str = "auto",
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
        max_grad_norm: float = 0.0,
        ascent_sync: bool = False,
        plan: str = "auto",
        model: torch.nn.Module | None = None,
        **base_kwargs: Any,
    ) -> None: ...

class MSAM(_MSAM):
    m: int
    def __init__(
        self,
        params: Any,
        base_optimizer: Callable[..., Optimizer],
        rho: float = 0.05,
        adaptive: bool = False,
        *,
        m: int = 32,
        max_grad_norm: float = 0.0,
        ascent_sync: bool = False,
        plan: str = "auto",
        model: torch.nn.Module | None = None,
        **base_kwargs: Any,
    ) -> None: ...

class SAM(_SAM):
    def __init__(
        self,
        params: Any,
        base_optimizer: Callable[..., Optimizer],
        rho: float = 0.05,
        adaptive: bool = False,
        *,
        max_grad_norm: float = 0.0,
        ascent_sync: bool = False,
        plan: str = "auto",
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
        class_counts: Any | None = None,
        class_weights: Any | None = None,
        max_grad_norm: float = 0.0,
        ascent_sync: bool = False,
        plan: str = "auto",
        model: torch.nn.Module | None = None,
        **base_kwargs: Any,
    ) -> None: ...

class SparseSAM(_SparseSAM):
    sparsity: float
    mask: str
    refresh_every: int
    drop_rate: float
    total_steps: int | None
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
        total_steps: int | None = None,
        num_samples: int = 16,
        seed: int = 0,
        max_grad_norm: float = 0.0,
        ascent_sync: bool = False,
        plan: str = "auto",
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
        max_grad_norm: float = 0.0,
        ascent_sync: bool = False,
        plan: str = "auto",
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
        max_grad_norm: float = 0.0,
        ascent_sync: bool = False,
        plan: str = "auto",
        model: torch.nn.Module | None = None,
        **base_kwargs: Any,
    ) -> None: ...
