"""Writes and reads GGUF files with numpy alone (ggml-org/ggml, docs/gguf.md), and rounds to its block formats the
plain way: it need not be the best rounding, only a valid one.
"""
import struct

import numpy as np

TYPES = {"F32": 0, "F16": 1, "Q4_0": 2, "Q4_1": 3, "Q8_0": 8, "Q4_K": 12, "Q6_K": 14, "BF16": 30}
BLOCKS = {"Q4_0": (32, 18), "Q4_1": (32, 20), "Q8_0": (32, 34), "Q4_K": (256, 144), "Q6_K": (256, 210)}
ALIGNMENT = 32


def half(values):
    """Rounded to float16, as float64."""
    return np.asarray(values).astype("<f2").astype(np.float64)


def ratio(a, b):
    return np.divide(a, b, out=np.zeros(np.broadcast(a, b).shape), where=b != 0)


# --- encoding: rows of blocks [n, 32 or 256] to bytes --------------------------------------------------------

def f16_bytes(values):
    return np.asarray(values).astype("<f2").view(np.uint8).reshape(len(values), -1)


def nibbles(q):
    """[n, 32] integers below 16: the first half in the low nibbles."""
    return (q[:, :16] | q[:, 16:] << 4).astype(np.uint8)


def encode_q8_0(x):
    d = np.abs(x).max(1, keepdims=True) / 127
    q = np.clip(np.rint(ratio(x, half(d))), -127, 127).astype(np.int8)
    return np.hstack([f16_bytes(d), q.view(np.uint8)])


def encode_q4_0(x):
    d = -x[np.arange(len(x)), np.abs(x).argmax(1)][:, None] / 8
    q = np.clip(np.rint(ratio(x, half(d))) + 8, 0, 15).astype(int)
    return np.hstack([f16_bytes(d), nibbles(q)])


def encode_q4_1(x):
    low = x.min(1, keepdims=True)
    d = (x.max(1, keepdims=True) - low) / 15
    q = np.clip(np.rint(ratio(x - half(low), half(d))), 0, 15).astype(int)
    return np.hstack([f16_bytes(d), f16_bytes(low), nibbles(q)])


def encode_q4_k(x):
    runs = x.reshape(len(x), 8, 32)
    low = np.minimum(runs.min(2), 0)
    scale = (runs.max(2) - low) / 15
    d, m = scale.max(1, keepdims=True) / 63, -low.min(1, keepdims=True) / 63
    sc = np.clip(np.rint(ratio(scale, half(d))), 0, 63).astype(int)
    mn = np.clip(np.rint(ratio(-low, half(m))), 0, 63).astype(int)
    step, base = (half(d) * sc)[..., None], (half(m) * mn)[..., None]
    q = np.clip(np.rint(ratio(runs + base, step)), 0, 15).astype(int)
    packed = np.hstack([sc[:, :4] | sc[:, 4:] >> 4 << 6, mn[:, :4] | mn[:, 4:] >> 4 << 6,
                        (sc[:, 4:] & 15) | (mn[:, 4:] & 15) << 4]).astype(np.uint8)
    pairs = (q[:, 0::2] | q[:, 1::2] << 4).astype(np.uint8).reshape(len(x), 128)
    return np.hstack([f16_bytes(d), f16_bytes(m), packed, pairs])


def encode_q6_k(x):
    runs = x.reshape(len(x), 16, 16)
    scale = np.abs(runs).max(2) / 31
    d = scale.max(1, keepdims=True) / 127
    sc = np.clip(np.rint(ratio(scale, half(d))), -128, 127).astype(np.int8)
    q = np.clip(np.rint(ratio(runs, (half(d) * sc)[..., None])), -32, 31).astype(int) + 32
    q = q.reshape(len(x), 2, 4, 32)  # half, quarter, column
    low = (q[:, :, :2] & 15) | (q[:, :, 2:] & 15) << 4
    high = sum(q[:, :, part] >> 4 << 2 * part for part in range(4))
    return np.hstack([low.reshape(len(x), 128).astype(np.uint8), high.reshape(len(x), 64).astype(np.uint8),
                      sc.view(np.uint8), f16_bytes(d)])


ENCODERS = {"Q8_0": encode_q8_0, "Q4_0": encode_q4_0, "Q4_1": encode_q4_1, "Q4_K": encode_q4_k, "Q6_K": encode_q6_k}


def encode(array, dtype):
    array = np.asarray(array, dtype=np.float64)
    if dtype in ENCODERS:
        return ENCODERS[dtype](array.reshape(-1, BLOCKS[dtype][0])).tobytes()
    if dtype == "BF16":
        bits = array.astype("<f4").view("<u4").astype(np.uint64)
        return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype("<u2").tobytes()
    return array.astype({"F32": "<f4", "F16": "<f2"}[dtype]).tobytes()


# --- decoding ------------------------------------------------------------------------------------------------

def scalar(blocks, byte):
    return np.ascontiguousarray(blocks[:, byte:byte + 2]).view("<f2").astype(np.float64)


def both_nibbles(b):
    return np.hstack([b & 15, b >> 4]).astype(np.float64)


def decode(data, dtype, shape):
    """Float64 values, exactly what the bytes mean."""
    if dtype == "F32" or dtype == "F16":
        return np.frombuffer(data, {"F32": "<f4", "F16": "<f2"}[dtype]).astype(np.float64).reshape(shape)
    if dtype == "BF16":
        return (np.frombuffer(data, "<u2").astype("<u4") << 16).view("<f4").astype(np.float64).reshape(shape)
    b = np.frombuffer(data, np.uint8).reshape(-1, BLOCKS[dtype][1])
    d = scalar(b, 0)
    if dtype == "Q8_0":
        values = d * np.ascontiguousarray(b[:, 2:]).view(np.int8)
    elif dtype == "Q4_0":
        values = d * (both_nibbles(b[:, 2:]) - 8)
    elif dtype == "Q4_1":
        values = d * both_nibbles(b[:, 4:]) + scalar(b, 2)
    elif dtype == "Q4_K":
        p = b[:, 4:16].astype(int)
        sc = np.hstack([p[:, :4] & 63, (p[:, 8:] & 15) | p[:, :4] >> 6 << 4])
        mn = np.hstack([p[:, 4:8] & 63, p[:, 8:] >> 4 | p[:, 4:8] >> 6 << 4])
        q = b[:, 16:].reshape(-1, 4, 32)
        runs = np.stack([q & 15, q >> 4], 2).reshape(-1, 8, 32)
        values = d[..., None] * sc[..., None] * runs - scalar(b, 2)[..., None] * mn[..., None]
    else:
        low = b[:, :128].reshape(-1, 2, 2, 32)
        high = b[:, 128:192].reshape(-1, 2, 32)
        quarters = [low[:, :, 0] & 15, low[:, :, 1] & 15, low[:, :, 0] >> 4, low[:, :, 1] >> 4]
        q = np.stack([quarters[part] | (high >> 2 * part & 3) << 4 for part in range(4)], 2).astype(int) - 32
        sc = np.ascontiguousarray(b[:, 192:208]).view(np.int8).astype(int)
        values = scalar(b, 208)[..., None] * (sc[..., None] * q.reshape(-1, 16, 16))
    return values.reshape(shape)


# --- files ---------------------------------------------------------------------------------------------------


def text(value):
    data = value.encode()
    return struct.pack("<Q", len(data)) + data


def field(value):
    """Type and bytes of a metadata value."""
    if isinstance(value, bool):
        return 7, struct.pack("<?", value)
    if isinstance(value, int):
        return 4, struct.pack("<I", value)
    if isinstance(value, float):
        return 6, struct.pack("<f", value)
    if isinstance(value, str):
        return 8, text(value)
    kinds = {int: (5, lambda v: struct.pack("<i", v)), str: (8, text)}
    kind, pack = kinds[type(value[0])]
    return 9, struct.pack("<IQ", kind, len(value)) + b"".join(pack(v) for v in value)


def save(path, metadata, tensors):
    """metadata: {key: value}; tensors: {name: (array, dtype)}, in file order."""
    head = b"GGUF" + struct.pack("<IQQ", 3, len(tensors), len(metadata))
    for key, value in metadata.items():
        kind, data = field(value)
        head += text(key) + struct.pack("<I", kind) + data
    blobs, offset = [], 0
    for name, (array, dtype) in tensors.items():
        blob = encode(array, dtype)
        shape = np.shape(array)
        head += text(name) + struct.pack("<I", len(shape)) + b"".join(struct.pack("<Q", n) for n in reversed(shape))
        head += struct.pack("<IQ", TYPES[dtype], offset)
        blob += b"\0" * (-len(blob) % ALIGNMENT)
        blobs.append(blob)
        offset += len(blob)
    head += b"\0" * (-len(head) % ALIGNMENT)
    path.write_bytes(head + b"".join(blobs))


def load(path):
    """{name: float64 array} of a file that save() wrote."""
    data = path.read_bytes()
    version, num_tensors, num_fields = struct.unpack_from("<IQQ", data, 4)
    at = 24

    def take(form):
        nonlocal at
        values = struct.unpack_from("<" + form, data, at)
        at += struct.calcsize("<" + form)
        return values[0]

    def take_text():
        nonlocal at
        length = take("Q")
        at += length
        return data[at - length:at].decode()

    def skip(kind):
        nonlocal at
        if kind == 8:
            take_text()
        elif kind == 9:
            element, count = take("I"), take("Q")
            for _ in range(count):
                skip(element)
        else:
            at += {7: 1, 4: 4, 5: 4, 6: 4}[kind]

    for _ in range(num_fields):
        take_text()
        skip(take("I"))
    names = {number: name for name, number in TYPES.items()}
    entries = []
    for _ in range(num_tensors):
        name = take_text()
        shape = [take("Q") for _ in range(take("I"))][::-1]
        entries.append((name, shape, names[take("I")], take("Q")))
    begin = at + -at % ALIGNMENT
    tensors = {}
    for name, shape, dtype, offset in entries:
        elements, size = BLOCKS.get(dtype, (1, {"F32": 4}.get(dtype, 2)))
        count = int(np.prod(shape)) // elements * size
        tensors[name] = decode(data[begin + offset:begin + offset + count], dtype, shape)
    return tensors
