"""Invariant: row groups that were encoded apart, each as a file of its own, make the file that one writer would have written, byte for byte.

A parquet file is its row groups and a footer, which says where they lie. The library encodes row groups one after another only; here each
is encoded by the library into a file of its own, in threads, and the footers become one: places are moved, rows added, groups numbered.
A footer is read as what it is, a struct of Thrift's compact protocol (https://github.com/apache/thrift/blob/master/doc/specs/thrift-compact-protocol.md),
and its fields by the numbers that parquet gives them (https://github.com/apache/parquet-format/blob/master/src/main/thrift/parquet.thrift).
"""

from dataclasses import dataclass

MAGIC = b"PAR1"
ROWS, GROUPS = 3, 4  # fields of a file's metadata
COLUMNS, GROUP_OFFSET, ORDINAL = 1, 5, 7  # of a row group
CHUNK_OFFSET, CHUNK = 2, 3  # of a column
PLACES = (9, 10, 11)  # of a column's metadata: where its data, index and dictionary begin

# types of the compact protocol
TRUE, FALSE, BYTE, SHORT, INT, LONG, DOUBLE, BINARY, LIST, SET, MAP, STRUCT = range(1, 13)


@dataclass
class Struct:
    """Fields of a struct by number: (type, value)."""

    fields: dict


def split(data) -> tuple[memoryview, Struct]:
    """What lies between the first four bytes of a whole file and its footer, and the footer."""
    view = memoryview(data)
    start = len(view) - 8 - int.from_bytes(view[-8:-4], "little")
    return view[4:start], _Reader(bytes(view[start:-8])).value(STRUCT)


def join(footers: list[Struct], lengths: list[int]) -> bytes:
    """The footer and end of a file that holds, after its first four bytes, the row groups of these footers, each part of `lengths` bytes."""
    whole, offset, groups = footers[0], 0, []
    for footer, length in zip(footers, lengths, strict=True):
        for group in footer.fields[GROUPS][1][1]:
            _move(group, GROUP_OFFSET, offset)
            if ORDINAL in group.fields:
                group.fields[ORDINAL] = (SHORT, len(groups))
            for column in group.fields[COLUMNS][1][1]:
                _move(column, CHUNK_OFFSET, offset)
                for place in PLACES:
                    _move(column.fields[CHUNK][1], place, offset)
            groups.append(group)
        offset += length
    whole.fields[ROWS] = (LONG, sum(footer.fields[ROWS][1] for footer in footers))
    whole.fields[GROUPS] = (LIST, (STRUCT, groups))
    written = bytearray()
    _write(written, STRUCT, whole)
    return bytes(written) + len(written).to_bytes(4, "little") + MAGIC


def _move(struct: Struct, number: int, offset: int) -> None:
    kind, place = struct.fields.get(number, (LONG, 0))
    if place:  # 0: not said
        struct.fields[number] = (kind, place + offset)


class _Reader:
    def __init__(self, data: bytes):
        self.data, self.place = data, 0

    def bytes(self, count: int) -> bytes:
        self.place += count
        return self.data[self.place - count : self.place]

    def varint(self) -> int:
        value = shift = 0
        while True:
            byte = self.data[self.place]
            self.place += 1
            value |= (byte & 127) << shift
            if byte < 128:
                return value
            shift += 7

    def signed(self) -> int:
        value = self.varint()
        return value >> 1 ^ -(value & 1)

    def value(self, kind: int):
        if kind in (TRUE, FALSE):
            return kind
        if kind in (SHORT, INT, LONG):
            return self.signed()
        if kind in (BYTE, DOUBLE, BINARY):
            return self.bytes({BYTE: 1, DOUBLE: 8}.get(kind) or self.varint())
        if kind in (LIST, SET):
            head = self.bytes(1)[0]
            count, own = head >> 4, head & 15
            count = self.varint() if count == 15 else count
            return own, [self.value(own if own not in (TRUE, FALSE) else BYTE) for _ in range(count)]
        if kind != STRUCT:
            raise ValueError(f"type {kind} does not occur in a parquet footer")
        fields, number = {}, 0
        while head := self.bytes(1)[0]:
            number = number + (head >> 4) if head >> 4 else self.signed()
            fields[number] = (head & 15, self.value(head & 15))
        return Struct(fields)


def _write(out: bytearray, kind: int, value) -> None:
    if kind in (SHORT, INT, LONG):
        _varint(out, value << 1 if value >= 0 else ~(value << 1))
    elif kind in (BYTE, DOUBLE):
        out += value
    elif kind == BINARY:
        _varint(out, len(value))
        out += value
    elif kind in (LIST, SET):
        own, values = value
        out.append(min(len(values), 15) << 4 | own)
        if len(values) >= 15:
            _varint(out, len(values))
        for each in values:
            _write(out, own if own not in (TRUE, FALSE) else BYTE, each)
    elif kind == STRUCT:
        last = 0
        for number, (own, each) in sorted(value.fields.items()):
            if 0 < number - last < 16:
                out.append(number - last << 4 | own)
            else:
                out.append(own)
                _write(out, SHORT, number)
            _write(out, own, each)
            last = number
        out.append(0)


def _varint(out: bytearray, value: int) -> None:
    while value > 127:
        out.append(value & 127 | 128)
        value >>= 7
    out.append(value)
