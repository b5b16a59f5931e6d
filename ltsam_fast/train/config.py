"""The settings of a training run: defaults, then a recipe, a file and flags, each overriding those before."""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ltsam_fast.optim.options import did_you_mean
from ltsam_fast.train.recipes import RECIPES


class ConfigError(ValueError):
    """A wrong setting; the message is one line with its name, its value and what is accepted."""


def _setting(default: Any, text: str, **more: Any) -> Any:
    return field(default=default, metadata={"help": text, **more})


def _options(text: str, flag: str) -> Any:
    return field(default_factory=dict, metadata={"help": text, "flag": flag})


@dataclass(frozen=True)
class Config:
    """The settings of a run; each is a flag of ``python -m ltsam_fast train`` and a key of a config file.

    Raises:
        ConfigError: A value is out of its range or of the wrong type.

    >>> Config(lr=-1)
    Traceback (most recent call last):
        ...
    ltsam_fast.train.config.ConfigError: lr must be a number > 0, got -1
    """

    data: str = _setting(
        "digits", "'digits', a folder of CIFAR pickles, an ImageFolder tree, or a list of 'path label'"
    )
    test_data: str | None = _setting(None, "the test images, if they are not the test split of --data")
    format: str = _setting("auto", "how --data is stored; auto: detect it")
    images: str | None = _setting(None, "folder that the paths in a list are relative to")
    size: int | None = _setting(None, "height and width of the images in pixels; default: as stored")
    classes: int | None = _setting(None, "number of classes, to be checked")
    cache: str | None = _setting(None, "folder for decoded images, for data sets that do not fit into memory")
    imbalance: float | None = _setting(
        None, "take a long-tailed subset with this ratio of the largest to the smallest class; default: all images"
    )
    profile: str = _setting("exp", "shape of the subset", choices=("exp", "step", "none"))
    data_seed: int = _setting(0, "seed of the subset; 0: the published CIFAR-LT")
    many: int = _setting(100, "classes with more training images than this are 'many'")
    few: int = _setting(20, "classes with fewer training images than this are 'few'")
    augment: bool = _setting(True, "augment training images: crop and flip for colour images")
    model: str = _setting("resnet32", "network by name")
    method: str = _setting("sgd", "sgd (the base optimizer alone) or a method of ltsam_fast.optim, e.g. focal_sam")
    options: dict[str, Any] = _options(
        "option of the method, any keyword of its class, e.g. rho=0.2; METHOD.name=value is for one method only", "set"
    )
    cosine_head: bool | None = _setting(None, "a cosine classifier; default: for the losses ldam and gcl")
    loss: str = _setting("ce", "loss by name, e.g. ce or la")
    loss_options: dict[str, Any] = _options(
        "option of the loss, e.g. tau=0.75; LOSS.name=value is for one only", "loss-set"
    )
    drw_start: int | None = _setting(
        None, "epoch from which classes are reweighted (deferred reweighting); default: never"
    )
    drw_beta: float = _setting(0.9999, "beta of deferred reweighting")
    optimizer: str = _setting("sgd", "base optimizer", choices=("sgd", "adam", "adamw"))
    lr: float = _setting(0.1, "learning rate")
    momentum: float = _setting(0.9, "momentum of SGD")
    nesterov: bool = _setting(False, "Nesterov's momentum")
    weight_decay: float = _setting(2e-4, "weight decay of the base optimizer")
    schedule: str = _setting("cosine", "learning rate over the epochs", choices=("cosine", "step", "constant"))
    warmup: int = _setting(0, "epochs of linear warm-up")
    milestones: tuple[int, ...] = _setting(
        (160, 180), "epochs at which the step schedule multiplies the rate by --decay"
    )
    decay: float = _setting(0.01, "factor of the step schedule")
    epochs: int = _setting(200, "passes over the training images")
    batch_size: int = _setting(64, "images per step, over all processes")
    seed: int = _setting(0, "seed of weights, sampling order and augmentation")
    device: str = _setting("auto", "cpu, cuda, cuda:1, ...; auto: cuda where there is one")
    threads: int | None = _setting(None, "CPU threads; default: as torch chooses")
    amp: str = _setting("off", "mixed precision; fp16 with a GradScaler", choices=("off", "bf16", "fp16"))
    channels_last: bool = _setting(False, "memory format of images and weights")
    compile: bool = _setting(False, "compile the network with torch.compile")
    deterministic: bool = _setting(False, "deterministic kernels only, so that a resumed run is exact on a GPU, too")
    tensorboard: bool | None = _setting(None, "TensorBoard logs; default: if it is installed")

    def __post_init__(self) -> None:
        for item in dataclasses.fields(self):
            object.__setattr__(self, item.name, _checked(item, getattr(self, item.name)))
        for name in ("lr", "drw_beta", "decay"):
            _range(name, getattr(self, name), 0, exclusive=True)
        for name in ("momentum", "weight_decay", "warmup", "many", "few"):
            _range(name, getattr(self, name), 0)
        for name in ("epochs", "batch_size", "threads", "size", "imbalance"):
            if getattr(self, name) is not None:
                _range(name, getattr(self, name), 1)
        for name in ("seed", "data_seed"):
            if not 0 <= getattr(self, name) < 2**32:
                raise ConfigError(f"{name} must be a whole number in [0, 2^32), got {getattr(self, name)}")
        if self.few > self.many:
            raise ConfigError(f"few must be at most many = {self.many}, got {self.few}")
        if self.profile == "none" and self.imbalance is not None:
            raise ConfigError(f"imbalance must not be given with profile 'none', got {self.imbalance!r}")
        if self.drw_start is not None and self.drw_start < 0:
            raise ConfigError(f"drw_start must be an epoch >= 0, got {self.drw_start}")
        if not self.drw_beta < 1:
            raise ConfigError(f"drw_beta must be a number in (0, 1), got {self.drw_beta!r}")
        if self.drw_start is None and self.drw_beta != FIELDS["drw_beta"].default:
            raise ConfigError(f"drw_beta must be given with drw_start, its first epoch, got {self.drw_beta!r} alone")
        if not self.momentum < 1:
            raise ConfigError(f"momentum must be a number in [0, 1), got {self.momentum!r}")
        if self.warmup > self.epochs:
            raise ConfigError(f"warmup must be at most epochs = {self.epochs}, got {self.warmup}")
        if self.schedule == "step":
            ends = (-1, *self.milestones, self.epochs)
            if any(before >= after for before, after in itertools.pairwise(ends)):
                raise ConfigError(
                    f"milestones must increase from 0 or more to less than epochs = {self.epochs}, got "
                    f"{','.join(map(str, self.milestones))}"
                )
        if self.nesterov and (self.optimizer != "sgd" or not self.momentum):
            raise ConfigError("nesterov needs optimizer sgd and a momentum > 0")

    def as_dict(self) -> dict[str, Any]:
        """Returns the settings as JSON-serializable values."""
        return {name: list(value) if isinstance(value, tuple) else value for name, value in vars(self).items()}

    def factor(self, epoch: int) -> float:
        """Returns the factor of the learning rate in an epoch, counted from 0.

        >>> [round(Config(epochs=4, warmup=1).factor(epoch), 2) for epoch in range(4)]
        [1.0, 1.0, 0.75, 0.25]
        """
        if epoch < self.warmup:
            return (epoch + 1) / self.warmup
        if self.schedule == "cosine":
            return 0.5 + 0.5 * math.cos(math.pi * (epoch - self.warmup) / max(1, self.epochs - self.warmup))
        if self.schedule == "step":
            return self.decay ** sum(epoch >= milestone for milestone in self.milestones)
        return 1.0


FIELDS = {item.name: item for item in dataclasses.fields(Config)}
DATA_SETTINGS = ("data", "test_data", "format", "images", "size", "classes", "imbalance", "profile", "data_seed")
"""Settings that determine the images."""
RESUMABLE = ("device", "threads", "tensorboard", "cache")
"""Settings that may change when a run is resumed."""


def _checked(item: dataclasses.Field[Any], value: Any) -> Any:
    """Returns the value in its setting's type; raises ConfigError for other types and choices."""
    kind, _, optional = str(item.type).partition(" | ")
    if value is None and optional:
        return None
    if kind.startswith("dict") and isinstance(value, Mapping):
        return dict(value)
    if kind.startswith("tuple") and isinstance(value, list | tuple) and all(type(one) is int for one in value):
        return tuple(value)
    wanted: Any = {"bool": bool, "int": int, "float": (int, float), "str": str}.get(kind, ())
    if isinstance(value, wanted) and isinstance(value, bool) == (kind == "bool"):
        choices = item.metadata.get("choices")
        if choices and value not in choices:
            raise ConfigError(f"{item.name} must be one of {', '.join(choices)}, got {value!r}")
        return value
    names = {"bool": "true or false", "int": "a whole number", "float": "a number", "str": "a text"}
    wanted = names.get(kind, "a table" if kind.startswith("dict") else "a list of whole numbers")
    raise ConfigError(f"{item.name} must be {wanted}, got {value!r}")


def _range(name: str, value: float, low: float, exclusive: bool = False) -> None:
    if not low <= value < math.inf or (exclusive and value == low):
        raise ConfigError(f"{name} must be a number {'>' if exclusive else '>='} {low}, got {value!r}")


def read_file(path: str | Path) -> dict[str, Any]:
    """Returns the settings in a TOML, YAML or JSON file.

    Raises:
        ConfigError: The file can't be read, or is not a table of settings.
    """
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8-sig")
        if path.suffix == ".toml":
            try:
                import tomllib
            except ModuleNotFoundError:  # Python 3.10
                import tomli as tomllib  # type: ignore[import-not-found,no-redef]
            values = tomllib.loads(text)
        elif path.suffix in (".yaml", ".yml"):
            import yaml

            try:
                values = yaml.safe_load(text)
            except yaml.YAMLError as error:
                raise ValueError(" ".join(str(error).split())) from error
        elif path.suffix == ".json":
            values = json.loads(text)
        else:
            raise ValueError("its name must end in .toml, .yaml, .yml or .json")
    except OSError as error:
        raise ConfigError(f"config {path}: {error.strerror or error}") from error
    except ValueError as error:
        raise ConfigError(f"config {path}: {error}") from error
    if not isinstance(values, dict):
        raise ConfigError(f"config {path}: must be a table of settings, got {type(values).__name__}")
    return values


def build(*layers: Mapping[str, Any]) -> Config:
    """Returns a config from layers of settings; later layers override earlier ones, and all override ``recipe``.

    ``options`` of several layers are merged entry by entry. ``focal_sam.rho`` applies to this method only and overrides
    ``rho``.

    Raises:
        ConfigError: A name is unknown, or a value is not accepted.

    >>> build({"recipe": "cifar10-lt", "data": "cifar"}, {"method": "focal_sam", "options": {"rho": 0.3}}).options
    {'rho': 0.3, 'gamma': 3.0, 'lam': 0.5}
    """
    given: dict[str, Any] = {}
    for layer in layers:
        for name, value in layer.items():
            if name != "recipe" and name not in FIELDS:
                raise ConfigError(
                    f"there is no setting {name!r}{did_you_mean(name, FIELDS)} There are recipe, {', '.join(FIELDS)}"
                )
            merges = name in ("options", "loss_options") and isinstance(value, Mapping)
            given[name] = {**given.get(name, {}), **value} if merges else value
    recipe = given.pop("recipe", None)
    if recipe is None:
        base: Mapping[str, Any] = {} if "data" in given else RECIPES["digits-lt"]
    elif recipe not in RECIPES:
        raise ConfigError(f"recipe must be one of {', '.join(RECIPES)}, got {recipe!r}")
    else:
        base = RECIPES[recipe]
        if "data" not in base and "data" not in given:
            raise ConfigError(f"recipe {recipe} needs data: where the images are")
    settings = {**base, **given}
    for name, owner in (("options", "method"), ("loss_options", "loss")):
        chosen = settings.get(owner, FIELDS[owner].default)
        from_recipe = _of(base.get(name, {}), chosen)
        if chosen == "sgd":  # a recipe gives the radius to all methods
            from_recipe.pop("rho", None)
        settings[name] = {**from_recipe, **_of(given.get(name, {}), chosen)}
    return Config(**settings)


def from_stored(stored: dict[str, Any]) -> dict[str, Any]:
    """Returns the settings that a run has stored: version 0.1.0 called one method by another name."""
    return {**stored, "method": "micro_batch_sam"} if stored.get("method") == "m_sam" else stored


def _of(options: Any, owner: str) -> dict[str, Any]:
    """Returns the options for this method or loss; those with its prefix override the others."""
    if not isinstance(options, Mapping):
        raise ConfigError(f"options must be a table, got {options!r}")
    from ltsam_fast.train.loss_registry import LOSSES  # they import this module
    from ltsam_fast.train.method_registry import METHODS

    for name in options:
        prefix, dot, _ = str(name).partition(".")
        if dot and prefix not in METHODS and prefix not in LOSSES:
            meant = did_you_mean(prefix, [*METHODS, *LOSSES])
            raise ConfigError(f"option {name!r}: there is no method or loss {prefix!r}{meant}".rstrip("."))
    common = {name: value for name, value in options.items() if "." not in name}
    return common | {name.split(".", 1)[1]: value for name, value in options.items() if name.startswith(f"{owner}.")}


def differing(old: Config, new: Config) -> list[str]:
    """Returns the names of settings that differ although a resumed run must not change them.

    More epochs are allowed unless the finished epochs depend on their number, see :func:`depends_on_epochs`.
    """
    changeable = set(RESUMABLE)
    if new.epochs >= old.epochs and not depends_on_epochs(old):
        changeable.add("epochs")
    return [name for name in FIELDS if name not in changeable and getattr(old, name) != getattr(new, name)]


def depends_on_epochs(config: Config) -> bool:
    """Returns whether the first epochs depend on the number of epochs: by the cosine schedule or an option in percent."""
    percent: Iterable[Any] = (value for value in config.options.values() if isinstance(value, str))
    return config.schedule == "cosine" or config.method == "sparse_sam" or any(one.endswith("%") for one in percent)
