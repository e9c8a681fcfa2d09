"""Inputs and definitions of the instructions in instructions.cu, for the tests of the models and record_vectors.py.

Each instruction has its input bytes, what its output holds before, and `expected`: the output by the PTX manual's
definition, written here on whole matrices with numpy, apart from the C++ models.
"""

from __future__ import annotations

import dataclasses
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np

FOLDER = Path(__file__).resolve().parent / "vectors"

_LANES = np.arange(32)
_G, _T = _LANES // 4, _LANES % 4


@dataclasses.dataclass(frozen=True)
class Instruction:
    name: str
    sm90a: bool
    input: np.ndarray
    output: np.ndarray  # before
    expected: np.ndarray  # after
    tolerance: float = 0.0  # relative to the largest expected value; 0 is bitwise

    def __str__(self) -> str:
        return self.name

    def check(self, got: np.ndarray) -> None:
        """`got` against the definition."""
        compare(got, self.expected, self.tolerance)


def compare(got: np.ndarray, expected: np.ndarray, tolerance: float) -> None:
    if tolerance == 0.0:
        np.testing.assert_array_equal(got.view(np.uint8), expected.view(np.uint8))
    else:
        finite = np.isfinite(expected)
        np.testing.assert_array_equal(got[~finite], expected[~finite])
        largest = np.abs(expected[finite]).max()
        np.testing.assert_allclose(got[finite], expected[finite], rtol=0, atol=tolerance * largest)


def _random(name: str) -> np.random.Generator:
    return np.random.default_rng(zlib.crc32(name.encode()))


# ---- 16-bit types --------------------------------------------------------------------------------------------------


def to_bits(x: np.ndarray, dtype: str) -> np.ndarray:
    """fp32 rounded to nearest even, as uint16; NaN is 0x7fff."""
    x = np.asarray(x, np.float32)
    if dtype == "fp16":
        with np.errstate(over="ignore"):
            bits = x.astype(np.float16).view(np.uint16)
    else:
        words = x.view(np.uint32).astype(np.uint64)
        bits = ((words + 0x7fff + (words >> 16 & 1)) >> 16).astype(np.uint16)
    return np.where(np.isnan(x), np.uint16(0x7fff), bits)


def from_bits(bits: np.ndarray, dtype: str) -> np.ndarray:
    if dtype == "fp16":
        return bits.view(np.float16).astype(np.float32)
    return (bits.astype(np.uint32) << 16).view(np.float32)


def _packed(low: np.ndarray, high: np.ndarray) -> np.ndarray:
    return low.astype(np.uint32) | high.astype(np.uint32) << 16


# ---- Fragments: [register][lane] from matrices ---------------------------------------------------------------------


def a_fragment(a: np.ndarray) -> np.ndarray:
    """[16, 16] of uint16 -> [4, 32] of uint32."""
    rows = [_G, _G + 8, _G, _G + 8]
    cols = [2 * _T, 2 * _T, 2 * _T + 8, 2 * _T + 8]
    return np.stack([_packed(a[r, c], a[r, c + 1]) for r, c in zip(rows, cols)])


def b_fragment(b: np.ndarray) -> np.ndarray:
    """[16, 8] of uint16 -> [2, 32] of uint32."""
    return np.stack([_packed(b[r, _G], b[r + 1, _G]) for r in (2 * _T, 2 * _T + 8)])


def c_fragment(c: np.ndarray) -> np.ndarray:
    """[16, 8] -> [4, 32]."""
    return np.stack([c[_G, 2 * _T], c[_G, 2 * _T + 1], c[_G + 8, 2 * _T], c[_G + 8, 2 * _T + 1]])


def _mma(name: str, dtype: str) -> Instruction:
    random = _random(name)
    c = random.standard_normal((16, 8)).astype(np.float32)
    if dtype == "tf32":
        a, b = (random.standard_normal(s).astype(np.float32) for s in ((16, 8), (8, 8)))
        a, b = ((x.view(np.uint32) & ~np.uint32(0x1fff)).view(np.float32) for x in (a, b))
        registers = [np.stack([a[_G, _T], a[_G + 8, _T], a[_G, _T + 4], a[_G + 8, _T + 4]]).view(np.uint32),
                     np.stack([b[_T, _G], b[_T + 4, _G]]).view(np.uint32)]
    else:
        a_bits, b_bits = (to_bits(random.standard_normal(s), dtype) for s in ((16, 16), (16, 8)))
        a, b = from_bits(a_bits, dtype), from_bits(b_bits, dtype)
        registers = [a_fragment(a_bits), b_fragment(b_bits)]
    d = (c + a.astype(np.float64) @ b).astype(np.float32)
    given = np.concatenate([*registers, c_fragment(c).view(np.uint32)])
    return Instruction(name, False, given, np.zeros((4, 32), np.float32), c_fragment(d), 2e-7 * 8)


def _matrices(name: str, trans: bool, store: bool) -> Instruction:
    matrices = _random(name).integers(0, 2**16, (4, 8, 8), dtype=np.uint16)
    used = matrices.swapaxes(1, 2) if trans else matrices
    registers = np.stack([_packed(m[_G, 2 * _T], m[_G, 2 * _T + 1]) for m in used])
    if store:
        return Instruction(name, True, registers, np.zeros((4, 8, 8), np.uint16), np.ascontiguousarray(matrices))
    return Instruction(name, False, matrices, np.zeros((4, 32), np.uint32), registers)


def _special_floats(name: str) -> np.ndarray:
    x = _random(name).standard_normal(256).astype(np.float32)
    x *= (2.0 ** _random(name + "scale").integers(-30, 18, 256)).astype(np.float32)
    x[:14] = [0.0, -0.0, np.inf, -np.inf, np.nan, 65519.9, 65520.0, -65536.0, 6.1e-5, 5.9e-8, 2.9e-8, 1.0 + 2.0**-8,
              1.0 + 3 * 2.0**-8, 1.0 + 2.0**-11]
    return x


def _convert(name: str) -> Instruction:
    x = _special_floats(name)
    y = x[::-1].copy()
    tolerance = 0.0
    if name.startswith("pack"):
        dtype = name.removeprefix("pack_")
        expected = _packed(to_bits(x, dtype), to_bits(y, dtype))
    elif name == "to_tf32":
        words = x.view(np.uint32)
        magnitude = (words & np.uint32(0x7fffffff)).astype(np.uint64)
        rounded = ((magnitude + 0x1000) & ~np.uint64(0x1fff)).astype(np.uint32)
        expected = np.where(magnitude >= 0x7f800000, words, rounded | words & np.uint32(0x80000000))
        x = np.where(np.isnan(x), np.float32(1.5), x)  # the manual does not say which NaN comes out
        expected = np.where(magnitude > 0x7f800000, np.float32(1.5).view(np.uint32), expected)
    elif name == "fp16_to_float":
        with np.errstate(invalid="ignore"):
            expected = (x.view(np.uint32) >> 16).astype(np.uint16).view(np.float16).astype(np.float32)
        x = np.where(np.isnan(expected), np.float32(1.0), x)
        expected = (x.view(np.uint32) >> 16).astype(np.uint16).view(np.float16).astype(np.float32)
    else:
        x = np.where(np.isnan(x), np.float32(0.5), np.clip(x, -120, 120) if name == "exp2" else x).astype(np.float32)
        x[2:4] = np.inf, -np.inf
        with np.errstate(divide="ignore"):
            wide = x.astype(np.float64)
            expected = (np.exp2(wide) if name == "exp2" else np.log2(np.abs(wide))).astype(np.float32)
        tolerance = 3e-7
    dtype = np.uint32 if tolerance == 0.0 else np.float32
    return Instruction(name, False, x, np.zeros(256, dtype), expected, tolerance)


def _cp_async() -> Instruction:
    random = _random("cp_async")
    data = random.integers(0, 256, (32, 16), dtype=np.uint8)
    counts = random.integers(0, 17, 32).astype(np.int32)
    expected = np.where(np.arange(16) < counts[:, None], data, 0).astype(np.uint8)
    given = np.concatenate([data.ravel(), counts.view(np.uint8)])
    return Instruction("cp_async", False, given, np.zeros((32, 16), np.uint8), expected)


def _reduce() -> Instruction:
    x = _random("reduce").integers(-50, 50, 128).astype(np.float32)
    quads, warps = x.reshape(-1, 4).sum(1).repeat(4), x.reshape(4, 32).cumsum(1).ravel()
    expected = np.stack([quads, warps, np.full(128, x.max()), x.cumsum()])
    return Instruction("reduce", False, x, np.zeros((4, 128), np.float32), expected.astype(np.float32))


def _turns() -> Instruction:
    x = _random("turns").integers(0, 1000, (4, 32)).astype(np.uint32)
    expected = np.append(8 * x[0] + 4 * x[1] + 2 * x[2] + x[3], (4, 4))
    return Instruction("turns", False, x, np.zeros(34, np.uint32), expected.astype(np.uint32))


def _reduce_add() -> Instruction:
    random = _random("reduce_add")
    x, before = (random.integers(-50, 50, size).astype(np.float32) for size in ((4, 8, 4), (8, 4)))
    return Instruction("reduce_add", True, x, before, before + x.sum(0))


# ---- TMA -----------------------------------------------------------------------------------------------------------


def swizzle(tile: np.ndarray, width: int) -> np.ndarray:
    """Bytes of a tile with rows of `width` bytes: chunk c of row r goes to c ^ (r * width // 128 % chunks)."""
    flat = tile.reshape(-1)
    offsets = np.arange(flat.size)
    chunks = width // 16
    moved = offsets ^ ((offsets >> 7) % chunks << 4) if chunks > 1 else offsets
    result = np.empty_like(flat)
    result[moved] = flat
    return result


_ELEMENT = {"fp16": 2, "bf16": 2, "fp32": 4}


def _tile_index(box: int, at: tuple[int, int, int]) -> tuple[np.ndarray, np.ndarray]:
    """Flat element index in the tensor [5, 6, 96] of each element of the tile [2, 4, box], and which are inside."""
    c2, c1, c0 = np.meshgrid(np.arange(2) + at[2], np.arange(4) + at[1], np.arange(box) + at[0], indexing="ij")
    inside = (0 <= c0) & (c0 < 96) & (0 <= c1) & (c1 < 6) & (0 <= c2) & (c2 < 5)
    return (c2 * 6 + c1) * 96 + c0, inside


def _tma_load(name: str, dtype: str, box: int, width: int, at: tuple[int, int, int]) -> Instruction:
    size = _ELEMENT[dtype]
    tensor = _random(name).integers(0, 256, (5 * 6 * 96, size), dtype=np.uint8)
    index, inside = _tile_index(box, at)
    tile = np.where(inside[..., None], tensor[np.where(inside, index, 0)], 0).astype(np.uint8)
    return Instruction(name, True, tensor, np.zeros(tile.size, np.uint8), swizzle(tile, width))


def _tma_store(name: str, dtype: str, box: int, width: int, at: tuple[int, int, int], reduce: bool) -> Instruction:
    random = _random(name)
    index, inside = _tile_index(box, at)
    # Small integers, so that sums are exact.
    before, tile = (random.integers(-30, 30, s).astype(np.float32) for s in (5 * 6 * 96, index.shape))
    after = before.copy()
    after[index[inside]] = tile[inside] + (after[index[inside]] if reduce else 0)
    encode = (lambda x: x) if dtype == "fp32" else lambda x: to_bits(x, dtype)
    return Instruction(name, True, swizzle(encode(tile).view(np.uint8), width), encode(before), encode(after))


def _bulk() -> Instruction:
    x = _random("bulk").standard_normal(256).astype(np.float32)
    return Instruction("bulk", True, x, np.zeros(256, np.float32), x + np.float32(1))


# ---- wgmma ---------------------------------------------------------------------------------------------------------


def _wgmma(name: str, dtype: str, n: int, trans_a: bool, trans_b: bool) -> Instruction:
    random = _random(name)
    a_bits, b_bits = (to_bits(random.standard_normal(s), dtype) for s in ((64, 32), (n, 32)))
    d = from_bits(a_bits, dtype).astype(np.float64) @ from_bits(b_bits, dtype).T
    stored = [np.ascontiguousarray(x.T if trans else x).ravel() for x, trans in ((a_bits, trans_a), (b_bits, trans_b))]
    output = np.zeros((64, n), np.float32)
    return Instruction(name, True, np.concatenate(stored), output, d.astype(np.float32), 2e-7 * 16)


INSTRUCTIONS: list[Instruction] = [
    *(_mma("mma_" + dtype, dtype) for dtype in ("bf16", "fp16", "tf32")),
    _matrices("ldmatrix", False, False),
    _matrices("ldmatrix_trans", True, False),
    _matrices("stmatrix", False, True),
    _matrices("stmatrix_trans", True, True),
    *map(_convert, ("pack_bf16", "pack_fp16", "to_tf32", "exp2", "log2", "fp16_to_float")),
    _cp_async(),
    _reduce(),
    _turns(),
    _reduce_add(),
    _bulk(),
    # The tiles and coordinates are those that instructions.cu gives.
    _tma_load("tma_load_none", "fp16", 32, 16, (16, 1, 1)),
    _tma_load("tma_load_32", "fp16", 16, 32, (88, -2, 4)),
    _tma_load("tma_load_64", "bf16", 32, 64, (-8, 3, 1)),
    _tma_load("tma_load_128", "bf16", 64, 128, (40, 4, -1)),
    _tma_store("tma_store_128", "bf16", 64, 128, (40, 4, -1), False),
    _tma_store("tma_store_none", "fp32", 32, 16, (-4, 1, 1), False),
    _tma_store("tma_reduce_fp32", "fp32", 32, 128, (4, 1, 4), True),
    _tma_store("tma_reduce_bf16", "bf16", 32, 64, (72, 1, 1), True),
    _wgmma("wgmma_ss_64", "bf16", 64, False, False),
    _wgmma("wgmma_ss_32", "fp16", 32, False, False),
    _wgmma("wgmma_ss_none", "bf16", 96, False, False),
    _wgmma("wgmma_ss_80", "bf16", 80, False, False),
    _wgmma("wgmma_ss_112", "fp16", 112, False, False),
    _wgmma("wgmma_ss_trans_b", "bf16", 128, False, True),
    _wgmma("wgmma_ss_trans_both", "fp16", 128, True, True),
    _wgmma("wgmma_ss_trans_64", "bf16", 64, True, True),
    _wgmma("wgmma_ss_trans_none", "bf16", 32, True, True),
    _wgmma("wgmma_rs", "bf16", 192, False, False),
    _wgmma("wgmma_rs_176", "bf16", 176, False, False),
    _wgmma("wgmma_rs_trans_b", "fp16", 256, False, True),
]


def run(call: Callable[[str, np.ndarray, np.ndarray], None], instruction: Instruction) -> np.ndarray:
    """The output of `call(name, input, output)`, which changes output in place."""
    output = instruction.output.copy()
    call(instruction.name, np.ascontiguousarray(instruction.input), output)
    return output


def recorded() -> dict[str, dict[str, np.ndarray]]:
    """{device: {instruction: output}} of the vectors recorded so far."""
    return {file.stem: dict(np.load(file)) for file in sorted(FOLDER.glob("*.npz"))}
