"""The kernels that a run trains with, chosen once and the same for every rank, attempt and machine.

LyCORIS 4.x picks a back end by what is installed, times its kernels and keeps the choice in the user's home; torch may
take kernels whose sums come in another order each time; and variables of the shell choose others in the libraries below
them. Each changes the last bits of the weights, or more.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from kohaku_wrap.errors import UsageError

BACKEND_VARIABLE = "LYCORIS_KERNEL_BACKEND"
BACKENDS = ("torch", "compile", "triton", "tilelang")
"""LyCORIS' own names; the first is always there and computes with torch's own operators."""

DETERMINISTIC_VARIABLE = "KWRAP_DETERMINISTIC"
"""1: ask torch for deterministic kernels on a GPU too, with the engine sd-scripts; slower."""

SWITCHES = (
    # CUDA, cuBLAS, cuDNN: precision of products, workspace, choice of kernels.
    "NVIDIA_TF32_OVERRIDE",
    "TORCH_ALLOW_TF32_CUBLAS_OVERRIDE",
    "CUBLAS_WORKSPACE_CONFIG",
    "CUBLASLT_WORKSPACE_SIZE",
    "DISABLE_ADDMM_CUDA_LT",
    "TORCH_BLAS_PREFER_CUBLASLT",
    "TORCH_BLAS_PREFER_HIPBLASLT",
    "TORCH_LINALG_PREFER_CUSOLVER",
    "TORCH_LINALG_PREFER_HIPSOLVER",
    "TORCH_ROCM_FA_PREFER_CK",
    "TORCH_CUDNN_USE_HEURISTIC_MODE_B",
    "TORCH_CUDNN_V8_API_DISABLED",
    "PYTORCH_TUNABLEOP_ENABLED",
    "PYTORCH_TUNABLEOP_TUNING",
    "PYTORCH_TUNABLEOP_FILENAME",
    "PYTORCH_MIOPEN_SUGGEST_NHWC",
    "PYTORCH_MIOPEN_SUGGEST_NHWC_BATCHNORM",
    "FLASH_ATTENTION_DETERMINISTIC",
    # torch itself.
    "ATEN_CPU_CAPABILITY",
    "PYTORCH_TENSOREXPR",
    "TORCH_LINEAR_FLATTEN_3D",
    "TORCH_MKLDNN_MATMUL_MIN_DIM",
    "TORCH_MKLDNN_MATMUL_MIN_SIZE",
    "TORCHDYNAMO_DISABLE",
    "TORCH_COMPILE_DISABLE",
    # Sums over ranks.
    "NCCL_ALGO",
    "NCCL_PROTO",
    "NCCL_MIN_NCHANNELS",
    "NCCL_MAX_NCHANNELS",
    "NCCL_NTHREADS",
    "NCCL_COLLNET_ENABLE",
    "NCCL_NVLS_ENABLE",
    # CPU libraries: instruction sets, precision, threads. OMP_NUM_THREADS is the attempt's own.
    "MKL_CBWR",
    "MKL_DISABLE_FAST_MM",
    "MKL_DOMAIN_NUM_THREADS",
    "MKL_DYNAMIC",
    "MKL_ENABLE_INSTRUCTIONS",
    "MKL_NUM_THREADS",
    "MKL_NUM_STRIPES",
    "MKL_THREADING_LAYER",
    "DNNL_DEFAULT_FPMATH_MODE",
    "DNNL_MAX_CPU_ISA",
    "ONEDNN_DEFAULT_FPMATH_MODE",
    "ONEDNN_MAX_CPU_ISA",
    "KMP_DETERMINISTIC_REDUCTION",
    "OMP_DYNAMIC",
    "OMP_SCHEDULE",
    "OMP_THREAD_LIMIT",
    "OPENBLAS_CORETYPE",
    "OPENBLAS_NUM_THREADS",
    "BLIS_NUM_THREADS",
    "NPY_DISABLE_CPU_FEATURES",
    "NPY_ENABLE_CPU_FEATURES",
)
"""Variables that can change bits of what is trained: a run keeps those that were set when it was made, and no other."""

CACHE_FOLDER = "kernels"
"""Within the run's folder: what LyCORIS would keep in the user's home."""


def choose_kernels(*, on_cpu: bool) -> dict[str, Any]:
    """The lock's table `kernels`: by the caller's variables where they are set. Raises UsageError."""
    backend = (os.environ.get(BACKEND_VARIABLE) or BACKENDS[0]).lower()
    if backend not in BACKENDS:
        raise UsageError(
            f"{BACKEND_VARIABLE}={backend}: a run is made with one back end for all its ranks and attempts",
            f"Unset it, or name one: {', '.join(BACKENDS)}.",
        )
    deterministic = os.environ.get(DETERMINISTIC_VARIABLE, "")
    if deterministic not in ("", "0", "1"):
        raise UsageError(f"{DETERMINISTIC_VARIABLE}={deterministic}: not 0 or 1", "Set it to 1, or unset it.")
    return {
        "lycoris_backend": BACKENDS[0] if on_cpu else backend,
        "lycoris_tuning": False,
        "deterministic": on_cpu or deterministic == "1",
        "switches": switches_of_the_shell(),
    }


def switches_of_the_shell() -> dict[str, str]:
    """The caller's variables that can change bits."""
    return {name: os.environ[name] for name in SWITCHES if name in os.environ}


def list_other_switches(kernels: Mapping[str, Any]) -> list[str]:
    """How the caller's switches differ from the run's, which hold; or which are set where a run recorded none."""
    now, locked = switches_of_the_shell(), kernels.get("switches")
    notes = list_other_choices(kernels)
    if locked is None:
        return notes + [
            f"{name}={value} is set here and can change bits; whether it was when the run was made is not recorded"
            for name, value in now.items()
        ]
    return notes + [
        f"{name} is {show_switch(now.get(name))} here and was {show_switch(locked.get(name))} when the run was made: "
        "the run keeps it as it was"
        for name in SWITCHES
        if now.get(name) != locked.get(name)
    ]


def list_other_choices(kernels: Mapping[str, Any]) -> list[str]:
    """The back end and KWRAP_DETERMINISTIC of the caller, where they are set and the run's lock has others."""
    if not kernels:
        return []
    chosen = {
        BACKEND_VARIABLE: str(kernels["lycoris_backend"]),
        DETERMINISTIC_VARIABLE: str(int(kernels["deterministic"])),
    }
    return [
        f"{name} is {given} here: the run keeps {own}, as it was made"
        for name, own in chosen.items()
        if (given := os.environ.get(name)) and given.lower() != own
    ]


def show_switch(value: str | None) -> str:
    """A variable's value for people."""
    return "not set" if value is None else value or "empty"


def dropped_variables(kernels: Mapping[str, Any]) -> frozenset[str]:
    """The caller's variables that an attempt does not get; none for runs that recorded no switches."""
    return frozenset(SWITCHES) - kernels["switches"].keys() if "switches" in kernels else frozenset()


def kernel_settings(kernels: Mapping[str, Any], run_folder: Path) -> dict[str, str]:
    """The variables that hold a worker to the lock's table, over those of the caller; none for runs of kwrap 0.1."""
    if not kernels:
        return {}
    return {
        **kernels.get("switches", {}),
        BACKEND_VARIABLE: str(kernels["lycoris_backend"]),
        "LYCORIS_KERNEL_TUNE": "on" if kernels["lycoris_tuning"] else "off",
        # What was timed before, by any run, must not decide.
        "LYCORIS_KERNEL_CACHE_DIR": str(run_folder / CACHE_FOLDER),
        "LYCORIS_DEVICE_JSON": "",
        DETERMINISTIC_VARIABLE: str(int(kernels["deterministic"])),
    }
