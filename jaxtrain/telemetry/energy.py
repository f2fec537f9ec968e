"""Measure a run's energy: NVML on NVIDIA GPUs, RAPL on CPUs, nothing where neither is readable.

    joules_per_token = joules between two rows / tokens of the steps between them
    energy_kwh       = joules so far / 3.6e6, before and after interruptions
    energy_kwh_at_end = energy_kwh + mean joules a token of this process * tokens left / 3.6e6

Everything between two rows counts: validation, saving and waiting too. On a GPU machine the hosts' CPUs, fans and network
do not count; on a CPU machine everything else that runs on its CPUs does.

Process 0 reads its own devices and assumes that all others draw as much: nothing is communicated, and no step waits. A
reading costs less than a millisecond; it is taken where a row is logged, and every POLL_SECONDS.
"""

from __future__ import annotations

import os
import re
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from jaxtrain.errors import ExplainedError

JOULES_PER_KWH = 3.6e6
POLL_SECONDS = 10.0
"""RAPL's counters wrap after some hundred kilojoules (20 minutes at 200 W), and a sum of power needs frequent readings."""
POWERCAP = Path("/sys/class/powercap")
Row = dict[str, float | int | str | None]


class Unreadable(Exception):
    """No meter of this kind can be read here; the message gives the reason."""


class Meter(Protocol):
    """A counter of joules."""

    description: str
    """What the meter counts, for the log."""
    devices: int
    """Number of jax devices that it counts; 0 if it counts the host."""

    def joules(self) -> float:
        """Return the joules since the meter was opened; call it about every POLL_SECONDS at least.

        Raises:
          Unreadable: the meter can no longer be read.
        """
        ...


class NvmlMeter:
    """NVIDIA GPUs through NVML: their own energy counters (Volta and newer), or mean power between readings x time.

    Args:
      nvml: the module `pynvml`, from the package nvidia-ml-py.
      ordinals: CUDA's numbers of this process's GPUs.
      environment: holds CUDA_VISIBLE_DEVICES: NVML numbers all GPUs of the machine.
      now: a monotonic clock, in seconds.

    Raises:
      Unreadable: no driver, no such GPU, or a MIG slice, whose power is not measured apart from its GPU's.
    """

    def __init__(
        self,
        nvml: Any,
        ordinals: Sequence[int],
        environment: Mapping[str, str] = os.environ,
        now: Callable[[], float] = time.perf_counter,
    ):
        self._nvml, self._now, self.devices = nvml, now, len(ordinals)
        visible = [name for name in environment.get("CUDA_VISIBLE_DEVICES", "").split(",") if name.strip()]
        names = [visible[i] if i < len(visible) else str(i) for i in ordinals]
        try:
            nvml.nvmlInit()
            self._handles = [self._handle(name.strip()) for name in names]
            self._counts = all(self._has_counter(handle) for handle in self._handles)
            self._first, self._last = self._read(), self._now()
        except nvml.NVMLError as error:
            raise Unreadable(f"NVML: {error}") from error
        self._sum = 0.0
        how = "energy counters" if self._counts else "power, summed up"
        self.description = f"NVML, {how} of {self.devices} GPU{'s' if self.devices > 1 else ''}"

    def joules(self) -> float:
        try:
            value, now = self._read(), self._now()
        except self._nvml.NVMLError as error:
            raise Unreadable(f"NVML: {error}") from error
        if self._counts:
            return value - self._first
        self._sum += (self._first + value) / 2 * (now - self._last)
        self._first, self._last = value, now
        return self._sum

    def _read(self) -> float:
        """Return the sum over all GPUs, in joules, or in watts where there are no counters; NVML counts in thousandths."""
        read = self._nvml.nvmlDeviceGetTotalEnergyConsumption if self._counts else self._nvml.nvmlDeviceGetPowerUsage
        return sum(read(handle) for handle in self._handles) / 1000

    def _handle(self, name: str) -> Any:
        if name.startswith("MIG"):
            raise Unreadable(f"NVML: {name} is a slice of a GPU, and power is measured of whole ones")
        if name.isdigit():
            return self._nvml.nvmlDeviceGetHandleByIndex(int(name))
        return self._nvml.nvmlDeviceGetHandleByUUID(name)

    def _has_counter(self, handle: Any) -> bool:
        try:
            self._nvml.nvmlDeviceGetTotalEnergyConsumption(handle)
        except self._nvml.NVMLError:
            return False
        return True


class RaplMeter:
    """CPU packages and their DRAM through RAPL (Intel, and AMD since Zen), read from Linux's powercap files.

    A counter wraps at `max_energy_range_uj`; it may do so once between two readings.

    Args:
      folder: Linux's powercap zones.

    Raises:
      Unreadable: there are none, or only root may read them (the rule since CVE-2020-8694).
    """

    devices = 0

    def __init__(self, folder: Path = POWERCAP):
        zones = [zone for zone in sorted(folder.glob("intel-rapl:*")) if _is_counted(zone)]
        if not zones:
            raise Unreadable(f"RAPL: no CPU package in {folder}")
        try:
            self._ranges = {zone: int((zone / "max_energy_range_uj").read_text(encoding="utf-8")) for zone in zones}
            self._last = {zone: _microjoules(zone) for zone in zones}
        except (OSError, ValueError) as error:
            raise Unreadable(f"RAPL: {error}; `chmod a+r {zones[0]}/energy_uj` as root lets everybody read it") from error
        self._sum = 0
        packages = sum(zone.name.count(":") == 1 for zone in zones)
        self.description = f"RAPL, {packages} CPU package{'s' if packages > 1 else ''} with all that runs on this host"

    def joules(self) -> float:
        try:
            for zone, before in self._last.items():
                now = _microjoules(zone)
                self._sum += now - before if now >= before else now - before + self._ranges[zone]
                self._last[zone] = now
        except (OSError, ValueError) as error:
            raise Unreadable(f"RAPL: {error}") from error
        return self._sum / 1e6


def _microjoules(zone: Path) -> int:
    return int((zone / "energy_uj").read_text(encoding="utf-8"))


def _is_counted(zone: Path) -> bool:
    """Return whether a zone is a package or its DRAM: packages include cores and GPU, and `psys` counts them twice."""
    try:
        name = (zone / "name").read_text(encoding="utf-8").strip()
    except OSError:
        return False
    return re.fullmatch(r"package-\d+.*|dram", name) is not None


def open_meter(wanted: str, platform: str, ordinals: Sequence[int]) -> tuple[Meter | None, str]:
    """(the fitting meter or None, a description of it or of why there is none).

    Args:
      wanted: `telemetry.energy`: auto, nvml, rapl or none.
      platform: platform of jax's devices: gpu, cuda, cpu, tpu.
      ordinals: CUDA's numbers of this process's GPUs.

    Raises:
      ExplainedError: nvml or rapl was requested and cannot be read.
    """
    kinds = {"gpu": "nvml", "cuda": "nvml", "cpu": "rapl"}
    kind = kinds.get(platform, "none") if wanted == "auto" else wanted
    if kind == "none":
        return None, "not measured" + (f": nothing measures a {platform} here" if wanted == "auto" else "")
    try:
        meter: Meter = NvmlMeter(_pynvml(), ordinals) if kind == "nvml" else RaplMeter()
    except Unreadable as why:
        if wanted != "auto":
            raise ExplainedError(f"telemetry.energy={wanted}: {why}; use auto or none") from why
        return None, f"not measured: {why}"
    return meter, meter.description


def _pynvml() -> Any:
    try:
        import pynvml  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise Unreadable('the package nvidia-ml-py is not installed: pip install "jaxtrain[energy]"') from error
    return pynvml


class EnergyLog:
    """Turns a meter's readings into a row's figures.

    Args:
      meter: counts joules; None gives rows without figures.
      tokens: gives the tokens of the first so many steps.
      last_step: the last step of the run.
      device_count: jax's devices over all processes, each assumed to draw as much as this process's.
      start_step: the step that the run resumed from.
      kwh_before: energy of the run before it was resumed.
      now: a monotonic clock, in seconds.
    """

    def __init__(
        self,
        meter: Meter | None,
        tokens: Callable[[int], float] = float,
        last_step: int = 0,
        device_count: int = 1,
        start_step: int = 0,
        kwh_before: float = 0.0,
        now: Callable[[], float] = time.perf_counter,
    ):
        self._meter, self._now = meter, now
        self._scale = device_count / meter.devices if meter is not None and meter.devices else 1.0
        self._tokens, self._last_step = tokens, last_step
        self._start_step, self._kwh_before = start_step, kwh_before
        self.start()

    def start(self) -> None:
        """Start counting: call it after compilation, just before the first step."""
        self._step = self._start_step
        self._polled = self._row_at = self._now()
        self._zero = self._row_joules = 0.0
        self._zero = self._row_joules = self._joules()

    def poll(self) -> None:
        """Read the meter if the last reading is older than POLL_SECONDS. Costs a microsecond otherwise."""
        if self._meter is not None and self._now() - self._polled > POLL_SECONDS:
            self._joules()

    def row(self, step: int) -> Row:
        """Return watts (mean since the last row), joules_per_token, energy_kwh and energy_kwh_at_end; empty without a meter."""
        joules, now = self._joules(), self._now()
        if self._meter is None:
            return {}
        seconds, used, so_far = now - self._row_at, joules - self._row_joules, joules - self._zero
        first, last, at, end = map(self._tokens, (self._start_step, self._step, step, self._last_step))
        kwh = self._kwh_before + so_far / JOULES_PER_KWH
        self._step, self._row_at, self._row_joules = step, now, joules
        return {
            "watts": used / seconds if seconds > 0 else None,
            "joules_per_token": used / (at - last) if at > last else None,
            "energy_kwh": kwh,
            "energy_kwh_at_end": kwh + so_far / (at - first) * (end - at) / JOULES_PER_KWH if at > first else None,
        }

    def _joules(self) -> float:
        """Return the joules of all devices since the meter was opened. A meter that fails is dropped; training goes on."""
        if self._meter is None:
            return 0.0
        self._polled = self._now()
        try:
            return self._meter.joules() * self._scale
        except Unreadable:
            self._meter = None
            return 0.0
