"""The record format of TensorBoard's event files: length, its checksum, data, its checksum; little-endian.

The checksum is CRC-32C (Castagnoli, RFC 3720 appendix B.4), rotated right by 15 bits plus a constant, so that a
checksum of data that holds checksums stays meaningful (TensorFlow, tsl/lib/io/record_writer.h).
"""

from __future__ import annotations

import struct
from functools import cache


def tf_record(data: bytes) -> bytes:
    """`data` framed as one record."""
    length = struct.pack("<Q", len(data))
    return length + struct.pack("<I", _masked(crc32c(length))) + data + struct.pack("<I", _masked(crc32c(data)))


def crc32c(data: bytes) -> int:
    """CRC-32C, a byte at a time: some 30 us for an event. Example: b"123456789" -> 0xE3069283."""
    table, crc = _table(), 0xFFFFFFFF
    for byte in data:
        crc = table[(crc ^ byte) & 0xFF] ^ (crc >> 8)
    return crc ^ 0xFFFFFFFF


def _masked(crc: int) -> int:
    return (((crc >> 15) | (crc << 17)) + 0xA282EAD8) & 0xFFFFFFFF


@cache
def _table() -> tuple[int, ...]:
    values = []
    for value in range(256):
        for _ in range(8):
            value = (value >> 1) ^ (0x82F63B78 if value & 1 else 0)
        values.append(value)
    return tuple(values)
