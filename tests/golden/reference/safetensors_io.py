"""Reads and writes safetensors files with numpy alone.

Layout: u64 little-endian header length, JSON header {name: {dtype, shape, data_offsets}}, raw little-endian
data. BF16 and F16 arrays are given as float32 and rounded to nearest even here.
"""
import json
import struct

import numpy as np


def bf16_bits(values):
    """Float32 values to bfloat16 bit patterns, round to nearest even (no NaN among them)."""
    bits = np.ascontiguousarray(values, dtype="<f4").view("<u4").astype(np.uint64)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype("<u2")


def bf16_values(bits):
    """Bfloat16 bit patterns to the float32 values that they stand for; exact."""
    return (bits.astype("<u4") << 16).view("<f4")


def encode(array, dtype):
    if dtype == "BF16":
        return bf16_bits(array).tobytes()
    return np.ascontiguousarray(array, dtype={"F64": "<f8", "F32": "<f4", "F16": "<f2", "I64": "<i8"}[dtype]).tobytes()


def decode(data, dtype, shape):
    if dtype == "BF16":
        return bf16_values(np.frombuffer(data, "<u2")).reshape(shape)
    numpy_dtype = {"F64": "<f8", "F32": "<f4", "F16": "<f2", "I64": "<i8"}[dtype]
    return np.frombuffer(data, numpy_dtype).reshape(shape)


def save(path, tensors, dtype="F32", metadata=None):
    """tensors: {name: array}, written in name order, all as `dtype`."""
    header, blobs, offset = {}, [], 0
    if metadata:
        header["__metadata__"] = metadata
    for name in sorted(tensors):
        blob = encode(tensors[name], dtype)
        header[name] = {"dtype": dtype, "shape": list(np.shape(tensors[name])),
                        "data_offsets": [offset, offset + len(blob)]}
        blobs.append(blob)
        offset += len(blob)
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "wb") as file:
        file.write(struct.pack("<Q", len(text)) + text + b"".join(blobs))


def load(path):
    """{name: array}; F16 and BF16 come back widened to float32."""
    with open(path, "rb") as file:
        data = file.read()
    (length,) = struct.unpack_from("<Q", data)
    header = json.loads(data[8:8 + length])
    header.pop("__metadata__", None)
    tensors = {}
    for name, entry in header.items():
        begin, end = (8 + length + offset for offset in entry["data_offsets"])
        array = decode(data[begin:end], entry["dtype"], entry["shape"])
        tensors[name] = array.astype(np.float32) if entry["dtype"] == "F16" else array
    return tensors
