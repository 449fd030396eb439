# SPDX-License-Identifier: Apache-2.0
"""Which H.264 pictures can be left out before decoding, and at which decoding can begin, without changing a pixel."""

from collections.abc import Callable

AVCC = 1  # first byte of an avcC record; Annex B extradata starts with a zero
SLICE_TYPES = range(1, 6)  # nal_unit_type of coded slices: non-IDR, partitions A to C, IDR
IDR = 5


def reference_test(codec: str, extradata: bytes | None) -> Callable[[memoryview], bool] | None:
    """Return a test "is this packet needed to decode others?", or None where packets must all be decoded.

    A picture with nal_ref_idc 0 is never predicted from, so leaving it out changes nothing else. FFmpeg's own
    disposable flag is not set for H.264 in MP4, hence the look into the packet. Source: ITU-T H.264 7.3.1, 7.4.1;
    ISO/IEC 14496-15 5.2.4.1 for the length field.

    Args:
        codec: FFmpeg's codec name.
        extradata: the stream's codec record; only avcC (length-prefixed NAL units) is understood.
    """
    prefix = _length_size(codec, extradata)
    if prefix is None:
        return None

    def is_reference(packet: memoryview) -> bool:
        offset, slices = 0, 0
        while offset + prefix < len(packet):
            length = int.from_bytes(packet[offset : offset + prefix], "big")
            header = packet[offset + prefix]
            if header & 31 in SLICE_TYPES:
                slices += 1
                if header >> 5 & 3:
                    return True
            offset += prefix + length
        return offset != len(packet) or not slices  # anything that does not parse goes to the decoder, which judges it

    return is_reference


def restart_test(codec: str, extradata: bytes | None) -> Callable[[memoryview], bool] | None:
    """Return a test "does this packet make the decoder forget all before it?", or None where that cannot be told.

    That is an IDR picture; containers also mark pictures from which a decoder only recovers in time. Arguments and
    source as for :func:`reference_test`.
    """
    prefix = _length_size(codec, extradata)
    if prefix is None:
        return None

    def restarts(packet: memoryview) -> bool:
        offset = 0
        while offset + prefix < len(packet):
            kind = packet[offset + prefix] & 31
            if kind in SLICE_TYPES:
                return kind == IDR
            offset += prefix + int.from_bytes(packet[offset : offset + prefix], "big")
        return False

    return restarts


def _length_size(codec: str, extradata: bytes | None) -> int | None:
    """Bytes of the length in front of each NAL unit; None unless this is H.264 with an avcC record."""
    if codec != "h264" or not extradata or len(extradata) < 5 or extradata[0] != AVCC:
        return None
    return (extradata[4] & 3) + 1  # lengthSizeMinusOne
