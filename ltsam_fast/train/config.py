"""The settings of a training run: defaults, then a recipe, a file and flags, each overriding those before."""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
import re
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
    skip_broken: bool = _setting(False, "leave images out that can't be read; the run folder's skipped.txt lists them")
    imbalance: float | None = _setting(
        None, "take a long-tailed subset with this ratio of the largest to the smallest class; default: all images"
    )
    n_max: int | None = _setting(
        None, "images of the subset's largest class; default: as many as the smallest class of all images has"
    )
    profile: str = _setting("exp", "shape of the subset", choices=("exp", "step", "none"))
    data_seed: int = _setting(0, "seed of the subset; 0: the published CIFAR-LT")
    resample: bool = _setting(False, "draw another subset, and other images to hold out, for each seed")
    val: int | None = _setting(
        None,
        "hold out so many training images of each class and test on them, to choose options without the test images",
    )
    val_share: float | None = _setting(
        None,
        "hold out this share of the training images, of each class, and take the best epoch on them; its weights, best.pt, are "
        "tested once at the end",
    )
    test_per_class: int | None = _setting(
        None, "test on so many images of each class, the same in all runs; default: all"
    )
    many: int = _setting(100, "classes with more training images than this are 'many'")
    few: int = _setting(20, "classes with fewer training images than this are 'few'")
    augment: bool = _setting(True, "augment training images: crop and flip for colour images")
    model: str = _setting("resnet32", "network by name")
    method: str = _setting("sgd", "sgd (the base optimizer alone) or a method of ltsam_fast.optim, e.g. focal_sam")
    options: dict[str, Any] = _options(
        "option of the method, any keyword of its class, e.g. rho=0.2; METHOD.name=value is for one method only", "set"
    )
    active: str = _setting(
        "all", "steps in which the method perturbs: all, 0.3 (a share at the end), every:5, 100:2000, 140ep:, 70%%:"
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
    eval_every: int = _setting(1, "epochs between two tests and checkpoints; the last epoch always has both")
    keep_weights: bool = _setting(True, "keep weights and the optimizer's state in the checkpoint of a finished run")
    seed: int = _setting(0, "seed of weights, sampling order and augmentation")
    device: str = _setting("auto", "cpu, cuda, cuda:1, ...; auto: cuda where there is one")
    threads: int | None = _setting(None, "CPU threads; default: as torch chooses")
    amp: str = _setting("off", "mixed precision; fp16 with a GradScaler", choices=("off", "bf16", "fp16"))
    channels_last: bool = _setting(False, "memory format of images and weights")
    compile: bool = _setting(False, "compile the network with torch.compile")
    graph: bool = _setting(False, "capture whole training steps in CUDA graphs; GPU only")
    deterministic: bool = _setting(False, "deterministic kernels only, so that a resumed run is exact on a GPU, too")
    tensorboard: bool | None = _setting(None, "TensorBoard logs; default: if it is installed")

    def __post_init__(self) -> None:
        for item in dataclasses.fields(self):
            object.__setattr__(self, item.name, _checked(item, getattr(self, item.name)))
        for name in ("lr", "drw_beta", "decay"):
            _range(name, getattr(self, name), 0, exclusive=True)
        for name in ("momentum", "weight_decay", "warmup", "many", "few"):
            _range(name, getattr(self, name), 0)
        for name in ("epochs", "batch_size", "eval_every", *_AT_LEAST_ONE):
            if getattr(self, name) is not None:
                _range(name, getattr(self, name), 1)
        for name in ("seed", "data_seed"):
            if not 0 <= getattr(self, name) < 2**32:
                raise ConfigError(f"{name} must be a whole number in [0, 2^32), got {getattr(self, name)}")
        if self.few > self.many:
            raise ConfigError(f"few must be at most many = {self.many}, got {self.few}")
        if self.profile == "none" and self.imbalance is not None:
            raise ConfigError(f"imbalance must not be given with profile 'none', got {self.imbalance!r}")
        if self.n_max is not None and self.imbalance is None:
            raise ConfigError(f"n_max needs imbalance: it is the size of the subset's largest class, got {self.n_max}")
        if self.val_share is not None:
            if not 0 < self.val_share < 1:
                raise ConfigError(f"val_share must be a number in (0, 1), got {self.val_share}")
            if self.val is not None or not self.keep_weights:
                raise ConfigError("val_share must not be given with val, nor without keep_weights")
        active_steps(self.active, 1, 100)
        if self.graph and (self.compile or self.loss == "gcl"):
            raise ConfigError("graph must be false with compile, and with gcl, whose noise is drawn outside the graph")
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
            start, stop = (_steps(end, steps_per_epoch, steps) for end in (first or "0", last or str(steps)))
            if min(start, stop) >= 0:
                return ("range", start, stop)
    except ValueError:
        pass
    raise ConfigError(f"active must be all, 0.3, every:5, 100:2000, or a range such as 140ep: or 70%:, got {text!r}")


def _steps(text: str, steps_per_epoch: int, steps: int) -> int:
    for suffix, unit in (("ep", steps_per_epoch), ("%", steps / 100)):
        if text.endswith(suffix):
            return round(float(text.removesuffix(suffix)) * unit)
    return int(text)


_AT_LEAST_ONE = ("threads", "size", "imbalance", "n_max", "val", "test_per_class")
FIELDS = {item.name: item for item in dataclasses.fields(Config)}
DATA_SETTINGS = (
    *(
        "data",
        "test_data",
        "format",
        "images",
        "size",
        "classes",
        "skip_broken",
        "imbalance",
        "n_max",
        "profile",
        "data_seed",
    ),
    *("resample", "val", "val_share", "test_per_class"),
)
"""Settings that determine the images."""
RESUMABLE = ("device", "threads", "tensorboard", "cache", "eval_every", "keep_weights")
"""Settings that may change when a run is resumed."""


def parsed(text: str) -> Any:
    """Returns the value of an option in a text: JSON, True, False or None, else the text itself."""
    try:
        return json.loads(text)
    except ValueError:
        return {"True": True, "False": False, "None": None}.get(text, text)


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
    """Returns the settings in a TOML, YAML or JSON file, by the names of :class:`Config`; those of the flags are accepted, too.

    Raises:
        ConfigError: The file can't be read, is not a table of settings, or gives one twice.
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
            values = _from_yaml(text)
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
    try:
        return by_field(values)
    except ValueError as error:
        raise ConfigError(f"config {path}: {error}") from error


def by_field(values: Mapping[Any, Any]) -> dict[str, Any]:
    """Returns the settings by the names of :class:`Config`, whether they have these or those of the flags.

    Raises:
        ConfigError: A setting is given by both names.

    >>> by_field({"batch-size": 32, "set": {"rho": 0.1}})
    {'batch_size': 32, 'options': {'rho': 0.1}}
    """
    flags = {item.metadata["flag"].replace("-", "_"): name for name, item in FIELDS.items() if "flag" in item.metadata}
    found: dict[str, Any] = {}
    for name, value in values.items():
        field_name = str(name).replace("-", "_")
        field_name = flags.get(field_name, field_name)
        if field_name in found:
            raise ConfigError(f"{name} is given twice, also as {field_name}")
        found[field_name] = value
    return found


def _from_yaml(text: str) -> Any:
    """Returns what YAML 1.2 reads in a text; PyYAML, which is of YAML 1.1, takes ``1e-2`` for a text."""
    import yaml

    class Loader(yaml.SafeLoader):  # type: ignore[misc]
        pass

    number = re.compile(r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)[eE][-+]?[0-9]+$")
    Loader.add_implicit_resolver("tag:yaml.org,2002:float", number, list("-+.0123456789"))
    try:
        return yaml.load(text, Loader)  # noqa: S506  # a SafeLoader
    except yaml.YAMLError as error:
        raise ValueError(" ".join(str(error).split())) from error


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
    return (
        config.schedule == "cosine"
        or config.method == "sparse_sam"
        or config.active != "all"
        or "rho_schedule" in config.options
        or any(one.endswith("%") for one in percent)
    )
