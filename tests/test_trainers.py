"""Lightning, Hugging Face's Trainer and Accelerate take the steps that a plain loop takes; the examples run and learn."""

import datetime
import importlib
import os
import socket
import subprocess
import sys
import types
import warnings

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn.functional as F
from torch.utils.data import DataLoader, TensorDataset

import ltsam_fast as lf

COUNTS = [40, 20, 5]
METHODS = {
    "SAM": {},
    "FocalSAM": {"class_counts": COUNTS},
    "ImbSAM": {"class_counts": COUNTS, "eta": 30},
    "CCSAM": {"class_counts": COUNTS, "scope": "all"},
    "SSESAM": {"class_counts": COUNTS, "eta": 30},
    "GNM": {"dis_mul": 1.0},
    "FriendlySAM": {},
    "MSAM": {"m": 3},
    "SparseSAM": {"refresh_every": 4},
    "ESAM": {},
    "LookSAM": {"k": 2},
    "GSAM": {},
    "WSAM": {},
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
    assert made.optimizer.param_groups[0]["taken"] == 2 * STEPS


@each_trainer
@pytest.mark.parametrize("method", ["SAM", "FocalSAM", "GNM", "GSAM"])
def test_accumulating_equals_the_large_batch(trainer, method, seed, tmp_path, monkeypatch):
    monkeypatch.setitem(globals(), "Net", Unnormalized)  # batch norm sees the parts
    data, options = make_data(seed), METHODS[method]
    climbs = []
    climb = getattr(lf, method)._perturb
    monkeypatch.setattr(getattr(lf, method), "_perturb", lambda self, *rest: (climbs.append(1), climb(self, *rest)))
    ours, made = run(trainer, method, options, data, tmp_path, micro=4)
    assert len(climbs) == STEPS and made.optimizer.param_groups[0]["taken"] == STEPS
    assert_equal(ours, plain(method, options, data), 1e-5)


class Unnormalized(Net):
    def __init__(self):
        super().__init__()
        self.layers[1] = torch.nn.Identity()


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
@pytest.mark.parametrize("method", ["SAM", "FocalSAM", "MSAM"])
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
    ("SAM", "local"): {},
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
                results[trainer, kind] = run(trainer, method, options, make_data(7), folder, workers=2)[0]
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
    """Synced, they are the joined batch; by default each climbs along its own half, which is m-SAM with m of a half."""
    pytest.importorskip(MODULES[trainer][0])
    monkeypatch.setitem(globals(), "Net", Unnormalized)
    joined = plain("FocalSAM", {"class_counts": COUNTS}, make_data(7))
    halves = plain("MSAM", {"m": BATCH // 2}, make_data(7))
    for one in workers:
        assert_equal(one[trainer, "synced"], joined, 1e-5)
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
    return Trainer(**quiet, **settings)


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


def test_lightning_hooks_fire_once_a_step(seed, tmp_path):
    pytest.importorskip("lightning")
    from lightning.pytorch.callbacks import Callback

    fired = []

    class Watch(Callback):
        def on_before_optimizer_step(self, trainer, module, optimizer):
            fired.append(type(optimizer).__name__)

    module = lightning_module(lambda net: optimizer_of(net, "SAM", {}))
    trainer = lightning_trainer(tmp_path, accumulate_grad_batches=2, callbacks=[Watch()])
    trainer.fit(module, DataLoader(TensorDataset(*make_data(seed)), batch_size=BATCH))
    assert fired == ["SAM"] * (STEPS // 2) and trainer.global_step == STEPS // 2


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
        ({"method": "sam"}, TypeError, "method must be a class such as ltsam_fast.SAM, got 'sam'"),
        (
            {"method": lf.SAM, "optimizer_cls_and_kwargs": (torch.optim.SGD, {"lr": 0.1})},
            ValueError,
            "method must be None where",
        ),
        ({"method": lf.SAM, "method_options": {"max_grad_norm": 0.5}}, ValueError, "max_grad_norm = 0.5 or 0, got 1.0"),
        ({"method": lf.SAM, "arguments": {"label_names": []}}, ValueError, "args.label_names must be the one name"),
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
