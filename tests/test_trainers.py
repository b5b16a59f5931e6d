"""Lightning, Hugging Face's Trainer and Accelerate take the steps that a plain loop takes; the examples run and learn."""

import collections
import copy
import dataclasses
import datetime
import importlib
import itertools
import os
import socket
import subprocess
import sys
import threading
import types
import warnings

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn.functional as F
from torch.utils.data import DataLoader, TensorDataset

import ltsam_fast as lf
from ltsam_fast.optim.step import Step

from .method_rows import EVERY

COUNTS = [40, 20, 5]
METHODS = dict.fromkeys(EVERY, {}) | {
    "FocalSAM": {"class_counts": COUNTS},
    "ImbSAM": {"class_counts": COUNTS, "eta": 30},
    "CCSAM": {"class_counts": COUNTS, "scope": "all"},
    "SSESAM": {"class_counts": COUNTS, "eta": 30},
    "GNM": {"dis_mul": 1.0},
    "MicroBatchSAM": {"m": 3},
    "SparseSAM": {"refresh_every": 4},
    "LookSAM": {"k": 2},
    "MomentumSAM": {"direction": "last_gradient"},
    "TailMomentumSAM": {"class_counts": COUNTS},
}
TRAINERS = ("lightning", "accelerate", "hugging_face")
RHO, LR, BATCH, STEPS = 0.1, 0.02, 8, 6
each_trainer = pytest.mark.parametrize("trainer", TRAINERS)


@pytest.fixture(autouse=True)
def fresh_accelerate():
    """Accelerate's settings are the process's: each test has its own."""
    yield
    if "accelerate" in sys.modules:
        from accelerate.state import AcceleratorState, GradientState

        AcceleratorState._reset_state(True)
        GradientState._reset_state()


class Net(torch.nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.layers = torch.nn.Sequential(
            torch.nn.Linear(5, 16), torch.nn.BatchNorm1d(16), torch.nn.Tanh(), torch.nn.Linear(16, 3)
        )

    def forward(self, x, labels=None):
        return {"logits": self.layers(x)}


def make_data(seed, spoilt=None):
    """Training data of STEPS batches with every class twice or more; batch ``spoilt`` has a number that overflows."""
    generator = torch.Generator().manual_seed(seed)
    y = torch.cat([torch.arange(BATCH)[torch.randperm(BATCH, generator=generator)] % 3 for _ in range(STEPS)])
    x = torch.randn(len(y), 5, generator=generator) + F.one_hot(y, 5)
    if spoilt is not None:
        x[BATCH * spoilt] = torch.inf
    return x, y


def losses(net, x, y):
    return F.cross_entropy(net(x)["logits"], y, reduction="none")


def groups_of(net):
    """As Hugging Face's Trainer has them."""
    named = list(net.named_parameters())
    return [{"params": [p for n, p in named if ("bias" in n) == bias]} for bias in (False, True)]


def optimizer_of(net, method, options, **more):
    own = {"rho": RHO, "lr": LR, "weight_decay": 0.0, **options, **more}
    if own.get("plan") == "require":  # needs a model from the first
        own["model"] = net
    return getattr(lf, method)(groups_of(net), torch.optim.AdamW, **own)


def decay(optimizer, steps):
    return torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: max(0.0, (steps - step) / steps))


def weights(net):
    return torch.cat([p.detach().flatten() for p in net.state_dict().values()])


def plain(method, options, data, *, clip=0.0, epochs=1, skip=(), bf16=False, constant=False):
    """The loop that the trainers have to equal."""
    net = Net()
    optimizer = optimizer_of(net, method, options, max_grad_norm=clip, model=net)
    schedule = decay(optimizer, epochs * STEPS)
    for _ in range(epochs):
        for i, (x, y) in enumerate(zip(*(one.split(BATCH) for one in data), strict=True)):
            if i in skip:
                continue

            def closure(index=slice(None), x=x, y=y):
                with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
                    return losses(net, x[index], y[index])

            optimizer.step(closure, targets=y)
            if not constant:
                schedule.step()
    return weights(net)


class Run:
    """One training run, by a trainer's own means."""

    def __init__(self, method, options, data, folder, **settings):
        self.method, self.options, self.data, self.folder = method, options, data, folder
        self.micro = settings.get("micro", 1)
        self.clip = settings.get("clip", 0.0)
        self.epochs = settings.get("epochs", 1)
        self.scaler = settings.get("scaler")
        self.bf16 = settings.get("bf16", False)
        self.constant = settings.get("constant", False)
        self.workers = settings.get("workers", 1)
        self.interrupt = settings.get("interrupt", False)
        self.steps = self.epochs * STEPS
        self.net = Net()

    def loader(self):
        batch = BATCH // self.micro // self.workers
        return DataLoader(TensorDataset(*self.data), batch_size=batch)

    def schedule(self, optimizer, steps=None):
        if self.constant:
            return torch.optim.lr_scheduler.ConstantLR(optimizer, 1.0)
        return decay(optimizer, self.steps if steps is None else steps)

    def lightning(self):
        pytest.importorskip("lightning")
        from lightning.pytorch import Trainer
        from lightning.pytorch.plugins import MixedPrecision

        from ltsam_fast.trainers.lightning import SharpnessAwareModule

        run = self

        class Module(SharpnessAwareModule):
            def __init__(self):
                super().__init__()
                self.net = Net()
                self.seen = []

            def training_losses(self, batch, batch_idx):
                return losses(self.net, *batch)

            def on_train_batch_end(self, outputs, batch, batch_idx):
                self.seen.append(self.training_loss)

            def configure_optimizers(self):
                optimizer = optimizer_of(self.net, run.method, run.options)
                return {
                    "optimizer": optimizer,
                    "lr_scheduler": {"scheduler": run.schedule(optimizer), "interval": "step"},
                }

        class Scaled(MixedPrecision):
            def autocast_context_manager(self):
                return torch.autocast("cpu", enabled=False)

        def trainer(epochs):
            precision = {"precision": "bf16-mixed"} if self.bf16 else {}
            if self.scaler is not None:
                precision = {"plugins": [Scaled("16-mixed", "cpu", self.scaler)]}
            return Trainer(
                max_epochs=epochs,
                accelerator="cpu",
                devices=self.workers,
                strategy="ddp" if self.workers > 1 else "auto",
                use_distributed_sampler=False,
                accumulate_grad_batches=self.micro,
                gradient_clip_val=self.clip or None,
                logger=False,
                enable_checkpointing=False,
                enable_model_summary=False,
                enable_progress_bar=False,
                default_root_dir=self.folder,
                **precision,
            )

        loader = self.loader()
        if self.workers > 1:  # this worker's batches
            loader = DataLoader(list(loader)[dist.get_rank() :: self.workers], batch_size=None)
        path = None
        if self.interrupt:
            first = trainer(1)
            first.fit(Module(), loader)
            path = self.folder / "half.ckpt"
            first.save_checkpoint(path)
        module = Module()
        trainer(self.epochs).fit(module, loader, ckpt_path=path)
        assert all(loss is None or loss.shape == () for loss in module.seen)
        self.net, self.optimizer = module.net, module.trainer.optimizers[0]
        return weights(self.net)

    def accelerate(self):
        pytest.importorskip("accelerate")
        from accelerate import Accelerator
        from accelerate.state import AcceleratorState, GradientState

        from ltsam_fast.trainers.accelerate import AcceleratedStep

        def start():
            AcceleratorState._reset_state(True)
            GradientState._reset_state()
            accelerator = Accelerator(
                cpu=True, gradient_accumulation_steps=self.micro, mixed_precision="bf16" if self.bf16 else "no"
            )
            accelerator.scaler = self.scaler  # fp16 asks for a GPU
            self.net = Net()
            self.optimizer = optimizer_of(self.net, self.method, self.options, max_grad_norm=self.clip)
            schedule = self.schedule(self.optimizer, self.steps * self.workers)  # moves once for each worker
            model, optimizer, loader, schedule = accelerator.prepare(self.net, self.optimizer, self.loader(), schedule)
            step = AcceleratedStep(accelerator, model, optimizer, lambda batch: losses(model, *batch))

            def epoch():
                taken = []
                for batch in loader:
                    with accelerator.accumulate(model):
                        taken.append(step(batch))
                        schedule.step()
                self.skipped.append(accelerator.optimizer_step_was_skipped)
                assert sum(loss is not None for loss in taken) == STEPS
                assert all(loss is None or loss.shape == () for loss in taken)

            return accelerator, epoch

        self.skipped = []
        accelerator, epoch = start()
        if self.interrupt:
            epoch()
            accelerator.save_state(self.folder / "half")
            accelerator, epoch = start()
            accelerator.load_state(self.folder / "half")
        for _ in range(self.epochs - self.interrupt):
            epoch()
        AcceleratorState._reset_state(self.workers == 1)
        return weights(self.net)

    def hugging_face(self):
        pytest.importorskip("transformers")
        from accelerate.state import AcceleratorState
        from transformers import TrainingArguments

        from ltsam_fast.trainers.hugging_face import SharpnessAwareTrainer

        class Ordered(SharpnessAwareTrainer):
            def get_train_dataloader(self):
                made = run.loader()
                made.collate_fn = lambda pairs: dict(zip(("x", "labels"), map(torch.stack, zip(*pairs)), strict=True))  # noqa: B905
                return self.accelerator.prepare(made)

        run = self
        AcceleratorState._reset_state(self.workers == 1)

        def trainer():
            self.net = Net()
            made = Ordered(
                model=self.net,
                args=TrainingArguments(
                    output_dir=self.folder,
                    num_train_epochs=self.epochs,
                    per_device_train_batch_size=BATCH // self.micro // self.workers,
                    gradient_accumulation_steps=self.micro,
                    max_grad_norm=self.clip,
                    learning_rate=LR,
                    lr_scheduler_type="constant" if self.constant else "linear",
                    weight_decay=0.0,
                    bf16=self.bf16,
                    use_cpu=True,
                    save_strategy="epoch" if self.interrupt else "no",
                    report_to="none",
                    disable_tqdm=True,
                    label_names=["labels"],
                    ddp_backend="gloo" if self.workers > 1 else None,
                ),
                train_dataset=TensorDataset(*self.data),
                method=getattr(lf, self.method),
                method_options={"rho": RHO, **self.options},
            )
            made.accelerator.scaler = self.scaler
            return made

        made = trainer()
        made.train()
        if self.interrupt:
            made = trainer()
            made.train(resume_from_checkpoint=str(self.folder / f"checkpoint-{STEPS}"))
        self.optimizer = made.optimizer.optimizer
        return weights(self.net)


def run(trainer, method, options, data, folder, **settings):
    made = Run(method, options, data, folder, **settings)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*lr_scheduler.*")
        warnings.filterwarnings("error", message=".*optimizer.step.*")
        return getattr(made, trainer)(), made


def assert_equal(one, other, tolerance=0.0):
    assert one.isfinite().all()
    torch.testing.assert_close(one, other, rtol=tolerance, atol=tolerance)


@each_trainer
@pytest.mark.parametrize("method", METHODS)
def test_a_trainer_equals_the_plain_loop(trainer, method, seed, tmp_path):
    data, options = make_data(seed), METHODS[method]
    ours, made = run(trainer, method, options, data, tmp_path, epochs=2)
    assert_equal(ours, plain(method, options, data, epochs=2))
    assert not torch.equal(ours, weights(Net()))
    assert made.optimizer.param_groups[0]["steps"] == 2 * STEPS


@each_trainer
@pytest.mark.parametrize("method", ["SAM", "FocalSAM", "GNM", "GSAM"])
def test_accumulating_equals_the_large_batch(trainer, method, seed, tmp_path, monkeypatch):
    monkeypatch.setitem(globals(), "Net", Unnormalized)  # batch norm sees the parts
    data, options = make_data(seed), METHODS[method]
    perturbed, verb = [], "add_noise" if method == "GNM" else "ascend"
    perturb = getattr(Step, verb)
    monkeypatch.setattr(Step, verb, lambda self, *rest, **more: (perturbed.append(1), perturb(self, *rest, **more)))
    ours, made = run(trainer, method, options, data, tmp_path, micro=4)
    assert len(perturbed) == STEPS and made.optimizer.param_groups[0]["steps"] == STEPS
    assert_equal(ours, plain(method, options, data), 1e-5)


class Unnormalized(Net):
    def __init__(self):
        super().__init__()
        self.layers[1] = torch.nn.Identity()


class Counting(Unnormalized):
    """Notes how many samples each pass with gradients has."""

    sizes = []

    def forward(self, x, labels=None):
        if torch.is_grad_enabled():
            self.sizes.append(len(x))
        return super().forward(x)


PLANNED = {
    "ImbSAM": {"class_counts": COUNTS, "eta": 10},
    "FocalSAM": {"class_counts": COUNTS},
    "SSESAM": {"class_counts": COUNTS, "eta": 10},
    "CCSAM": {"class_counts": COUNTS, "scope": "all"},
}


@each_trainer
@pytest.mark.parametrize("micro", [1, 2])
@pytest.mark.parametrize("method", PLANNED)
def test_plans_end_alike(trainer, method, micro, seed, tmp_path, monkeypatch, caplog):
    monkeypatch.setitem(globals(), "Net", Counting)
    ends, sizes = {}, {}
    for plan in ("published", "auto", "require"):
        Counting.sizes = sizes[plan] = []
        options = {**PLANNED[method], "plan": plan}
        ends[plan], made = run(trainer, method, options, make_data(seed), tmp_path, micro=micro)
        assert made.optimizer.model is not None
    assert "ltsam_fast" not in {one.name for one in caplog.records}
    assert_equal(ends["auto"], ends["published"], 1e-5)
    assert_equal(ends["require"], ends["auto"])
    if method in ("ImbSAM", "SSESAM"):
        tail = int((make_data(seed)[1][-BATCH:] == 2).sum())
        head = BATCH - tail
        last = [head, tail, tail] if method == "ImbSAM" else [head, tail, head, tail]
        assert {*sizes["auto"]} > {*sizes["published"]}
        assert micro > 1 or sizes["auto"][-len(last) :] == last


def odd_batches(kind):
    """Batches with more in them than samples, of sizes that are those of the rest, too."""
    x, y = make_data(0)
    rest = {"scale": torch.tensor([1.0, 2.0, 0.5, 1.5, 1.0]), "weights": torch.tensor([1.0, 2.0, 3.0])}
    rest |= {"mask": torch.ones(1, 5).tril(3), "none": None, "number": 2, "text": ["a"]}
    pairs = zip(x.split([8, 5, 3, 1, 8, 8, 5, 3, 7]), y.split([8, 5, 3, 1, 8, 8, 5, 3, 7]), strict=True)
    made = [{"x": x, "labels": y, **rest} for x, y in pairs]
    return [types.SimpleNamespace(**one) for one in made] if kind == "unknown" else made


def odd_losses(net, batch):
    one = vars(batch) if isinstance(batch, types.SimpleNamespace) else batch
    logits = net(one["x"] * one["scale"] * one["mask"])["logits"]
    return F.cross_entropy(logits, one["labels"], one["weights"], reduction="none")


@pytest.mark.parametrize("kind", ["mapping", "unknown"])
@pytest.mark.parametrize("method", [*PLANNED, "ESAM"])
@pytest.mark.parametrize("trainer", ["accelerate", "lightning"])
def test_only_samples_are_sliced(trainer, method, kind, tmp_path, monkeypatch, caplog):
    pytest.importorskip(MODULES[trainer][0])
    monkeypatch.setitem(globals(), "Net", Counting)
    batches, ends = odd_batches(kind), []

    def labels(batch):
        return batch.labels if kind == "unknown" else batch["labels"]

    def by_accelerate(net, optimizer):
        from accelerate import Accelerator

        from ltsam_fast.trainers.accelerate import AcceleratedStep

        accelerator = Accelerator(cpu=True)
        model, optimizer = accelerator.prepare(net, optimizer)
        step = AcceleratedStep(accelerator, model, optimizer, lambda batch: odd_losses(model, batch), labels)
        for batch in batches:
            step(batch)

    def by_lightning(net, optimizer):
        own = {"training_losses": lambda self, batch, _: odd_losses(net, batch)}
        own |= {"training_targets": lambda self, batch: labels(batch)}
        module = type("Own", (type(lightning_module(None)),), own)()
        module.net, module.configure_optimizers = net, lambda: optimizer
        lightning_trainer(tmp_path).fit(module, DataLoader(batches, batch_size=None))

    for plan in ("published", "auto"):
        net, Counting.sizes = Net(), []
        optimizer = optimizer_of(net, method, {**{**METHODS, **PLANNED}[method], "plan": plan})
        fit = {"accelerate": by_accelerate, "lightning": by_lightning}[trainer]
        if method == "ESAM" and kind == "unknown":
            with pytest.raises(TypeError, match="batch must hold tensors, .*, got SimpleNamespace"):
                fit(net, optimizer)
            return
        fit(net, optimizer)
        ends.append(weights(net))
        sizes = [size for size, _ in itertools.groupby(Counting.sizes)]
    assert "ltsam_fast" not in {one.name for one in caplog.records}
    assert_equal(*ends, 1e-5)
    if method in ("ImbSAM", "SSESAM"):
        assert (sizes == [8, 5, 3, 1, 8, 5, 3, 7]) == (kind == "unknown")


def test_what_is_sliced_is_the_same_in_every_batch():
    from ltsam_fast.trainers.micro_batches import Layouts

    def found(size, *lengths):
        return layouts.of([torch.zeros(length, 2) for length in lengths], size)

    layouts = Layouts()
    assert found(1, 1, 1) == [True, True]  # says nothing of others
    assert found(8, 8, 3) == found(3, 3, 3) == [True, False]
    assert found(8, 9, 3) is None
    assert found(8, 8, 8, 3) == [True, True, False]  # other tensors


def test_without_labels_the_losses_tell_the_size():
    from ltsam_fast.trainers.micro_batches import MicroBatches

    x, y = make_data(0)
    ends = []
    for constants in (5, 7):
        net = Unnormalized()
        micro = MicroBatches(lambda batch, net=net: losses(net, batch[0], batch[1]), lambda batch: None)
        optimizer = optimizer_of(net, "ESAM", {}, model=net)
        for some in torch.arange(len(y)).split(7):
            micro.add((x[some], y[some], torch.zeros(constants)), last=True)
            micro.step(optimizer)
        ends.append(weights(net))
    assert_equal(*ends)


@each_trainer
def test_clipping_is_passed_on(trainer, seed, tmp_path):
    # SGD-like sensitivity: AdamW hardly feels the scale of a gradient, but with a bound this low eps counts.
    data = make_data(seed)
    ours, made = run(trainer, "SAM", {}, data, tmp_path, clip=1e-7)
    assert made.optimizer.max_grad_norm == 1e-7
    assert_equal(ours, plain("SAM", {}, data, clip=1e-7))
    assert not torch.allclose(ours, plain("SAM", {}, data), atol=1e-3)


@each_trainer
@pytest.mark.parametrize("method", ["FriendlySAM", "ESAM"])
def test_a_resumed_run_is_an_undisturbed_one(trainer, method, seed, tmp_path):
    data, options = make_data(seed), METHODS[method]
    ours, _ = run(trainer, method, options, data, tmp_path, epochs=2, interrupt=True)
    assert_equal(ours, plain(method, options, data, epochs=2))


@each_trainer
@pytest.mark.parametrize("method", ["SAM", "FocalSAM", "MicroBatchSAM"])
@pytest.mark.parametrize("spoilt", [0, 3, STEPS - 1])
def test_a_scaler_skips_what_overflows(trainer, method, spoilt, seed, tmp_path, monkeypatch):
    monkeypatch.setitem(globals(), "Net", Unnormalized)  # running statistics would keep the overflow
    data, options = make_data(seed, spoilt), METHODS[method]
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**8, growth_interval=10**6)
    ours, made = run(trainer, method, options, data, tmp_path, scaler=scaler, constant=True)
    assert_equal(ours, plain(method, options, data, skip=(spoilt,), constant=True), 1e-6)
    assert scaler.get_scale() == 2.0**7
    if trainer == "accelerate":
        assert made.skipped == [spoilt == STEPS - 1]


@each_trainer
def test_bfloat16(trainer, seed, tmp_path):
    data = make_data(seed)
    ours, _ = run(trainer, "FocalSAM", METHODS["FocalSAM"], data, tmp_path, bf16=True)
    exact = plain("FocalSAM", METHODS["FocalSAM"], data)
    assert ours.isfinite().all() and not torch.equal(ours, exact)
    # AdamW's first steps are signs of gradients: small gradients may have another one in bfloat16.
    assert (ours - exact).abs().mean() < 0.2 * (exact - weights(Net())).abs().mean()


def free_port():
    with socket.socket() as one:
        one.bind(("localhost", 0))
        return one.getsockname()[1]


DISTRIBUTED = {
    ("FocalSAM", "synced"): {"class_counts": COUNTS, "ascent_sync": True},
    ("FocalSAM", "accumulated"): {"class_counts": COUNTS, "ascent_sync": True},
    ("SAM", "local"): {},
    ("ImbSAM", "tail"): {"class_counts": COUNTS, "eta": 10, "ascent_sync": True, "plan": "require"},
}


def worker(rank, folder, port):
    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": "2",
        "LOCAL_WORLD_SIZE": "2",
        "MASTER_ADDR": "localhost",
        "MASTER_PORT": str(port),
        "TORCHELASTIC_RUN_ID": "tests",  # who started these processes: torchrun, as far as Lightning can tell
        "ACCELERATE_USE_CPU": "true",
    }
    globals()["Net"] = Unnormalized
    torch.set_num_threads(1)
    dist.init_process_group("gloo", timeout=datetime.timedelta(seconds=60))
    results = {}
    for trainer in TRAINERS:
        if importlib.util.find_spec(MODULES[trainer][0]):
            for (method, kind), options in DISTRIBUTED.items():
                micro = 2 if kind == "accumulated" else 1
                results[trainer, kind] = run(trainer, method, options, make_data(7), folder, workers=2, micro=micro)[0]
    torch.save(results, folder / f"{rank}.pt")
    os._exit(0)  # gloo's threads may abort an interpreter that ends in good order (pytorch/pytorch#190489)


@pytest.fixture(scope="module")
def workers(tmp_path_factory):
    if not dist.is_available():
        pytest.skip("this torch has no torch.distributed")
    folder = tmp_path_factory.mktemp("workers")
    mp.spawn(worker, (folder, free_port()), nprocs=2)
    return [torch.load(folder / f"{rank}.pt") for rank in range(2)]


MODULES = {
    "lightning": ("lightning", "ltsam_fast[lightning]"),
    "accelerate": ("accelerate", "ltsam_fast[accelerate]"),
    "hugging_face": ("transformers", "ltsam_fast[hugging-face]"),
}


@each_trainer
def test_two_workers(trainer, workers, monkeypatch):
    """Synced, they are the joined batch; by default each climbs along its own half, which is MicroBatchSAM with m of a half."""
    pytest.importorskip(MODULES[trainer][0])
    monkeypatch.setitem(globals(), "Net", Unnormalized)
    joined = plain("FocalSAM", {"class_counts": COUNTS}, make_data(7))
    halves = plain("MicroBatchSAM", {"m": BATCH // 2}, make_data(7))
    tail = plain("ImbSAM", {"class_counts": COUNTS, "eta": 10, "plan": "published"}, make_data(7))
    for one in workers:
        assert_equal(one[trainer, "synced"], joined, 1e-5)
        assert_equal(one[trainer, "tail"], tail, 1e-5)
        assert_equal(one[trainer, "accumulated"], joined, 1e-5)
        assert_equal(one[trainer, "local"], halves, 1e-5)
    assert not torch.allclose(halves, plain("SAM", {}, make_data(7)), atol=1e-4)


EXAMPLES = {  # what must be installed, epochs, and the accuracy they bring at least
    "plain_loop": ((), 20, 60),
    "accelerate_loop": (("accelerate",), 20, 60),
    "lightning_module": (("lightning",), 20, 60),
    "hugging_face_lora": (("transformers", "peft"), 10, 20),
}


def example_of(name):
    for module in ("sklearn", *EXAMPLES[name][0]):
        pytest.importorskip(module)
    return importlib.import_module(f"ltsam_fast.examples.{name}").main


@pytest.mark.parametrize("example", EXAMPLES)
@pytest.mark.parametrize("arguments", [(), ("--method", "gnm", "--accumulate", "2", "--bf16")])
def test_examples_run_and_learn(example, arguments, capsys):
    main, (_, epochs, accuracy) = example_of(example), EXAMPLES[example]
    result = main(["--epochs", str(epochs), *arguments])
    shown = capsys.readouterr().out
    assert "test accuracy (%)" in shown and "few" in shown
    assert result["all"] > accuracy and result["many"] > 70


@pytest.mark.parametrize("example", EXAMPLES)
def test_examples_refuse_bad_arguments(example, capsys):
    main = example_of(example)
    with pytest.raises(SystemExit, match="2"):
        main(["--epochs", "0"])
    assert "--epochs: must be at least 1, got 0" in capsys.readouterr().err


@each_trainer
def test_a_missing_dependency_names_the_extra(trainer):
    """In a process of its own, where the module can't be found."""
    module, extra = MODULES[trainer]
    script = f"import sys; sys.modules[{module!r}] = None; import ltsam_fast.trainers.{trainer}"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120)
    assert done.returncode and f"pip install '{extra}'" in done.stderr.splitlines()[-1]


def lightning_trainer(folder, **settings):
    from lightning.pytorch import Trainer

    quiet = {"logger": False, "enable_checkpointing": False, "enable_model_summary": False}
    quiet |= {"enable_progress_bar": False, "default_root_dir": folder, "accelerator": "cpu", "max_epochs": 1}
    return Trainer(**quiet | settings)


def lightning_module(make_optimizer, targets=True):
    from ltsam_fast.trainers.lightning import SharpnessAwareModule

    class Module(SharpnessAwareModule):
        def __init__(self):
            super().__init__()
            self.net = Net()

        def training_losses(self, batch, batch_idx):
            return losses(self.net, *batch)

        def training_targets(self, batch):
            return super().training_targets(batch) if targets else None

        def configure_optimizers(self):
            return make_optimizer(self.net)

    return Module()


def half_clipped(net):
    return optimizer_of(net, "SAM", {}, max_grad_norm=0.5)


@pytest.mark.parametrize(
    ("make_optimizer", "targets", "settings", "message"),
    [
        (
            lambda net: optimizer_of(net, "SAM", {}),
            True,
            {"gradient_clip_val": 1.0, "gradient_clip_algorithm": "value"},
            "gradient_clip_algorithm must be 'norm'",
        ),
        (
            half_clipped,
            True,
            {"gradient_clip_val": 1.0},
            "gradient_clip_val must be the optimizer's max_grad_norm = 0.5",
        ),
        (lambda net: optimizer_of(net, "FocalSAM", METHODS["FocalSAM"]), False, {}, "targets must be given"),
    ],
)
def test_lightning_refuses(make_optimizer, targets, settings, message, tmp_path):
    pytest.importorskip("lightning")
    module = lightning_module(make_optimizer, targets)
    with pytest.raises(ValueError, match=message):
        lightning_trainer(tmp_path, **settings).fit(module, DataLoader(TensorDataset(*make_data(0)), batch_size=BATCH))
    assert_equal(weights(module.net)[: 5 * 16], weights(Net())[: 5 * 16])


def test_lightning_with_an_ordinary_optimizer(seed, tmp_path, monkeypatch):
    pytest.importorskip("lightning")
    monkeypatch.setitem(globals(), "Net", Unnormalized)
    data = make_data(seed)
    module = lightning_module(lambda net: torch.optim.AdamW(groups_of(net), lr=LR, weight_decay=0.0))
    lightning_trainer(tmp_path).fit(module, DataLoader(TensorDataset(*data), batch_size=BATCH))
    assert_equal(weights(module.net), plain("SAM", {"rho": 0.0}, data, constant=True), 1e-4)


def test_lightning_forgets_what_an_interrupted_step_left(seed, tmp_path):
    pytest.importorskip("lightning")
    data = make_data(seed)
    module = lightning_module(lambda net: optimizer_of(net, "SAM", {}))
    on_start = []

    def interrupt(batch, batch_idx):
        on_start.append(batch_idx)
        if batch_idx == 1 and len(on_start) == 2:
            raise RuntimeError("stopped")

    module.on_train_batch_start = interrupt
    batches = DataLoader(TensorDataset(*data), batch_size=BATCH)
    with pytest.raises(RuntimeError, match="stopped"):
        lightning_trainer(tmp_path, accumulate_grad_batches=2).fit(module, batches)
    lightning_trainer(tmp_path, accumulate_grad_batches=2).fit(module, batches)
    other = lightning_module(lambda net: optimizer_of(net, "SAM", {}))
    lightning_trainer(tmp_path, accumulate_grad_batches=2).fit(other, batches)
    assert_equal(weights(module.net), weights(other.net))


def test_lightning_refuses_manual_optimization(tmp_path):
    pytest.importorskip("lightning")
    module = lightning_module(lambda net: optimizer_of(net, "SAM", {}))
    module.automatic_optimization = False
    with pytest.raises(ValueError, match="automatic_optimization must be True"):
        lightning_trainer(tmp_path).fit(module, DataLoader(TensorDataset(*make_data(0)), batch_size=BATCH))


def copied_losses(net, x, y):
    """The losses that a forward of ``net`` would give now; it is left as it is."""
    with torch.no_grad():
        return losses(copy.deepcopy(net), x, y)


def shown_by_lightning(make_optimizer, folder, data, batch=BATCH, **settings):
    """What Lightning shows of each batch, and what is true: (loss in outputs, logged in the step, mean loss at w)."""
    shown = []

    def training_losses(batch, batch_idx):
        found = losses(module.net, *batch)
        module.log("loss", found.mean(), on_step=True, on_epoch=True)
        return found

    def before(batch, batch_idx):
        with module.trainer.precision_plugin.forward_context():
            true.append(copied_losses(module.net, *batch).mean())

    true, module = [], lightning_module(make_optimizer)
    module.training_losses, module.on_train_batch_start = training_losses, before
    module.on_train_batch_end = lambda outputs, batch, batch_idx: shown.append(
        (outputs["loss"], module.trainer.callback_metrics["loss_step"])
    )
    trainer = lightning_trainer(folder, **settings)
    trainer.fit(module, DataLoader(TensorDataset(*data), batch_size=batch))
    outputs, logged = (torch.stack(one) for one in zip(*shown, strict=True))
    return outputs, logged, torch.stack(true), trainer.callback_metrics["loss_epoch"], module


@pytest.mark.parametrize("micro", [1, 2, 4])
@pytest.mark.parametrize("method", [*METHODS, None])
def test_lightning_shows_the_loss_at_w(method, micro, seed, tmp_path, monkeypatch):
    pytest.importorskip("lightning")
    if method in (
        "CCSAM",
        "MicroBatchSAM",
        "ESAM",
        "ImbSAM",
        "SSESAM",
    ):  # in parts, of which batch norm makes nothing, or other ones
        monkeypatch.setitem(globals(), "Net", Unnormalized)
    data = make_data(seed)

    def make_optimizer(net):
        if method is None:
            return torch.optim.SGD(net.parameters(), lr=0.1)
        return optimizer_of(net, method, METHODS[method], rho=1.0)

    outputs, logged, true, epoch, module = shown_by_lightning(
        make_optimizer, tmp_path, data, BATCH // micro, accumulate_grad_batches=micro
    )
    assert_equal(outputs * micro, true, 1e-6)
    assert_equal(logged, true, 1e-6)
    assert_equal(epoch, true.mean(), 1e-6)
    if method is not None:
        assert_equal(module.training_loss, true[-micro:].mean(), 1e-6)


@pytest.mark.parametrize("precision", ["32-true", "64-true", "bf16-true", "bf16-mixed", "scaler"])
@pytest.mark.parametrize("micro", [1, 2])
def test_lightning_shows_the_loss_in_every_precision(precision, micro, seed, tmp_path):
    pytest.importorskip("lightning")
    from lightning.pytorch.plugins import MixedPrecision

    class Scaled(MixedPrecision):
        def autocast_context_manager(self):
            return torch.autocast("cpu", enabled=False)

    def shown(make_optimizer):
        scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
        own = {"plugins": [Scaled("16-mixed", "cpu", scaler)]} if precision == "scaler" else {"precision": precision}
        data = make_data(seed)
        return shown_by_lightning(make_optimizer, tmp_path, data, BATCH // micro, accumulate_grad_batches=micro, **own)[
            0
        ]

    ours = shown(lambda net: lf.SAM(net.parameters(), torch.optim.SGD, rho=0.5, lr=0.0))
    assert_equal(ours, shown(lambda net: torch.optim.SGD(net.parameters(), lr=0.0)), 1e-6)


def test_lightning_finds_the_rate_of_sgd(seed, tmp_path):
    pytest.importorskip("lightning")
    from lightning.pytorch.tuner import Tuner

    def found(make_optimizer):
        module = lightning_module(lambda net: make_optimizer(net.parameters(), lr=module.lr))
        module.lr = 0.1
        trainer = lightning_trainer(tmp_path, accumulate_grad_batches=2)
        loader = DataLoader(TensorDataset(*make_data(seed)), batch_size=BATCH // 4)
        found = Tuner(trainer).lr_find(module, loader, num_training=20, min_lr=1e-4, max_lr=1.0)
        return torch.tensor(found.results["loss"]), module.lr

    ours, rate = found(lambda params, lr: lf.SAM(params, torch.optim.SGD, rho=0.0, lr=lr))
    theirs, right = found(torch.optim.SGD)
    assert_equal(ours, theirs, 1e-4)
    assert rate == right


@pytest.mark.parametrize("method", ["SAM", "FocalSAM", "GNM"])
def test_lightning_looks_without_a_trace(method, seed, tmp_path, monkeypatch):
    """The forward for the loss: running statistics and random numbers are as without it."""
    pytest.importorskip("lightning")

    class Dropping(Net):
        def __init__(self):
            super().__init__()
            self.layers.append(torch.nn.Dropout(0.5))
            torch.manual_seed(1)

    monkeypatch.setitem(globals(), "Net", Dropping)

    def fit(look):
        module = lightning_module(lambda net: optimizer_of(net, method, METHODS[method]))
        if not look:
            module._loss_before_step = lambda batch, batch_idx: (
                module._losses_at_w.append(torch.zeros(1)) or torch.zeros(())
            )
        lightning_trainer(tmp_path, accumulate_grad_batches=2).fit(
            module, DataLoader(TensorDataset(*make_data(seed)), batch_size=BATCH // 2)
        )
        return [*module.net.state_dict().values(), torch.rand(3)]

    for one, other in zip(fit(True), fit(False), strict=True):
        assert_equal(one, other)


def test_lightning_averages_weights_with_their_statistics(seed, tmp_path):
    """Weight averaging ends with an epoch that only runs forwards, for batch norm."""
    pytest.importorskip("lightning")
    from lightning.pytorch.callbacks import StochasticWeightAveraging

    def fit(make_optimizer):
        module = lightning_module(lambda net: make_optimizer(net.parameters(), lr=LR))
        trainer = lightning_trainer(tmp_path, max_epochs=3, callbacks=[StochasticWeightAveraging(LR, 1, 1)])
        trainer.fit(module, DataLoader(TensorDataset(*make_data(seed)), batch_size=BATCH))
        return module.net

    ours, theirs = fit(lambda params, lr: lf.SAM(params, torch.optim.SGD, rho=0.0, lr=lr)), fit(torch.optim.SGD)
    for one, other in zip(ours.buffers(), theirs.buffers(), strict=True):
        assert_equal(one.float(), other.float(), 1e-5)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("own", ["super", "step", "closure, then step"])
def test_lightning_hooks_fire_as_documented(method, own, seed, tmp_path):
    """Those that need no gradients; own ways to zero them and to take the step, too. The steps are those without hooks."""
    pytest.importorskip("lightning")
    from lightning.pytorch.callbacks import Callback

    fired = {name: [] for name in ("callback", "zero", "backward", "zero_grad", "step")}

    class Watch(Callback):
        def on_before_zero_grad(self, trainer, module, optimizer):
            fired["callback"].append(type(optimizer).__name__)

    class Mixin:
        def optimizer_step(self, epoch, batch_idx, optimizer, optimizer_closure):
            fired["step"].append(1)
            if own == "super":
                super().optimizer_step(epoch, batch_idx, optimizer, optimizer_closure)
            elif own == "step":
                optimizer.step(closure=optimizer_closure)
            else:
                optimizer_closure()
                optimizer.step()

    def fit(hooks):
        module = lightning_module(lambda net: optimizer_of(net, method, METHODS[method]))
        if hooks:

            class Hooked(Mixin, type(module)):
                def on_before_zero_grad(self, optimizer):
                    fired["zero"].append(1)

                def on_before_backward(self, loss):
                    fired["backward"].append(float(loss))

                def optimizer_zero_grad(self, epoch, batch_idx, optimizer):
                    fired["zero_grad"].append(1)
                    optimizer.zero_grad(set_to_none=False)

            module = Hooked()
        trainer = lightning_trainer(tmp_path, accumulate_grad_batches=2, callbacks=[Watch()] if hooks else [])
        trainer.fit(module, DataLoader(TensorDataset(*make_data(seed)), batch_size=BATCH))
        assert trainer.global_step == STEPS // 2
        return weights(module.net)

    assert_equal(fit(True), fit(False))
    counts = {name: len(calls) for name, calls in fired.items()}
    half = STEPS // 2
    assert counts == {"callback": half, "zero": half, "backward": STEPS, "zero_grad": half, "step": half}
    first = losses(Net(), *(one[:BATCH] for one in make_data(seed))).mean()
    assert fired["backward"][0] == pytest.approx(first.item() / 2, rel=1e-5)


def nothing(*_, **__):
    pass


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(
    ("name", "hook", "message"),
    [
        ("on_after_backward", nothing, "but Hooked does: .*on_train_batch_end comes after every step"),
        ("on_before_optimizer_step", nothing, "but Hooked does: .*on_train_batch_start comes before every step"),
        (
            "configure_gradient_clipping",
            nothing,
            "clip with the Trainer's gradient_clip_val or the optimizer's max_grad_norm",
        ),
        ("backward", nothing, "belongs in training_losses"),
    ],
)
def test_lightning_refuses_hooks_that_need_gradients(method, name, hook, message, tmp_path):
    pytest.importorskip("lightning")
    module = lightning_module(lambda net: optimizer_of(net, method, METHODS[method]))
    module = type("Hooked", (type(module),), {name: hook})()
    with pytest.raises(ValueError, match=rf"{name}\(\) must.*{message}"):
        lightning_trainer(tmp_path).fit(module, DataLoader(TensorDataset(*make_data(0)), batch_size=BATCH))
    assert_equal(weights(module.net), weights(Net()))


@pytest.mark.parametrize("name", ["on_after_backward", "on_before_optimizer_step"])
@pytest.mark.parametrize("kind", ["callback", "lambda", "instance"])
def test_lightning_refuses_callbacks_that_need_gradients(name, kind, tmp_path):
    pytest.importorskip("lightning")
    from lightning.pytorch.callbacks import Callback, LambdaCallback

    callback = {
        "callback": type("Watch", (Callback,), {name: nothing}),
        "lambda": lambda: LambdaCallback(**{name: nothing}),
    }
    module = lightning_module(lambda net: optimizer_of(net, "SAM", {}))
    if kind == "instance":
        setattr(module, name, nothing)
    callbacks = [] if kind == "instance" else [callback[kind]()]
    trainer = lightning_trainer(tmp_path, accumulate_grad_batches=2, callbacks=callbacks)
    with pytest.raises(ValueError, match=rf"{name}\(\) must not be overridden"):
        trainer.fit(module, DataLoader(TensorDataset(*make_data(0)), batch_size=BATCH))
    assert_equal(weights(module.net), weights(Net()))


def test_lightning_clips_as_the_hook_says_with_an_ordinary_optimizer(tmp_path):
    pytest.importorskip("lightning")
    module = lightning_module(lambda net: torch.optim.SGD(net.parameters(), lr=1.0))
    module.configure_gradient_clipping = lambda optimizer, *rest, **more: module.clip_gradients(
        optimizer, gradient_clip_val=1e-3, gradient_clip_algorithm="norm"
    )
    lightning_trainer(tmp_path, limit_train_batches=1).fit(
        module, DataLoader(TensorDataset(*make_data(0)), batch_size=BATCH)
    )
    moved = torch.cat([(p - q).flatten() for p, q in zip(module.net.parameters(), Net().parameters(), strict=True)])
    assert moved.norm().item() == pytest.approx(1e-3, rel=1e-3)


Pair = collections.namedtuple("Pair", "x y")  # noqa: PYI024


@dataclasses.dataclass(frozen=True)
class Data:
    x: torch.Tensor
    y: torch.Tensor


class Reusing:
    """A loader whose batches are all in the same memory."""

    def __init__(self, data, batch, reuse, wrap=lambda x, y: (x, y)):
        self.parts, self.reuse, self.wrap = list(zip(*(one.split(batch) for one in data), strict=True)), reuse, wrap

    def __len__(self):
        return len(self.parts)

    def __iter__(self):
        x, y = (torch.empty_like(one) for one in self.parts[0])
        for a, b in self.parts:
            yield self.wrap(x.copy_(a), y.copy_(b)) if self.reuse else self.wrap(a.clone(), b.clone())


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("trainer", ["lightning", "accelerate"])
def test_a_loader_may_use_its_memory_again(trainer, method, seed, tmp_path, monkeypatch):
    pytest.importorskip(MODULES[trainer][0])
    monkeypatch.setitem(globals(), "Net", Unnormalized)

    def run(reuse):
        loader = Reusing(make_data(seed), BATCH // 4, reuse)
        if trainer == "lightning":
            module = lightning_module(lambda net: optimizer_of(net, method, METHODS[method]))
            lightning_trainer(tmp_path, accumulate_grad_batches=4).fit(module, loader)
            return weights(module.net)
        from accelerate import Accelerator

        from ltsam_fast.trainers.accelerate import AcceleratedStep

        accelerator = Accelerator(cpu=True, gradient_accumulation_steps=4)
        net = Net()
        net, optimizer = accelerator.prepare(net, optimizer_of(net, method, METHODS[method]))
        step = AcceleratedStep(accelerator, net, optimizer, lambda batch: losses(net, *batch))
        for batch in loader:
            with accelerator.accumulate(net):
                step(batch)
        return weights(net)

    assert_equal(run(True), run(False))


def encoding(x, y):
    transformers = pytest.importorskip("transformers")
    return transformers.BatchEncoding({"x": x, "y": y})


def output(x, y):
    pytest.importorskip("transformers")
    from transformers.modeling_outputs import SequenceClassifierOutput

    return SequenceClassifierOutput(loss=y, logits=x)


def attributes(x, y):
    return types.SimpleNamespace(pair=(x, {"y": y}), name="a", nothing=None)


@pytest.mark.parametrize(
    ("wrap", "x_of"),
    [
        (lambda x, y: (x, y), lambda one: one[0]),
        (lambda x, y: [{"x": (x, [y, "text", None, 3])}], lambda one: one[0]["x"][0]),
        (lambda x, y: collections.OrderedDict(x=x, y=y), lambda one: one["x"]),
        (Pair, lambda one: one.x),
        (Data, lambda one: one.x),
        (encoding, lambda one: one["x"]),
        (output, lambda one: one.logits),
        (attributes, lambda one: one.pair[0]),
        (lambda x, y: {"x": x.numpy(), "y": y}, lambda one: torch.as_tensor(one["x"])),
        (lambda x, y: (x * torch.ones((), requires_grad=True), y), lambda one: one[0]),
    ],
)
def test_what_is_kept_is_a_copy(wrap, x_of):
    from ltsam_fast.trainers.micro_batches import copy_of

    memory = torch.zeros(1000)
    batch = wrap(memory[:4], torch.zeros(4))
    kept = copy_of(batch)
    assert type(kept) is type(batch)
    x = x_of(kept)
    memory.fill_(1)
    assert x.tolist() == [0.0] * 4
    assert x.untyped_storage().nbytes() == 16  # not all the memory that the view is part of


@pytest.mark.parametrize("trainer", ["lightning", "accelerate"])
def test_what_cannot_be_copied_is_refused(trainer, tmp_path):
    pytest.importorskip(MODULES[trainer][0])

    class Locked:
        def __init__(self, x, y):
            self.x, self.y, self.lock = x, y, threading.Lock()

    def run(micro):
        loader = Reusing(make_data(0), BATCH // micro, True, Locked)
        if trainer == "lightning":
            module = lightning_module(lambda net: optimizer_of(net, "SAM", {}))
            module.training_losses = lambda batch, batch_idx: losses(module.net, batch.x, batch.y)
            lightning_trainer(tmp_path, accumulate_grad_batches=micro).fit(module, loader)
            return module.net
        from accelerate import Accelerator

        from ltsam_fast.trainers.accelerate import AcceleratedStep

        accelerator = Accelerator(cpu=True, gradient_accumulation_steps=micro)
        net = Net()
        net, optimizer = accelerator.prepare(net, optimizer_of(net, "SAM", {}))
        step = AcceleratedStep(accelerator, net, optimizer, lambda batch: losses(net, batch.x, batch.y))
        for batch in loader:
            with accelerator.accumulate(net):
                step(batch)
        return net

    with pytest.raises(TypeError, match=r"got (tuple|Locked), which can't be .*: define __deepcopy__"):
        run(2)
    assert not torch.equal(weights(run(1)), weights(Net()))  # nothing is kept: nothing is copied


@each_trainer
def test_a_mean_in_place_of_losses_is_refused(trainer, tmp_path):
    pytest.importorskip(MODULES[trainer][0])
    if trainer == "lightning":
        module = lightning_module(lambda net: optimizer_of(net, "SAM", {}))
        module.training_losses = lambda batch, batch_idx: losses(module.net, *batch).mean()
        with pytest.raises(
            ValueError, match=r"training_losses\(\) must return the per-sample losses, shape \(B,\), got \(\)"
        ):
            lightning_trainer(tmp_path).fit(module, DataLoader(TensorDataset(*make_data(0)), batch_size=BATCH))
    elif trainer == "accelerate":
        from accelerate import Accelerator

        from ltsam_fast.trainers.accelerate import AcceleratedStep

        accelerator, net = Accelerator(cpu=True), Net()
        net, optimizer = accelerator.prepare(net, optimizer_of(net, "SAM", {}))
        step = AcceleratedStep(accelerator, net, optimizer, lambda batch: losses(net, *batch).mean())
        with pytest.raises(ValueError, match=r"losses must return the per-sample losses, shape \(B,\), got \(\)"):
            step([one[:BATCH] for one in make_data(0)])
    else:
        made = hugging_face_trainer(
            tmp_path,
            method=lf.SAM,
            compute_loss_func=lambda outputs, labels, num_items_in_batch: outputs["logits"].mean(),
        )
        with pytest.raises(ValueError, match="compute_loss_func must return the per-sample losses"):
            made.train()


def test_accelerate_refuses(tmp_path):
    pytest.importorskip("accelerate")
    from accelerate import Accelerator

    from ltsam_fast.trainers.accelerate import AcceleratedStep

    net, accelerator = Net(), Accelerator(cpu=True)
    sam = optimizer_of(net, "SAM", {})
    with pytest.raises(TypeError, match=r"as accelerator.prepare\(\) returned it, got SAM"):
        AcceleratedStep(accelerator, net, sam, lambda batch: losses(net, *batch))
    plain_sgd = accelerator.prepare(torch.optim.SGD(net.parameters(), lr=0.1))
    with pytest.raises(TypeError, match="got SGD"):
        AcceleratedStep(accelerator, net, plain_sgd, lambda batch: losses(net, *batch))


def classifier(count=3, problem=None, **more):
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    kind = more.pop("kind", "BertForSequenceClassification")
    size = {
        "vocab_size": 20,
        "hidden_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "intermediate_size": 16,
    }
    none = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0, "is_decoder": "LMHead" in kind}
    config = transformers.BertConfig(**size, **none, num_labels=count, problem_type=problem)
    return getattr(transformers, kind)(config)


def labels_for(problem, count, generator):
    if problem == "regression":
        return torch.randn(BATCH, generator=generator) if count == 1 else torch.randn(BATCH, count, generator=generator)
    if problem == "multi_label_classification":
        return torch.randint(0, 2, (BATCH, count), generator=generator).float()
    return torch.arange(BATCH) % count


def classified(folder, model, labels, own=None, arguments=(), **more):
    """A trainer over sequences, one batch a micro-batch; Hugging Face's own for ``own`` = True."""
    transformers = pytest.importorskip("transformers")
    from ltsam_fast.trainers.hugging_face import SharpnessAwareTrainer

    tokens = torch.randint(0, 20, (len(labels), 6), generator=torch.Generator().manual_seed(0))
    data = [{"input_ids": one, "labels": label} for one, label in zip(tokens, labels, strict=True)]
    settings = {"max_steps": 1, "use_cpu": True, "report_to": "none", "save_strategy": "no", "disable_tqdm": True}
    settings |= {"per_device_train_batch_size": BATCH, "learning_rate": 0.1, "optim": "sgd", "max_grad_norm": 0.0}
    args = transformers.TrainingArguments(folder, **settings | {"logging_steps": 1} | dict(arguments))
    if own:
        return transformers.Trainer(model=model, args=args, train_dataset=data, **more)
    made = type("Made", (SharpnessAwareTrainer,), more.pop("methods", {}))
    return made(model=model, args=args, train_dataset=data, **{"method": lf.SAM, "method_options": {"rho": 0.0}} | more)


PROBLEMS = {
    "single": (3, "single_label_classification", False),
    "single, inferred": (3, "single_label_classification", True),
    "multi": (3, "multi_label_classification", False),
    "multi, inferred": (3, "multi_label_classification", True),
    "regression": (1, "regression", False),
    "regression, inferred": (1, "regression", True),
    "regression of several": (3, "regression", False),
}
NO_CLASSES = [name for name in METHODS if "class_counts" not in METHODS[name]]


@pytest.mark.parametrize("problem", PROBLEMS)
@pytest.mark.parametrize(("method", "micro"), [("SAM", 2), *((method, 1) for method in NO_CLASSES)])
def test_hugging_face_takes_the_models_own_loss(method, problem, micro, seed, tmp_path):
    """At radius 0 it is Hugging Face's Trainer with SGD, bar ESAM's choice of samples and SSAM's masks."""
    count, kind, inferred = PROBLEMS[problem]
    labels = labels_for(kind, count, torch.Generator().manual_seed(seed))
    arguments = {"per_device_train_batch_size": BATCH // micro, "gradient_accumulation_steps": micro}
    options = {"rho": 0.0, **METHODS[method]} | ({"gamma": 1.0} if method == "ESAM" else {})
    moved, logged = [], []
    for own in (True, False):
        model = classifier(count, None if inferred else kind)
        more = {} if own else {"method": getattr(lf, method), "method_options": options}
        trainer = classified(tmp_path, model, labels, own, arguments, **more)
        trainer.loss_is_scaled_for_ga = False  # BERT takes num_items_in_batch and does not look at it
        trainer.train()
        moved.append(weights(model) - weights(classifier(count)))
        logged.append(float(trainer.state.log_history[0]["loss"]))
    if method not in ("GSAM", "WSAM"):
        assert_equal(*moved, 1e-5)
    assert logged[0] == pytest.approx(logged[1], rel=1e-3)


class Weighing(torch.nn.Module):
    """A classifier whose own loss is with class weights."""

    def __init__(self):
        super().__init__()
        self.net = classifier()

    def forward(self, input_ids, labels=None):
        logits = self.net(input_ids=input_ids).logits
        weight = torch.tensor([1.0, 1.0, 1.5])
        return {"logits": logits} | ({} if labels is None else {"loss": F.cross_entropy(logits, labels, weight)})


def without_super(self, model, inputs, num_items_in_batch=None):
    loss = self.compute_loss(model, inputs)
    self.accelerator.backward(loss)
    return loss.detach()


def own_mean(self, model, inputs, return_outputs=False, num_items_in_batch=None):
    outputs = model(**inputs)
    return (outputs["loss"], outputs) if return_outputs else outputs["loss"]


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(
    ("make", "labels", "more", "message"),
    [
        (Weighing, None, {}, r"compute_loss_func must be given, .*: the model's own loss is .*, not their mean"),
        (
            lambda: classifier(kind="BertForTokenClassification"),
            (BATCH, 6),
            {},
            r"must be given, .* got logits of shape \(\d, 6, 3\)",
        ),
        (lambda: classifier(kind="BertLMHeadModel"), (BATCH, 6), {}, r"compute_loss_func must be given"),
        (
            classifier,
            None,
            {"methods": {"compute_loss": own_mean}},
            "compute_loss must not be overridden, but Made does",
        ),
        (classifier, None, {"methods": {"training_step": without_super}}, r"training_step\(\) must call super"),
        (
            lambda: classifier(1, "regression"),
            "float",
            {"arguments": {"label_smoothing_factor": 0.1}},
            "label_smoothing_factor must be 0 with problem_type 'regression', got 0.1",
        ),
    ],
)
def test_hugging_face_refuses_what_it_would_not_train(method, make, labels, more, message, tmp_path):
    model = make()
    if isinstance(labels, tuple):
        labels = torch.randint(0, 3, labels)
    elif labels == "float":
        labels = torch.randn(BATCH)
    else:
        labels = torch.arange(BATCH) % 3
    if method not in NO_CLASSES and (labels.dim() > 1 or labels.is_floating_point()):
        message = "targets must"  # which come first
    options = {"method": getattr(lf, method), "method_options": METHODS[method]}
    with pytest.raises(ValueError, match=message):
        classified(tmp_path, model, labels, **more, **options).train()
    assert_equal(weights(model), weights(make()))


def test_hugging_face_refuses_callbacks_before_the_step(tmp_path):
    transformers = pytest.importorskip("transformers")
    callback = type("Watch", (transformers.TrainerCallback,), {"on_pre_optimizer_step": nothing})
    with pytest.raises(ValueError, match=r"on_pre_optimizer_step\(\) must not be overridden, but Watch does"):
        classified(tmp_path, classifier(), torch.arange(BATCH) % 3, callbacks=[callback()]).train()


def test_hugging_face_trains_as_ever_with_an_ordinary_optimizer(tmp_path):
    """Whatever it overrides."""
    methods = {"compute_loss": own_mean, "training_step": without_super}
    model = classifier()
    classified(tmp_path, model, torch.arange(BATCH) % 3, method=None, method_options=None, methods=methods).train()
    assert not torch.equal(weights(model), weights(classifier()))


def test_hugging_face_takes_a_method_by_its_name(tmp_path):
    ends, labels = [], torch.arange(BATCH) % 3
    for method, options in (("asam", {"rho": 1.0}), (lf.SAM, {"rho": 1.0, "adaptive": True})):
        model = classifier()
        trainer = classified(tmp_path, model, labels, method=method, method_options=options)
        trainer.train()
        assert trainer.optimizer.optimizer.adaptive is True
        ends.append(weights(model))
    assert torch.equal(*ends) and not torch.equal(ends[0], weights(classifier()))
    with pytest.raises(ValueError, match="there is no method 'focal': did you mean 'focal_sam'"):
        classified(tmp_path, classifier(), labels, method="focal")


def hugging_face_trainer(folder, net=None, arguments=(), **more):
    from transformers import TrainingArguments

    from ltsam_fast.trainers.hugging_face import SharpnessAwareTrainer

    x, y = make_data(0)
    settings = {"output_dir": folder, "max_steps": 3, "per_device_train_batch_size": BATCH, "use_cpu": True}
    settings |= {"report_to": "none", "save_strategy": "no", "disable_tqdm": True, "learning_rate": LR}
    label = dict(arguments).get("label_names", ["labels"])[0]
    data = [{"x": one, label: other} for one, other in zip(x, y, strict=True)]
    args = TrainingArguments(**settings | {"label_names": ["labels"]} | dict(arguments), remove_unused_columns=False)
    return SharpnessAwareTrainer(model=net or Net(), args=args, train_dataset=data, **more)


@pytest.mark.parametrize(
    ("more", "error", "message"),
    [
        ({"method": 3}, TypeError, "method must be a class such as ltsam_fast.SAM, got 3"),
        (
            {"method": lf.SAM, "optimizer_cls_and_kwargs": (torch.optim.SGD, {"lr": 0.1})},
            ValueError,
            "method must be None where",
        ),
        ({"method": lf.SAM, "method_options": {"max_grad_norm": 0.5}}, ValueError, "max_grad_norm = 0.5 or 0, got 1.0"),
        ({"method": lf.SAM, "arguments": {"label_names": []}}, ValueError, "args.label_names must be the one name"),
        (
            {"method": lf.SAM, "method_options": {"model": torch.nn.Flatten()}},
            ValueError,
            r"model must be left out of method_options, for the Trainer has its own; got Flatten",
        ),
        (
            {"method": "sam", "method_options": {"lr": 0.5}},
            ValueError,
            rf"lr must be left out of method_options, for args has {LR}; got 0\.5",
        ),
        (
            {"method": "sam", "method_options": {"weight_decay": 0.1}},
            ValueError,
            r"weight_decay must be left out of method_options, for args has 0\.0; got 0\.1",
        ),
    ],
)
def test_hugging_face_refuses(more, error, message, tmp_path):
    pytest.importorskip("transformers")
    if more.get("arguments") == {"label_names": []}:
        more = {**more, "arguments": {"label_names": ["a", "labels"]}}
    with pytest.raises(error, match=message):
        hugging_face_trainer(tmp_path, **more).train()


@pytest.mark.parametrize("kind", ["loss function", "label name", "smoothing"])
def test_hugging_face_losses(kind, tmp_path):
    """A loss of one's own, labels under another name, label smoothing: each shows in the loss that is logged."""
    pytest.importorskip("transformers")
    arguments, more = {"logging_steps": 1, "max_steps": 1}, {}
    if kind == "loss function":
        more = {"compute_loss_func": lambda outputs, labels, num_items_in_batch: 7 + 0 * outputs["logits"].sum(1)}
    elif kind == "label name":
        arguments["label_names"] = ["kind"]
    else:
        arguments["label_smoothing_factor"] = 0.4
    net = Net()
    net.config = types.SimpleNamespace(problem_type=None)  # the Trainer looks at it before it smooths labels
    trainer = hugging_face_trainer(tmp_path, net, arguments, method=lf.SAM, **more)
    batch = next(iter(trainer.get_train_dataloader()))
    torch.manual_seed(trainer.args.seed)
    (batch,) = [one for one in trainer.get_train_dataloader()][:1] if kind != "loss function" else [batch]
    trainer.get_train_dataloader = lambda: trainer.accelerator.prepare(DataLoader([batch], batch_size=None))
    label = arguments.get("label_names", ["labels"])[0]
    smoothing = arguments.get("label_smoothing_factor", 0.0)
    expected = F.cross_entropy(Net()(batch["x"])["logits"], batch[label], label_smoothing=smoothing).item()
    trainer.train()
    logged = trainer.state.log_history[0]["loss"]
    assert float(logged) == pytest.approx(7 if kind == "loss function" else expected, rel=1e-3)


def test_hugging_face_with_an_ordinary_optimizer(tmp_path):
    pytest.importorskip("transformers")

    class Losing(Net):
        def forward(self, x, labels=None):
            logits = self.layers(x)
            return {"loss": F.cross_entropy(logits, labels), "logits": logits}

    net = Losing()
    hugging_face_trainer(tmp_path, net).train()
    assert not torch.equal(weights(net), weights(Net()))


class Heads(torch.nn.Module):
    """A classifier whose forward looks at the labels, by ``kind``."""

    def __init__(self, kind):
        super().__init__()
        self.net, self.kind, self.calls = classifier(), kind, 0

    def forward(self, input_ids, labels):
        logits = self.net(input_ids=input_ids).logits
        if self.kind == "margin":
            logits = logits - 2.0 * F.one_hot(labels, 3)
        self.calls += 1
        late = 3.0 if self.kind == "late" and self.calls > 1 else 1.0
        return {"logits": logits, "loss": late * F.cross_entropy(logits, labels)}


@pytest.mark.parametrize("method", NO_CLASSES)
def test_hugging_face_gives_the_labels_at_every_step(method, tmp_path):
    moved = []
    options = {"rho": 0.0, **METHODS[method]} | ({"gamma": 1.0} if method == "ESAM" else {})
    for own in (True, False):
        model = Heads("margin")
        more = {} if own else {"method": getattr(lf, method), "method_options": options}
        arguments = {"max_steps": 3, "num_train_epochs": 3}
        classified(tmp_path, model, torch.arange(2 * BATCH) % 3, own, arguments, **more).train()
        moved.append(weights(model) - weights(Heads("margin")))
    if method in ("GSAM", "WSAM"):
        assert moved[1].isfinite().all()
    else:
        assert_equal(*moved, 1e-5)


IGNORING = torch.where(torch.arange(2 * BATCH) == 2 * BATCH - 1, -100, torch.arange(2 * BATCH) % 3)


@pytest.mark.parametrize(
    ("make", "labels", "smoothing", "message"),
    [
        (lambda: Heads("late"), torch.arange(2 * BATCH) % 3, 0.0, "the model's own loss is .*, not their mean"),
        (classifier, IGNORING, 0.0, r"labels must be classes, got -100 \(ignore_index\)"),
        (classifier, IGNORING, 0.1, r"labels must be classes, got -100 \(ignore_index\)"),
    ],
)
def test_hugging_face_checks_the_loss_at_every_step(make, labels, smoothing, message, tmp_path, monkeypatch):
    """What is wrong comes in the second step, which is not taken."""
    steps = []
    arguments = {"max_steps": 3, "label_smoothing_factor": smoothing}
    trainer = classified(tmp_path, make(), labels, arguments=arguments)
    monkeypatch.setattr(trainer, "_get_train_sampler", lambda *_: torch.utils.data.SequentialSampler(labels))
    callback = types.SimpleNamespace(on_step_end=lambda *_, **__: steps.append(weights(trainer.model)))
    kind = type("Watch", (pytest.importorskip("transformers").TrainerCallback,), vars(callback))
    trainer.add_callback(kind())
    with pytest.raises(ValueError, match=message):
        trainer.train()
    assert len(steps) == 1
    assert_equal(weights(trainer.model), steps[0])


def test_hugging_face_loss_functions_have_no_num_items(tmp_path):
    def summed(outputs, labels, num_items_in_batch):
        return F.cross_entropy(outputs["logits"], labels, reduction="sum") / num_items_in_batch

    with pytest.raises(ValueError, match="compute_loss_func must not use num_items_in_batch, which is None"):
        classified(tmp_path, classifier(), torch.arange(BATCH) % 3, compute_loss_func=summed).train()


def test_hugging_face_refuses_callbacks_added_late(tmp_path):
    transformers = pytest.importorskip("transformers")
    watch = type("Watch", (transformers.TrainerCallback,), {"on_pre_optimizer_step": nothing})
    late = {"on_train_begin": lambda *_, **__: trainer.add_callback(watch())}
    model = classifier()
    trainer = classified(
        tmp_path, model, torch.arange(BATCH) % 3, callbacks=[type("Late", (transformers.TrainerCallback,), late)()]
    )
    with pytest.raises(ValueError, match=r"on_pre_optimizer_step\(\) must not be overridden, but Watch does"):
        trainer.train()
    assert_equal(weights(model), weights(classifier()))


def lightning_fit(folder, make_optimizer, members=(), **settings):
    """A module with ``members`` in its class, fitted; what Lightning showed and logged of it."""
    shown = []
    module = lightning_module(make_optimizer)
    kind = type(module)

    def training_losses(self, batch, batch_idx):
        found = kind.training_losses(self, batch, batch_idx)
        self.log("loss", found.mean(), on_step=True, on_epoch=True)
        return found

    def on_train_batch_end(self, outputs, batch, batch_idx):
        shown.append(outputs["loss"].item() if outputs else None)

    common = {"training_losses": training_losses, "on_train_batch_end": on_train_batch_end}
    module = type("Own", (kind,), common | dict(members))()
    trainer = lightning_trainer(folder, **settings)
    trainer.fit(module, DataLoader(TensorDataset(*make_data(0)), batch_size=BATCH))
    return module.net, shown, trainer.callback_metrics


def mean_step(self, batch, batch_idx):
    return losses(self.net, *batch).mean()


def in_a_dict(self, batch, batch_idx):
    return {"loss": type(self).__mro__[1].training_step(self, batch, batch_idx), "y": batch[1]}


def but_batch_2(self, batch, batch_idx):
    return None if batch_idx == 2 else type(self).__mro__[1].training_step(self, batch, batch_idx)


def every_other(self, epoch, batch_idx, optimizer, optimizer_closure):
    return optimizer.step(closure=optimizer_closure) if batch_idx % 2 == 0 else optimizer_closure()


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(
    "members",
    [{"training_step": in_a_dict}, {"training_step": but_batch_2}, {"optimizer_step": every_other}],
    ids=["dict", "left out", "every other"],
)
def test_lightning_shows_and_logs_as_with_sgd(method, members, tmp_path, monkeypatch):
    """The weights rest, so every loss is known."""
    pytest.importorskip("lightning")
    monkeypatch.setitem(globals(), "Net", Unnormalized)
    options = METHODS[method]
    ours = lightning_fit(
        tmp_path, lambda net: getattr(lf, method)(net.parameters(), torch.optim.SGD, lr=0.0, **options), members
    )
    theirs = lightning_fit(tmp_path, lambda net: torch.optim.SGD(net.parameters(), lr=0.0), members)
    assert [one or 0.0 for one in ours[1]] == pytest.approx([one or 0.0 for one in theirs[1]], rel=1e-5)
    assert {n: v.item() for n, v in ours[2].items()} == pytest.approx({n: v.item() for n, v in theirs[2].items()})


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("micro", [1, 2])
def test_lightning_leaves_a_batch_out(method, micro, tmp_path, monkeypatch):
    pytest.importorskip("lightning")
    monkeypatch.setitem(globals(), "Net", Unnormalized)
    ours, shown, _ = lightning_fit(
        tmp_path,
        lambda net: optimizer_of(net, method, METHODS[method]),
        {"training_step": but_batch_2},
        accumulate_grad_batches=micro,
    )
    assert [one is None for one in shown] == [i == 2 for i in range(STEPS)]
    if micro == 1:
        assert_equal(weights(ours), plain(method, METHODS[method], make_data(0), skip=(2,), constant=True), 1e-6)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("micro", [1, 2])
def test_lightning_refuses_a_training_step_of_ones_own(method, micro, tmp_path):
    pytest.importorskip("lightning")
    nets = []

    def make_optimizer(net):
        nets.append(net)
        return optimizer_of(net, method, METHODS[method])

    with pytest.raises(
        ValueError, match=r"^training_step\(\) must call super.*: write training_losses\(\), which returns"
    ):
        lightning_fit(tmp_path, make_optimizer, {"training_step": mean_step}, accumulate_grad_batches=micro)
    assert all(torch.equal(p, q) for p, q in zip(nets[0].parameters(), Net().parameters(), strict=True))


@pytest.mark.parametrize("method", METHODS)
def test_lightning_steps_set_on_the_instance_and_past_its_optimizer(method, tmp_path):
    pytest.importorskip("lightning")

    def fit(step):
        module = lightning_module(lambda net: optimizer_of(net, method, METHODS[method]))
        if step is not None:
            module.optimizer_step = step
        lightning_trainer(tmp_path).fit(module, DataLoader(TensorDataset(*make_data(0)), batch_size=BATCH))
        return weights(module.net)

    def set_on_it(epoch, batch_idx, optimizer, optimizer_closure):
        optimizer.step(closure=optimizer_closure)

    def past_it(self, epoch, batch_idx, optimizer, optimizer_closure):
        optimizer.optimizer.step(closure=optimizer_closure)

    assert_equal(fit(set_on_it), fit(None))
    with pytest.raises(ValueError, match=r"^optimizer_step\(\) must call optimizer.step\(closure\)"):
        lightning_fit(tmp_path, lambda net: optimizer_of(net, method, METHODS[method]), {"optimizer_step": past_it})


def by_hand(self, batch, batch_idx):
    self.manual_backward(losses(self.net, *batch).mean())
    self.trainer.optimizers[-1].step()


def by_its_optimizers(self, batch, batch_idx):
    optimizer = self.optimizers()[-1]
    optimizer.step(lambda: losses(self.net, *batch))


@pytest.mark.parametrize("step", [by_hand, by_its_optimizers, None])
@pytest.mark.parametrize("second", [False, True])
def test_lightning_refuses_manual_optimization_by_ones_own_step(step, second, tmp_path):
    pytest.importorskip("lightning")

    def make_optimizers(net):
        two = [
            torch.optim.SGD(net.layers[0].parameters(), lr=0.1),
            lf.SAM(net.layers[3].parameters(), torch.optim.SGD, lr=0.1),
        ]
        return two if second else two[::-1]

    members = {"automatic_optimization": False} | ({} if step is None else {"training_step": step})
    with pytest.raises(ValueError, match="automatic_optimization must be True"):
        lightning_fit(tmp_path, make_optimizers, members)


def test_lightning_manual_optimization_with_ordinary_optimizers(tmp_path):
    pytest.importorskip("lightning")
    members = {"automatic_optimization": False, "training_step": by_hand}
    net, _, _ = lightning_fit(tmp_path, lambda net: torch.optim.SGD(net.parameters(), lr=0.1), members)
    assert not torch.equal(weights(net), weights(Net()))


@pytest.mark.parametrize(
    ("wrap", "x_of"),
    [
        (lambda x, y: encoding(x, y), lambda one: one["x"]),
        (lambda x, y: types.MappingProxyType({"x": x, "y": y}), lambda one: one["x"]),
        (lambda x, y: collections.UserDict(x=x, y=[y, "text", None, 3]), lambda one: one["x"]),
        (lambda x, y: output(x, y), lambda one: one.logits),
        (Data, lambda one: one.x),
        (lambda x, y: [Data(x, Data(y, y))], lambda one: one[0].x),
        (Pair, lambda one: one.x),
    ],
)
def test_samples_are_taken_from_mappings_and_dataclasses(wrap, x_of):
    from ltsam_fast.trainers.micro_batches import select, sliced_in

    batch = wrap(torch.arange(4.0), torch.arange(4))
    taken = select(batch, torch.tensor([2, 0]), sliced_in(batch, 4))
    assert type(taken) is type(batch) or isinstance(batch, types.MappingProxyType)
    assert x_of(taken).tolist() == [2.0, 0.0] and x_of(batch).tolist() == [0.0, 1.0, 2.0, 3.0]


@pytest.mark.parametrize("wrap", [attributes, lambda x, y: (x.numpy(), y)])
def test_samples_of_other_batches_are_refused(wrap):
    from ltsam_fast.trainers.micro_batches import select, sliced_in

    batch = wrap(torch.arange(4.0), torch.arange(4))
    with pytest.raises(TypeError, match=r"batch must hold tensors, .*, got (SimpleNamespace|ndarray): return one of"):
        sliced_in(batch, 4)
    assert select(batch, None, []) is batch
