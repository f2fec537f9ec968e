"""Map files into memory as read-only arrays, without keeping them open."""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
import weakref
from pathlib import Path

import numpy as np

from jaxtrain.data.file_hashes import unreadable
from jaxtrain.errors import DataError

_libc = ctypes.CDLL(None, use_errno=True)
_libc.mmap.restype = ctypes.c_void_p
_libc.mmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_ssize_t)
_libc.munmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t)
_FAILED = ctypes.c_void_p(-1).value


def map_array(path: Path, dtype: np.dtype | type, count: int, offset: int = 0) -> np.ndarray:
    """Map `count` elements of a file, from byte `offset`, as a read-only array [count].

    Python's own mmap holds a file descriptor while it lives, and a process may have only 1,024; this holds none, and a mapped
    file stays readable after it is removed. Raises DataError where the file cannot be mapped or is too short.
    """
    dtype = np.dtype(dtype)
    length = offset + count * dtype.itemsize
    if not count:
        return np.zeros(0, dtype)
    try:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            if (size := os.fstat(descriptor).st_size) < length:
                raise DataError(
                    f"{path}: {size} bytes, but {count} numbers of {dtype} end at byte {length}; the file is cut short"
                )
            address = _libc.mmap(None, length, mmap.PROT_READ, mmap.MAP_SHARED, descriptor, 0)
        finally:
            os.close(descriptor)
        if address == _FAILED:
            raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    except OSError as error:
        if error.errno == errno.ENOMEM:
            raise DataError(
                f"{path}: cannot be mapped into memory: a process may have vm.max_map_count mappings, usually 65,530; join the "
                "token files into fewer, or raise it with sysctl"
            ) from error
        raise unreadable(path, error) from error
    memory = (ctypes.c_char * length).from_address(address)
    weakref.finalize(memory, _libc.munmap, address, length).atexit = False  # threads may still read at exit
    array = np.frombuffer(memoryview(memory), dtype, count, offset)
    array.flags.writeable = False
    return array
