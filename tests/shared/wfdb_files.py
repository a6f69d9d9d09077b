"""WFDB records written byte by byte, without the library that reads them."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

ECG = Path(__file__).resolve().parents[2].parent / "shared" / "data" / "ecg"
needs_ecg = pytest.mark.skipif(not ECG.is_dir(), reason=f"no {ECG.name} data")
RATE, SECONDS = 250, 8
NUM = RATE * SECONDS
CODES = {"N": 1, "L": 2, "R": 3, "a": 4, "V": 5, "F": 6, "J": 7, "A": 8, "S": 9, "E": 10, "j": 11, "/": 12, "Q": 13, "~": 14, "B": 25, "+": 28,
         "?": 30, "e": 34, "n": 35, "f": 38, "r": 41}  # fmt: skip
SECRET = "Mustermann 87 years"
NO_VALUE = -32768  # of format 16


def counts(signal: int) -> np.ndarray:
    """Samples of a signal as the converter gave them, `(T,)`."""
    return np.random.default_rng(signal).integers(-400, 400, size=NUM).astype("<i2")


def annotation_bytes(marks: Sequence[tuple[int, str]], *, note: str = "") -> bytes:
    """The MIT format of annot(5): ten bits of time since the last mark, six of kind; a note after the first; two zero bytes at the end."""
    words, last = b"", 0
    for number, (sample, symbol) in enumerate(marks):
        gap = sample - last
        if not 0 <= gap < 1024:
            words += (59 << 10).to_bytes(2, "little") + ((gap >> 16) & 0xFFFF).to_bytes(2, "little") + (gap & 0xFFFF).to_bytes(2, "little")
            gap = 0
        words += (CODES[symbol] << 10 | gap).to_bytes(2, "little")
        if note and number == 0:
            words += (63 << 10 | len(note)).to_bytes(2, "little") + note.encode().ljust(len(note) + len(note) % 2, b"\0")
        last = sample
    return words + b"\0\0"


def write_record(
    folder: Path, name: str = "r", *, signals: Sequence[str] = ("16 200 12 0 0 0 0 MLII",), rate: str = str(RATE), marks: Sequence[tuple[int, str]] = ()
) -> np.ndarray:  # fmt: skip
    """A record in format 16; what the converter gave comes back, `(T, signals)`."""
    folder.mkdir(exist_ok=True, parents=True)
    values = np.stack([counts(index) for index in range(len(signals))], axis=1)
    lines = [f"{name} {len(signals)} {rate} {NUM}", *(f"{name}.dat {signal}" for signal in signals), f"# {SECRET}", "#<age>: 87 <sex>: F"]
    (folder / f"{name}.hea").write_text("\n".join(lines) + "\n")
    (folder / f"{name}.dat").write_bytes(values.astype("<i2").tobytes())
    (folder / f"{name}.atr").write_bytes(annotation_bytes(marks or [(200 * beat, "N") for beat in range(1, 9)], note=SECRET))
    return values
