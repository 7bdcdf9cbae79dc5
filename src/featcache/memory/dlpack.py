"""Storages over memory that torch did not allocate: an address in, a torch storage out.

DLPack is the one public way to tell torch both the address and the device. The driver would name the
device that holds the memory, which for a peer's slab differs from the device that reads it. The structs
are those of DLPack's ABI (dlpack.h, version 0.8).
"""

import atexit
import ctypes
from collections.abc import Callable
from typing import Any, Final

import torch
from torch.utils.dlpack import from_dlpack

_CPU: Final = 1  # kDLCPU
_CUDA: Final = 2  # kDLCUDA
_UNSIGNED: Final = 1  # kDLUInt


class _Device(ctypes.Structure):
    _fields_ = (("kind", ctypes.c_int32), ("index", ctypes.c_int32))


class _DataType(ctypes.Structure):
    _fields_ = (("code", ctypes.c_uint8), ("bits", ctypes.c_uint8), ("lanes", ctypes.c_uint16))


class _Tensor(ctypes.Structure):
    _fields_ = (
        ("data", ctypes.c_void_p),
        ("device", _Device),
        ("ndim", ctypes.c_int32),
        ("dtype", _DataType),
        ("shape", ctypes.POINTER(ctypes.c_int64)),
        ("strides", ctypes.POINTER(ctypes.c_int64)),
        ("byte_offset", ctypes.c_uint64),
    )


class _Managed(ctypes.Structure):
    pass


_Deleter = ctypes.CFUNCTYPE(None, ctypes.POINTER(_Managed))
_Managed._fields_ = (("tensor", _Tensor), ("context", ctypes.c_void_p), ("deleter", _Deleter))

_new_capsule: Any = ctypes.pythonapi.PyCapsule_New
_new_capsule.restype = ctypes.py_object
_new_capsule.argtypes = (ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p)

_lent: dict[int, tuple[_Managed, Any, Callable[[], object]]] = {}
"""Structs that torch holds a pointer to, by that pointer: they stay until torch calls the deleter."""


def _gone(managed: Any) -> None:
    # Runs in whichever thread dropped the last tensor, with the GIL.
    _gone_at(ctypes.addressof(managed.contents))


def _gone_at(pointer: int) -> None:
    entry = _lent.pop(pointer, None)
    if entry is not None:
        entry[2]()


_deleter = _Deleter(_gone)


def _forget() -> None:
    """At exit, make torch drop its storages without a call into the dying interpreter."""
    for managed, _shape, _on_gone in list(_lent.values()):
        managed.deleter = _Deleter()  # null: torch then calls nothing


atexit.register(_forget)


def storage_over(
    address: int, nbytes: int, device: torch.device, on_gone: Callable[[], object]
) -> torch.UntypedStorage:
    """Return a storage over memory that must stay until `on_gone` is called.

    `on_gone` is called once, when the storage and every tensor over it are gone, in any thread, or
    when this fails; it must not block.
    """
    shape = (ctypes.c_int64 * 1)(nbytes)
    kind, index = (_CPU, 0) if device.type == "cpu" else (_CUDA, device.index)
    tensor = _Tensor(address, _Device(kind, index), 1, _DataType(_UNSIGNED, 8, 1), shape, None, 0)
    managed = _Managed(tensor, None, _deleter)
    _lent[ctypes.addressof(managed)] = (managed, shape, on_gone)
    capsule = _new_capsule(ctypes.addressof(managed), b"dltensor", None)
    try:
        return from_dlpack(capsule).untyped_storage()
    except BaseException:
        _gone_at(ctypes.addressof(managed))
        raise
