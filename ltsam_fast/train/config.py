"""The settings of a training run: defaults, then a recipe, a file and flags, each overriding those before."""

from __future__ import annotations

import itertools
import json
import math
import re
import sys
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import AliasChoices, BaseModel, ConfigDict, Field, ValidationError, model_validator
from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError

from ltsam_fast.optim.options import did_you_mean
from ltsam_fast.train.recipes import RECIPES

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib


class ConfigError(ValueError):
    """A wrong setting; the message is one line with its name, its value and what is accepted."""


def setting(default: Any, text: str, **more: Any) -> Any:
    """Returns a field with its text in ``--help``, and bounds such as ``gt=0``."""
    return Field(default, description=text, **more)


class Settings(BaseModel):
    """Typed settings. What is wrong with them is a ConfigError."""

    model_config = ConfigDict(strict=True, frozen=True, extra="forbid", allow_inf_nan=False, loc_by_alias=False)

    if not TYPE_CHECKING:  # type checkers know the fields

        def __init__(self, **settings: Any) -> None:
            try:
                super().__init__(**settings)
            except ValidationError as error:
                raise ConfigError(in_words(error, type(self).model_fields)) from error


class Config(Settings):
    """The settings of a run; each is a flag of ``python -m ltsam_fast train`` and a key of a config file.

    Raises:
        ConfigError: A value is out of its range or of the wrong type.

    >>> Config(lr=-1)
    Traceback (most recent call last):
        ...
    ltsam_fast.train.config.ConfigError: lr must be greater than 0, got -1
    """

    data: str = setting("digits", "'digits', a folder of CIFAR pickles, an ImageFolder tree, or a list of 'path label'")
    test_data: str | None = setting(None, "the test images, if they are not the test split of --data")
    format: str = setting("auto", "how --data is stored; auto: detect it")
    images: str | None = setting(None, "folder that the paths in a list are relative to")
    size: int | None = setting(None, "height and width of the images in pixels; default: as stored", ge=1)
    classes: int | None = setting(None, "number of classes, to be checked")
    cache: str | None = setting(None, "folder for decoded images, for data sets that do not fit into memory")
    skip_broken: bool = setting(False, "leave images out that can't be read; the run folder's skipped.txt lists them")
    imbalance: float | None = setting(
        None,
        "take a long-tailed subset with this ratio of the largest to the smallest class; default: all images",
        ge=1,
    )
    n_max: int | None = setting(
        None, "images of the subset's largest class; default: as many as the smallest class of all images has", ge=1
    )
    profile: Literal["exp", "step", "none"] = setting("exp", "shape of the subset")
    data_seed: int = setting(0, "seed of the subset; 0: the published CIFAR-LT", ge=0, lt=2**32)
    resample: bool = setting(False, "draw another subset, and other images to hold out, for each seed")
    val: int | None = setting(
        None,
        "hold out so many training images of each class and test on them, to choose options without the test images",
        ge=1,
    )
    val_share: float | None = setting(
        None,
        "hold out this share of the training images, of each class, and take the best epoch on them; its weights, "
        "best.pt, are tested once at the end",
        gt=0,
        lt=1,
    )
    test_per_class: int | None = setting(
        None, "test on so many images of each class, the same in all runs; default: all", ge=1
    )
    many: int = setting(100, "classes with more training images than this are 'many'", ge=0)
    few: int = setting(20, "classes with fewer training images than this are 'few'", ge=0)
    augment: bool = setting(True, "augment training images: crop and flip for colour images")
    model: str = setting("resnet32", "network by name")
    method: str = setting("sgd", "sgd (the base optimizer alone) or a method of ltsam_fast.optim, e.g. focal_sam")
    options: dict[str, Any] = setting(
        {},
        "option of the method, any keyword of its class, e.g. rho=0.2; METHOD.name=value is for one method only",
        validation_alias=AliasChoices("set", "options"),
    )
    active: str = setting(
        "all", "steps in which the method perturbs: all, 0.3 (a share at the end), every:5, 100:2000, 140ep:, 70%:"
    )
    cosine_head: bool | None = setting(None, "a cosine classifier; default: for the losses ldam and gcl")
    loss: str = setting("ce", "loss by name, e.g. ce or la")
    loss_options: dict[str, Any] = setting(
        {},
        "option of the loss, e.g. tau=0.75; LOSS.name=value is for one only",
        validation_alias=AliasChoices("loss-set", "loss_options"),
    )
    drw_start: int | None = setting(
        None, "epoch from which classes are reweighted (deferred reweighting); default: never", ge=0
    )
    drw_beta: float = setting(0.9999, "beta of deferred reweighting", gt=0, lt=1)
    optimizer: Literal["sgd", "adam", "adamw"] = setting("sgd", "base optimizer")
    lr: float = setting(0.1, "learning rate", gt=0)
    momentum: float = setting(0.9, "momentum of SGD", ge=0, lt=1)
    nesterov: bool = setting(False, "Nesterov's momentum")
    weight_decay: float = setting(2e-4, "weight decay of the base optimizer", ge=0)
    schedule: Literal["cosine", "step", "constant"] = setting("cosine", "learning rate over the epochs")
    warmup: int = setting(0, "epochs of linear warm-up", ge=0)
    milestones: tuple[int, ...] = setting(
        (160, 180), "epochs at which the step schedule multiplies the rate by --decay", strict=False
    )
    decay: float = setting(0.01, "factor of the step schedule", gt=0)
    epochs: int = setting(200, "passes over the training images", ge=1)
    batch_size: int = setting(64, "images per step, over all processes", ge=1)
    eval_every: int = setting(1, "epochs between two tests and checkpoints; the last epoch always has both", ge=1)
    keep_weights: bool = setting(True, "keep weights and the optimizer's state in the checkpoint of a finished run")
    seed: int = setting(0, "seed of weights, sampling order and augmentation", ge=0, lt=2**32)
    device: str = setting("auto", "cpu, cuda, cuda:1, ...; auto: cuda where there is one")
    threads: int | None = setting(None, "CPU threads; default: as torch chooses", ge=1)
    amp: Literal["off", "bf16", "fp16"] = setting("off", "mixed precision; fp16 with a GradScaler")
    channels_last: bool = setting(False, "memory format of images and weights")
    compile: bool = setting(False, "compile the network with torch.compile")
    graph: bool = setting(False, "capture whole training steps in CUDA graphs; GPU only")
    deterministic: bool = setting(False, "deterministic kernels only, so that a resumed run is exact on a GPU, too")
    tensorboard: bool | None = setting(None, "TensorBoard logs; default: if it is installed")

    @model_validator(mode="after")
    def _together(self) -> Config:
        """Checks what several settings must fulfil together."""
        active_steps(self.active, 1, 100)
        if self.few > self.many:
            raise ConfigError(f"few must be at most many = {self.many}, got {self.few}")
        if self.profile == "none" and self.imbalance is not None:
            raise ConfigError(f"imbalance must not be given with profile 'none', got {self.imbalance!r}")
        if self.n_max is not None and self.imbalance is None:
            raise ConfigError(f"n_max needs imbalance: it is the size of the subset's largest class, got {self.n_max}")
        if self.val_share is not None and (self.val is not None or not self.keep_weights):
            raise ConfigError("val_share must not be given with val, nor without keep_weights")
        if self.graph and (self.compile or self.loss == "gcl"):
            raise ConfigError("graph must be false with compile, and with gcl, whose noise is drawn outside the graph")
        if self.drw_start is None and self.drw_beta != FIELDS["drw_beta"].default:
            raise ConfigError(f"drw_beta must be given with drw_start, its first epoch, got {self.drw_beta!r} alone")
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
        return self

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


def active_steps(text: str, steps_per_epoch: int, steps: int) -> Any:
    """Returns a method's option ``active`` from the text of a setting.

    Args:
        text: "all", a share of the steps at the end, "every:5", or a range "100:2000" with ends such as "140ep" or "70%".
        steps_per_epoch: Steps of an epoch.
        steps: Steps of the run.

    Raises:
        ConfigError: It is nothing of that kind.

    >>> active_steps("140ep:", 10, 2000), active_steps("0.3", 10, 2000), active_steps("every:5", 10, 2000)
    (('range', 1400, 2000), 0.3, ('every', 5))
    """
    first, colon, last = text.partition(":")
    try:
        if not colon:
            if text == "all" or 0 <= float(text) <= 1:
                return text if text == "all" else float(text)
        elif first == "every" and int(last) > 0:
            return ("every", int(last))
        else:
            start, stop = (number_of_steps(end, steps_per_epoch, steps) for end in (first or "0", last or str(steps)))
            if min(start, stop) >= 0:
                return ("range", start, stop)
    except (ValueError, OverflowError):
        pass
    raise ConfigError(f"active must be all, 0.3, every:5, 100:2000, or a range such as 140ep: or 70%:, got {text!r}")


def number_of_steps(text: str, steps_per_epoch: int, steps: int) -> int:
    """Returns how many steps "140ep" (epochs), "70%" (of the run) or "100" are; others raise ValueError or OverflowError."""
    for suffix, unit in (("ep", steps_per_epoch), ("%", steps / 100)):
        if text.endswith(suffix):
            return round(float(text.removesuffix(suffix)) * unit)
    return int(text)


FIELDS = Config.model_fields


def in_words(error: ValidationError, names: Iterable[str]) -> str:
    """Returns the first of the errors in one line; ``names`` are those that there are."""
    first = error.errors()[0]
    name, value, text = ".".join(map(str, first["loc"])), first["input"], first["msg"]
    if first["type"] == "extra_forbidden":
        return f"there is no setting {name!r}{did_you_mean(name, [*names])} There are {', '.join(names)}"
    if first["type"] == "missing":
        return f"{name} must be given"
    if first["type"] == "value_error":  # of a check of ours
        return str(first["ctx"]["error"])
    return f"{name} must {re.sub('^(Input|Value|String|List) should |, (unable|got) .*', '', text)}, got {value!r}"


DATA_SETTINGS = (
    "data test_data format images size classes skip_broken imbalance n_max profile data_seed resample val val_share "
    "test_per_class"
).split()
"""Settings that determine the images."""
RESUMABLE = ("device", "threads", "tensorboard", "cache", "eval_every", "keep_weights")
"""Settings that may change when a run is resumed."""


def parsed(text: str) -> Any:
    """Returns the value of an option in a text: JSON, True, False or None, else the text itself."""
    try:
        return json.loads(text)
    except ValueError:
        return {"True": True, "False": False, "None": None}.get(text, text)


_READERS: dict[str, Callable[[str], Any]] = {
    ".toml": tomllib.loads,
    ".yaml": YAML(typ="safe", pure=True).load,
    ".json": json.loads,
}
_READERS[".yml"] = _READERS[".yaml"]


def read_file(path: str | Path) -> dict[str, Any]:
    """Returns the settings in a TOML, YAML or JSON file, by the names of :class:`Config`; those of the flags are accepted, too.

    Raises:
        ConfigError: The file can't be read, is not a table of settings, or gives one twice.
    """
    path = Path(path)
    try:
        if path.suffix not in _READERS:
            raise ConfigError(f"its name must end in {', '.join(_READERS)}")
        values = _READERS[path.suffix](path.read_text(encoding="utf-8-sig"))
        if not isinstance(values, dict):
            raise ConfigError(f"must be a table of settings, got {type(values).__name__}")
        return by_field(values)
    except OSError as error:
        raise ConfigError(f"config {path}: {error.strerror or error}") from error
    except (ValueError, YAMLError) as error:
        raise ConfigError(f"config {path}: {' '.join(str(error).split())}") from error


def by_field(values: Mapping[Any, Any]) -> dict[str, Any]:
    """Returns the settings by the names of :class:`Config`, whether they have these or those of the flags.

    Raises:
        ConfigError: A setting is given by both names.

    >>> by_field({"batch-size": 32, "set": {"rho": 0.1}})
    {'batch_size': 32, 'options': {'rho': 0.1}}
    """
    flags = {"set": "options", "loss_set": "loss_options"}
    found: dict[str, Any] = {}
    for name, value in values.items():
        field_name = str(name).replace("-", "_")
        field_name = flags.get(field_name, field_name)
        if field_name in found:
            raise ConfigError(f"{name} is given twice, also as {field_name}")
        found[field_name] = value
    return found


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
            merges = isinstance(value, Mapping) and isinstance(given.get(name), Mapping)
            given[name] = {**given[name], **value} if merges else value
    recipe = given.pop("recipe", None if "data" in given else "digits-lt")
    if recipe not in (None, *RECIPES):
        raise ConfigError(f"recipe must be one of {', '.join(RECIPES)}, got {recipe!r}")
    base = RECIPES[recipe] if recipe else {}
    settings = base | given
    if recipe and "data" not in settings:
        raise ConfigError(f"recipe {recipe} needs data: where the images are")
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
    return (
        config.schedule == "cosine"
        or config.method == "sparse_sam"
        or config.active != "all"
        or "rho_schedule" in config.options
        or any(one.endswith("%") for one in percent)
    )
