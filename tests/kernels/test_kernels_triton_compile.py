"""The Triton kernels compile for the GPUs they are meant for, without one, and keep what the documentation counts."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="the package triton is not installed")

INSTRUCTIONS = 3.2
"""Per weight and thread in the inner loop at 3 bits, Hopper, at most 32 columns (counted: 2.7 to 3.1). With 128 issue
slots a cycle that is 40 weights a cycle and multiprocessor, above the 33 that 70 % of an H200's bandwidth delivers."""
PERMUTATIONS = 1.2
"""Of these, byte permutations: one lookup of each byte and one to pair the bytes, for four weights each, is 1.0."""
SPILL_BYTES = 64
"""Of a thread's stack at 64 columns, where 255 registers are all in use; nothing spills at fewer."""

SCRIPT = """
import json, re
from hcx.kernels.triton import aot
from hcx.kernels.triton.launch import TILES

def entry(name, built, columns, weights=256):
    return {"name": name, "columns": columns, "stack": built.stack_bytes, "shared": built.shared_bytes,
            "prmt": "prmt.b32" in built.ptx,
            "matrix": re.findall("(?:wg)?mma[._a-z]*sync", built.ptx)[:1],
            "instructions": sum(built.loop.values()) / weights,
            "permutations": built.loop["PRMT"] / weights, "hgmma": built.loop["HGMMA"], "hmma": built.loop["HMMA"],
            "local": built.loop["LDL"] + built.loop["STL"]}

found = []
for capability, tiles in ((80, TILES[8][:1]), (90, TILES[9])):
    for tile in tiles:
        found.append(entry(f"sm_{capability} q3", aot.compile_product(capability, tile, 3), tile.columns))
small = TILES[9][0]
for bits in (2, 4, 7):
    built = aot.compile_product(90, small, bits, dtype="fp16", has_offset=True)
    found.append(entry(f"sm_90 q{bits}", built, small.columns))
found.append(entry("sm_90 exact", aot.compile_product(90, small, 3, exact=True), small.columns))
found.append(entry("sm_90 g32", aot.compile_product(90, small, 2, group_size=32, words=1), small.columns, 64))
for capability, bits in ((80, 2), (90, 4)):
    for name, built in zip(("dx", "dscales"), aot.compile_gradients(capability, bits), strict=True):
        found.append(entry(f"sm_{capability} {name}", built, 16))
for capability, bits in ((80, 4), (90, 3)):
    for name, built in zip(("dense", "sum"), aot.compile_passes(capability, bits), strict=True):
        found.append(entry(f"sm_{capability} {name}", built, 16))
print(json.dumps(found))
"""


@pytest.fixture(scope="module")
def compiled() -> list[dict]:
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT], capture_output=True, text=True, env=environment, cwd=Path(__file__).parents[2]
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout)


def test_products_and_gradients_compile_for_ampere_and_hopper(compiled: list[dict]) -> None:
    names = {entry["name"] for entry in compiled}
    assert {
        "sm_80 q3",
        "sm_90 q3",
        "sm_90 q7",
        "sm_90 exact",
        "sm_90 g32",
        "sm_80 dx",
        "sm_90 dscales",
        "sm_90 dense",
    } <= names
    for entry in compiled:
        # 163 KiB of shared memory a block on an A100, 227 KiB on Hopper.
        assert entry["shared"] <= (163 if "sm_80" in entry["name"] else 227) * 1024, entry
        assert entry["matrix"] or entry["name"].split()[-1] in ("dense", "sum"), entry


def test_weights_are_expanded_by_byte_permutation(compiled: list[dict]) -> None:
    for entry in compiled:
        if entry["name"].split()[-1] not in ("dx", "dscales", "dense", "sum"):
            assert entry["prmt"], entry
    for entry in (e for e in compiled if e["name"] == "sm_90 q3" and e["columns"] <= 32):
        assert entry["permutations"] <= PERMUTATIONS, entry
        assert entry["instructions"] <= INSTRUCTIONS, entry


def test_batches_above_eight_use_warpgroup_instructions_on_hopper(compiled: list[dict]) -> None:
    for entry in (e for e in compiled if e["name"] == "sm_90 q3"):
        assert (entry["hgmma"] > 0) == (entry["columns"] > 8), entry


def test_nothing_spills_but_a_little_at_64_columns(compiled: list[dict]) -> None:
    for entry in (e for e in compiled if "q" in e["name"]):
        assert entry["stack"] <= (SPILL_BYTES if entry["columns"] == 64 else 0), entry
