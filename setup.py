"""Builds the two native cores with ninja; everything else is declared in pyproject.toml.

A core that cannot be built is left out, and ltsam_fast/_build_info.py says why, because pip hides build output.
Obeyed: CXX, CUDA_HOME, MAX_JOBS, LTSAM_CUDA_ARCHS="80 9.0 100+PTX", or "none" for no CUDA core, and LTSAM_REQUIRE=cpu,cuda
(missing is an error). What was compiled stays in build/, and is not compiled again while sources and commands are the same.
"""

import os
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
from glob import glob
from pathlib import Path

import pybind11
from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError

SOURCES = {"cpu": sorted(glob("csrc/cpu/*.cpp")), "cuda": sorted(glob("csrc/cuda/*.cu"))}
DURATIONS = {"cpu": "half a minute", "cuda": "3 to 5 minutes"}
ALSO_IN_SDIST = ["csrc/**/*.*", "tests/**/*.*", "bench/**/*.*", ".ci/*", ".clang-format", "*.md", "Makefile"]
# Not setuptools' build_temp: an editable install throws that away, and everything would be compiled again.
BUILD = Path("build", f"cores-{sysconfig.get_config_var('SOABI')}")
HEADERS = BUILD / f"pybind11-{pybind11.__version__}"  # a copy: build isolation puts the original elsewhere each time
COMMON = ["-O3", "-DNDEBUG", "-std=c++17", "-Icsrc", f"-I{HEADERS}", f"-I{sysconfig.get_path('include')}"]
HOST = ["-fPIC", "-fvisibility=hidden", "-fno-math-errno", "-ffp-contract=off"]
SHARED = ["-bundle", "-undefined", "dynamic_lookup"] if sys.platform == "darwin" else ["-shared"]


def words(variable):
    return re.findall(r"[^\s,;]+", os.environ.get(variable, ""))


def run(*command, **options):
    return subprocess.run(command, text=True, errors="replace", capture_output=True, **options)


def cpu_tools():
    """Returns the commands that compile and link the CPU core."""
    cxx = shlex.split(os.environ.get("CXX", "")) or [c for c in ("c++", "g++", "clang++") if shutil.which(c)][:1]
    if not (cxx and shutil.which(cxx[0])):
        raise CompileError(f"no C++ compiler: {cxx[0] if cxx else 'c++, g++ or clang++'} not found at install time")
    program = "#include <omp.h>\nint threads() { return omp_get_max_threads(); }\n"
    probe = run(*cxx, "-fopenmp", "-fPIC", *SHARED, "-xc++", "-", "-o", BUILD / "probe.so", input=program)
    openmp = [] if probe.returncode else ["-fopenmp"]
    return [*cxx, *COMMON, *HOST, "-fno-trapping-math", *openmp], [*cxx, *SHARED, *openmp]


def cuda_tools():
    """Returns the commands that compile and link the CUDA core; no GPU is needed for that."""
    if words("LTSAM_CUDA_ARCHS") == ["none"]:
        raise CompileError("left out at install time by LTSAM_CUDA_ARCHS=none")
    home, cxx = os.environ.get("CUDA_HOME"), os.environ.get("CXX")
    nvcc = (home and shutil.which(f"{home}/bin/nvcc")) or shutil.which("nvcc")
    if not nvcc:
        raise CompileError("no nvcc on PATH or in CUDA_HOME at install time")
    known = run(nvcc, "--list-gpu-arch").stdout.split()
    asked = words("LTSAM_CUDA_ARCHS") or [arch for arch in ("80", "90", "100") if f"compute_{arch}" in known]
    archs = {arch.replace(".", "").removesuffix("+PTX"): arch.endswith("+PTX") for arch in asked}
    if archs and not any(archs.values()):
        archs[max(archs, key=lambda arch: (len(arch.rstrip("af")), arch))] = True
    code = [f"-gencode=arch=compute_{a},code=[sm_{a}{f',compute_{a}' * ptx}]" for a, ptx in archs.items()]
    nvcc = [nvcc, *(["-ccbin", cxx] if cxx and " " not in cxx else []), *code]
    flags = ["-fmad=false", "--expt-relaxed-constexpr", f"--threads={os.environ.get('MAX_JOBS', 0)}"]
    return [*nvcc, *COMMON, *flags, f"-Xcompiler={','.join(HOST)}"], [*nvcc, *SHARED, "--cudart=static"]


def rules(core, compiler, linker):
    """Returns the part of build.ninja that makes one core."""
    compiler, linker = (shlex.join(command).replace("$", "$$") for command in (compiler, linker))
    objects = {f"{BUILD}/{source}.o": source for source in SOURCES[core]}
    return f"""
rule {core}
 command = {compiler} -MD -MF $out.d -c $in -o $out
 deps = gcc
 depfile = $out.d
rule {core}_link
 command = {linker} $in -o $out
build {BUILD}/{core}.so: {core}_link {" ".join(objects)}
""" + "".join(f"build {made}: {core} {source}\n" for made, source in objects.items())


def ninja(*arguments):
    jobs = ["-j", os.environ["MAX_JOBS"]] if "MAX_JOBS" in os.environ else []
    return run(sys.executable, "-m", "ninja", "-f", BUILD / "build.ninja", *jobs, *arguments)


class BuildCores(build_ext):
    """Makes all cores in one ninja run, then puts each in its place or notes why there is none."""

    def run(self):
        super().run()
        package = Path(self.get_ext_fullpath("ltsam_fast._cpu")).parent
        package.mkdir(parents=True, exist_ok=True)
        for core in self.missing:  # one left from an earlier build would be out of step with the sources
            Path(self.get_ext_fullpath(f"ltsam_fast._{core}")).unlink(missing_ok=True)
        (package / "_build_info.py").write_text(f"MISSING = {self.missing!a}\n")

    def build_extensions(self):
        if not HEADERS.exists():
            shutil.copytree(f"{pybind11.get_include()}/pybind11", BUILD / "new/pybind11", dirs_exist_ok=True)
            (BUILD / "new").rename(HEADERS)
        self.missing, script = {}, f"builddir = {BUILD}\n"
        for core, tools in (("cpu", cpu_tools), ("cuda", cuda_tools)):
            try:
                script += rules(core, *tools())
            except CompileError as error:
                self.missing[core] = str(error)
        (BUILD / "build.ninja").write_text(script)
        made = [f"{core} ({DURATIONS[core]})" for core in SOURCES if core not in self.missing]
        print(
            "Compiling, unless that was done before:", ", ".join(made), flush=True
        )  # all that `pip -v` shows meanwhile
        print(ninja("-k0").stdout)
        super().build_extensions()

    def build_extension(self, ext):
        core = ext.name.partition("._")[2]
        if core not in self.missing:
            made = ninja(BUILD / f"{core}.so")
            if made.returncode == 0:
                self.mkpath(os.path.dirname(self.get_ext_fullpath(ext.name)))
                return shutil.copy2(BUILD / f"{core}.so", self.get_ext_fullpath(ext.name))
            lines = [line.strip() for line in (made.stdout + made.stderr).splitlines() if line.strip()]
            telling = [line for line in lines if re.search(r"\berror\b|\bfatal\b|not found|No module|undefined", line)]
            self.missing[core] = (telling or lines)[0]
        because = "" if ext.optional else f"LTSAM_REQUIRE asks for the {core} core: "
        raise CompileError(because + self.missing[core])  # `optional` turns this kind, and no other, into a warning


required = set(words("LTSAM_REQUIRE"))
if not required <= SOURCES.keys():
    raise SystemExit(f"LTSAM_REQUIRE={','.join(sorted(required))}: the cores are {' and '.join(SOURCES)}")
sdist = [file for pattern in ALSO_IN_SDIST for file in glob(pattern, recursive=True)]
cores = [Extension(f"ltsam_fast._{c}", SOURCES[c], depends=sdist, optional=c not in required) for c in SOURCES]
setup(ext_modules=cores, cmdclass={"build_ext": BuildCores})
