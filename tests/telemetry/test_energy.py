"""Meters of energy, over a folder like Linux's and a module like pynvml; and what a row says of them."""

from pathlib import Path
from types import SimpleNamespace

import pytest

from jaxtrain.errors import ExplainedError
from jaxtrain.telemetry import energy
from jaxtrain.telemetry.energy import EnergyLog, NvmlMeter, RaplMeter, Unreadable, open_meter

RANGE = 262_143_328_850


class Clock:
    """Seconds that pass when told to."""

    def __init__(self):
        self.seconds = 100.0

    def __call__(self) -> float:
        return self.seconds


class FakeNvml:
    """NVML of some GPUs: `millijoules` and `milliwatts` by index; counters are there from Volta on."""

    class NVMLError(Exception):
        pass

    def __init__(self, count: int, has_counters: bool = True):
        self.millijoules, self.milliwatts, self.has_counters = [0] * count, [0] * count, has_counters
        self.uuids = [f"GPU-{i}" for i in range(count)]

    def nvmlInit(self):
        pass

    def nvmlDeviceGetHandleByIndex(self, index):
        if index >= len(self.millijoules):
            raise self.NVMLError("Invalid Argument")
        return index

    def nvmlDeviceGetHandleByUUID(self, uuid):
        return self.uuids.index(uuid)

    def nvmlDeviceGetTotalEnergyConsumption(self, handle):
        if not self.has_counters:
            raise self.NVMLError("Not Supported")
        return self.millijoules[handle]

    def nvmlDeviceGetPowerUsage(self, handle):
        return self.milliwatts[handle]


def zone(folder: Path, name: str, label: str, microjoules: int) -> Path:
    path = folder / name
    path.mkdir()
    for file, value in (("name", label), ("energy_uj", microjoules), ("max_energy_range_uj", RANGE)):
        (path / file).write_text(f"{value}\n")
    return path


def test_nvml_counters_of_the_visible_gpus():
    nvml = FakeNvml(4)
    nvml.millijoules = [5_000, 6_000, 7_000, 8_000]
    meter = NvmlMeter(nvml, [0, 1], {"CUDA_VISIBLE_DEVICES": "2, GPU-3"})
    nvml.millijoules = [99_000, 99_000, 17_000, 28_500]
    assert meter.joules() == pytest.approx(10 + 20.5)
    assert (meter.devices, "counters of 2 GPUs" in meter.description) == (2, True)


def test_nvml_without_counters_sums_up_power():
    nvml, clock = FakeNvml(1, has_counters=False), Clock()
    nvml.milliwatts = [100_000]
    meter = NvmlMeter(nvml, [0], {}, clock)
    clock.seconds, nvml.milliwatts = 104.0, [300_000]
    assert meter.joules() == pytest.approx(4 * 200)  # the mean of both ends
    clock.seconds = 106.0
    assert meter.joules() == pytest.approx(4 * 200 + 2 * 300)


def test_what_nvml_cannot_measure():
    with pytest.raises(Unreadable, match="slice"):
        NvmlMeter(FakeNvml(1), [0], {"CUDA_VISIBLE_DEVICES": "MIG-abc"})
    with pytest.raises(Unreadable, match="Invalid Argument"):
        NvmlMeter(FakeNvml(1), [1], {})


def test_rapl_counts_packages_and_dram_over_the_end_of_a_counter(tmp_path: Path):
    package = zone(tmp_path, "intel-rapl:0", "package-0", RANGE - 1_000_000)
    other = zone(tmp_path, "intel-rapl:1", "package-1", 0)
    dram = zone(tmp_path, "intel-rapl:0:1", "dram", 10)
    zone(tmp_path, "intel-rapl:0:0", "core", 0)
    zone(tmp_path, "intel-rapl:2", "psys", 0)
    meter = RaplMeter(tmp_path)
    assert "2 CPU packages" in meter.description
    (package / "energy_uj").write_text("3000000\n")  # 1 J up to the end, 3 J after it
    (other / "energy_uj").write_text("2000000\n")
    (dram / "energy_uj").write_text("500010\n")
    (tmp_path / "intel-rapl:0:0" / "energy_uj").write_text("700000000\n")
    (tmp_path / "intel-rapl:2" / "energy_uj").write_text("900000000\n")
    assert meter.joules() == pytest.approx(4 + 2 + 0.5)
    assert meter.joules() == pytest.approx(6.5)


def test_rapl_counters_that_cannot_be_read(tmp_path: Path):
    with pytest.raises(Unreadable, match="no CPU package"):
        RaplMeter(tmp_path)
    (zone(tmp_path, "intel-rapl:0", "package-0", 0) / "energy_uj").unlink()
    with pytest.raises(Unreadable, match="chmod a\\+r"):
        RaplMeter(tmp_path)


def test_auto_goes_without_and_a_wish_is_answered(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(RaplMeter.__init__, "__defaults__", (tmp_path,))
    assert open_meter("none", "cpu", [0]) == (None, "not measured")
    meter, words = open_meter("auto", "cpu", [0])
    assert (meter, words.startswith("not measured: RAPL")) == (None, True)
    assert open_meter("auto", "tpu", [0])[0] is None
    with pytest.raises(ExplainedError, match="telemetry.energy=rapl: RAPL: .*; use auto or none"):
        open_meter("rapl", "cpu", [0])
    zone(tmp_path, "intel-rapl:0", "package-0", 0)
    assert isinstance(open_meter("auto", "cpu", [0])[0], RaplMeter)


def test_without_the_package_the_extra_is_named(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(__import__("sys").modules, "pynvml", None)
    assert 'pip install "jaxtrain[energy]"' in open_meter("auto", "gpu", [0])[1]


def test_a_row_says_watts_joules_and_kilowatt_hours():
    """2 of 8 GPUs are read, so all is times 4; the run had taken 1 kWh before step 10."""
    meter, clock = SimpleNamespace(joules=lambda: joules[0], devices=2, description=""), Clock()
    joules = [50.0]
    log = EnergyLog(
        meter, tokens=lambda steps: 1000 * steps, last_step=40, device_count=8, start_step=10, kwh_before=1.0, now=clock
    )
    clock.seconds, joules[0] = 110.0, 950.0  # 900 J read, 3600 J in all
    row = log.row(20)
    assert row["watts"] == pytest.approx(360)
    assert row["joules_per_token"] == pytest.approx(3600 / (10 * 1000))
    assert row["energy_kwh"] == pytest.approx(1.001)
    assert row["energy_kwh_at_end"] == pytest.approx(1.001 + 0.002)  # as much for each of the 20 steps left
    clock.seconds, joules[0] = 115.0, 1400.0
    row = log.row(30)
    assert (row["watts"], row["joules_per_token"]) == (pytest.approx(360), pytest.approx(0.18))
    assert row["energy_kwh_at_end"] == pytest.approx(1.0015 + 0.00075)  # 5400 J in 20 steps, 10 left


def test_the_meter_is_read_between_rows_that_are_far_apart():
    reads, clock = [], Clock()
    meter = SimpleNamespace(joules=lambda: reads.append(clock.seconds) or 0.0, devices=0, description="")
    log = EnergyLog(meter, now=clock)
    for _ in range(100):
        log.poll()
    assert len(reads) == 1
    clock.seconds += energy.POLL_SECONDS + 1
    log.poll()
    log.poll()
    assert len(reads) == 2


def test_a_meter_that_fails_is_given_up_and_training_goes_on():
    def joules() -> float:
        if reads.pop():
            raise Unreadable("NVML: GPU is lost")
        return 0.0

    reads = [True, False]
    log = EnergyLog(SimpleNamespace(joules=joules, devices=1, description=""))
    assert log.row(1) == {}
    assert log.row(2) == {}
    assert EnergyLog(None).row(1) == {}
