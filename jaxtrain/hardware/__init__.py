"""Chips and their links: their makers' figures, measurements, and how to name one."""

from jaxtrain.hardware.chip import IDLE_SHARE, Calibration, Chip, CollectiveRate, Rate, predicted_watts
from jaxtrain.hardware.chip_file import ENDINGS, write_chip
from jaxtrain.hardware.chips import CHIPS, chip_of_device_kind, find_chip, load_chip, resolve_chip

__all__ = ["CHIPS", "ENDINGS", "IDLE_SHARE", "Calibration", "Chip", "CollectiveRate", "Rate", "chip_of_device_kind"]
__all__ += ["find_chip", "load_chip", "predicted_watts", "resolve_chip", "write_chip"]
