"""`python -m tests.preflight.faulty ...` is `jaxtrain preflight ...`, but in process 1 something is wrong.

PREFLIGHT_FAULTS names what, separated by commas.
"""

import os
import sys

import numpy as np

from jaxtrain import agreement
from jaxtrain.cli import explained
from jaxtrain.launch import distributed
from jaxtrain.preflight import data, devices, folders, hosts, links
from jaxtrain.verbs.preflight import main as preflight


def version():
    real = agreement.version_of
    agreement.version_of = lambda package: "0.1.2" if package == "flax" else real(package)


def clock():
    real = hosts.now
    hosts.now = lambda: real() + 100


def folder():
    """Its run_dir is a folder of its own host."""
    real = folders._probe
    folders._probe = lambda path, token, process: real(path, token + "-elsewhere", process)


def multiplier():
    """Its last device gets one number in a matmul wrong."""
    real = devices.product_on
    wrong = np.zeros((128, 128), np.float32)
    wrong[3, 4] = 1
    devices.product_on = lambda device, a, b: real(device, a, b) + (device.id == 2049) * wrong


def slow():
    real = devices.timed_chain

    def timed_chain(device, edge):
        seconds, sums = real(device, edge)
        return 1000 * seconds, sums

    devices.timed_chain = timed_chain


def link():
    """What it gets from an all-reduce is one too much."""
    real = links.collectives

    def operations(size):
        kinds = real(size)
        reduce = kinds["all-reduce"]
        return kinds | {"all-reduce": lambda x: reduce(x) + 1}

    links.collectives = operations


def tokens():
    """It reads other data."""
    real = data.look_at_data
    data.look_at_data = lambda site: real(site) | {"fingerprint": "0123456789abcdef"}


if __name__ == "__main__":
    if os.environ["JAXTRAIN_PROCESS_ID"] == "1":
        for fault in os.environ["PREFLIGHT_FAULTS"].split(","):
            globals()[fault]()
    distributed.run_and_exit(lambda: explained(lambda: preflight(sys.argv[1:])))
