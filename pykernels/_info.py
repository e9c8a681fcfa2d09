"""What `python -m pykernels info` tells: of the installation, the machine, and the choice of backends."""

from __future__ import annotations

import importlib.metadata
import json
import platform
from pathlib import Path
from typing import Any

import torch

from . import _library, backends
from ._version import __version__
from .testing import DTYPES, OPS, choice


def _processor() -> str:
    try:
        names = [
            line.split(":", 1)[1].strip()
            for line in Path("/proc/cpuinfo").read_text().splitlines()
            if line.startswith("model name")
        ]
    except OSError:
        names = []
    return names[0] if names else platform.processor() or platform.machine()


def _triton_version() -> str | None:
    try:
        return importlib.metadata.version("triton")
    except importlib.metadata.PackageNotFoundError:
        return None


def _library_facts() -> dict[str, Any]:
    facts: dict[str, Any] = {"path": str(_library.path()), "error": _library.error()}
    if facts["error"] is None:
        facts |= {
            "built_isas": _library.built_isas(),
            "machine_isas": _library.machine_isas(),
            "active_isa": _library.active_isa(),
            "cuda_build": _library.cuda_build(),
        }
    return facts


def _probe() -> str | None:
    """None when this build's CUDA kernels run on the GPU, else why not."""
    reason = backends.environment().cuda
    if reason is not None:
        return reason
    x = torch.arange(1000, dtype=torch.float32, device="cuda")
    try:
        right = torch.equal(torch.ops.pykernels.cuda_probe(x), x + 1)
    except RuntimeError as error:
        return f"the probe kernel failed: {error}"
    return None if right else "the probe kernel gave a wrong result"


def _gpu_facts() -> dict[str, Any]:
    facts: dict[str, Any] = {"torch_cuda": torch.version.cuda, "kernels": _probe(), "devices": []}
    if torch.cuda.is_available():
        driver = torch._C._cuda_getDriverVersion()
        facts["driver_cuda"] = f"{driver // 1000}.{driver % 1000 // 10}"
        for index in range(torch.cuda.device_count()):
            properties = torch.cuda.get_device_properties(index)
            facts["devices"].append(
                {
                    "name": properties.name,
                    "capability": f"{properties.major}.{properties.minor}",
                    "memory_gib": round(properties.total_memory / 2**30, 1),
                }
            )
    return facts


def _cuda_kernels() -> dict[str, dict[str, str]]:
    """{op: {compute capability: kernels}} of the build's CUDA kernels: for the GPUs here, else for each family."""
    if _library.error() is not None or _library.cuda_build() is None:
        return {}
    capabilities = [torch.cuda.get_device_capability(i) for i in range(torch.cuda.device_count())] or [(8, 0), (9, 0)]
    found: dict[str, dict[str, str]] = {}
    for op in {op.op.name: op.op for op in OPS}.values():
        for major, minor in sorted(set(capabilities)):
            if (kernels := _library.cuda_kernels(op.name, (major, minor))) is not None:
                found.setdefault(op.name, {})[f"{major}.{minor}"] = kernels
    return found


def _choices() -> dict[str, Any]:
    """Per op, device and dtype, what "auto" takes; CUDA tensors also where there are none, to see what they lack."""
    found: dict[str, Any] = {}
    for op in {op.op.name: op.op for op in OPS}.values():
        for device in ("cpu", "cuda", *(["xpu"] if hasattr(torch, "xpu") and torch.xpu.is_available() else [])):
            for dtype in DTYPES:
                chosen = choice(op, "auto", device, dtype)
                found.setdefault(op.name, {}).setdefault(device, {})[str(dtype).removeprefix("torch.")] = {
                    "backend": chosen.backend,
                    "reason": chosen.reason,
                    "rejected": dict(chosen.rejected),
                }
    return found


def facts() -> dict[str, Any]:
    """Everything that `info` prints."""
    return {
        "pykernels": __version__,
        "torch": torch.__version__,
        "triton": _triton_version(),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "processor": _processor(),
        "threads": torch.get_num_threads(),
        "library": _library_facts(),
        "gpu": _gpu_facts(),
        "cuda_kernels": _cuda_kernels(),
        "default_backend": backends._default,
        "ops": _choices(),
    }


def _text(facts: dict[str, Any]) -> list[str]:
    library, gpu = facts["library"], facts["gpu"]
    rows = [
        ("pykernels", facts["pykernels"]),
        ("torch", facts["torch"]),
        ("triton", facts["triton"] or "not installed"),
        ("python", facts["python"]),
        ("platform", facts["platform"]),
        ("processor", facts["processor"]),
        ("threads", str(facts["threads"])),
    ]
    rows.append(("library", library["path"]))
    if library["error"] is not None:
        rows.append(("", f"NOT LOADED: {library['error']}"))
    else:
        missing = [isa for isa in library["built_isas"] if isa not in library["machine_isas"]]
        rows.append(
            (
                "instructions",
                f"{library['active_isa']} (built: {' '.join(library['built_isas'])}"
                + (f"; not on this machine: {' '.join(missing)})" if missing else ")"),
            )
        )
        rows.append(("CUDA build", library["cuda_build"] or "none"))
    for device in gpu["devices"] or [None]:
        rows.append(
            (
                "GPU",
                "none that torch can use"
                if device is None
                else f"{device['name']}, compute capability {device['capability']}, {device['memory_gib']} GiB",
            )
        )
    if "driver_cuda" in gpu:
        rows.append(("driver", f"CUDA {gpu['driver_cuda']} (torch: CUDA {gpu['torch_cuda']})"))
    rows.append(("CUDA kernels", "run here" if gpu["kernels"] is None else f"not available: {gpu['kernels']}"))
    for op, kernels in facts["cuda_kernels"].items():
        rows += [("", f"{op} on compute capability {capability}: {text}") for capability, text in kernels.items()]
    lines = [f"{label:<13} {text}" for label, text in rows]
    default = facts["default_backend"]
    if default not in ("auto", *backends.BACKENDS):
        default += ", which is no backend: calls that name none raise ValueError"
    lines += ["", f'Backends, as backend="auto" takes them (default: {default})']
    for op, devices in facts["ops"].items():
        for device, dtypes in devices.items():
            lines += ["", f"  {op}, tensors on {device}"]
            # Dtypes that fare alike share a line.
            groups: dict[str, list[str]] = {}
            for dtype, chosen in dtypes.items():
                why = "; ".join(f"{name}: {reason}" for name, reason in chosen["rejected"].items())
                served = chosen["backend"] or "none but reference, which must be asked for"
                groups.setdefault(f"-> {served}" + (f"   (not {why})" if why else ""), []).append(dtype)
            lines += [f"    {', '.join(group)}\n      {text}" for text, group in groups.items()]
    return lines


def info(as_json: bool) -> int:
    """Prints the facts; the exit status is 1 when the native library does not load."""
    found = facts()
    print(json.dumps(found, indent=2) if as_json else "\n".join(_text(found)))
    return 0 if found["library"]["error"] is None else 1
