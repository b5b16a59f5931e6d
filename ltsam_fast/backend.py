"""Which module runs an op: ``"cuda"`` and ``"cpu"`` (C++), ``"triton"``, or ``"torch"``, the reference implementation.

A backend is a module as :class:`Backend` describes it. The choice is, in this order: :func:`use_backend`, the environment
variable ``LTSAM_BACKEND``, the first available one for the tensors' device. A choice that cannot be had is an error, never
another backend.
"""

from __future__ import annotations

import contextlib
import contextvars
import importlib
import importlib.util
import os
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol

import torch

from ltsam_fast.launch_args import RowArgs

NAMES = ("cuda", "triton", "cpu", "torch")
VARIABLE = "LTSAM_BACKEND"

_MODULES = {
    "cuda": "ltsam_fast._cuda",
    "triton": "ltsam_fast.kernels",
    "cpu": "ltsam_fast._cpu",
    "torch": "ltsam_fast.torch_backend",
}
_AUTOMATIC = {"cuda": ("cuda", "triton", "torch"), "cpu": ("cpu", "torch")}

_CHECKOUT = "this is a source checkout without built cores: run `pip install -e .` or leave the folder"

_wish: contextvars.ContextVar[str | None] = contextvars.ContextVar("ltsam_fast.backend", default=None)
_resolved: dict[tuple[str | None, object, torch.device], Backend] = {}

# os.environ.get takes 0.5 us to find that a name is not set, the dictionary behind it 0.03.
_environment: Any = getattr(os.environ, "_data", os.environ)
_variable = VARIABLE if _environment is os.environ else os.environ.encodekey(VARIABLE)


class Backend(Protocol):
    """What a backend is: a module with a callable for each op of :data:`ltsam_fast.ops.OPS`, and one for the cross entropies.

    All ops are called alike, ``backend.perturb_(args)``, and return nothing. ``args``, a
    :class:`~ltsam_fast.launch_args.LaunchArgs`, has all they need: addresses for native code, tensors for others, both checked.
    Tensors are on one device, their elements lie alike, and the device is the current one. An op

    * changes nothing but the roles it writes, signals, ``args.scratch``, ``args.cache`` and ``args.launched``;
    * as a reduction fills ``args.signals["norm"]``, which has ``bucket_count`` times ``sums`` numbers;
    * leaves evidence in ``args.launched`` for a ``KeyboardInterrupt``, which Python may raise before and after any line of
      Python, and for a launch that fails after others: ``True``, set in native code once all has been written (or will be, by a
      kernel that is under way), or, before it begins or when it fails, a function that returns for each of the T tensors
      whether it has been written. What an op writes for a tensor, its backup too, is written when the tensor itself is.
    """

    CAPTURABLE: bool
    """Whether its calls can be captured in a CUDA graph."""

    def cross_entropy(self, args: RowArgs, /) -> None:
        """Losses, their state, gradients: see :class:`~ltsam_fast.launch_args.RowArgs`."""


_interpreted: bool | None = None
"""Whether Triton's interpreter runs the kernels; known once they are imported, because that is when Triton decides."""


def backends() -> list[str]:
    """Returns the names of the available backends, preferred first.

    >>> backends()[-1]
    'torch'
    """
    return [name for name in NAMES if why_not(name) is None]


def use_backend(name: str) -> contextlib.AbstractContextManager[None]:
    """Returns a context in which every op runs on this backend; a loss's backward runs where its forward did.

    It counts in this thread: others start with the process's own choice.

    But for one that ``torch.compile`` has made, on a GPU: it runs in a thread of autograd's, on the process's own backend.

    Args:
        name: One of :data:`NAMES`.

    Raises:
        ValueError: There is no such backend, or it is not available; the message says why.

    >>> with use_backend("torch"):
    ...     print(backend_for(torch.device("cpu")).__name__)
    ltsam_fast.torch_backend
    """
    reason = why_not(name)
    if reason is not None:
        raise ValueError(f"use_backend({name!r}): {reason}. {_remedy()}")
    return using(name)


def wish() -> str | None:
    """Returns what :func:`use_backend` asks for here. Autograd's threads do not know: a node must keep it for its backward."""
    return _wish.get()


def is_chosen() -> bool:
    """Whether :func:`use_backend` or the environment says which backend runs an op."""
    return bool(_wish.get() or _environment.get(_variable))


@contextlib.contextmanager
def using(name: str | None) -> Iterator[None]:
    """A context with this :func:`wish`."""
    token = _wish.set(name)
    try:
        yield
    finally:
        _wish.reset(token)


def backend_for(device: torch.device) -> Backend:
    """Returns the backend that serves tensors on ``device``.

    Raises:
        ValueError: The chosen backend cannot serve them, or none can; the message has all backends with their reasons.
    """
    # Called several times per optimizer step. The environment is part of the key, so it still counts at each call.
    key = (_wish.get(), _environment.get(_variable), device)
    module = _resolved.get(key)
    if module is None:
        module = _resolved[key] = importlib.import_module(_MODULES[_choose(device.type)])  # type: ignore[assignment]
    return module


def why_not(name: str) -> str | None:
    """Returns why a backend is not available, in one line, or ``None`` if it is.

    Raises:
        ValueError: There is no such backend.

    >>> why_not("torch") is None
    True
    """
    if name not in NAMES:
        raise ValueError(f"unknown backend {name!r}: choose one of {', '.join(map(repr, NAMES))}")
    if name == "cuda":
        return _why_not_cuda()
    return _why_not_triton() if name == "triton" else _why_not_loaded(name)


def check_variable() -> None:
    """Raises ValueError if the environment names a backend that is not to be had."""
    name = os.environ.get(VARIABLE)
    if name and name not in NAMES:
        raise ValueError(f"{VARIABLE}={name} names no backend: choose one of {', '.join(NAMES)}")
    if name and (reason := why_not(name)) is not None:
        raise ValueError(f"{VARIABLE}={name} cannot be had: {reason}. {_remedy()}")


def report() -> str:
    """Returns one line per backend: ``name: reason``, or ``name: available``."""
    return "\n".join(f"{name}: {why_not(name) or 'available'}" for name in NAMES)


def _remedy() -> str:
    return f"Leave the choice open or choose an available backend ({'; '.join(report().splitlines())})"


def _choose(device: str) -> str:
    if device not in _AUTOMATIC:
        raise ValueError(f"tensors on {device!r} are not supported by any backend: move them to 'cpu' or 'cuda'")
    name = _wish.get() or os.environ.get(VARIABLE)
    if not name:
        found = next(candidate for candidate in _AUTOMATIC[device] if _why_not_on(device, candidate) is None)
        if found == "torch" and (reason := _why_not_on(device, _AUTOMATIC[device][0])) == _CHECKOUT:
            warnings.warn(f"the backend is 'torch', in plain PyTorch, which is slow: {reason}", stacklevel=2)
        return found
    chosen = f"use_backend({name!r})" if _wish.get() else f"{VARIABLE}={name}"
    if name not in NAMES:
        raise ValueError(f"{chosen} names no backend: choose one of {', '.join(NAMES)}")
    reason = _why_not_on(device, name)
    if reason is not None:
        raise ValueError(f"{chosen} cannot serve tensors on {device!r}: {reason}. {_remedy()}")
    return name


def _why_not_on(device: str, name: str) -> str | None:
    serves = {"cuda": "cuda", "triton": "cpu" if _interprets() else "cuda", "cpu": "cpu", "torch": device}[name]
    reason = why_not(name)
    if reason is None and serves != device:
        return f"it takes tensors on {serves!r}"
    return reason


def _why_not_cuda() -> str | None:
    reason = _why_not_loaded("cuda")
    if reason is not None:
        return reason
    if not torch.cuda.is_available():
        return "built, but torch sees no GPU"
    if torch.version.hip is not None:
        return "built for NVIDIA GPUs, but this torch is for AMD's"
    major, minor = torch.cuda.get_device_capability()
    gpu = 10 * major + minor
    archs = [arch // 10 for arch in importlib.import_module(_MODULES["cuda"]).ARCHS]
    # Machine code runs on later GPUs of its generation, the PTX of the newest architecture on all that came after.
    if archs and gpu < max(archs) and not any(arch // 10 == major and arch <= gpu for arch in archs):
        return (
            f"built for sm_{', sm_'.join(map(str, archs))}, the GPU is sm_{gpu}: reinstall with LTSAM_CUDA_ARCHS={gpu}"
        )
    return None


def _interprets() -> bool:
    if _interpreted is not None:
        return _interpreted
    return os.environ.get("TRITON_INTERPRET", "").lower() in ("1", "true", "on", "yes", "y")  # what Triton itself reads


def _why_not_triton() -> str | None:
    global _interpreted
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed: pip install triton"
    interprets = _interprets()
    if not interprets and not torch.cuda.is_available():
        return "no GPU; TRITON_INTERPRET=1 runs the kernels on CPU tensors"
    reason = _why_not_loaded("triton")
    if reason is None:
        _interpreted = interprets
    return reason


def _why_not_loaded(name: str) -> str | None:
    try:
        importlib.import_module(_MODULES[name])
        return None
    except ModuleNotFoundError as error:
        if error.name == _MODULES[name]:
            return _why_absent(name)
        reason = str(error)
    except Exception as error:  # importing runs much foreign code; whatever it says is the reason
        reason = f"{type(error).__name__}: {error}"
    return f"{_MODULES[name]} does not load: {reason}"


def _why_absent(name: str) -> str:
    try:
        missing = importlib.import_module("ltsam_fast._build_info").MISSING
    except ModuleNotFoundError:
        missing = {}
    if name in missing:
        return f"not built: {missing[name]}"
    if (Path(__file__).parents[1] / "csrc").is_dir():
        return _CHECKOUT
    return f"{_MODULES[name]} is not there for {sys.implementation.cache_tag}: reinstall ltsam_fast"
