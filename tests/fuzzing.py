"""Damages files in every way it can think of: what test_fuzz.py and test_fuzz_networks.py put in front of readers.

`FUZZ_EXAMPLES=2000 pytest tests/test_fuzz*.py --hypothesis-show-statistics` tries many more than the suite does, and
says how many of each reader.
"""

import json
import os
import re
import resource
import shutil
import signal
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st

from repcodec.errors import RepCodecError

EXAMPLES = int(os.environ.get("FUZZ_EXAMPLES", "5"))
"""Files of each reader and kind of damage."""

CPU_SECONDS = 20
"""Computing that one small file may cost; all of them take milliseconds."""

MEMORY = 2 << 30
"""Bytes that may be taken beyond what the process has: what a file of some KiB may not make a reader ask for."""

some = settings(
    max_examples=EXAMPLES,
    derandomize=True,
    database=None,
    deadline=None,
    suppress_health_check=list(HealthCheck),
)

TEXT = [
    "", " ", "0", "-1", "1.5", "nan", "inf", "-inf", "1e400", "1e999999999", "9" * 19, "9" * 400, "9" * 5000, "0x10",
    "1_0", "²", "٣", "\0", "\t", "\n", "\r", "\x85", "\ufeff", "../../evil", "/etc/evil", "a" * 70_000,
    "<script>", "pipe:touch evil", "$(touch evil)", "null", "true", "{", "[" * 5000, "(" * 90, "-" * 5000, ":", "1:0",
    "1:99999999", "1:" + "9" * 400,
]  # fmt: skip
"""What no field expects."""

JSON = [
    *(json.dumps(text) for text in TEXT), "null", "true", "false", "0", "-0.0", "-1", "1.5", "1e308", "1e400", "NaN",
    "Infinity", "-Infinity", "9" * 19, "9" * 400, "9" * 5000, "[]", "{}", "[[]]", "[null]", '["a"]', "[1, 2]", "[-1]",
    '{"a": 1}', r'"\ud800"', r'"a\u0000b"', r'"a\tb\nc"', "[" * 50_000, "[" * 300 + "]" * 300, '{"a":' * 50_000,
    "[" + "[]," * 2000 + "[]]", "[99999999]", "[0.5]", '{"kind": "ema"}', '""', "2147483647", "2147483648", "1000000",
]  # fmt: skip
"""What a value of JSON may be, as it stands in a file."""

PICKLES = [
    b"cos\nsystem\n(S'touch evil'\ntR.",
    b"\x80\x04\x95\x05\x00\x00\x00\x00\x00\x00\x00\x8c\x01a\x94.",
    b"}.",
    b"N.",
]


KINDS = ["flip", "set", "cut", "insert", "drop", "double", "number", "number", "field", "field", "swap", "text"]
FIELDS = [
    0,
    1,
    2,
    3,
    7,
    8,
    0x7F,
    0xFF,
    0x7FFF,
    0xFFFF,
    0xFFFFFF,
    0x7FFFFFFF,
    0xFFFFFFFE,
    0xFFFFFFFF,
    1 << 40,
    (1 << 63) - 1,
]
"""Numbers that a binary header may be made to say."""


@st.composite
def damaged(draw: st.DrawFn, whole: bytes) -> bytes:
    """Draw a file that was whole once: bytes flipped, cut off, put in, left out, doubled; numbers that lie."""
    data = whole
    for _ in range(draw(st.integers(1, 3))):
        # Often near the beginning, where headers are.
        at = draw(st.integers(0, len(data)) | st.integers(0, min(len(data), 128)))
        length = draw(st.integers(1, 64) | st.integers(1, max(1, len(data))))
        kind = draw(st.sampled_from(KINDS))
        before, block, after = data[:at], data[at : at + length], data[at + length :]
        if kind == "flip" and at < len(data):
            data = before + bytes([data[at] ^ 1 << draw(st.integers(0, 7))]) + data[at + 1 :]
        elif kind == "set":
            data = before + draw(st.sampled_from([b"\xff", b"\0", b"\x7f\xff\xff\xff"])) * min(length, 8) + after
        elif kind == "cut":
            data = before
        elif kind == "insert":
            data = before + draw(st.binary(max_size=32)) + block + after
        elif kind == "drop":
            data = before + after
        elif kind == "double":
            data = before + block * draw(st.integers(2, 4)) + after
        elif kind == "number":
            places = [found.span() for found in re.finditer(rb"\d+", data[at : at + 2000])]
            if places:
                first, stop = draw(st.sampled_from(places))
                number = draw(st.sampled_from(TEXT[:24])).encode()
                data = data[: at + first] + number + data[at + stop :]
        elif kind == "field":
            size, order = draw(st.sampled_from([1, 2, 4, 8])), draw(st.sampled_from(["little", "big"]))
            number = draw(st.sampled_from(FIELDS)) & (1 << 8 * size) - 1
            data = before + number.to_bytes(size, order) + data[at + size :]
        elif kind == "swap":
            data = before + after + block
        else:
            data = before + draw(st.sampled_from(TEXT)).encode() + block + after
    return data[: 4 * len(whole) + 200_000]


@st.composite
def lying_json(draw: st.DrawFn, line: str) -> str:
    """Draw a JSON object one of whose values, at any depth, another one has taken the place of, or is missing."""
    value = json.loads(line)
    for _ in range(draw(st.integers(1, 2))):
        holder: object = {"": value}
        key: object = ""
        while isinstance(holder[key], dict | list) and holder[key] and draw(st.integers(0, 4)):
            holder = holder[key]
            key = draw(
                st.sampled_from(sorted(holder) if isinstance(holder, dict) else list(range(min(len(holder), 5))))
            )
        if key == "":
            return draw(st.sampled_from(JSON))
        kind = draw(st.sampled_from(["lie", "lie", "lie", "lie", "drop"]))
        if kind == "drop":
            del holder[key]
        else:
            holder[key] = f"@{draw(st.integers(0, len(JSON) - 1))}@"
    return re.sub(r'"@(\d+)@"', lambda found: JSON[int(found[1])], json.dumps(value))


@st.composite
def lying_table(draw: st.DrawFn, whole: str, separator: str = "\t") -> str:
    """Draw a table in which one field of some lines is another one."""
    lines = whole.split("\n")
    for _ in range(draw(st.integers(1, 3))):
        number = draw(st.integers(0, len(lines) - 1))
        fields = lines[number].split(separator)
        fields[draw(st.integers(0, len(fields) - 1))] = draw(st.sampled_from(TEXT))
        lines[number] = separator.join(fields)
    return "\n".join(lines)


@dataclass(frozen=True, repr=False)  # what hypothesis would show of a failure
class Reader:
    """A way to read files.

    Attributes:
        files: name below a folder → what is in it when all is well.
        damage: which of them are damaged.
        read: reads them, given the folder.
        lies: further contents of one of these, by its name: what is packed, or has a header, changed inside.
    """

    files: dict[str, bytes]
    damage: tuple[str, ...]
    read: Callable[[Path], object]
    lies: dict[str, st.SearchStrategy[bytes]] = field(default_factory=dict)

    def write(self, folder: Path, **damaged: bytes) -> None:
        """Write the files, with other contents for those that are named."""
        for name, whole in (self.files | damaged).items():
            path = folder / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(whole)

    @property
    def strategy(self) -> st.SearchStrategy[tuple[str, bytes]]:
        """Draw the name of a file, and what is in it now."""
        kinds = []
        for name in self.damage:
            whole = self.files[name]
            ways = [damaged(whole), st.binary(max_size=200), st.sampled_from([text.encode() for text in TEXT])]
            if name.endswith((".json", ".jsonl")) and whole.startswith(b"{"):
                lines = whole.decode().splitlines() if name.endswith(".jsonl") else [whole.decode()]
                lies = (
                    st.sampled_from(lines)
                    .flatmap(lying_json)
                    .map(lambda text: f"{text}\n".encode("utf-8", "surrogatepass"))
                )
                ways += [lies] * 4
            elif name.endswith((".tsv", ".tokens", ".len", ".phn", ".csv")):
                mark = "\t" if name.endswith((".tsv", ".tokens")) else "," if name.endswith(".csv") else " "
                ways += [lying_table(whole.decode(), mark).map(str.encode)] * 2
            elif name.endswith((".pkl", ".ckpt", ".npy", ".npz")):
                ways.append(st.sampled_from(PICKLES))
            if name in self.lies:
                ways += [self.lies[name]] * 4
            kinds.append(st.tuples(st.just(name), st.one_of(ways)))
        return st.one_of(kinds)


def check(reader: Reader, name: str, content: bytes, folder: Path) -> None:
    """Read a damaged file: it gives a value or one sentence, and nothing else happens.

    It may cost `CPU_SECONDS` and `MEMORY`, leaves no file anywhere in or beside the folder, and starts nothing.
    """
    shutil.rmtree(folder, ignore_errors=True)
    reader.write(folder / "in", **{name: content})
    before = sorted(folder.rglob("*"))
    with bounded(folder):
        try:
            reader.read(folder / "in")
        except RepCodecError as error:
            assert str(error).strip() and "\n" not in str(error), f"no single sentence: {error}"
    assert sorted(folder.rglob("*")) == before


@contextmanager
def bounded(folder: Path, memory: int = MEMORY):
    """Work in a folder, within `CPU_SECONDS` and so many bytes more than the process has now."""

    def too_long(number, frame):
        raise AssertionError(f"more than {CPU_SECONDS} seconds for one small file")

    here, limits = os.getcwd(), resource.getrlimit(resource.RLIMIT_AS)
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    old = signal.signal(signal.SIGPROF, too_long)
    os.chdir(folder)
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + memory, limits[1]))
    signal.setitimer(signal.ITIMER_PROF, CPU_SECONDS)
    try:
        yield
    except MemoryError as error:
        raise AssertionError("more memory than a small file may cost") from error
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        resource.setrlimit(resource.RLIMIT_AS, limits)
        os.chdir(here)
        signal.signal(signal.SIGPROF, old)
