"""Pickles of OC20 without running them: a list of what may be named, and NumPy stand-ins for torch and PyG.

An OC20 LMDB holds pickled `torch_geometric.data.Data`, its mappings are pickled dicts. Loading a pickle runs
whatever it names, so only the names below are let through, each bound to a plain function or container of
ours: neither torch nor torch_geometric is imported, tensors come out as NumPy arrays. Anything else is a
`RefusedPickle` that names it.
"""

from __future__ import annotations

import io
import pickle
from collections import OrderedDict
from typing import Any

import numpy as np
from numpy.typing import NDArray


class RefusedPickle(ValueError):
    """A pickle names something that no OC20 file needs; it was not run."""


class BrokenPickle(ValueError):
    """Bytes that are no pickle, or not all of one."""


def load_pickle(data: bytes) -> Any:
    """The object of a pickle made of plain values, NumPy arrays, torch tensors (-> NumPy)
    and PyG records (-> Bag).

    Raises RefusedPickle, which names what was refused, or BrokenPickle.
    """
    return _load(_Unpickler(io.BytesIO(data)))


def _load(unpickler: pickle.Unpickler) -> Any:
    try:
        return unpickler.load()
    except (RefusedPickle, BrokenPickle):
        raise
    # A damaged pickle can fail in any way that its opcodes can: none of them is worth telling apart.
    except Exception as error:
        raise BrokenPickle(f"the pickle cannot be read: {type(error).__name__}: {error}") from error


class _Dtype:
    """Stands in for numpy.dtype, of which a pickle may set a byte order and nothing else. It could set the
    flags too, and bytes of the file would count as addresses of objects."""

    def __init__(self, name: Any, *_: Any) -> None:
        self.dtype = np.dtype(name if isinstance(name, str) else "O")
        if self.dtype.kind not in "biufSUV" or self.dtype.hasobject:
            raise RefusedPickle(
                f"the pickle holds an array of {name!r}, not of plain values; it was not read"
            )

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        _, order, subarray, names, fields, *_ = state
        if any(part is not None for part in (subarray, names, fields)):
            raise RefusedPickle("the pickle holds an array of records, not of plain values; it was not read")
        self.dtype = self.dtype.newbyteorder(order)


class _Array(np.ndarray[Any, Any]):
    """An array before its pickled state is set, and after."""

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        version, shape, dtype, *rest = state
        super().__setstate__((version, shape, dtype.dtype, *rest))


class Bag:
    """Stands in for a PyG object: its attributes, and no behaviour."""


def fields(record: Any) -> dict[str, Any]:
    """The values by key of a PyG record of either layout (before 2.0 in the object, since then in its
    `_store`), or of a plain dict. Raises ValueError for anything else."""
    if isinstance(record, dict):
        return record
    if not isinstance(record, Bag):
        raise ValueError(f"the record is a {type(record).__name__}, not a PyG Data or a dict")
    inside = record.__dict__
    store = inside.get("_store", inside)
    if isinstance(store, Bag):
        store = store.__dict__
    store = store.get("_mapping", store) if isinstance(store, dict) else store
    if not isinstance(store, dict):
        raise ValueError(f"the store of the record is a {type(store).__name__}")
    return {key: value for key, value in store.items() if value is not None}


_STORAGES = {
    "DoubleStorage": "<f8",
    "FloatStorage": "<f4",
    "HalfStorage": "<f2",
    "LongStorage": "<i8",
    "IntStorage": "<i4",
    "ShortStorage": "<i2",
    "CharStorage": "i1",
    "ByteStorage": "u1",
    "BoolStorage": "?",
}
_MAGIC, _PROTOCOL = (
    0x1950A86A20F9469CFC6C,
    1001,
)  # of torch's file format before zip, which tensors still pickle by


def _storage(data: bytes) -> NDArray[Any]:
    """The flat array of a pickled storage: stands in for torch.storage._load_from_bytes."""
    if not isinstance(data, bytes | bytearray):
        raise BrokenPickle("a tensor's storage is not bytes")
    stream = io.BytesIO(data)
    if _load(_Unpickler(stream)) != _MAGIC or _load(_Unpickler(stream)) != _PROTOCOL:
        raise BrokenPickle("a tensor's storage is of a format unknown here")
    if not _load(_Unpickler(stream)).get("little_endian", True):
        raise BrokenPickle("a tensor's storage is big-endian")
    storage = _Unpickler(stream)
    dtype, key, size = _load(storage)
    if dtype not in _STORAGES.values():
        raise BrokenPickle("a tensor's storage is of a kind unknown here")
    if _load(_Unpickler(stream)) != [key]:
        raise BrokenPickle("a tensor has more than one storage")
    count = int.from_bytes(stream.read(8), "little")
    values = np.frombuffer(data, dtype=np.uint8, offset=stream.tell())
    dtype = np.dtype(dtype)
    if count != size or len(values) < count * dtype.itemsize:
        raise BrokenPickle(f"a tensor's storage ends early: {len(values)} bytes for {count} values")
    return values[: count * dtype.itemsize].view(dtype)


def _tensor(
    storage: Any, offset: int, size: tuple[int, ...], stride: tuple[int, ...], *_: Any
) -> NDArray[Any]:
    """A tensor as an array: stands in for torch._utils._rebuild_tensor and _v2."""
    if (
        not isinstance(storage, np.ndarray)
        or len(size) != len(stride)
        or min((*size, *stride, offset), default=0) < 0
    ):
        raise BrokenPickle("a tensor without storage, or of a shape that cannot be")
    if 0 in size:
        return np.zeros(size, storage.dtype)
    # as_strided trusts its caller; these numbers come from a file
    if offset + sum((n - 1) * step for n, step in zip(size, stride)) >= len(storage):
        raise BrokenPickle(f"a tensor of shape {size} does not fit into its storage of {len(storage)}")
    steps = [step * storage.itemsize for step in stride]
    return np.lib.stride_tricks.as_strided(storage[offset:], size, steps).copy()


def _reconstruct(*_: Any) -> _Array:
    """An empty array, whose state follows: stands in for numpy._core.multiarray._reconstruct."""
    return _Array(0, np.int8)


def _scalar(dtype: _Dtype, data: bytes) -> Any:
    """Stands in for numpy._core.multiarray.scalar."""
    return np.frombuffer(data, dtype.dtype, 1)[0]


def _frombuffer(buffer: bytes, dtype: _Dtype, shape: tuple[int, ...], order: str, *_: Any) -> NDArray[Any]:
    """An array pickled by protocol 5: stands in for numpy._core.numeric._frombuffer."""
    try:
        return np.frombuffer(buffer, dtype.dtype).reshape(shape, order=order).copy()  # type: ignore[call-overload]
    except (TypeError, ValueError) as error:
        raise BrokenPickle(f"an array of shape {shape} does not fit into its bytes") from error


def _encode(text: str, encoding: str = "latin1") -> bytes:
    """Bytes pickled by protocol 2: stands in for _codecs.encode."""
    if not isinstance(text, str) or encoding != "latin1":
        raise BrokenPickle("bytes that are not written as pickles write them")
    return text.encode("latin1")


_ALLOWED: dict[tuple[str, str], Any] = {
    ("collections", "OrderedDict"): OrderedDict,
    ("builtins", "set"): set,
    ("builtins", "bytearray"): bytearray,
    ("_codecs", "encode"): _encode,
    ("torch._utils", "_rebuild_tensor"): _tensor,
    ("torch._utils", "_rebuild_tensor_v2"): _tensor,
    ("torch.storage", "_load_from_bytes"): _storage,
    ("numpy", "ndarray"): "numpy.ndarray",  # only named, to _reconstruct
    ("numpy", "dtype"): _Dtype,
    **{("torch", name): dtype for name, dtype in _STORAGES.items()},
    **{
        (f"torch_geometric.data.{module}", name): Bag
        for module, names in (
            ("data", ("Data", "DataEdgeAttr", "DataTensorAttr")),
            ("storage", ("GlobalStorage", "BaseStorage")),
        )
        for name in names
    },
}
for _module in ("numpy.core.multiarray", "numpy._core.multiarray"):
    _ALLOWED[_module, "_reconstruct"] = _reconstruct
    _ALLOWED[_module, "scalar"] = _scalar
for _module in ("numpy.core.numeric", "numpy._core.numeric"):
    _ALLOWED[_module, "_frombuffer"] = _frombuffer

# fairchem carries PyG's classes under names of its own since 2.0
_RECORDS = ("Data", "DataEdgeAttr", "DataTensorAttr", "GlobalStorage", "BaseStorage")


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        try:
            return _ALLOWED[module, name]
        except KeyError:
            if module.startswith("fairchem.core.") and name in _RECORDS:
                return Bag
            hint = "; write structures as .extxyz, .db or .aselmdb instead" * module.startswith("ase.")
            raise RefusedPickle(
                f"the pickle names {module}.{name}, which no OC20 file needs; it was not run{hint}"
            ) from None

    def persistent_load(self, pid: Any) -> tuple[Any, Any, int]:
        kind, dtype, key, _, size = pid[:5]
        if kind != "storage" or (len(pid) > 5 and pid[5] is not None):
            raise BrokenPickle("a tensor's storage is a view of another")
        return dtype, key, size
