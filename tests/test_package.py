"""What pip installs, what each core is made of, and which backend serves a call."""

import ast
import importlib.metadata
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import timeit
import warnings
import zipfile
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import ltsam_fast
from ltsam_fast import backend
from ltsam_fast.__main__ import main

ROOT = Path(__file__).parents[1]
CPU = torch.device("cpu")
PYPROJECT = (ROOT / "pyproject.toml").read_text()
BUILD_SETTINGS = (
    "CXX",
    "CUDA_HOME",
    "MAX_JOBS",
    "LTSAM_CUDA_ARCHS",
    "LTSAM_REQUIRE",
    "LTSAM_BACKEND",
    "TRITON_INTERPRET",
)
COMPILER = next(filter(None, map(shutil.which, ("c++", "g++", "clang++"))), None)
needs_compiler = pytest.mark.skipif(COMPILER is None, reason="no C++ compiler on PATH")

TINY_CORE = """
#include <Python.h>
#include "answer.h"
static PyModuleDef definition = {PyModuleDef_HEAD_INIT, "_cpu", nullptr, -1, nullptr};
PyMODINIT_FUNC PyInit__cpu() {
  PyObject* module = PyModule_Create(&definition);
  PyModule_AddIntConstant(module, "ANSWER", ANSWER);
  return module;
}
"""


def python(*arguments, cwd=None, **environment):
    """Runs Python in a process of its own, free of this one's build settings."""
    clean = {name: value for name, value in os.environ.items() if name not in BUILD_SETTINGS}
    command = [sys.executable, *map(str, arguments)]
    return subprocess.run(command, cwd=cwd, env=clean | environment, text=True, errors="replace", capture_output=True)


@pytest.fixture
def tree(tmp_path):
    """A copy of what is packaged, with a native core that compiles in a second."""
    tree = tmp_path / "tree"
    ignore = shutil.ignore_patterns("*.so", "__pycache__", "_build_info.py")
    for folder in ("ltsam_fast", "kernels"):
        shutil.copytree(ROOT / folder, tree / folder, ignore=ignore)
    for file in ("pyproject.toml", "setup.py", "LICENSE", "README.md", "Makefile"):
        shutil.copy(ROOT / file, tree)
    for core in ("cpu", "cuda"):
        (tree / "csrc" / core).mkdir(parents=True)
    (tree / "csrc/answer.h").write_text("#define ANSWER 1\n")
    (tree / "csrc/cpu/module.cpp").write_text(TINY_CORE)
    (tree / "csrc/cuda/module.cu").write_text("")
    return tree


@pytest.fixture
def no_tools(tmp_path):
    """A folder for PATH in which no compiler is found."""
    (tmp_path / "bin").mkdir()
    return tmp_path / "bin"


@pytest.fixture
def bad_nvcc(tree, no_tools):
    """A PATH that begins with an nvcc from before sm_100, which notes its arguments and fails."""
    nvcc = no_tools / "nvcc"
    nvcc.write_text(
        "#!/bin/sh\n"
        'if [ "$1" = --list-gpu-arch ]; then echo compute_80; echo compute_90; exit; fi\n'
        f"echo \"$@\" > '{tree}/asked'\n"
        'echo "module.cu(1): error: no luck"\n'
        "exit 2\n"
    )
    nvcc.chmod(0o755)
    return f"{no_tools}{os.pathsep}{os.environ['PATH']}"


def build(tree, kind, **environment):
    """Calls the build backend as pip does; returns the process and the path of the archive, or ``None``."""
    out = tree.parent / "out"
    out.mkdir(exist_ok=True)
    script = f"import sys, setuptools.build_meta as backend; print(backend.build_{kind}(sys.argv[1]))"
    process = python("-c", script, out, cwd=tree, **environment)
    return process, None if process.returncode else out / process.stdout.split()[-1]


def missing_cores(wheel):
    text = zipfile.ZipFile(wheel).read("ltsam_fast/_build_info.py").decode()
    return ast.literal_eval(text.removeprefix("MISSING = "))


def test_every_package_is_listed():
    found = {".".join(file.parent.relative_to(ROOT).parts) for file in ROOT.glob("ltsam_fast/**/__init__.py")}
    found |= {".".join(["ltsam_fast", *f.parent.relative_to(ROOT).parts]) for f in ROOT.glob("kernels/**/__init__.py")}
    listed = re.search(r"^packages = (\[.*?\])", PYPROJECT, re.MULTILINE | re.DOTALL)[1]
    assert found == set(ast.literal_eval(listed))


def test_no_two_files_share_a_stem():
    files = [path for folder in ("ltsam_fast", "kernels") for path in (ROOT / folder).rglob("*.py")]
    stems = Counter(path.stem for path in files if path.stem not in ("__init__", "__main__"))
    assert [stem for stem, count in stems.items() if count > 1] == []


def test_versions_agree():
    assert f'version = "{ltsam_fast.__version__}"' in PYPROJECT.splitlines()


def test_dir_shows_what_a_user_needs():
    assert dir(ltsam_fast) == sorted(ltsam_fast.__all__)
    assert all(hasattr(ltsam_fast, name) for name in dir(ltsam_fast))
    assert not {"annotations", "importlib", "Any", "snapshot", "table"} & set(dir(ltsam_fast))


@pytest.mark.parametrize("kind", ["wheel", "editable"])
def test_install_without_any_compiler(tree, no_tools, kind):
    process, wheel = build(tree, kind, PATH=str(no_tools), CXX="/nonexistent")
    assert wheel, process.stderr
    reasons = {
        "cpu": "no C++ compiler: /nonexistent not found at install time",
        "cuda": "no nvcc on PATH or in CUDA_HOME at install time",
    }
    warnings = [line for line in process.stderr.splitlines() if "failed: " in line]
    assert [line.partition("failed: ")[2] for line in warnings] == list(reasons.values())
    if kind == "editable":
        assert (tree / "ltsam_fast/_build_info.py").read_text() == f"MISSING = {reasons}\n"
        return
    assert missing_cores(wheel) == reasons
    names = zipfile.ZipFile(wheel).namelist()
    assert {f"ltsam_fast/kernels/{file.name}" for file in (tree / "kernels").glob("*.py")} <= set(names)
    assert "ltsam_fast/py.typed" in names
    assert {name.split("/")[0] for name in names} == {"ltsam_fast", f"ltsam_fast-{ltsam_fast.__version__}.dist-info"}


@pytest.mark.parametrize(
    ("require", "message"),
    [("cpu", "LTSAM_REQUIRE asks for the cpu core: no C++ compiler"), ("cpu gpu", "the cores are cpu and cuda")],
)
def test_required_core_is_an_error(tree, no_tools, require, message):
    process, wheel = build(tree, "wheel", PATH=str(no_tools), LTSAM_REQUIRE=require)
    assert wheel is None
    assert message in process.stderr


@needs_compiler
def test_core_is_rebuilt_only_when_a_header_changed(tree, bad_nvcc):
    """Whatever pip is asked for: `pip install .`, then `'.[train]'`, then `-e .`."""
    objects = []
    for kind, answer in (("wheel", 1), ("wheel", 1), ("editable", 1), ("editable", 2)):
        header = tree / "csrc/answer.h"
        if str(answer) not in header.read_text():
            header.write_text(f"#define ANSWER {answer}\n")
        process, wheel = build(tree, kind, PATH=bad_nvcc, CXX=COMPILER, LTSAM_REQUIRE="cpu")
        assert (
            "Compiling, unless that was done before: cpu (half a minute), cuda (3 to 5 minutes)\n" in process.stdout
        ), process.stderr
        objects.append(next(tree.glob("build/**/module.cpp.o")).stat().st_mtime_ns)
        folder = tree / "ltsam_fast"
        if kind == "wheel":
            shutil.unpack_archive(wheel, folder := tree.parent / "unpacked", "zip")
            folder /= "ltsam_fast"
        loaded = python("-c", "import _cpu; print(_cpu.ANSWER)", cwd=folder)
        assert loaded.stdout == f"{answer}\n", process.stderr + loaded.stderr
    assert objects[0] == objects[1] == objects[2] < objects[3]
    assert not list(tree.glob(".ninja*")), "all that a build leaves behind is in build/"


@needs_compiler
def test_core_that_no_longer_compiles_goes_and_the_compiler_says_why(tree, bad_nvcc):
    stale = tree / f"ltsam_fast/_cpu{sysconfig.get_config_var('EXT_SUFFIX')}"
    stale.touch()
    (tree / "csrc/answer.h").write_text("#define ANSWER nonsense\n")
    process, wheel = build(tree, "editable", PATH=bad_nvcc, CXX=COMPILER)
    assert wheel, process.stderr
    assert not stale.exists()
    missing = ast.literal_eval((tree / "ltsam_fast/_build_info.py").read_text().removeprefix("MISSING = "))
    assert re.match(r"csrc/answer.h:1:\d+: error: .*nonsense", missing["cpu"])
    assert missing["cuda"] == "module.cu(1): error: no luck"


@pytest.mark.parametrize(
    ("archs", "expected"),
    [
        ("", "compute_80,code=[sm_80] compute_90,code=[sm_90,compute_90]"),
        ("100 9.0a", "compute_100,code=[sm_100,compute_100] compute_90a,code=[sm_90a]"),
        ("8.0+PTX;9.0", "compute_80,code=[sm_80,compute_80] compute_90,code=[sm_90]"),
    ],
)
def test_cuda_architectures(tree, bad_nvcc, archs, expected):
    process, wheel = build(tree, "wheel", PATH=bad_nvcc, CXX="/nonexistent", LTSAM_CUDA_ARCHS=archs)
    assert wheel, process.stderr
    assert missing_cores(wheel)["cuda"] == "module.cu(1): error: no luck"
    assert re.findall(r"-gencode=arch=(\S+)", (tree / "asked").read_text()) == expected.split()


def test_cuda_can_be_left_out(tree, bad_nvcc):
    process, wheel = build(tree, "wheel", PATH=bad_nvcc, CXX="/nonexistent", LTSAM_CUDA_ARCHS="none")
    assert missing_cores(wheel)["cuda"] == "left out at install time by LTSAM_CUDA_ARCHS=none"
    assert not (tree / "asked").exists(), process.stderr


def test_sdist_has_all_it_takes_to_build_and_test(tree):
    extra = [
        "tests/conftest.py",
        "bench/results/h200.json",
        ".ci/constraints.txt",
        "csrc/functors/norm.h",
        "CHANGELOG.md",
    ]
    for file in extra:
        (tree / file).parent.mkdir(parents=True, exist_ok=True)
        (tree / file).touch()
    process, archive = build(tree, "sdist")
    assert archive, process.stderr
    names = {name.partition("/")[2] for name in tarfile.open(archive).getnames()}
    kernels = {f"kernels/{file.name}" for file in (tree / "kernels").glob("*.py")}
    assert {*extra, *kernels, "Makefile", "setup.py", "csrc/cpu/module.cpp", "csrc/cuda/module.cu"} <= names


def test_required_cores_were_built():
    info = pytest.importorskip("ltsam_fast._build_info", reason="the cores were not built by an install")
    assert not set(re.findall(r"\w+", os.environ.get("LTSAM_REQUIRE", ""))) & info.MISSING.keys()


def test_cuda_core_has_code_for_all_architectures():
    spec = importlib.util.find_spec("ltsam_fast._cuda")
    if spec is None:
        pytest.skip(f"cuda: {backend.why_not('cuda')}")
    from ltsam_fast import _cuda

    text = Path(spec.origin).read_bytes()
    assert _cuda.ARCHS
    for arch in _cuda.ARCHS:
        assert f"sm_{arch // 10}".encode() in text
    if "LTSAM_CUDA_ARCHS" not in os.environ:
        assert {800, 900} <= set(_cuda.ARCHS)


def test_import_is_quick_and_leaves_heavy_packages_alone():
    # Its own time on the processor: other processes do not count.
    script = (
        "import sys, time, torch; before = set(sys.modules); start = time.process_time(); import ltsam_fast;"
        "took = time.process_time() - start; import ltsam_fast.__main__;"
        "print(took, *{name.partition('.')[0] for name in set(sys.modules) - before})"
    )
    runs = [python("-c", script).stdout.split() for _ in range(3)]
    assert min(float(seconds) for seconds, *_ in runs) < 0.2
    assert not {"triton", "matplotlib", "sklearn", "rich", "pydantic"} & set(runs[0])


def test_info_has_every_backend_with_its_reason(capsys):
    main(["info"])
    out = capsys.readouterr().out
    assert backend.report() in out
    assert [line.partition(":")[0] for line in out.splitlines()[-4:]] == list(backend.NAMES)
    for version in (ltsam_fast.__version__, torch.__version__):
        assert version in out


@pytest.mark.parametrize(("arguments", "shown"), [([], "usage: ltsam "), (["--version"], ltsam_fast.__version__)])
def test_what_a_newcomer_types_first(arguments, shown, capsys):
    with pytest.raises(SystemExit) as caught:
        main(arguments)
    assert not caught.value.code
    assert shown in capsys.readouterr().out


def test_the_console_script_is_the_module():
    (script,) = importlib.metadata.entry_points(group="console_scripts", name="ltsam")
    assert script.load() is main


@pytest.mark.parametrize("arguments", [["compile"], ["info", "--fast"]])
def test_unknown_command_exits_with_2(arguments):
    with pytest.raises(SystemExit) as caught:
        main(arguments)
    assert caught.value.code == 2


def test_demo_gets_its_arguments(monkeypatch):
    received = []
    monkeypatch.setitem(sys.modules, "ltsam_fast.demo", SimpleNamespace(main=received.extend))
    main(["demo", "--quick", "--methods", "SAM,FocalSAM"])
    assert received == ["--quick", "--methods", "SAM,FocalSAM"]


@pytest.fixture
def nothing_chosen(monkeypatch):
    """A process in which no backend was chosen or resolved so far."""
    monkeypatch.delenv("LTSAM_BACKEND", raising=False)
    monkeypatch.setattr(backend, "_resolved", {})


@pytest.fixture
def all_available(monkeypatch, nothing_chosen):
    """A machine that has every backend."""
    monkeypatch.setattr(backend, "_interpreted", False)
    monkeypatch.setattr(backend, "why_not", lambda name: None)


def test_available_or_a_reason():
    assert backend.backends() == [name for name in backend.NAMES if backend.why_not(name) is None]
    assert backend.backends()[-1] == "torch"
    for name in set(backend.NAMES) - set(backend.backends()):
        reason = backend.why_not(name)
        assert reason and "\n" not in reason


@pytest.mark.parametrize("name", backend.NAMES)
def test_which_backends_the_tests_run_on(name):
    """One line for each that is missing here; tests of every backend have no entry for it."""
    if reason := backend.why_not(name):
        pytest.skip(f"{name}: {reason}")


@pytest.mark.parametrize("name", ["gpu", "", None])
def test_unknown_names_are_refused(name):
    with pytest.raises(ValueError, match="unknown backend .*'cuda', 'triton', 'cpu', 'torch'"):
        ltsam_fast.use_backend(name)  # before it is entered
    with pytest.raises(ValueError, match="unknown backend"):
        backend.why_not(name)


@pytest.mark.parametrize("how", ["use_backend", "environment"])
def test_unavailable_choice_is_refused_with_all_reasons(monkeypatch, nothing_chosen, how):
    monkeypatch.setattr(backend, "why_not", {"cuda": "no luck", "triton": "no GPU", "cpu": None, "torch": None}.get)
    with pytest.raises(ValueError, match=r"no luck.*cuda: no luck; triton: no GPU; cpu: available; torch: available"):
        if how == "environment":
            monkeypatch.setenv("LTSAM_BACKEND", "cuda")
            backend.backend_for(CPU)
        backend.use_backend("cuda")


def test_contexts_nest_and_end_with_an_exception(monkeypatch, all_available):
    monkeypatch.setitem(sys.modules, "ltsam_fast._cpu", "the C++ core")
    with backend.use_backend("cpu"):
        with pytest.raises(KeyError), backend.use_backend("torch"):
            assert backend.backend_for(CPU).__name__ == "ltsam_fast.torch_backend"
            raise KeyError
        assert backend.backend_for(CPU) == "the C++ core"
    monkeypatch.setenv("LTSAM_BACKEND", "torch")
    assert backend.backend_for(CPU).__name__ == "ltsam_fast.torch_backend"
    with backend.use_backend("cpu"):
        assert backend.backend_for(CPU) == "the C++ core"


def test_environment_counts_at_call_time(monkeypatch, nothing_chosen):
    automatic = backend.backend_for(CPU)
    monkeypatch.setenv("LTSAM_BACKEND", "torch")
    assert backend.backend_for(CPU).__name__ == "ltsam_fast.torch_backend"
    monkeypatch.setenv("LTSAM_BACKEND", "tpu")
    with pytest.raises(ValueError, match="LTSAM_BACKEND=tpu names no backend: choose one of cuda, triton, cpu, torch"):
        backend.backend_for(CPU)
    monkeypatch.setenv("LTSAM_BACKEND", "")
    assert backend.backend_for(CPU) is automatic


def test_environment_of_a_new_process():
    script = "import torch; from ltsam_fast import backend; print(backend.backend_for(torch.device('cpu')).__name__)"
    assert python("-c", script, LTSAM_BACKEND="torch").stdout == "ltsam_fast.torch_backend\n"
    assert "ValueError: LTSAM_BACKEND=tpu names no backend" in python("-c", script, LTSAM_BACKEND="tpu").stderr


@pytest.mark.parametrize(
    ("device", "present", "expected"),
    [
        ("cuda", "cuda triton cpu torch", "ltsam_fast._cuda"),
        ("cuda", "triton cpu torch", "ltsam_fast.kernels"),
        ("cuda", "cpu torch", "ltsam_fast.torch_backend"),
        ("cpu", "cuda triton cpu torch", "ltsam_fast._cpu"),
        ("cpu", "cuda triton torch", "ltsam_fast.torch_backend"),
    ],
)
def test_automatic_choice_goes_by_device(monkeypatch, nothing_chosen, device, present, expected):
    monkeypatch.setattr(backend, "_interpreted", False)
    monkeypatch.setattr(backend, "why_not", lambda name: None if name in present.split() else "not here")
    monkeypatch.setattr(backend.importlib, "import_module", lambda name: name)
    assert backend.backend_for(torch.device(device)) == expected


@pytest.mark.parametrize(
    "name, device, serves", [("cpu", "cuda:1", "cpu"), ("cuda", "cpu", "cuda"), ("triton", "cpu", "cuda")]
)
def test_choice_that_cannot_take_the_tensors_is_refused(all_available, name, device, serves):
    message = (
        rf"use_backend\('{name}'\) cannot serve tensors on '{device[:4].rstrip(':')}': it takes tensors on '{serves}'"
    )
    with backend.use_backend(name), pytest.raises(ValueError, match=message):
        backend.backend_for(torch.device(device))


def test_triton_in_the_interpreter_takes_cpu_tensors_only(monkeypatch, all_available):
    monkeypatch.setattr(backend, "_interpreted", True)
    monkeypatch.setitem(sys.modules, "ltsam_fast.kernels", "the kernels")
    monkeypatch.setitem(sys.modules, "ltsam_fast._cuda", "the CUDA core")
    with backend.use_backend("triton"):
        assert backend.backend_for(CPU) == "the kernels"
        with pytest.raises(ValueError, match="takes tensors on 'cpu'"):
            backend.backend_for(torch.device("cuda"))
    assert backend.backend_for(torch.device("cuda")) == "the CUDA core"


@pytest.mark.parametrize("device", ["mps", "meta", "xpu"])
def test_other_devices_are_refused(nothing_chosen, device):
    with pytest.raises(ValueError, match=f"tensors on '{device}' are not supported .*move them to 'cpu' or 'cuda'"):
        backend.backend_for(torch.device(device))


def test_resolved_backend_costs_nothing():
    with backend.use_backend("torch"):
        assert min(timeit.repeat(lambda: backend.backend_for(CPU), number=1000, repeat=20)) / 1000 < 1e-6


class TestReasons:
    """What is said where something is not there, broken or too old."""

    def test_recorded_at_install_time(self, monkeypatch):
        monkeypatch.setitem(sys.modules, "ltsam_fast._cuda", None)
        monkeypatch.setitem(sys.modules, "ltsam_fast._build_info", SimpleNamespace(MISSING={"cuda": "no nvcc"}))
        assert backend.why_not("cuda") == "not built: no nvcc"

    def test_source_checkout(self, monkeypatch):
        monkeypatch.setitem(sys.modules, "ltsam_fast._cpu", None)
        monkeypatch.setitem(sys.modules, "ltsam_fast._build_info", None)
        monkeypatch.setattr(backend, "__file__", str(ROOT / "ltsam_fast/backend.py"))
        assert "source checkout without built cores: run `pip install -e .` or leave" in backend.why_not("cpu")
        monkeypatch.setattr(backend, "_resolved", {})
        monkeypatch.delenv(backend.VARIABLE, raising=False)
        with pytest.warns(UserWarning, match=r"the backend is 'torch', .*: this is a source checkout"):
            assert backend.backend_for(CPU).__name__ == "ltsam_fast.torch_backend"
        with warnings.catch_warnings():
            warnings.simplefilter("error")  # it has been said
            backend.backend_for(CPU)

    def test_another_python(self, monkeypatch, tmp_path):
        monkeypatch.setitem(sys.modules, "ltsam_fast._cpu", None)
        monkeypatch.setitem(sys.modules, "ltsam_fast._build_info", SimpleNamespace(MISSING={}))
        monkeypatch.setattr(backend, "__file__", str(tmp_path / "ltsam_fast/backend.py"))
        expected = f"ltsam_fast._cpu is not there for {sys.implementation.cache_tag}: reinstall ltsam_fast"
        assert backend.why_not("cpu") == expected

    def test_core_that_does_not_load(self, monkeypatch):
        def fail(name):
            raise ImportError("libgomp.so.1: cannot open shared object file")

        monkeypatch.setattr(backend.importlib, "import_module", fail)
        assert backend.why_not("cpu") == (
            "ltsam_fast._cpu does not load: ImportError: libgomp.so.1: cannot open shared object file"
        )

    @pytest.mark.parametrize("capability", [None, (7, 5), (8, 0), (8, 9), (9, 0), (12, 0)])
    def test_gpu(self, monkeypatch, capability):
        monkeypatch.setitem(sys.modules, "ltsam_fast._cuda", SimpleNamespace(ARCHS=(800, 900, 1000)))
        monkeypatch.setattr(torch.version, "hip", None)
        monkeypatch.setattr(torch.cuda, "is_available", lambda: capability is not None)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)
        expected = {
            None: "built, but torch sees no GPU",
            (7, 5): "built for sm_80, sm_90, sm_100, the GPU is sm_75: reinstall with LTSAM_CUDA_ARCHS=75",
        }
        assert backend.why_not("cuda") == expected.get(capability)

    def test_triton(self, monkeypatch):
        monkeypatch.setattr(backend, "_interpreted", None)
        monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
        monkeypatch.delenv("TRITON_INTERPRET", raising=False)
        monkeypatch.setattr(backend.importlib.util, "find_spec", lambda name: None)
        assert backend.why_not("triton") == "triton is not installed: pip install triton"
        monkeypatch.setattr(backend.importlib.util, "find_spec", lambda name: "found")
        assert backend.why_not("triton") == "no GPU; TRITON_INTERPRET=1 runs the kernels on CPU tensors"
        monkeypatch.setenv("TRITON_INTERPRET", "1")
        monkeypatch.setitem(sys.modules, "ltsam_fast.kernels", "the kernels")
        assert backend.why_not("triton") is None
        monkeypatch.delenv("TRITON_INTERPRET")
        assert backend.why_not("triton") is None, "the kernels stay what they were when Triton decorated them"
